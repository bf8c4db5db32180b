"""demo.py with a gallery, as a user runs it: built, changed, searched; and two pictures compared."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec

import demo
from core.models import weights
from core.models.mask_rcnn import MaskRCNN
from core.models.reid import build_reid_model
from recognition import gallery_pictures
from recognition.cutouts import cut_out
from recognition.gallery import open_gallery
from recognition.networks import TRAIN_MASKS, TRAIN_REID

THRESHOLD = {"distance": 0.02, "false_accept_rate": 0.01, "true_accept_rate": 0.5}
THRESHOLD |= {"impostor_pairs": 90, "genuine_pairs": 10}


def save_reid(path, seed=0, threshold=None, **changes):
    """A checkpoint of a network that was never trained."""
    options = {"backbone": "resnet18", "num_classes": 0, "embedding_dim": 64}
    torch.manual_seed(seed)
    state = {"kind": "reid", "model": build_reid_model(**options).state_dict(), "ema": None, "network": options}
    state |= {"input_size": [32, 32], "normalisation": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    state |= {"identities": [], "distance": "cosine", "args": {}, "epoch": 2, "best": 0.1, "threshold": threshold}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**state, **changes}, path)
    return path


def save_mask_rcnn(path, detections=6, sees=True):
    """A checkpoint of a network that was never trained, but sees something everywhere, or nothing anywhere."""
    torch.manual_seed(0)
    options = {"backbone_name": "resnet18", "num_classes": 3, "min_size": 64, "max_size": 96}
    network = MaskRCNN(**options, box_detections_per_img=detections)
    with torch.no_grad():
        predictor = network.roi_heads.box_predictor.cls_score
        predictor.weight.mul_(30)
        predictor.bias.copy_(torch.tensor([-2.0, 1.0, 1.0]) if sees else torch.tensor([99.0, -99.0, -99.0]))
    state = {"kind": "mask_rcnn", "model": network.state_dict(), "ema": None, "network": network.options, "args": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**state, "categories": [[1, "bag"], [2, "box"]], "epoch": 3, "best": 0.1}, path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    names = {"reid": save_reid(folder / "reid.pth", threshold=THRESHOLD), "other": save_reid(folder / "other.pth", 1)}
    names |= {"blind": save_mask_rcnn(folder / "blind.pth", sees=False)}
    return {**names, "segment": save_mask_rcnn(folder / "mask.pth")}


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory):
    """Folder with bags/, two identities in folders and one by its MVB name; a gallery of them, taken whole; a scene."""
    folder = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(0)
    for name in ("red/1.png", "red/2.png", "blue/1.jpg", "0010_g_1.png"):
        values = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        (folder / "bags" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).resize((50, 60), Image.Resampling.NEAREST).save(folder / "bags" / name)
    values = random.integers(0, 256, (12, 18, 3), dtype=np.uint8)
    Image.fromarray(values).resize((180, 120), Image.Resampling.NEAREST).save(folder / "scene.png")
    options = ["--build-gallery", folder / "bags", "--gallery", folder / "whole.gallery", "--no-masks"]
    options += ["--reid", checkpoints["reid"], "--device", "cpu"]
    demo.main(demo.get_parser().parse_args(list(map(str, options))))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The current folder: a copy of bags/ and scene.png."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "whole.gallery").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def whole(made, place):
    """bags.gallery in the current folder: of whole pictures."""
    shutil.copy(made / "whole.gallery", "bags.gallery")


@pytest.fixture
def build(run, checkpoints, place):
    """Function: builds bags.gallery out of bags/, with more options."""

    def command(*options, folder="bags"):
        given = ["--build-gallery", folder, "--gallery", "bags.gallery", "--reid", checkpoints["reid"]]
        return run(demo, *given, "--device", "cpu", *options)

    return command


def read(folder):
    return json.loads((Path(folder) / "instances.json").read_text())


def identities(path="bags.gallery"):
    """{identity: number of pictures}."""
    with open_gallery(path) as gallery:
        return {name: int((gallery.numbers == number).sum()) for number, name in enumerate(gallery.names)}


def test_a_gallery_of_whole_pictures(build):
    code, out, err = build("--no-masks")
    assert (code, err) == (0, "") and "written to bags.gallery: 4 pictures of 3 identities" in out
    assert identities() == {"0010": 1, "blue": 1, "red": 2}
    with open_gallery("bags.gallery") as gallery:
        assert gallery.info["masks"] is False and Path(gallery.info["reid"]).name == "reid.pth"
        assert [Path(gallery.source(row)).is_absolute() for row in range(4)] == [True] * 4
        small = gallery_pictures.from_jpeg(gallery.thumbnail(0))
        assert small.size == (50, 60)


def test_who_is_in_a_gallery(run, whole):
    code, out, _ = run(demo, "--gallery", "bags.gallery")
    assert code == 0 and out.startswith("gallery: 4 pictures of 3 identities\nreid: ")
    assert out.endswith("\n     1  0010\n     1  blue\n     2  red\n") and "masks: False" in out


def test_pictures_that_come_back_as_another_identity_are_named(build):
    assert build("--no-masks")[0] == 0
    code, out, _ = build("--no-masks", "--add", folder="bags/red")
    assert code == 0 and "of another identity than before: 2 of these, the first bags/red/1.png, now 1, was red" in out
    assert identities() == {"0010": 1, "blue": 1, "1": 1, "2": 1}


def test_a_gallery_keeps_what_its_pictures_were_cut_out_by(run, build, checkpoints):
    """The network and the classes: for more pictures, and for scenes."""
    assert build("--segment", checkpoints["segment"], "--classes", "bag")[0] == 0
    with open_gallery("bags.gallery") as gallery:
        assert gallery.info["classes"] == ["bag"]
    shutil.copytree("bags", "more")
    code, out, _ = build("--add", folder="more")
    assert code == 0 and f"finds objects: {checkpoints['segment']}, epoch 3" in out and "another network" not in out
    code, out, _ = build("--add", "--segment", checkpoints["blind"], folder="more")
    assert code == 0 and f"cut out by another network: {checkpoints['segment']}" in out
    assert run(demo, "--gallery", "bags.gallery", "--remove", "0010", "blue", "red")[0] == 0
    assert identities() == {}
    code, out, _ = build("--add", folder="more")  # an empty gallery remembers them too
    assert code == 0 and f"finds objects: {checkpoints['segment']}, epoch 3" in out
    assert run(demo, "scene.png", "--gallery", "bags.gallery", "--score", 0.1, "--device", "cpu")[0] == 0
    assert {one["class"] for one in read("runs/demo/scene")["instances"]} == {"bag"}


def test_objects_are_cut_out_along_their_masks(build, checkpoints):
    code, out, _ = build("--segment", checkpoints["segment"])
    assert code == 0 and "finds objects: " in out
    with open_gallery("bags.gallery") as gallery:
        assert gallery.info["masks"] is True and gallery.info["segment"] == str(checkpoints["segment"])


def test_where_nothing_is_found_pictures_are_taken_whole_and_that_is_said(build, checkpoints, made):
    code, out, _ = build("--segment", checkpoints["blind"])
    assert code == 0 and "nothing found in 4 of 4 pictures, which are taken whole" in out
    with open_gallery("bags.gallery") as gallery:
        found = gallery.vectors()
    with open_gallery(made / "whole.gallery") as gallery:
        assert np.array_equal(gallery.vectors(), found)


def test_everyone_in_a_scene_is_recognised(run, build, checkpoints, links_of):
    """The gallery is made of what the network sees in the scene, each instance an identity: all must be found again."""
    networks = ["--segment", checkpoints["segment"], "--reid", checkpoints["reid"], "--score", 0.1, "--device", "cpu"]
    assert run(demo, "scene.png", *networks[:2], *networks[4:], "--output", "plain")[0] == 0
    seen = read("plain/scene")["instances"]
    assert len(seen) > 1
    Path("cuts").mkdir()
    for number, one in enumerate(seen):
        cut_out(Image.open("scene.png").convert("RGB"), one["box"]).save(f"cuts/bag {number}.png")
    assert build("--no-masks", folder="cuts")[0] == 0

    code, out, err = run(demo, "scene.png", "--gallery", "bags.gallery", *networks, "--matches", 2)
    assert (code, err) == (0, "")
    assert (
        f"scene.png: {len(seen)} instances: bag 0, bag 1" in out
        and "50 % of pairs of one object pass, and at most 1 % of pairs of two, on whole validation pictures" in out
    )
    content = read("runs/demo/scene")
    assert content["gallery"] == "bags.gallery" and content["threshold"] == 0.02 and content["metric"] == "cosine"
    assert (content["segment"], content["reid"]) == (str(checkpoints["segment"]), str(checkpoints["reid"]))
    assert (content["false_accept_rate"], content["true_accept_rate"]) == (0.01, 0.5)
    assert [one["number"] for one in content["instances"]] == list(range(1, len(seen) + 1))
    assert [one["identity"] for one in content["instances"]] == [f"bag {number}" for number in range(len(seen))]
    for one, expected in zip(content["instances"], seen, strict=True):
        assert one["box"] == expected["box"] and one["mask"] == expected["mask"]
        assert len(one["matches"]) == 2 and one["matches"][0]["distance"] < 0.002 < one["matches"][1]["distance"]
        assert one["matches"][0]["source"] == str(Path(f"cuts/{one['identity']}.png").absolute())
    files = {path.name for path in Path("runs/demo/scene").iterdir()}
    assert files == {"sheet.jpg", "identities.jpg", "thumbnail.jpg", "instances.json"}
    links = links_of(Path("runs/demo/index.html"))
    assert {Path(link).name for link in links} == files
    assert all((Path("runs/demo") / link).is_file() for link in links)

    # One is taken out of the gallery: now a stranger, unless the threshold lets everybody be somebody.
    code, out, _ = run(demo, "--gallery", "bags.gallery", "--remove", "bag 0")
    assert code == 0 and "removed: 1 picture\n" in out and "bag 0" not in identities()
    for threshold, name in ((0.0021, None), (2.0, str)):
        run(demo, "scene.png", "--gallery", "bags.gallery", *networks, "--output", "more", "--threshold", threshold)
        folder = "more" if name is None else "more-2"
        assert read(f"{folder}/scene")["false_accept_rate"] is None  # the threshold is the person's own
        first = read(f"{folder}/scene")["instances"][0]
        assert first["matches"] and (first["identity"] is None) == (name is None)


def test_a_scene_cut_out_along_masks(run, build, checkpoints):
    networks = ["--segment", checkpoints["segment"], "--reid", checkpoints["reid"]]
    build(*networks[:2])
    code, out, _ = run(demo, "scene.png", "--gallery", "bags.gallery", *networks, "--score", 0.1)
    assert code == 0 and "cut out along masks" in out
    assert all(len(one["matches"]) == 3 for one in read("runs/demo/scene")["instances"])


def test_a_scene_without_anything_and_one_of_16_pixels(run, whole, checkpoints):
    Image.new("RGB", (16, 16), "red").save("tiny.png")
    options = ["--gallery", "bags.gallery", "--reid", checkpoints["reid"]]
    code, out, _ = run(demo, "scene.png", "tiny.png", *options, "--segment", checkpoints["blind"])
    assert code == 0 and "scene.png: no instances" in out and read("runs/demo/scene")["instances"] == []
    code, out, _ = run(demo, "tiny.png", *options, "--segment", checkpoints["segment"], "--score", 0)
    assert code == 0 and read("runs/demo-2/tiny")["instances"]
    assert Image.open("runs/demo-2/tiny/sheet.jpg").width > 100


def test_identities_of_odd_names(run, build, checkpoints):
    shutil.rmtree("bags/blue")
    Path("bags/red").rename(os.fsdecode(b"bags/\xff $x$ <b>"))
    Path("bags/0010_g_1.png").rename("bags/a very long name " + 12 * "of a bag " + ".png")
    assert build("--no-masks")[0] == 0
    networks = ["--segment", checkpoints["segment"], "--reid", checkpoints["reid"]]
    code, _, err = run(demo, "scene.png", "--gallery", "bags.gallery", *networks, "--score", 0, "--threshold", 2)
    assert (code, err) == (0, "")
    named = {match["identity"] for one in read("runs/demo/scene")["instances"] for match in one["matches"]}
    assert named == {os.fsdecode(b"\xff $x$ <b>"), "a very long name " + 12 * "of a bag "}


def test_the_network_of_the_gallery_is_taken_and_another_one_is_refused(run, whole, checkpoints):
    save_reid(Path("runs/newer/best.pth"), 1)
    scene = ["scene.png", "--gallery", "bags.gallery", "--segment", checkpoints["segment"]]
    code, out, _ = run(demo, *scene)
    assert code == 0 and f"recognises them: {checkpoints['reid']}, epoch 2" in out
    code, _, err = run(demo, *scene, "--reid", checkpoints["other"])
    assert code == 2 and err.count("\n") == 1 and str(checkpoints["other"]) in err and "bags.gallery" in err
    assert not Path("runs/demo-2").exists()


def test_without_a_threshold_everyone_is_unknown_and_that_is_said(run, place, checkpoints):
    network = ["--reid", checkpoints["other"]]
    run(demo, "--build-gallery", "bags", "--gallery", "bags.gallery", "--no-masks", *network)
    code, out, _ = run(
        demo, "scene.png", "--gallery", "bags.gallery", "--segment", checkpoints["segment"], "--score", 0
    )
    assert code == 0
    assert out.count("this checkpoint carries no threshold: everyone is unknown; give --threshold") == 1
    found = read("runs/demo/scene")["instances"]
    assert found and all(one["identity"] is None and one["matches"] for one in found)


def test_what_a_threshold_lets_pass_is_said_with_what_it_was_measured_on(run, whole, checkpoints, place):
    """A stranger meets every picture of every identity; old checkpoints don't say how many pass."""
    options = ["scene.png", "--gallery", "bags.gallery", "--device", "cpu", "--output", "out"]
    code, out, _ = run(demo, *options)
    assert code == 0 and "strangers" not in out
    assert read("out/scene")["false_accept_interval"] == [None, None]
    strangers = {"identities": [1, 2], "pictures": [1, 2], "rates": [[0.1, 0.31], [0.2, 0.31]]}
    measured = THRESHOLD | {"identities": 7, "lower": 0.001, "upper": 0.04, "strangers": strangers}
    state = torch.load(checkpoints["reid"], weights_only=True)
    torch.save({**state, "threshold": measured}, "newer.pth")
    code, out, err = run(demo, *options, "--reid", "newer.pth")
    assert (code, err) == (0, "")
    assert "at most 1 % of pairs of two among 7 identities (of others 0.1 to 4 %, at 95 % confidence), on whole" in out
    assert "among so many, at least 31 % of strangers find somebody near enough, as measured on 7 identities; " in out
    content = read("out-2/scene")
    assert (content["identities"], content["false_accept_interval"]) == (7, [0.001, 0.04])


def test_a_gallery_grows_and_is_merged(run, build, whole):
    Path("new").mkdir()
    shutil.copy("bags/red/1.png", "new/10_g_7.png")  # 10 is 0010
    shutil.copy("bags/red/1.png", "new/green.png")
    code, out, _ = build("--no-masks", "--add", folder="new")
    assert code == 0 and identities() == {"0010": 2, "blue": 1, "red": 2, "green": 1}
    assert "1 identity was in it before and has more pictures now: 0010\n" in out
    code, out, _ = build("--no-masks", "--add", folder="new")  # once more
    assert code == 0 and "2 of 2 pictures" in out and identities() == {"0010": 2, "blue": 1, "red": 2, "green": 1}
    assert "more pictures now" not in out

    shutil.copy("bags.gallery", "one.gallery")
    run(demo, "--gallery", "one.gallery", "--remove", "green", "red")
    run(demo, "--gallery", "bags.gallery", "--remove", "0010", "blue")
    code, out, _ = run(demo, "--gallery", "all.gallery", "--merge", "one.gallery", "bags.gallery")
    assert code == 0 and "written to all.gallery: 6 pictures of 4 identities" in out
    assert identities("all.gallery") == {"0010": 2, "blue": 1, "red": 2, "green": 1}
    code, _, err = run(demo, "--gallery", "all.gallery", "--merge", "one.gallery", "bags.gallery")
    assert code == 2 and "all.gallery" in err
    code, _, _ = run(demo, "--gallery", "one.gallery", "--merge", "one.gallery", "bags.gallery")
    assert code == 0 and len(identities("one.gallery")) == 4


def test_a_picture_that_moved_is_said_and_can_be_taken_out(run, build):
    code, out, _ = build("--no-masks")
    assert code == 0 and "once more" not in out
    Path("moved").mkdir()
    shutil.copy("bags/red/1.png", "moved/other.png")
    there, moved = (Path(path).absolute() for path in ("bags/red/1.png", "moved/other.png"))
    code, out, _ = build("--add", folder="moved")
    twice = f"it once more under another path: 1 picture, the first {moved} (of other) as {there} (of red)"
    assert code == 0 and f"\nin {twice}; --remove PATH takes one out\n" in out
    Path("bags/red/1.png").unlink()
    code, out, _ = run(demo, "--gallery", "bags.gallery", "--remove", "bags/red/1.png")
    assert code == 0 and "removed: 1 picture\n" in out and "once more" not in out
    assert identities() == {"0010": 1, "blue": 1, "red": 1, "other": 1}


def test_an_empty_gallery_answers_in_one_line_and_takes_new_entries(run, build, whole, checkpoints):
    run(demo, "--gallery", "bags.gallery", "--remove", "0010", "blue", "red")
    assert identities() == {}
    code, _, err = run(demo, "scene.png", "--gallery", "bags.gallery", "--segment", checkpoints["segment"])
    assert code == 2 and err.count("\n") == 1 and "bags.gallery is empty: nobody is known" in err
    assert not Path("runs").exists()
    code, _, err = build("--no-masks", "--add", "--reid", checkpoints["other"])  # still of its network
    assert code == 2 and err.count("\n") == 1 and str(checkpoints["other"]) in err and identities() == {}
    assert build("--no-masks", "--add")[0] == 0 and identities() == {"0010": 1, "blue": 1, "red": 2}


def test_names_that_merged_galleries_share_are_said(run, whole):
    shutil.copy("bags.gallery", "copy.gallery")
    code, out, _ = run(demo, "--gallery", "all.gallery", "--merge", "bags.gallery", "copy.gallery")
    assert code == 0 and "3 identities are in more than one of them: 0010, blue, red\n" in out
    run(demo, "--gallery", "copy.gallery", "--remove", "0010", "red")
    code, out, _ = run(demo, "--gallery", "more.gallery", "--merge", "bags.gallery", "copy.gallery")
    assert code == 0 and "1 identity is in more than one of them: blue\n" in out
    code, out, _ = run(demo, "--gallery", "one.gallery", "--merge", "bags.gallery", "bags.gallery")
    assert code == 0 and "more than one" not in out


def test_files_of_names_that_are_no_text(run, whole, checkpoints):
    name, output = os.fsdecode(b"b\xe4g.gallery"), os.fsdecode(b"\xe4out")
    Path("bags.gallery").rename(name)
    code, out, err = run(
        demo, "scene.png", "--gallery", name, "--segment", checkpoints["segment"], "--score", 0, "--output", output
    )
    assert (code, err) == (0, "") and "written to \ufffdout" in out and Path(output, "index.html").is_file()
    code, out, err = run(demo, "--gallery", name, "--remove", "red")
    assert (code, err) == (0, "") and "written to b\ufffdg.gallery: 2 pictures" in out
    code, out, err = run(
        demo, *2 * ["scene.png"], "--compare", "--no-masks", "--output", output, "--reid", checkpoints["reid"]
    )
    assert (code, err) == (0, "") and "written to \ufffdout-2" in out


def test_whole_pictures_and_cut_outs_are_not_mixed(run, build, whole, checkpoints):
    code, _, err = build("--add", "--segment", checkpoints["segment"])
    assert code == 2 and "taken whole" in err and err.count("\n") == 1
    Path("bags.gallery").rename("whole.gallery")
    build("--segment", checkpoints["segment"])
    code, _, err = build("--add", "--no-masks")
    assert code == 2 and "cut out along masks" in err
    code, _, err = run(demo, "--gallery", "all.gallery", "--merge", "whole.gallery", "bags.gallery")
    assert code == 2 and "taken whole" in err and not Path("all.gallery").exists()


@pytest.mark.parametrize("options", [[], ["--no-masks"]])
def test_a_photograph_of_one_object_is_searched_for_as_a_whole(run, whole, links_of, options):
    """Where the gallery's pictures are whole, and nothing that finds objects is there: nor is it asked for."""
    code, out, err = run(demo, "bags/red/2.png", "scene.png", "--gallery", "bags.gallery", *options, "--device", "cpu")
    assert (code, err) == (0, "") and "pictures are taken whole, as those of the gallery" in out
    assert "2.png: 1 instance: red\n" in out
    content = read("runs/demo/2")
    assert content["segment"] is content["min_score"] is None
    (found,) = content["instances"]
    assert found["identity"] == "red" and found["matches"][0]["distance"] < 1e-4
    assert found["box"] == [0, 0, 50, 60] and found["score"] is found["category_id"] is None
    assert rle_codec.decode(found["mask"]).shape == (60, 50) and rle_codec.decode(found["mask"]).all()
    assert {Path(link).name for link in links_of(Path("runs/demo/index.html"))} >= {"sheet.jpg", "instances.json"}


@pytest.mark.parametrize("option", [("--segment", "mask.pth"), ("--score", 0.1), ("--classes", "bag")])
def test_who_asks_for_objects_gets_those_in_a_picture(run, whole, checkpoints, option):
    Path("mask.pth").symlink_to(checkpoints["segment"])
    Path("runs/masks").mkdir(parents=True)
    shutil.copy("mask.pth", "runs/masks/best.pth")
    code, out, _ = run(demo, "scene.png", "--gallery", "bags.gallery", *option, "--device", "cpu")
    assert code == 0 and "finds objects: " in out and "taken whole" not in out
    assert read("runs/demo/scene")["segment"] in ("mask.pth", "runs/masks/best.pth")


def test_a_whole_picture_against_cut_outs_is_said(run, build, checkpoints):
    build("--segment", checkpoints["segment"])
    code, out, err = run(demo, "bags/red/1.png", "--gallery", "bags.gallery", "--no-masks", "--device", "cpu")
    assert (code, err) == (0, "") and len(read("runs/demo/1")["instances"]) == 1
    assert "pictures are taken whole, with their background, and those of the gallery were cut out along masks" in out


def test_without_a_network_that_finds_objects_the_one_that_recognises_them_counts(run, build, checkpoints, monkeypatch):
    def fetch(url):
        raise weights.DownloadError("no connection")

    segment = Path("mask.pth")
    shutil.copy(checkpoints["segment"], segment)
    build("--segment", segment)
    segment.unlink()
    monkeypatch.setattr(weights, "fetch", fetch)
    save_reid(Path("runs/one/best.pth"), threshold=THRESHOLD)
    code, _, err = run(demo, "scene.png", "--gallery", "bags.gallery", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "nothing is trained" not in err
    assert "error: no network that finds objects is trained yet" in err and "--no-masks" in err
    code, _, err = run(demo, "scene.png")
    assert code == 2 and "no network that finds objects is trained yet" in err and "--no-masks" not in err


@pytest.mark.parametrize("trained_later", [False, True])
def test_what_joins_a_gallery_is_taken_as_its_pictures_were(run, build, whole, checkpoints, made, trained_later):
    """The README's line: --build-gallery new --add, without --no-masks."""
    if trained_later:
        Path("runs/masks").mkdir(parents=True)
        shutil.copy(checkpoints["segment"], "runs/masks/best.pth")
    shutil.copytree("bags", "new")
    code, out, err = build("--add", folder="new")
    assert (code, err) == (0, "") and "pictures are taken whole, as those of the gallery\n" in out
    with open_gallery("bags.gallery") as gallery:
        assert len(gallery) == 8 and gallery.info["masks"] is False
        assert np.array_equal(gallery.vectors(0, 4), gallery.vectors(4, 8))


def test_a_broken_picture_is_named_and_the_gallery_has_the_others(build):
    Path("bags/blue/1.jpg").write_bytes(b"no picture")
    code, out, err = build("--no-masks")
    assert code == 2 and identities() == {"0010": 1, "red": 2}
    assert err.splitlines()[0].startswith("skipped: bags/blue/1.jpg: can't be read")
    assert err.splitlines()[-1].startswith("error: 1 of 4 pictures were skipped")


def test_two_pictures_compared(run, place, checkpoints):
    compared = ["--compare", "--reid", checkpoints["reid"], "--no-masks"]
    code, out, err = run(demo, "bags/red/1.png", "bags/red/1.png", *compared)
    assert (code, err) == (0, "") and "\nyes, the same object: similarity 1.000" in out
    assert {path.name for path in Path("runs/demo").iterdir()} == {"comparison.jpg", "comparison.json"}
    content = json.loads(Path("runs/demo/comparison.json").read_text())
    assert content["same"] is True and content["distance"] == 0 and content["threshold"] == 0.02
    assert content["answer"] == "yes, the same object" and content["similarity"] == pytest.approx(1)
    assert (content["false_accept_rate"], content["true_accept_rate"]) == (0.01, 0.5)
    assert (content["segment"], content["reid"]) == (None, str(checkpoints["reid"]))
    code, out, _ = run(demo, "bags/red/1.png", "bags/red/2.png", *compared, "--threshold", 0)
    assert code == 0 and "\nno, two objects: " in out
    content = json.loads(Path("runs/demo-2/comparison.json").read_text())
    assert content["same"] is False and content["true_accept_rate"] is None
    compared[2] = checkpoints["other"]
    code, out, _ = run(demo, "bags/red/1.png", "bags/red/2.png", *compared)
    assert code == 0 and "carries no threshold" in out
    assert json.loads(Path("runs/demo-3/comparison.json").read_text())["same"] is None
    for number, (network, cut_out_of_it) in enumerate([("segment", True), ("blind", False)], start=4):
        segment = ["--segment", checkpoints[network]]
        code, out, _ = run(demo, "bags/red/1.png", "scene.png", *compared[:3], *segment)
        assert code == 0 and ("both are taken whole" in out) != cut_out_of_it
        assert json.loads(Path(f"runs/demo-{number}/comparison.json").read_text())["cut_out"] is cut_out_of_it


def test_with_nothing_trained_one_line_names_both_commands(run, place, monkeypatch):
    def fetch(url):
        raise weights.DownloadError("no connection")

    monkeypatch.setattr(weights, "fetch", fetch)
    for command in (
        ["scene.png"],
        ["--build-gallery", "bags", "--gallery", "x.gallery"],
        ["--compare", *2 * ["a.png"]],
    ):
        shutil.copy("scene.png", "a.png")
        code, out, err = run(demo, *command)
        assert code == 2 and err.count("\n") == 1
        assert TRAIN_MASKS in err and TRAIN_REID in err
    assert not Path("runs").exists() and not Path("x.gallery").exists()


BUILD = ["--build-gallery", "bags"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["scene.png", "--gallery", "none.gallery"], "none.gallery: no such gallery"),
        (["scene.png", "--gallery", "cut.gallery"], "cut.gallery is truncated"),
        (["scene.png", "--gallery", "scene.png"], "scene.png is not a gallery"),
        (["--gallery", "none.gallery"], "none.gallery: no such gallery"),
        (["--gallery", "bags.gallery", "--matches", 3], "no pictures given"),
        ([*BUILD], "--build-gallery: give the file with --gallery FILE"),
        ([*BUILD, "--gallery", "bags.gallery"], "bags.gallery is there already: --add adds to it"),
        ([*BUILD, "--gallery", "x", "--add"], "x: no such gallery"),
        ([*BUILD, "scene.png", "--gallery", "x"], "pictures: not an option together with --build-gallery"),
        (["--build-gallery", "empty", "--gallery", "x"], "empty: no pictures in this folder or its sub-folders"),
        (["--build-gallery", "nowhere", "--gallery", "x"], "nowhere: no such folder"),
        ([*BUILD, "--gallery", "x", "--matches", 3], "--matches: not an option together with --build-gallery"),
        (["scene.png", "--compare"], "--compare needs two pictures, 1 given"),
        (["scene.png", "scene.png", "--compare", "--gallery", "x"], "--gallery: not an option together with --compare"),
        (["scene.png", "none.png", "--compare"], "none.png: no such picture"),
        (["scene.png", "--threshold", 0.3], "--threshold: not an option together with pictures alone; it goes with"),
        (["scene.png", "--no-masks", "--reid", "x"], "--reid, --no-masks: not an option together with pictures alone"),
        (["scene.png", "--gallery", "bags.gallery", "--no-masks", "--score", 0.2], "looked for: leave out --score"),
        (["scene.png", "--gallery", "bags.gallery", "--add"], "together with --gallery; it goes with --build-gallery"),
        (["scene.png", "--gallery", ""], "gallery: a value is empty"),
        ([*BUILD, "--gallery", "x", "--no-masks", "--segment", "mask.pth"], "looked for: leave out --segment"),
        ([*BUILD, "--gallery", "empty"], "empty is a folder: give another name"),
        (["empty", "--gallery", "bags.gallery"], "give 'empty/**'"),
        (["--gallery", "bags.gallery", "--remove", "green"], "no identity 'green' and no picture "),
        (["--remove", "green"], "--remove: give the file with --gallery FILE"),
        (["--gallery", "x", "--merge", "bags.gallery", "none.gallery"], "none.gallery: no such gallery"),
        (["--gallery", "x", "--merge", "bags.gallery", "--remove", "y"], "--merge: not an option together with"),
        (
            ["scene.png", "--gallery", "bags.gallery", "--reid", "mask.pth"],
            "mask.pth is a checkpoint of kind mask_rcnn",
        ),
        (["scene.png", "--gallery", "bags.gallery", "--threshold", -1], "--threshold"),
        (["scene.png", "--gallery", "bags.gallery", "--matches", 0], "--matches"),
    ],
)
def test_bad_input_is_one_line(run, whole, checkpoints, arguments, message):
    Path("empty").mkdir()
    content = Path("bags.gallery").read_bytes()
    Path("cut.gallery").write_bytes(content[:-100])
    Path("mask.pth").symlink_to(checkpoints["segment"])
    code, _, err = run(demo, *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert Path("bags.gallery").read_bytes() == content and not Path("x").exists() and not Path("runs").exists()


def test_no_gallery_is_left_open(run, build, whole, checkpoints):
    """Windows replaces no file that somebody has open."""
    shutil.copy("bags.gallery", "copy.gallery")
    merged, network = ["--gallery", "all.gallery", "--merge", "bags.gallery", "copy.gallery"], checkpoints["segment"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        for command in (
            ["scene.png", "--gallery", "bags.gallery", "--segment", network],
            ["scene.png", "--gallery", "bags.gallery", "--segment", network, "--reid", checkpoints["other"]],
            ["--gallery", "bags.gallery"],
            merged,
            merged,  # refused
            ["--gallery", "bags.gallery", "--remove", "0010", "blue", "red"],
            ["scene.png", "--gallery", "bags.gallery", "--segment", network],  # nobody is known
        ):
            run(demo, *command, "--device", "cpu")
        build("--no-masks", "--add")
        build("--no-masks", "--add", "--reid", checkpoints["other"])
    assert not [one.message for one in caught if ".gallery" in str(one.message)]


def test_damaged_thumbnails_and_sources_are_named(run, whole, checkpoints):
    with open_gallery("bags.gallery") as gallery:
        sections, content = gallery._sections, Path("bags.gallery").read_bytes()
    for section in ("sources", "thumbnails"):
        data, (offset, length, _) = bytearray(content), sections[section]
        data[offset : offset + length] = bytes(255 - value for value in data[offset : offset + length])
        Path("bags.gallery").write_bytes(data)
        scene = ["scene.png", "--gallery", "bags.gallery", "--segment", checkpoints["segment"], "--score", 0]
        code, _, err = run(demo, *scene)
        assert code == 2 and f"error: bags.gallery is damaged in its {section}; " in err and err.count("\n") == 1
        assert not Path("runs").exists()


@pytest.mark.slow
def test_two_hundred_instances_in_one_scene(run, whole, place):
    path = save_mask_rcnn(place / "many.pth", detections=200)
    values = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(values).resize((900, 600)).save("crowd.png")
    code, _, _ = run(demo, "crowd.png", "--gallery", "bags.gallery", "--segment", path, "--score", 0)
    assert code == 0 and len(read("runs/demo/crowd")["instances"]) > 50


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["notes.txt"], "1 of 1 pictures were skipped, the first is notes.txt"),
        (["scene.png", "--output", "."], "name a"),
    ],
)
def test_without_a_result_there_is_no_folder(run, place, checkpoints, arguments, message):
    Path("notes.txt").write_text("not a picture")
    before = sorted(Path().iterdir())
    code, out, err = run(demo, *arguments, "--segment", checkpoints["segment"], "--device", "cpu")
    assert code == 2 and message in err.splitlines()[-1] and "written" not in out
    assert sorted(Path().iterdir()) == before
