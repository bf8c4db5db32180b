"""Pictures with hard backgrounds: one bag is meant, the others are cut by the border, and the floor is loud."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from baggage import synthetic
from baggage.render.models import Bag, solid
from baggage.render.pictures import Identity, place, stand
from baggage.render.raycast import render
from baggage.render.surroundings import (
    COLORS,
    busy_floor,
    frame_loosely,
    neighbours,
    printed,
    reach,
    take_hard_picture,
    touch,
)
from baggage.synthetic import jpeg, make_synthetic_baggage
from core.data.reid_datasets import check_evaluation, load_reid_dataset

TINY = dict(train_identities=3, test_identities=2, gallery_views=2, probe_views=2)
LISTS = ("MVB_train/Info/train.json", "MVB_val/Info/val_gallery.json", "MVB_val/Info/val_probe.json")


@pytest.fixture(scope="module")
def hard_set(tmp_path_factory):
    return make_synthetic_baggage(tmp_path_factory.mktemp("hard") / "set", background="hard", **TINY, progress=False)


@pytest.fixture(scope="module")
def identities():
    with synthetic.tqdm(disable=True) as bar:
        return synthetic.make_identities(0, 0, 3, 1, bar)


def entries(root):
    return [entry for info in LISTS for entry in json.loads((root / info).read_text())["image"]]


def test_a_set_without_scenes_that_loads_as_the_plain_one_does(hard_set, baggage):
    assert sorted(path.name for path in hard_set.iterdir()) == ["MVB_train", "MVB_val", "synthetic.json"]
    dataset = load_reid_dataset("synthetic_hard", hard_set)
    assert tuple(map(len, dataset)) == (12, 4, 4) and check_evaluation(dataset, "no_camera") is None
    assert all(sample.box and sample.mask for part in dataset for sample in part)
    plain = {entry["image_name"]: entry for entry in entries(baggage)}  # with more identities, of which these are some
    for entry in json.loads((hard_set / LISTS[0]).read_text())["image"]:
        assert entry.keys() == plain[entry["image_name"]].keys()
        assert all(entry[key] == plain[entry["image_name"]][key] for key in ("id", "datatype", "material"))
        assert entry["bbox"] != plain[entry["image_name"]]["bbox"]


def test_the_bag_is_whole_and_small_and_around_the_middle(hard_set):
    off_middle = []
    for entry in entries(hard_set):
        (x, y, width, height), (columns, rows) = entry["bbox"], entry["dimsize"]
        assert 0 < x < x + width < columns and 0 < y < y + height < rows
        assert x < columns / 2 < x + width and y < rows / 2 < y + height
        mask = coco_mask.decode(entry["segmentation"])
        assert coco_mask.toBbox(entry["segmentation"]).tolist() == entry["bbox"]
        assert 0.2 < mask.mean() < 0.47
        off_middle.append(abs((2 * x + width) / columns - 1) + abs((2 * y + height) / rows - 1))
    assert max(off_middle) > 0.2


def test_marker_says_hard_and_the_two_sets_do_not_pass_for_one_another(hard_set, monkeypatch):
    marker = json.loads((hard_set / "synthetic.json").read_text())
    assert marker == dict(version=2, seed=0, train_scenes=0, val_scenes=0, background="hard", hard_version=1) | TINY
    rendered = []
    monkeypatch.setattr(synthetic, "write_set", lambda root, parameters, progress: rendered.append(parameters))
    monkeypatch.setattr(synthetic, "put_in_place", lambda *_: None)
    assert make_synthetic_baggage(hard_set, background="hard", **TINY) == hard_set and rendered == []
    make_synthetic_baggage(hard_set, background="hard", **TINY, train_scenes=5)  # scenes play no part
    assert rendered == []
    make_synthetic_baggage(hard_set, **TINY, train_scenes=0, val_scenes=0)
    assert rendered == [dict(version=2, seed=0, train_scenes=0, val_scenes=0) | TINY]


def test_unknown_background(tmp_path):
    with pytest.raises(ValueError, match="background 'loud' is none of plain, hard"):
        make_synthetic_baggage(tmp_path / "set", background="loud")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_a_function_of_seed_identity_and_view(hard_set, identities):
    """Rendered alone, in another order, it is the same to the last byte."""
    for datatype, stream, view in (("p", synthetic.PROBE, 1), ("g", synthetic.GALLERY, 0)):
        rng = synthetic.random(0, stream, 2, view)
        picture, _, quality = take_hard_picture(identities[1], identities, datatype, view, 2, rng)
        name = f"MVB_train/Image/0002_{datatype}_{view + 1}.jpg"
        assert jpeg(picture, quality) == (hard_set / name).read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_are_others_at_the_border_and_leave_the_bag_in_sight(identities, seed):
    rng = np.random.default_rng(seed)
    target, position, middle, setting = stand(identities[0], "g", 0, 3, rng)
    camera = frame_loosely(position, middle, target, rng)
    around = neighbours(identities[0], identities, target, camera, rng)
    assert 1 <= len(around) <= 4
    own = {id(part) for part in identities[0].bag.parts}
    assert not own & {id(part) for bag in around for part in bag.parts}
    things = [target, *around]
    assert not any(touch(a, b) for k, a in enumerate(around) for b in things[k + 2 :])
    _, alone = render(camera, [target], setting.backdrop, setting.light)
    _, masks = render(camera, things, setting.backdrop, setting.light)
    assert masks[0].sum() > 0.85 * alone[0].sum()  # bodies hide 5% at most, handles and pockets a little more
    for mask in masks[1:]:
        assert mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
        assert mask.mean() > 0.01  # of what has since been hidden by a third bag, enough is left to disturb


def test_no_neighbours_where_there_are_no_others(identities):
    rng = np.random.default_rng(0)
    target, position, middle, _ = stand(identities[0], "g", 0, 3, rng)
    camera = frame_loosely(position, middle, target, rng)
    assert neighbours(identities[0], identities[:1], target, camera, rng) == []
    assert neighbours(identities[0], [], target, camera, rng) == []
    picture, mask, _ = take_hard_picture(identities[0], [], "p", 0, 1, rng)
    assert picture.shape[:2] == mask.shape and 0.2 < mask.mean() < 0.47


def cube(x, y, yaw=0.0):
    """A cube of 0.4 m."""
    bag = Bag([solid((0, 0, 0), (0.2, 0.2, 0.2), (1, 0, 0), 0.0, 0.0)], "box", "box", "others")
    placed = place(bag, 0, 0, yaw, lying=False)
    return placed._replace(position=placed.position + [x, y, 0])


def test_reach_and_touch_by_hand():
    """Two cubes of 0.4 m with 0.02 m around each: apart from 0.44 m on; turned by 45 degrees, a corner stands out."""
    assert reach(cube(3, 7), np.array([1.0, 0.0])) == pytest.approx(0.22)
    assert reach(cube(0, 0, np.pi / 4), np.array([0.0, -1.0])) == pytest.approx(0.2 * np.sqrt(2) + 0.02)
    assert touch(cube(0, 0), cube(0.43, 0)) and not touch(cube(0, 0), cube(0.45, 0))
    assert touch(cube(0, 0), cube(0, -0.5, np.pi / 4)) and not touch(cube(0, 0), cube(0, -0.53, np.pi / 4))
    assert touch(cube(1, 1), cube(1, 1))


def test_the_crop_of_a_known_box():
    """Of a cube the picture shows 25 to 45%, all of it, and the longer side has 140 to 220 pixels."""
    target = cube(0, 0)
    for seed in range(5):
        camera = frame_loosely(
            np.array([0.0, -2.0, 1.0]), np.array([0, 0, 0.2]), target, rng=np.random.default_rng(seed)
        )
        light = stand(Identity(1, Bag(target.parts, "box", "box", "others")), "g", 0, 1, np.random.default_rng(0))[3]
        _, masks = render(camera, [target], light.backdrop, light.light)
        assert 139 <= max(camera.size) <= 220 and 0.23 < masks[0].mean() < 0.47
        assert not (masks[0][[0, -1]].any() or masks[0][:, [0, -1]].any())


def test_floors_are_loud_and_differ_from_picture_to_picture():
    x, y = np.meshgrid(np.linspace(-1, 1, 60, dtype=np.float32), np.linspace(-1, 1, 40, dtype=np.float32))
    floors = []
    for seed in range(6):
        floor = busy_floor(np.random.default_rng(seed))
        color = floor(x, y)
        assert color.shape == (40, 60, 3)
        assert color.min() >= 0 and color.max() <= 1 and np.array_equal(color, floor(x, y))
        assert color.std() > 0.1
        floors.append(color)
    assert all(np.abs(a - b).mean() > 0.05 for k, a in enumerate(floors) for b in floors[k + 1 :])


def test_a_print_has_two_colours_of_bags_that_stand_apart():
    x, y = np.meshgrid(np.linspace(-2, 2, 90, dtype=np.float32), np.linspace(-2, 2, 90, dtype=np.float32))
    for seed in range(12):
        color = printed(np.random.default_rng(seed))(x, y).reshape(-1, 3)
        ends = [color[np.argmin(np.abs(color - known).sum(1))] for known in COLORS]
        near = [known for known, end in zip(COLORS, ends, strict=True) if np.abs(known - end).sum() < 0.02]
        assert max(np.abs(a - b).sum() for a in near for b in near) > 0.7
