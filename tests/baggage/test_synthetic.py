"""The synthetic baggage set: its files, its masks, that a seed fixes every byte, and that a half set is never taken.

Its pictures with hard backgrounds are tested in tests/baggage/test_surroundings.py.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from baggage import synthetic
from baggage.render.art import Skin, sticker_image
from baggage.render.looks import CATEGORIES, GROUP_KINDS, KINDS, design
from baggage.render.models import make_bag, solid
from baggage.render.raycast import Light, Placed, look_at, render
from baggage.synthetic import make_synthetic_baggage
from core.errors import InputError

TINY = dict(train_identities=3, test_identities=2, gallery_views=2, probe_views=2, train_scenes=2, val_scenes=1)
PLAIN = (  # name, dimsize and bbox of pictures of version 2 made with TINY
    ("0001_g_2.jpg", [156, 142], [23, 20, 122, 110]),
    ("0001_p_1.jpg", [107, 150], [10, 13, 80, 116]),
    ("0002_p_1.jpg", [81, 122], [33, 21, 38, 84]),
    ("0003_p_2.jpg", [120, 97], [15, 14, 90, 69]),
)


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    return make_synthetic_baggage(tmp_path_factory.mktemp("baggage") / "tiny", **TINY, progress=False)


def digest(root):
    """One hash over names and contents of all files below a folder."""
    content = hashlib.sha256()
    for path in sorted(path for path in Path(root).rglob("*") if path.is_file()):
        content.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


def entries(root, info):
    return json.loads((root / info).read_text())["image"]


def test_files_are_those_of_the_original_mvb_layout(tiny_set):
    train = entries(tiny_set, "MVB_train/Info/train.json")
    gallery = entries(tiny_set, "MVB_val/Info/val_gallery.json")
    probe = entries(tiny_set, "MVB_val/Info/val_probe.json")
    assert [entry["image_name"] for entry in train[:4]] == [f"0001_{side}_{k}.jpg" for side in "gp" for k in (1, 2)]
    assert (len(train), len(gallery), len(probe)) == (12, 4, 4)
    assert {entry["datatype"] for entry in gallery} == {"g"} and {entry["datatype"] for entry in probe} == {"p"}
    assert {entry["id"] for entry in train} == {"0001", "0002", "0003"}
    assert {entry["id"] for entry in gallery} == {entry["id"] for entry in probe} == {"0004", "0005"}
    for folder, listed in (("MVB_train", train), ("MVB_val", gallery + probe)):
        names = sorted(path.name for path in (tiny_set / folder / "Image").rglob("*.jpg"))
        assert names == sorted(entry["image_name"] for entry in listed)
    assert all(entry["material"] in {"hard", "soft", "others"} for entry in train + gallery + probe)


def test_box_is_the_tight_box_of_the_mask_and_both_fit_the_picture(tiny_set):
    for folder, info in (
        ("MVB_train/Image", "MVB_train/Info/train.json"),
        ("MVB_val/Image/gallery", "MVB_val/Info/val_gallery.json"),
        ("MVB_val/Image/probe", "MVB_val/Info/val_probe.json"),
    ):
        for entry in entries(tiny_set, info):
            with Image.open(tiny_set / folder / entry["image_name"]) as image:
                width, height = image.size
            assert entry["dimsize"] == [width, height] and entry["segmentation"]["size"] == [height, width]
            assert isinstance(entry["segmentation"]["counts"], str)
            mask = coco_mask.decode(entry["segmentation"])
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert entry["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert all(isinstance(value, float) for value in entry["bbox"])
            assert mask.mean() > 0.15


@pytest.mark.parametrize("split, pictures", [("train2017", 2), ("val2017", 1)])
def test_scenes_are_coco_with_identities(tiny_set, split, pictures):
    coco = COCO(str(tiny_set / f"scenes/annotations/instances_{split}.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CATEGORIES)
    assert len(coco.imgs) == pictures and len(coco.anns) >= 2 * pictures
    for number, image in coco.imgs.items():
        with Image.open(tiny_set / "scenes" / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        covered = np.zeros((image["height"], image["width"]), int)
        for annotation in coco.loadAnns(coco.getAnnIds(number)):
            mask = coco.annToMask(annotation)
            covered += mask
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            assert annotation["identity"] in range(1, 4 if split == "train2017" else 6)
        assert covered.max() == 1  # visible pixels belong to one bag


def test_scene_identity_is_the_mvb_bag_of_the_same_category(tiny_set):
    """Category and material of an identity agree between the two halves of the set."""
    materials = {}
    for info in ("MVB_train/Info/train.json", "MVB_val/Info/val_gallery.json"):
        materials |= {int(entry["id"]): entry["material"] for entry in entries(tiny_set, info)}
    allowed = set(KINDS.values())
    for split in ("train2017", "val2017"):
        content = json.loads((tiny_set / f"scenes/annotations/instances_{split}.json").read_text())
        for annotation in content["annotations"]:
            assert (CATEGORIES[annotation["category_id"] - 1], materials[annotation["identity"]]) in allowed


def test_same_seed_same_bytes_in_another_process_and_another_seed_not(tiny_set, tmp_path):
    code = "import sys; from baggage.synthetic import make_synthetic_baggage as make; "
    code += f"make(sys.argv[1], **{TINY!r}, progress=False)"
    environment = dict(
        os.environ, PYTHONHASHSEED="7", OMP_NUM_THREADS="2", PYTHONPATH=str(Path(__file__).resolve().parents[2])
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], env=environment, check=True)
    assert digest(tmp_path / "again") == digest(tiny_set)
    other = make_synthetic_baggage(tmp_path / "other", **TINY | dict(train_scenes=0, val_scenes=0), seed=1)
    name = "MVB_train/Image/0001_g_1.jpg"
    assert (other / name).read_bytes() != (tiny_set / name).read_bytes()


def test_a_picture_does_not_depend_on_how_many_there_are(tiny_set, tmp_path):
    fewer = make_synthetic_baggage(tmp_path / "fewer", **TINY | dict(train_identities=1, train_scenes=0, val_scenes=0))
    name = "MVB_train/Image/0001_g_2.jpg"
    assert (fewer / name).read_bytes() == (tiny_set / name).read_bytes()


def test_plain_pictures_are_those_of_version_2(tiny_set):
    """Whoever has a set keeps it: a change that draws other random numbers has to raise VERSION."""
    assert json.loads((tiny_set / "synthetic.json").read_text()) == dict(version=2, seed=0) | TINY
    train = {entry["image_name"]: entry for entry in entries(tiny_set, "MVB_train/Info/train.json")}
    for name, dimsize, bbox in PLAIN:
        assert train[name]["dimsize"] == dimsize
        np.testing.assert_allclose(train[name]["bbox"], bbox, atol=1)


def test_second_call_renders_nothing(tiny_set, monkeypatch):
    monkeypatch.setattr(synthetic, "write_set", lambda *_: pytest.fail("rendered again"))
    assert make_synthetic_baggage(tiny_set, **TINY) == tiny_set


def test_a_set_of_the_other_background_is_refused(tiny_set, monkeypatch):
    monkeypatch.setattr(synthetic, "make_synthetic_baggage", lambda *_, **__: pytest.fail("rendered"))
    said = []
    synthetic.settle_synthetic_baggage(tiny_set, "plain", said.append)
    with pytest.raises(InputError, match="plain background, the one with a hard background is wanted"):
        synthetic.settle_synthetic_baggage(tiny_set, "hard", said.append)
    marker = tiny_set / "synthetic.json"
    content = marker.read_text()
    marker.write_text(json.dumps({**json.loads(content), "version": 1}))
    with pytest.raises(InputError, match="another version of Carousel: remove it"):
        synthetic.settle_synthetic_baggage(tiny_set, "plain", said.append)
    marker.write_text(content)
    with pytest.raises(InputError, match="is not a synthetic baggage set"):
        synthetic.settle_synthetic_baggage(tiny_set / "MVB_val", "plain", said.append)
    assert said == []


def fake_set(root, parameters, progress):
    (root / "pictures").write_text(json.dumps(parameters))


def test_interrupted_run_leaves_nothing_that_passes_for_a_set(tmp_path, monkeypatch):
    def interrupted(root, parameters, progress):
        (root / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "write_set", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic_baggage(tmp_path / "set", **TINY)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(synthetic, "write_set", fake_set)
    make_synthetic_baggage(tmp_path / "set", **TINY)
    assert (tmp_path / "set/synthetic.json").is_file()


KILLED = """
import os, signal, sys
from baggage import synthetic

def killed(root, parameters, progress):
    (root / "half").write_text("")
    print(root.name, flush=True)
    signal.pause()

synthetic.write_set = killed
synthetic.make_synthetic_baggage(sys.argv[1])
"""


def test_what_a_killed_run_left_half_rendered_goes_with_the_next_run_and_a_live_ones_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "write_set", fake_set)
    (tmp_path / f".set.{'0' * 32}.partial").mkdir()  # of an older version
    (tmp_path / ".set-of-mine.1-2.partial").mkdir()  # of another set
    command, root = [sys.executable, "-c", KILLED, str(tmp_path / "set")], Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as rendering:
        partial = tmp_path / rendering.stdout.readline().strip()
        try:
            make_synthetic_baggage(tmp_path / "set", **TINY)
            assert (partial / "half").is_file() and partial.with_suffix(".lock").is_file()
        finally:
            rendering.kill()
    make_synthetic_baggage(tmp_path / "set", **TINY, seed=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set-of-mine.1-2.partial", "set"]


@pytest.mark.parametrize(
    "content", ["[1, 2]", "7", "null", "{}", '{"version": "two"}', "{half", "\0", b"\xff\xfe", "[" * 9999]
)
def test_a_marker_that_a_person_has_changed_is_one_line(tmp_path, monkeypatch, content):
    (tmp_path / "synthetic.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for make in (
        lambda: synthetic.settle_synthetic_baggage(tmp_path, "plain", print),
        lambda: make_synthetic_baggage(tmp_path),
    ):
        with pytest.raises(InputError, match="synthetic.json is not as a run wrote it .*remove the folder") as error:
            make()
        assert "\n" not in str(error.value)


def test_set_of_other_parameters_is_replaced_and_other_folders_are_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "write_set", fake_set)
    root = make_synthetic_baggage(tmp_path / "set", **TINY)
    make_synthetic_baggage(root, **TINY, seed=5)
    assert json.loads((root / "pictures").read_text())["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photograph.jpg").write_text("precious")
    with pytest.raises(InputError, match="mine exists and is not a synthetic baggage set"):
        make_synthetic_baggage(tmp_path / "mine", **TINY)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="file exists"):
        make_synthetic_baggage(tmp_path / "file", **TINY)
    with pytest.raises(InputError, match="below can't be made"):
        make_synthetic_baggage(tmp_path / "file/below", **TINY)
    assert (tmp_path / "mine/photograph.jpg").read_text() == (tmp_path / "file").read_text() == "precious"


def test_several_at_the_same_time(tmp_path, monkeypatch):
    barrier = threading.Barrier(4)

    def together(root, parameters, progress):
        fake_set(root, parameters, progress)
        barrier.wait(timeout=20)

    monkeypatch.setattr(synthetic, "write_set", together)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make_synthetic_baggage(tmp_path / "set", **TINY), range(4)))
    assert made == [tmp_path / "set"] * 4 and [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bag_can_be_made(kind):
    look = design(GROUP_KINDS.index(kind), 1, np.random.default_rng(0), np.random.default_rng(1))
    bag = make_bag(look, np.random.default_rng(2))
    assert (bag.kind, bag.category, bag.material) == (kind, *KINDS[kind])
    assert all(part.faces.dtype == np.uint8 and part.faces.shape[::3] == (6, 5) for part in bag.parts)


def test_members_of_a_group_look_alike_and_differ():
    one, other = (design(3, member, np.random.default_rng(5), np.random.default_rng([6, member])) for member in (0, 1))
    assert one.kind == other.kind
    np.testing.assert_allclose(one.base, other.base, atol=0.12)
    np.testing.assert_allclose(one.half, other.half, rtol=0.11)
    assert one.pattern != other.pattern and not np.array_equal(one.accent, other.accent)


def view_of(part, size=(64, 64)):
    """A part at the origin, seen from 2 m in front (-y), 32 pixels to the metre at its middle."""
    camera = look_at(np.array([0.0, -2.0, 0.0]), np.zeros(3), 64.0, size)
    light = Light(np.array([0.0, -1.0, 0.0]), np.ones(3), 1.0, 1.0)
    placed = Placed([part], np.eye(3), np.zeros(3))
    return render(camera, [placed], lambda x, y: np.zeros((*x.shape, 3), np.float32), light)


def test_silhouettes_by_hand():
    """A thin plate 2 m ahead covers focal * size / distance pixels; a disc pi / 4 of its square."""
    _, masks = view_of(solid((0, 0, 0), (0.5, 0.001, 0.25), (1, 1, 1), 0.0, 0.0))
    rows, columns = np.nonzero(masks[0])
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (16, 48, 24, 40)
    _, masks = view_of(solid((0, 0, 0), (0.5, 0.001, 0.5), (1, 1, 1), 0.5, 0.0))
    assert masks[0].sum() == pytest.approx(np.pi * 16**2, rel=0.03)


def test_the_nearer_part_hides_the_farther():
    near = solid((0, -0.5, 0), (0.1, 0.01, 0.1), (1, 0, 0), 0.0, 0.0)
    far = solid((0, 0.5, 0), (0.5, 0.01, 0.5), (0, 0, 1), 0.0, 0.0)
    camera = look_at(np.array([0.0, -2.0, 0.0]), np.zeros(3), 64.0, (64, 64))
    light = Light(np.array([0.0, -1.0, 0.0]), np.ones(3), 1.0, 1.0)
    for order in ([near, far], [far, near]):
        objects = [Placed([part], np.eye(3), np.zeros(3)) for part in order]
        picture, masks = render(camera, objects, lambda x, y: np.zeros((*x.shape, 3), np.float32), light)
        assert picture[32, 32, 0] > picture[32, 32, 2] and picture[20, 32, 2] > picture[20, 32, 0]
        assert not (masks[0] & masks[1]).any() and masks[:, 32, 32].tolist() == [part is near for part in order]


def test_paint_lands_where_it_was_put():
    """A sticker right of the middle of a face is right of the middle of its texture, and its size is in metres."""
    skin = Skin((0.5, 0.1, 0.25), (0, 0, 0), (0, 0, 0), "plain", 0.05, np.random.default_rng(0), texels=100)
    skin.start_drawing()
    skin.sticker(3, (0.25, 0.125), 0.1, 0, Image.new("RGBA", (96, 96), (255, 0, 0, 255)))
    red = skin.finish()[3, ..., 0] > 200
    rows, columns = np.nonzero(red)
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (70, 80, 15, 35)
    assert sticker_image(np.random.default_rng(3)).mode == "RGBA"
