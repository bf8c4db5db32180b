"""evaluate.py as a person runs it, on Mask R-CNN: a checkpoint gives the COCO numbers, files and pictures."""

import contextlib
import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
import train_mask_rcnn
from core.data.coco import CocoCategory, CocoData
from core.engine import detection, options
from core.engine.checkpoint import load_checkpoint, save_checkpoint
from core.engine.coco_evaluation import COCO_NUMBERS

CPU = ["--device", "cpu", "--workers", 0]
SMALL = ["--recipe", "quick", "--min-size", 64, "--max-size", 96, "--anchor-sizes", 8, 16, 24, 32, 48]
SMALL += ["--rois-per-image", 16, "--rpn-samples", 32, "--pre-nms-train", 50, "--post-nms-train", 30]
SMALL += ["--pre-nms-test", 50, "--post-nms-test", 20, "--epochs", 1, "--iterations-per-epoch", 15]
SMALL += ["--box-roi-size", 3, "--mask-roi-size", 7]
SMALL += ["--ema", 0, "--schedule", "one_cycle", "--warmup-iterations", 0]
NAMES = [f"{kind}_{name}" for kind in ("box", "mask") for name in COCO_NUMBERS]


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """The folder of a run of 15 steps, after which some squares are found."""
    output = tmp_path_factory.mktemp("runs")
    arguments = [*SMALL, *CPU, "--data", shapes, "--output", output, "--name", "shapes"]
    parser, recipes = train_mask_rcnn.get_parser(), train_mask_rcnn.RECIPES
    train_mask_rcnn.main(options.parse(parser, recipes, train_mask_rcnn.default_recipe, list(map(str, arguments))))
    folder = output / "shapes"
    # whole.pth is the last.pth that the run left; last.pth, which most tests read, lacks what they have no use for.
    (folder / "last.pth").rename(folder / "whole.pth")
    state = load_checkpoint(folder / "whole.pth")
    save_checkpoint(folder / "last.pth", {name: value for name, value in state.items() if name != "optimizers"})
    return folder


@pytest.fixture
def altered(trained, tmp_path):
    """Function: (function that changes the state of a checkpoint) -> path of the changed copy."""

    def write(change):
        state = load_checkpoint(trained / "last.pth")
        change(state)
        save_checkpoint(tmp_path / "altered.pth", state)
        return tmp_path / "altered.pth"

    return write


@pytest.fixture
def evaluated(run, tmp_path):
    """Function: (*arguments) -> (what was said, metrics.json, its folder) of an evaluation that goes well."""

    def command(*arguments, pictures=0):
        code, said, err = run(evaluate, *arguments, *CPU, "--output", tmp_path / "results", "--predictions", pictures)
        assert code == 0, err
        folder = Path(said.split("written to ")[-1].strip())
        assert folder.parent == tmp_path / "results"
        return said, json.loads((folder / "metrics.json").read_text()), folder

    return command


def val(shapes):
    return shapes / "val2017", shapes / "annotations" / "instances_val2017.json"


def pycocotools_says(annotations, folder, iou_type):
    """AP of a result file, as pycocotools measures it for whoever reads the file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / f"detections_{iou_type}.json")), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


def test_a_checkpoint_alone_gives_the_numbers_of_its_training(evaluated, trained, shapes):
    said, metrics, folder = evaluated(trained / "best.pth")
    with open(trained / "log.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    assert list(metrics["results"]) == NAMES
    for name, value in metrics["results"].items():
        assert last[name] in ("", "nan") if value is None else value == float(last[name])
    assert metrics["results"]["mask_AP"] > 0.01 and metrics["results"]["mask_APl"] is None  # no shape is large

    classes = {row["name"]: row for row in metrics["classes"]}
    assert {name: row["num_instances"] for name, row in classes.items()} == {"square": 4, "disc": 2}
    assert classes["square"]["mask_ap50"] > 0.1
    table = (folder / "table.txt").read_text()
    assert table.strip() in said and table.splitlines()[0].split() == list(COCO_NUMBERS)
    assert table.splitlines()[-1].split()[:2] == ["all", "6"]
    assert f"{trained / 'best.pth'} on {val(shapes)[1]}: 4 pictures with 6 instances" in said
    assert folder.name == "instances_val2017"


def test_what_it_leaves_behind(evaluated, trained, shapes):
    _, metrics, folder = evaluated(trained / "last.pth", "--score", 0.3, pictures=3)
    assert {path.name for path in folder.iterdir()} == {
        *("metrics.json", "table.txt", "precision_recall.png", "predictions"),
        *("detections_bbox.json", "detections_segm.json"),
    }
    assert min(Image.open(folder / "precision_recall.png").size) > 300
    sheets = list((folder / "predictions").iterdir())
    assert len(sheets) == 3 and all(min(Image.open(sheet).size) > 300 for sheet in sheets)
    for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
        assert pycocotools_says(val(shapes)[1], folder, iou_type) == metrics["results"][f"{kind}_AP"]


def test_without_output_the_results_lie_beside_the_checkpoint(run, altered):
    checkpoint = altered(lambda state: None)
    for name in ("instances_val2017", "instances_val2017-2"):
        code, _, err = run(evaluate, checkpoint, *CPU, "--predictions", 0)
        assert code == 0, err
        assert (checkpoint.with_suffix("") / name / "metrics.json").exists()


def changed_annotations(shapes, path, change):
    """A copy of the validation annotations, changed."""
    content = json.loads(val(shapes)[1].read_text())
    change(content)
    path.write_text(json.dumps(content))
    return ["--images", val(shapes)[0], "--annotations", path]


def swap_ids(content):
    """The same classes under other ids, in the other order."""
    ids = {3: 70, 7: 5}
    for category in content["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]


def test_other_ids_for_the_same_classes(evaluated, trained, shapes, tmp_path):
    _, before, first = evaluated(trained / "last.pth")
    data = changed_annotations(shapes, tmp_path / "other.json", swap_ids)
    _, metrics, folder = evaluated(trained / "last.pth", *data)
    assert folder.name == "other" and metrics["args"]["annotations"] == str(tmp_path / "other.json")
    assert metrics["results"] == pytest.approx(before["results"], nan_ok=True)
    assert [row["name"] for row in metrics["classes"]] == ["disc", "square"]  # by id
    one, other = (json.loads((path / "detections_bbox.json").read_text()) for path in (first, folder))
    ids = {3: 70, 7: 5}
    assert [ids[result["category_id"]] for result in one] == [result["category_id"] for result in other]
    assert pycocotools_says(tmp_path / "other.json", folder, "segm") == metrics["results"]["mask_AP"]


def test_classes_that_one_of_the_two_does_not_have(evaluated, trained, shapes, tmp_path):
    """Data with squares and stars, for a network that knows squares and discs."""
    _, before, _ = evaluated(trained / "last.pth")
    square = next(row for row in before["classes"] if row["name"] == "square")

    def rename(content):
        content["categories"][1]["name"] = "star"

    said, metrics, folder = evaluated(
        trained / "last.pth", *changed_annotations(shapes, tmp_path / "stars.json", rename)
    )
    assert "left out, since the network does not know them: star" in said
    assert metrics["classes"] == [square] and metrics["results"]["mask_AP"] == square["mask_ap"]
    assert {one["category_id"] for one in json.loads((folder / "detections_segm.json").read_text())} == {3}


def test_no_class_in_common(run, trained, shapes, tmp_path):
    def rename(content):
        for category in content["categories"]:
            category["name"] += " shape"

    data = changed_annotations(shapes, tmp_path / "strange.json", rename)
    line = refused(run, trained / "last.pth", *data)
    assert "the network knows square, disc, the annotations are of square shape, disc shape" in line


def test_two_classes_of_one_name(evaluated, altered, shapes, tmp_path):
    """They are told apart by their ids."""

    def rename(content):
        content["categories"][1]["name"] = "square"

    def know_both(state):
        state["categories"][1][1] = "square"

    _, before, _ = evaluated(altered(lambda state: None))
    _, metrics, _ = evaluated(altered(know_both), *changed_annotations(shapes, tmp_path / "twins.json", rename))
    assert metrics["results"] == before["results"] and before["results"]["mask_AP"] > 0
    assert [row["num_instances"] for row in metrics["classes"]] == [4, 2]


@pytest.mark.parametrize(
    ("known", "listed", "matched"),
    [
        ([(1, "bag"), (2, "bag")], [(9, "bag")], [9, None]),  # the first label, as in the evaluation of a training
        ([(5, "bag")], [(1, "bag"), (2, "bag")], [1]),
        ([(2, "bag")], [(1, "bag"), (2, "bag")], [2]),
        ([(1, "bag"), (2, "bag")], [(1, "bag"), (2, "bag")], [1, 2]),
        ([(1, "bag"), (2, "bag")], [(2, "bag"), (7, "cup")], [None, 2]),
        ([(7, "cup"), (1, "bag")], [(1, "cup"), (7, "bag")], [1, 7]),
    ],
)
def test_which_category_a_label_is(known, listed, matched):
    data = CocoData([], [CocoCategory(*category) for category in listed], "some.json", [], {})
    found = detection.match_categories([list(category) for category in known], data, print)
    assert [category and category.id for category in found] == matched


def test_pictures_of_one_name_have_their_own_sheets(evaluated, trained, shapes, tmp_path):
    def into_folders(content):
        for picture in content["images"]:
            folder = tmp_path / "pictures" / str(picture["id"])
            folder.mkdir(parents=True)
            shutil.copy(val(shapes)[0] / picture["file_name"], folder / "camera.png")
            picture["file_name"] = f"{folder.name}/camera.png"

    annotations = changed_annotations(shapes, tmp_path / "folders.json", into_folders)[2:]
    _, _, folder = evaluated(trained / "last.pth", "--images", tmp_path / "pictures", *annotations, pictures=4)
    sheets = {path.name for path in (folder / "predictions").iterdir()}
    assert sheets == {"camera.jpg", "camera-2.jpg", "camera-3.jpg", "camera-4.jpg"}


def test_a_folder_in_the_layout_of_coco(evaluated, trained, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "copy")
    _, before, _ = evaluated(trained / "last.pth")
    _, metrics, _ = evaluated(trained / "last.pth", "--data", root)
    assert metrics["results"] == before["results"] and metrics["args"]["annotations"].startswith(str(root))


def held_out(state, fraction=0.25):
    """As if the run had had one annotation file and `--val-fraction`."""
    state["args"].update(data=None, val_images=None, val_annotations=None, val_fraction=fraction)


def test_the_part_that_the_training_held_out(evaluated, altered):
    said, metrics, folder = evaluated(altered(held_out))
    assert "instances_train2017.json: 2 pictures with" in said and folder.name == "instances_train2017"
    found = {one["image_id"] for one in json.loads((folder / "detections_bbox.json").read_text())}
    assert len(found) <= 2 and sum(row["num_instances"] for row in metrics["classes"]) in (2, 4)


def test_nothing_found_is_a_result(evaluated, altered):
    checkpoint = altered(lambda state: state["network"].update(box_score_thresh=1.0))
    said, metrics, folder = evaluated(checkpoint, pictures=2)
    assert metrics["results"]["mask_AP"] == metrics["results"]["box_AR100"] == 0
    for name in ("bbox", "segm"):
        assert json.loads((folder / f"detections_{name}.json").read_text()) == []
    assert len(list((folder / "predictions").iterdir())) == 2


def test_data_without_an_instance(evaluated, trained, shapes, tmp_path):
    data = changed_annotations(shapes, tmp_path / "empty.json", lambda content: content["annotations"].clear())
    said, metrics, _ = evaluated(trained / "last.pth", *data)
    assert set(metrics["results"].values()) == {None}
    assert said.splitlines()[-2].split() == ["all", "0", "-", "-", "-", "-"]


@pytest.mark.slow
def test_two_processes_get_the_numbers_of_one(evaluated, run_on_two, trained, tmp_path, one_thread):
    _, metrics, folder = evaluated(trained / "last.pth")
    said = run_on_two(evaluate, trained / "last.pth", *CPU, "--output", tmp_path / "two", "--predictions", 1)
    other = tmp_path / "two" / "instances_val2017"
    assert json.loads((other / "metrics.json").read_text())["results"] == metrics["results"]
    for name in ("table.txt", "detections_bbox.json", "detections_segm.json"):
        assert (other / name).read_bytes() == (folder / name).read_bytes()
    assert said.count("written to") == 1


def test_weights_alone_are_evaluated_as_their_checkpoint(run, evaluated, trained, tmp_path):
    code, _, err = run(evaluate, trained / "whole.pth", "--export", "weights", "--output", tmp_path / "small.pth")
    assert code == 0, err
    sizes = {path.name: path.stat().st_size for path in (*trained.glob("*.pth"), tmp_path / "small.pth")}
    assert sizes["small.pth"] < 0.6 * sizes["whole.pth"] and abs(sizes["small.pth"] / sizes["best.pth"] - 1) < 0.01
    with open(trained / "log.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    assert evaluated(tmp_path / "small.pth")[1]["results"]["mask_AP"] == float(last["mask_AP"])


# Bad input


def refused(run, *arguments):
    """The one line with which an evaluation is refused."""
    code, _, err = run(evaluate, *CPU, *arguments)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rerank"], "--rerank: not an option for a network of Mask R-CNN; leave it out"),
        (["--dataset", "mvb", "--flip"], "--dataset, --flip: not an option"),
        (["--eval-batch-size", "2", "--expansion-k", "2"], "--eval-batch-size, --expansion-k: not an option"),
        (["--expansion-alpha", "1", "--k1", "2", "--k2", "2"], "--expansion-alpha, --k1, --k2: not an option"),
        (["--lambda", "0.5"], "--lambda: not an option"),
        (["--complexity", "--feature", "before"], "--feature, --complexity: not an option"),
        (["--export", "onnx"], "is a Mask R-CNN; use weights"),
        (["CHECKPOINT"], "several checkpoints are for evaluating ReID"),
        (["--images", "SHAPES/val2017"], "belong together"),
        (["--annotations", "SHAPES/x.json"], "belong together"),
        (["--images", "SHAPES", "--annotations", "x", "--data", "SHAPES"], "not all of them"),
        (["--images", "SHAPES/val2017", "--annotations", "no/such/file.json"], "no/such/file.json"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--score", "2"], "--score"),
        (["--predictions", "-1"], "--predictions"),
    ],
)
def test_bad_options_are_one_line(run, trained, shapes, arguments, said):
    places = {"SHAPES": str(shapes), "CHECKPOINT": str(trained / "last.pth")}
    arguments = [re.sub("SHAPES|CHECKPOINT", lambda name: places[name[0]], argument) for argument in arguments]
    assert said in refused(run, trained / "last.pth", *arguments)


def test_a_training_without_evaluation_has_no_data_of_its_own(run, altered):
    assert "--annotations" in refused(run, altered(lambda state: held_out(state, 0.0)))


def test_data_that_has_moved_since_the_training(run, altered, tmp_path):
    moved = str(tmp_path / "moved.json")
    assert moved in refused(run, altered(lambda state: state["args"].update(val_annotations=moved)))


def test_a_broken_picture_is_named_and_may_be_left_out(run, evaluated, trained, altered, shapes, tmp_path):
    """It is left out, too, if it was in the training."""
    root = shutil.copytree(shapes, tmp_path / "data")
    (root / "val2017" / "2.png").write_bytes(b"no picture")
    data = ["--data", root]
    assert "2.png" in refused(run, trained / "last.pth", *data, "--output", tmp_path / "results")
    assert not (tmp_path / "results").exists()
    said, metrics, folder = evaluated(trained / "last.pth", *data, "--skip-broken")
    assert "2.png" in said and "--skip-broken: 1 of 4 pictures of" in said
    assert ": 3 pictures with 4 instances" in said and metrics["args"]["skip_broken"] is True
    assert 2 not in {one["image_id"] for one in json.loads((folder / "detections_bbox.json").read_text())}
    _, again, _ = evaluated(altered(lambda state: state["args"].update(skip_broken=True)), *data)
    assert again["results"] == metrics["results"]


def test_the_checkpoint_is_read_once(evaluated, trained, monkeypatch):
    read_files = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: read_files.append(path) or load(path, **how))
    evaluated(trained / "last.pth")
    assert list(map(str, read_files)) == [str(trained / "last.pth")]


def test_a_checkpoint_that_is_not_whole(run, altered):
    assert "lacks categories" in refused(run, altered(lambda state: state.pop("categories")))
