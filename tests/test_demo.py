"""demo.py as a user runs it: pictures in; sheets, panels, JSON and a page out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec

import demo
from core.data.images import read_image
from core.engine.checkpoint import REQUIRED
from core.errors import InputError
from core.models import weights
from core.models.mask_rcnn import MaskRCNN
from core.visualize import instances
from core.visualize.instances import PANELS
from recognition import networks

FILES = {"sheet.jpg", "instances.json", "thumbnail.jpg", *(f"{panel}.jpg" for panel in PANELS)}
OPTIONS = {"backbone_name": "resnet18", "num_classes": 4, "min_size": 64, "max_size": 96, "box_detections_per_img": 9}


def save_checkpoint(path, options, kind="mask_rcnn", epoch=3):
    """A checkpoint of a network that was never trained, but sees something everywhere."""
    torch.manual_seed(0)
    network = MaskRCNN(**options)
    with torch.no_grad():
        predictor = network.roi_heads.box_predictor.cls_score
        predictor.weight.mul_(30)
        predictor.bias.copy_(torch.tensor([-2.0, 1.0, 1.0, 1.0]))
    categories = [[1, "date"], [2, "fig"], [7, "hazel nut"]]
    state = {"kind": kind, "model": network.state_dict(), "ema": None, "network": network.options, "args": {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**state, "categories": categories, "epoch": epoch, "best": 0.1}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "best.pth", OPTIONS)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with two pictures, one of them lying on its side; also the current folder's only content."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((180, 120))
    picture.save(folder / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    return folder


def read(folder):
    return json.loads((folder / "instances.json").read_text())


def test_one_picture_gives_a_sheet_six_panels_and_json(run, checkpoint, photos, links_of):
    code, out, err = run(demo, photos / "one.png", "--weights", checkpoint, "--score", 0.2, "--device", "cpu")
    assert (code, err) == (0, "")
    assert f"finds objects: {checkpoint}, epoch 3" in out and "one.png: 9 instances: " in out
    folder = Path("runs/demo/one")
    assert {path.name for path in folder.iterdir()} == FILES
    content = read(folder)
    assert (content["picture"], content["width"], content["height"]) == (str(photos / "one.png"), 180, 120)
    assert (content["segment"], content["min_score"]) == (str(checkpoint), 0.2)
    assert [found["number"] for found in content["instances"]] == list(range(1, 10))
    for found in content["instances"]:
        assert found["class"] == {1: "date", 2: "fig", 7: "hazel nut"}[found["category_id"]]
        assert 0.2 <= found["score"] <= 1
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 <= x2 <= 180 and 0 <= y1 <= y2 <= 120
        assert rle_codec.decode(found["mask"]).shape == (120, 180)
    original = Image.open(folder / "original.jpg")
    assert original.width == 4 * 180 and original.height == 4 * 120  # enlarged, so that labels can be read
    links = links_of(Path("runs/demo/index.html"))
    assert {Path(link).name for link in links} == FILES
    assert all((Path("runs/demo") / link).is_file() for link in links)


def test_json_holds_what_the_network_says(run, checkpoint, photos):
    run(demo, photos / "one.png", "--weights", checkpoint, "--score", 0, "--device", "cpu")
    network = networks.load_detector(str(checkpoint), torch.device("cpu")).network
    image = torch.from_numpy(np.array(Image.open(photos / "one.png"))).permute(2, 0, 1) / 255
    with torch.inference_mode():
        (expected,) = network([image])
    found = read(Path("runs/demo/one"))["instances"]
    assert torch.tensor([one["score"] for one in found]).equal(expected["scores"])
    assert (torch.tensor([one["box"] for one in found]) - expected["boxes"]).abs().max() < 1e-3
    assert [one["category_id"] for one in found] == [[1, 2, 7][label - 1] for label in expected["labels"].tolist()]


def unnumbered(instances):
    return [{word: value for word, value in one.items() if word != "number"} for one in instances]


def test_score_and_classes_choose_what_is_shown(run, checkpoint, photos):
    def shown(*options):
        code, out, _ = run(demo, photos / "one.png", "--weights", checkpoint, *options)
        assert code == 0
        folder = Path(out.splitlines()[-1].split(";")[0].removeprefix("written to "))
        return folder, read(folder / "one")["instances"]

    first, everything = shown("--score", 0)
    classes = sorted({one["class"] for one in everything})
    middle = sorted(one["score"] for one in everything)[4]
    second, surer = shown("--score", middle + 1e-7)
    third, some = shown("--score", 0, "--classes", classes[0].upper())
    assert [str(folder) for folder in (first, second, third)] == ["runs/demo", "runs/demo-2", "runs/demo-3"]
    assert unnumbered(surer) == unnumbered(one for one in everything if one["score"] >= middle + 1e-7)
    assert len(surer) < len(everything)
    assert unnumbered(some) == unnumbered(one for one in everything if one["class"] == classes[0])
    _, none = shown("--score", 1)
    assert none == []


def test_an_object_seen_as_two_classes_is_shown_once(run, checkpoint, photos, monkeypatch):
    """A fig that is also a hazel nut, and a date beside it; the surest class counts, the other stands beside it."""
    classes, masks = ((2, "fig", 0.86), (7, "hazel nut", 0.57), (1, "date", 0.55)), np.zeros((3, 120, 180), np.uint8)
    masks[0, 10:60, 10:60] = masks[1, 12:62, 10:60] = masks[2, 10:60, 100:150] = 1
    found = [
        {"box": [0, 0, 9, 9], "category_id": number, "label": name, "score": score, "rle": encode(mask)}
        for (number, name, score), mask in zip(classes, masks, strict=True)
    ]
    texts = set()
    monkeypatch.setattr(demo, "find_instances", lambda *_: (found, None))
    monkeypatch.setattr(instances, "draw_text", lambda draw, x, y, text, *style: texts.add(text))
    code, out, err = run(demo, photos / "one.png", "--weights", checkpoint)
    assert (code, err) == (0, "") and "one.png: 2 instances: 1 fig, 1 date\n" in out
    shown = [(one["class"], one["score"], one["also"]) for one in read(Path("runs/demo/one"))["instances"]]
    assert shown == [("fig", 0.86, [{"class": "hazel nut", "score": 0.57}]), ("date", 0.55, [])]
    assert texts == {"fig 0.86 or hazel nut 0.57", "date 0.55", "fig or hazel nut", "date"}


def encode(mask):
    rle = rle_codec.encode(np.asfortranarray(mask))
    return {**rle, "counts": rle["counts"].decode()}


def test_a_broken_picture_is_named_and_the_others_are_there(run, checkpoint, photos):
    (photos / "bad.jpg").write_bytes((photos / "turned.jpg").read_bytes()[:2000])
    (photos / "notes.txt").write_text("no picture")
    code, out, err = run(demo, photos, "--weights", checkpoint, "--output", "out")
    assert code == 2
    assert err.splitlines()[0].startswith(f"skipped: {photos}/bad.jpg: can't be read")
    assert err.splitlines()[-1].startswith(f"error: 1 of 3 pictures were skipped, the first is {photos}/bad.jpg")
    assert "one.png: " in out and "turned.jpg: " in out
    assert {path.name for path in Path("out").iterdir()} == {"one", "turned", "index.html"}
    assert "<h1>2 pictures</h1>" in (page := Path("out/index.html").read_text())
    assert "bad.jpg: can&#x27;t be read" in page
    content = read(Path("out/turned"))
    assert (content["width"], content["height"]) == (120, 180)  # upright


def test_pictures_of_one_name_and_of_odd_names_have_their_own_folders(run, checkpoint, photos, links_of):
    content = (photos / "one.png").read_bytes()
    names = ["one.bmp", "ONE.jpg", "...png", "index.html.png", "a <b>&\"'#%?.png", os.fsdecode(b"\xff.png")]
    for name in names:
        (photos / name).write_bytes(content)
    everything = [photos / name for name in names] + [photos, photos / "*.png", photos / "one.png"]
    code, out, err = run(demo, *everything, "--weights", checkpoint)
    assert (code, err) == (0, "")
    folders = {path.name for path in Path("runs/demo").iterdir()} - {"index.html"}
    assert len({name.casefold() for name in folders}) == len(names) + 2  # each picture once, though named three times
    assert {"one", "ONE-2", "one-3", "picture", "index.html-2", "turned"} <= folders
    links = links_of(Path("runs/demo/index.html"))
    assert len(links) == 10 * len(folders)
    assert all((Path("runs/demo") / link).is_file() for link in links)
    assert {path.name for path in Path("runs").iterdir()} == {"demo"}


def test_pictures_of_one_name_are_told_apart(run, checkpoint, photos):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "x.png").write_bytes((photos / "one.png").read_bytes())
    assert run(demo, "a/x.png", "b/x.png", "photos/one.png", "--weights", checkpoint)[0] == 0
    assert [read(Path("runs/demo", name))["picture"] for name in ("x", "x-2", "one")] == [
        "a/x.png",
        "b/x.png",
        "photos/one.png",
    ]
    titles = re.findall("<h2>(.*)</h2>", Path("runs/demo/index.html").read_text())
    assert titles == ["a/x.png", "b/x.png", "one.png"]


@pytest.mark.parametrize("classes", [(), ("--classes", "fig")])
def test_as_many_as_the_network_returns_may_not_be_all(run, checkpoint, photos, classes):
    """Nine at most, of all classes together: those of one class are fewer, and there may be more of them, too."""
    words = "; 9 is as many as the network returns, there may be more"
    code, out, _ = run(demo, photos / "one.png", "--weights", checkpoint, "--score", 0.2, *classes)
    assert code == 0 and words in next(line for line in out.splitlines() if "one.png: " in line)
    assert words in Path("runs/demo/index.html").read_text()
    assert len(read(Path("runs/demo/one"))["instances"]) <= 9
    code, out, _ = run(demo, photos / "one.png", "--weights", checkpoint, "--score", 1, *classes)
    assert code == 0 and "there may be more" not in out + Path("runs/demo-2/index.html").read_text()


def test_a_run_that_is_interrupted_shows_what_is_done(run, checkpoint, photos, monkeypatch, links_of):
    shown = []

    def interrupted(path, bits):
        if shown:
            raise KeyboardInterrupt
        shown.append(path)
        return read_image(path)

    monkeypatch.setattr(demo, "read_image", interrupted)
    code, out, err = run(demo, photos, "--weights", checkpoint)
    assert (code, err) == (130, "") and "runs/demo/index.html shows it" in out
    assert {Path(link).parts[0] for link in links_of(Path("runs/demo/index.html"))} == {"one"}
    assert "<h1>1 of 2 pictures</h1>" in Path("runs/demo/index.html").read_text()


def test_12_bits_of_16_are_shown(run, checkpoint, photos):
    grey = np.asarray(Image.open(photos / "one.png").convert("L"))
    deep = Path("deep")
    deep.mkdir()
    Image.fromarray(grey.astype(np.uint16) * 16).save(deep / "one.png")
    Image.fromarray(grey).save(deep / "plain.png")
    code, out, err = run(demo, deep, "--weights", checkpoint, "--score", 0.2, "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.count("pictures of 16 bits use 12 of them: 0 .. 4,095 is taken as black .. white\n") == 1
    one, plain = (read(Path("runs/demo") / name) for name in ("one", "plain"))
    assert one["instances"] == plain["instances"] != []


@pytest.mark.parametrize("output", ["file", "file/x"])
def test_an_output_that_cant_be_made_is_refused_first(run, photos, monkeypatch, output):
    Path("file").write_text("")
    monkeypatch.setattr(demo, "load_detector", lambda *_: pytest.fail("loaded before"))
    monkeypatch.setattr(demo, "load_encoder", lambda *_: pytest.fail("loaded before"))
    for more in ([], ["photos/turned.jpg", "--compare"]):
        code, out, err = run(demo, "photos/one.png", *more, "--output", output)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "file is a file where" in err


def test_of_a_run_without_a_result_no_folder_stays(run, photos):
    Path("there").mkdir()
    code, _, err = run(demo, "photos/one.png", "--output", "there/new/deep/out", "--weights", "none.pth")
    assert code == 2 and "none.pth" in err and list(Path("there").iterdir()) == []


def test_pictures_are_found_by_pattern(photos):
    (photos / "deep" / "er").mkdir(parents=True)
    (photos / "one.png").rename(photos / "deep" / "er" / "one.png")
    (photos / "deep" / "notes.txt").write_text("")
    assert demo.list_pictures([f"{photos}/**"]) == [f"{photos}/deep/er/one.png", f"{photos}/turned.jpg"]
    assert demo.list_pictures([f"{photos}/*.jpg", photos / "deep/er", photos]) == [
        f"{photos}/turned.jpg",
        f"{photos}/deep/er/one.png",
    ]
    (photos / "[x].jpg").write_bytes(b"")  # a name that is a pattern as well
    assert demo.list_pictures([f"{photos}/[x].jpg"]) == [f"{photos}/[x].jpg"]


@pytest.mark.parametrize("given", ["photos", "photos/*", "photos/**", "photos/*.[hH]*"])
def test_pictures_of_kinds_that_are_not_read_are_said(photos, capsys, given):
    for name in ("a.heic", "b.HEIC", "c.cr2.txt"):
        (photos / name).touch()
    paths = None
    if given == "photos/*.[hH]*":
        with pytest.raises(InputError, match="no such picture"):
            demo.list_pictures([given])
    else:
        paths = demo.list_pictures([given])
    assert paths in (None, ["photos/one.png", "photos/turned.jpg"])
    assert capsys.readouterr().out == f"not read: 2 .heic pictures in {given}; convert them to JPEG or PNG\n"


@pytest.mark.parametrize("given", ["photos/deep", "photos/**", "photos/**/*.png", "photos/d*/*.png"])
def test_a_folder_without_permission_is_named(photos, no_right_to, given):
    (photos / "deep").mkdir()
    no_right_to(photos / "deep")
    with pytest.raises(InputError, match=r"photos/deep/?: the folder can't be read \(Permission denied\)"):
        demo.list_pictures([given])
    assert len(demo.list_pictures(["photos", "photos/*", "photos/*.png"])) == 2  # what lies deeper is not looked for


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.jpg"], "nowhere.jpg: no such picture"),
        (["photos/*.gif"], "photos/*.gif: no such picture"),
        (["empty"], "empty: no pictures in this folder"),
        (["photos", "--classes", "fig", "dog"], "--classes dog: the network doesn't know this; it knows date, fig"),
        (["photos", "--weights", "reid.pth"], "reid.pth is a checkpoint of kind reid, mask_rcnn is needed here"),
        (["photos", "--weights", "plain.pth"], "plain.pth is neither a checkpoint of train_mask_rcnn.py nor"),
        (["photos", "--weights", "none.pth"], "no such file: none.pth"),
        (["photos", "--weights", "photos/one.png"], "photos/one.png is damaged"),
        (["photos", "--score", "2"], "--score"),
        (["photos", "--weights", "part.pth"], "part.pth lacks ema, network, categories"),
        (["photos", "--timeout", "3"], "unrecognized arguments: --timeout 3"),
        ([], "pictures"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(run, checkpoint, photos, arguments, message):
    Path("empty").mkdir()
    torch.save({"kind": "reid"}, "reid.pth")
    torch.save({"kind": "mask_rcnn", "model": {}}, "part.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, "plain.pth")
    given = [] if "--weights" in arguments else ["--weights", checkpoint]
    code, out, err = run(demo, *arguments, *given)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not Path("runs").exists()


def test_without_weights_the_newest_mask_rcnn_under_runs_is_taken(run, photos):
    for number, (name, kind) in enumerate([("old", "mask_rcnn"), ("new", "mask_rcnn"), ("reid", "reid")]):
        path = save_checkpoint(Path("runs") / name / "best.pth", OPTIONS, kind, epoch=number)
        os.utime(path, (1000 + number, 1000 + number))
    code, out, _ = run(demo, "photos/one.png")
    assert code == 0 and out.startswith("finds objects: runs/new/best.pth, epoch 1\n")


def test_what_is_no_checkpoint_under_runs_is_named_and_passed_over(run, photos):
    """The newest run was trained without evaluation: last.pth is all that it has."""
    save_checkpoint(Path("runs/blind/last.pth"), OPTIONS, epoch=7)
    save_checkpoint(Path("runs/old/best.pth"), OPTIONS, epoch=1)
    save_checkpoint(Path("runs/old/last.pth"), OPTIONS, epoch=2)
    reid = {**dict.fromkeys(REQUIRED["reid"]), "kind": "reid"}
    for name, content in (("foreign", {"weight": torch.zeros(2)}), ("part", {"kind": "mask_rcnn"}), ("reid", reid)):
        Path("runs", name).mkdir()
        torch.save(content, Path("runs", name, "best.pth"))
    Path("runs/damaged").mkdir()
    Path("runs/damaged/best.pth").write_bytes(b"no checkpoint")
    Path("runs/damaged/last.pth").symlink_to("gone.pth")
    for time, path in enumerate(["old/last", "old/best", "blind/last", "part/best", "foreign/best", "damaged/best"]):
        os.utime(Path("runs", f"{path}.pth"), (time, time))

    code, out, err = run(demo, "photos/one.png")
    assert code == 0 and out.startswith("finds objects: runs/blind/last.pth, epoch 7\n")
    assert [line.split()[:2] for line in err.splitlines()] == [
        ["skipped:", f"runs/{name}/best.pth"] for name in ("damaged", "foreign", "part")
    ]
    Path("runs/blind/last.pth").unlink()
    code, out, _ = run(demo, "photos/one.png")
    assert code == 0 and out.startswith("finds objects: runs/old/best.pth, epoch 1\n")


@pytest.mark.parametrize("given", [True, False])
def test_the_checkpoint_is_read_once(run, checkpoint, photos, monkeypatch, given):
    """Its kind is looked at before, in a mapped file of which little is read."""
    read_files = []
    load = torch.load
    note = lambda path, mmap, **how: mmap or read_files.append(str(path))  # noqa: E731
    monkeypatch.setattr(torch, "load", lambda path, **how: (note(path, **how), load(path, **how))[1])
    path = checkpoint if given else save_checkpoint(Path("runs/one/best.pth"), OPTIONS)
    code, _, _ = run(demo, "photos/one.png", *(["--weights", path] if given else []))
    assert code == 0 and read_files == [str(path)]


def test_classes_of_one_name_are_shown_together():
    categories = [(1, "bag"), (2, "Bag"), None, (3, "cup")]
    assert networks.choose_labels(categories, None) == [1, 2, 4]
    assert networks.choose_labels(categories, ["bag"]) == networks.choose_labels(categories, ["BAG", "bag"]) == [1, 2]
    assert networks.choose_labels(categories, ["cup", "bag"]) == [1, 2, 4]


def test_the_commands_to_train_are_those_of_the_readme():
    text = (Path(demo.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert all(command.strip("`") in text.splitlines() for command in (networks.TRAIN_MASKS, networks.TRAIN_REID))


def test_without_any_weights_one_line_says_how_to_get_some(run, photos, monkeypatch):
    def fetch(url):
        raise weights.DownloadError("no connection")

    monkeypatch.setattr(weights, "fetch", fetch)
    code, _, err = run(demo, photos)
    assert code == 2 and err.count("\n") == 1
    for part in (
        "no network that finds objects is trained yet",
        "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
        "no connection",
        "`python train_mask_rcnn.py`",
        networks.TRAIN_REID,
        "--segment",
    ):
        assert part in err


@pytest.mark.parametrize("option", ["--segment", "--weights"])
def test_who_asks_for_the_published_weights_gets_no_others(run, checkpoint, photos, monkeypatch, option):
    fetched = []

    def fetch(url):
        fetched.append(url)
        if len(fetched) == 1:
            raise weights.DownloadError("no connection")
        return checkpoint

    monkeypatch.setattr(weights, "fetch", fetch)
    save_checkpoint(Path("runs/own/best.pth"), OPTIONS)
    code, _, err = run(demo, "photos/one.png", option, "coco")
    assert code == 2 and err.count("\n") == 1 and "error: no published COCO weights: put https" in err
    code, out, _ = run(demo, "photos/one.png", option, "coco")
    assert code == 0 and out.startswith(f"finds objects: {checkpoint}, epoch 3\n")


@pytest.mark.slow
def test_published_weights_under_their_old_names(run, photos, monkeypatch):
    """torchvision's file: 91 classes, whose eleven without a category are never shown."""
    torch.manual_seed(0)
    network = MaskRCNN("resnet50", 91, norm="frozen")
    with torch.no_grad():  # labels 12, which is nothing, and 13, a stop sign, are seen everywhere
        predictor = network.roi_heads.box_predictor.cls_score
        predictor.weight.zero_()
        predictor.bias.fill_(-9)[[12, 13]] = 5.0
    old = {"rpn.head.conv.0.0.": "rpn.head.conv.", "_blocks.0.0.": "_blocks.0.", "_blocks.1.0.": "_blocks.1."}
    state = network.state_dict()
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    torch.save(state, "published.pth")
    monkeypatch.setattr(weights, "fetch", lambda url: Path("published.pth"))
    code, out, _ = run(demo, "photos/one.png", "--score", 0.1, "--classes", "stop sign", "dog")
    assert code == 0 and "published.pth" in out
    found = read(Path("runs/demo/one"))["instances"]
    assert found and {(one["category_id"], one["class"]) for one in found} == {(13, "stop sign")}


@pytest.mark.slow
def test_a_picture_of_24_megapixels_takes_less_than_4_gib(tmp_path):
    """In a process of its own, which says its peak. The trap: what the system counts for a child (getrusage) begins
    with the memory of the process that started it."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc to read a peak of memory from")
    save_checkpoint(tmp_path / "best.pth", {**OPTIONS, "box_detections_per_img": 12})
    Image.linear_gradient("L").resize((6000, 4000)).convert("RGB").save(tmp_path / "large.jpg")
    root = Path(demo.__file__).parent
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); print(open('/proc/self/status').read())"
    )
    code = f"import sys; sys.argv = sys.argv[1:]; {code}"
    command = [sys.executable, "-c", code, root / "demo.py", "large.jpg", "--weights", "best.pth", "--score", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--device", "cpu"], cwd=tmp_path, check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1])
    assert 100 << 10 < peak < 4 << 20  # KiB
    content = read(tmp_path / "runs" / "demo" / "large")
    assert len(content["instances"]) == 12
    assert Image.open(tmp_path / "runs" / "demo" / "large" / "all.jpg").size == (6000, 4000)
