"""The COCO evaluation beside plain pycocotools in one process: on real outlines, on nasty data, shared over ranks."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.engine import coco_evaluation, distributed
from core.engine.coco_evaluation import (
    COCO_NUMBERS,
    encode_detections,
    encode_masks,
    evaluate_detections,
    per_class_table,
    run_lengths,
    summary_table,
    write_results,
)
from core.layers.masks import paste_masks

IOU_TYPES = {"box": "bbox", "mask": "segm"}

# pycocotools 2.0.11 decoding a mask under numpy 2.4
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def as_coco(images, annotations, categories):
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def plain(ground_truth, box_results, mask_results):
    """The evaluations of pycocotools as its own example does them: name -> COCOeval."""
    evaluations = {}
    for kind, results in (("box", box_results), ("mask", mask_results)):
        truth = copy.deepcopy(ground_truth)
        with contextlib.redirect_stdout(io.StringIO()):
            found = truth.loadRes(copy.deepcopy(results)) if results else as_coco(truth.dataset["images"], [], [])
            evaluations[kind] = COCOeval(truth, found, IOU_TYPES[kind])
            evaluations[kind].evaluate()
            evaluations[kind].accumulate()
            evaluations[kind].summarize()
    return evaluations


def check_equal(result, ground_truth, box_results, mask_results):
    """A result has the very numbers of plain pycocotools."""
    for kind, evaluation in plain(ground_truth, box_results, mask_results).items():
        stats = np.where(evaluation.stats > -1, evaluation.stats, np.nan)
        np.testing.assert_array_equal([result.metrics[f"{kind}_{name}"] for name in COCO_NUMBERS], stats)
        precision = evaluation.eval["precision"][:, :, :, 0, 2]
        np.testing.assert_array_equal(result.precision[kind], np.where(precision > -1, precision, np.nan))


def segmentation(mask):
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def noisy_results(ground_truth, seed):
    """Detections made up from the truth: shifted, doubled, some of a wrong class, some missing, many equal scores."""
    generator = np.random.default_rng(seed)
    categories = sorted(ground_truth.getCatIds())
    box_results, mask_results = [], []
    for instance in ground_truth.dataset["annotations"] * 2:
        if generator.random() < 0.2:
            continue
        shift = generator.integers(-6, 7, 2)
        x, y, width, height = instance["bbox"]
        wrong = generator.random() < 0.1
        common = {
            "image_id": instance["image_id"],
            "category_id": int(generator.choice(categories)) if wrong else instance["category_id"],
            "score": round(float(generator.random()), 1),
        }
        box_results.append({**common, "bbox": [float(x + shift[0]), float(y + shift[1]), width * 0.97, height * 1.03]})
        mask = np.roll(ground_truth.annToMask(instance), shift, axis=(1, 0))
        mask_results.append({**common, "segmentation": segmentation(mask)})
    return box_results, mask_results


@pytest.fixture
def nuts(shared_data):
    path = shared_data / "nuts_coco" / "annotations" / "instances_train.json"
    dataset = json.loads(path.read_text())
    return as_coco(dataset["images"], dataset["annotations"], dataset["categories"])


def outline(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def nasty():
    """Small, medium and large instances, a crowd as RLE, pictures without instances, a class without any."""
    images = [{"id": number, "width": 200, "height": 150} for number in (40, 7, 300, 9, 12)]
    categories = [
        {"id": 90, "name": "a very long name of a class"},
        {"id": 3, "name": "bag"},
        {"id": 17, "name": "none"},
    ]
    boxes = {
        40: [(3, 10, 10, 30, 30), (3, 50, 20, 120, 90), (90, 100, 100, 110, 106)],
        7: [(3, 20, 20, 180, 140), (90, 5, 5, 55, 45), (90, 60, 5, 110, 45)],
        300: [(90, 0, 0, 199, 149)],
    }
    annotations = []
    for image_id, rows in boxes.items():
        for category, x1, y1, x2, y2 in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1) * 0.8,
                    "iscrowd": 0,
                    "segmentation": outline(x1, y1, x2, y2),
                }
            )
    crowd = np.zeros((150, 200), bool)
    crowd[30:120, 20:150] = True
    crowd = {"size": [150, 200], "counts": [20 * 150 + 30, *([90, 60] * 130)[:-1], 50 * 150 + 30]}
    annotations.append(
        {**annotations[0], "id": 50, "image_id": 9, "iscrowd": 1, "bbox": [20, 30, 130, 90], "area": 11700}
        | {"segmentation": crowd}
    )
    return as_coco(images, annotations, categories)


# Beside pycocotools


@pytest.mark.parametrize("seed", range(3))
def test_real_outlines_give_the_numbers_of_pycocotools(nuts, seed):
    results = noisy_results(nuts, seed)
    result = evaluate_detections(nuts, *results, list(nuts.imgs))
    check_equal(result, nuts, *results)
    assert 0.1 < result.metrics["mask_AP"] < 0.9 and result.metrics["box_AP"] != result.metrics["mask_AP"]
    assert [row.name for row in result.per_class] == ["date", "fig", "hazelnut"]
    assert [row.num_instances for row in result.per_class] == [39, 27, 33]
    for kind in ("box", "mask"):
        mean = np.mean([getattr(row, f"{kind}_ap") for row in result.per_class])
        assert mean == pytest.approx(result.metrics[f"{kind}_AP"], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_nasty_data_give_the_numbers_of_pycocotools(seed):
    truth = nasty()
    results = noisy_results(truth, seed)
    result = evaluate_detections(truth, *results, list(truth.imgs))
    check_equal(result, truth, *results)
    # "bag" is id 3 and comes first; the crowd is no instance to find; nothing is known of a class without instances.
    assert [(row.name, row.num_instances) for row in result.per_class] == [
        ("bag", 3),
        ("none", 0),
        ("a very long name of a class", 4),
    ]
    assert math.isnan(result.per_class[1].mask_ap) and not math.isnan(result.metrics["mask_AP"])


def test_a_detection_on_a_crowd_is_not_an_error():
    truth = nasty()
    inside = {"image_id": 9, "category_id": 3, "score": 0.99}
    mask = np.zeros((150, 200), bool)
    mask[40:80, 30:90] = True
    perfect = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "score": 0.9, "bbox": one["bbox"]}
        for one in truth.dataset["annotations"][:-1]
    ]
    boxes = [*perfect, {**inside, "bbox": [30, 40, 60, 40]}]
    masks = [{**inside, "segmentation": segmentation(mask)}]
    result = evaluate_detections(truth, boxes, masks, list(truth.imgs))
    check_equal(result, truth, boxes, masks)
    assert result.metrics["box_AP"] == pytest.approx(1) and result.metrics["mask_AP"] == 0


def test_area_is_that_of_the_mask_for_masks_and_that_of_the_box_for_boxes():
    """A ring: its box is large, its mask is medium. A `bbox` beside the mask would move it to the large ones."""
    ring = np.zeros((200, 200), bool)
    ring[20:180, 20:180] = True
    ring[30:170, 30:170] = False
    found = {"image_id": 1, "category_id": 1, "score": 0.5}
    truth = as_coco(
        [{"id": 1, "width": 200, "height": 200}],
        [
            found
            | {"id": 1, "bbox": [20, 20, 160, 160], "area": int(ring.sum()), "iscrowd": 0}
            | {"segmentation": segmentation(ring)}
        ],
        [{"id": 1, "name": "ring"}],
    )
    # A second, unmatched one of each kind is only counted as wrong within its own range.
    boxes = [{**found, "bbox": [20, 20, 160, 160]}, {**found, "score": 0.9, "bbox": [0, 0, 150, 150]}]
    disc = np.zeros((200, 200), bool)
    disc[:150, :150] = True
    disc[10:140, 10:140] = False
    masks = [{**found, "segmentation": segmentation(mask)} for mask in (ring, disc)]
    masks[1]["score"] = 0.9
    result = evaluate_detections(truth, boxes, masks, [1])
    assert result.metrics["mask_APm"] == pytest.approx(0.5) and math.isnan(result.metrics["mask_APl"])
    assert result.metrics["box_APm"] == pytest.approx(1)  # the ring is medium by its own area; the wrong box is large
    check_equal(result, truth, boxes, masks)


# Worked out by hand


def square(number, left, image_id=1):
    """A square of 40 x 40 pixels, as an annotation and as results."""
    mask = np.zeros((100, 200), bool)
    mask[20:60, left : left + 40] = True
    common = {"image_id": image_id, "category_id": 5}
    box, code = {"bbox": [left, 20, 40, 40]}, {"segmentation": segmentation(mask)}
    annotation = {**common, **box, **code, "id": number, "area": 1600, "iscrowd": 0}
    return annotation, {**common, **box}, {**common, **code}


def squares(*annotations):
    return as_coco([{"id": 1, "width": 200, "height": 100}], list(annotations), [{"id": 5, "name": "square"}])


def test_one_of_two_found_and_a_false_alarm():
    (first, first_box, first_mask), (second, _, _) = square(1, 0), square(2, 80)
    _, wrong_box, wrong_mask = square(3, 150)
    boxes = [{**first_box, "score": 0.9}, {**wrong_box, "score": 0.8}]
    masks = [{**first_mask, "score": 0.9}, {**wrong_mask, "score": 0.8}]
    result = evaluate_detections(squares(first, second), boxes, masks, [1])
    for kind in ("box", "mask"):
        # Precision is 1 up to recall 0.5, the first 51 of 101 points, and nothing comes after it.
        for name in ("AP", "AP50", "AP75", "APm"):
            assert result.metrics[f"{kind}_{name}"] == pytest.approx(51 / 101, abs=1e-12)
        for name in ("AR1", "AR10", "AR100", "ARm"):
            assert result.metrics[f"{kind}_{name}"] == 0.5
        for name in ("APs", "APl", "ARs", "ARl"):
            assert math.isnan(result.metrics[f"{kind}_{name}"])
        curve = np.linspace(0, 1, 101) <= 0.5
        np.testing.assert_allclose(result.precision[kind], np.tile(curve[None, :, None], (10, 1, 1)), rtol=1e-12)
    assert list(result.metrics) == [f"{kind}_{name}" for kind in ("box", "mask") for name in COCO_NUMBERS]
    assert result.per_class == [("square", 2, *[pytest.approx(51 / 101)] * 4)]


def test_the_false_alarm_first():
    annotation, right, right_mask = square(1, 0)
    _, wrong, wrong_mask = square(2, 150)
    boxes = [{**right, "score": 0.3}, {**wrong, "score": 0.8}]
    masks = [{**right_mask, "score": 0.3}, {**wrong_mask, "score": 0.8}]
    metrics = evaluate_detections(squares(annotation), boxes, masks, [1]).metrics
    assert metrics["box_AP"] == metrics["mask_AP"] == pytest.approx(0.5)
    assert metrics["box_AR1"] == 0 and metrics["mask_AR10"] == 1


def test_hundreds_of_detections_of_two_thirds_of_the_instances():
    """pycocotools' area of a list of masks overflows from 256 on, where numpy is 2: its own loadRes does one by one."""
    rows = [[{**one, "image_id": image_id} for one in square(image_id, 0)] for image_id in range(1, 301)]
    truth = as_coco(
        [{"id": image_id, "width": 200, "height": 100} for image_id in range(1, 301)],
        [annotation for annotation, _, _ in rows],
        [{"id": 5, "name": "square"}],
    )
    boxes, masks = ([{**row[kind], "score": 0.5} for row in rows if row[0]["id"] % 3] for kind in (1, 2))
    assert len(masks * 2) == 400
    result = evaluate_detections(truth, boxes * 2, masks * 2, list(truth.imgs))
    check_equal(result, truth, boxes * 2, masks * 2)
    assert result.metrics["mask_AR1"] == pytest.approx(2 / 3)


def test_an_instance_of_id_0_is_found_too():
    """To pycocotools alone it is never found: a match with 0 is none."""
    annotation, box, mask = square(0, 0)
    results = [{**box, "score": 0.9}], [{**mask, "score": 0.9}]
    truth = squares(annotation)
    metrics = evaluate_detections(truth, *results, [1]).metrics
    assert metrics["box_AP"] == metrics["mask_AP"] == pytest.approx(1)
    assert plain(truth, *results)["box"].stats[0] == 0


# Nothing there


def test_no_detection_at_all_is_a_result(nuts):
    result = evaluate_detections(nuts, [], [], list(nuts.imgs))
    for kind in ("box", "mask"):
        assert result.metrics[f"{kind}_AP"] == result.metrics[f"{kind}_AR100"] == 0
        assert math.isnan(result.metrics[f"{kind}_APs"])  # there is no small one to find
        assert not result.precision[kind].any()
    check_equal(result, nuts, [], [])


def test_no_instance_at_all_has_no_numbers(nuts):
    boxes, masks = noisy_results(nuts, 0)
    empty = as_coco(nuts.dataset["images"], [], nuts.dataset["categories"])
    for results in ((boxes, masks), ([], [])):
        result = evaluate_detections(empty, *results, list(nuts.imgs))
        assert all(map(math.isnan, result.metrics.values())) and len(result.metrics) == 24
        assert all(np.isnan(values).all() for values in result.precision.values())
        assert per_class_table(result).splitlines()[-1].split() == ["all", "0", *"----"]


def test_a_part_of_the_pictures(nuts):
    boxes, masks = noisy_results(nuts, 0)
    part = sorted(nuts.imgs)[:4]
    result = evaluate_detections(nuts, *([one for one in r if one["image_id"] in part] for r in (boxes, masks)), part)
    smaller = as_coco(
        [nuts.imgs[i] for i in part],
        [one for i in part for one in nuts.imgToAnns[i]],
        nuts.dataset["categories"],
    )
    check_equal(result, smaller, *([one for one in r if one["image_id"] in part] for r in (boxes, masks)))
    assert sum(row.num_instances for row in result.per_class) == len(smaller.anns)


def test_a_detection_in_a_foreign_picture_is_a_fault(nuts):
    boxes, masks = noisy_results(nuts, 0)
    with pytest.raises(ValueError, match="not among those to evaluate"):
        evaluate_detections(nuts, boxes, masks, sorted(nuts.imgs)[1:])


def test_truth_and_results_are_left_as_they_are_and_nothing_is_printed(nuts, capsys):
    results = noisy_results(nuts, 0)
    before = copy.deepcopy((nuts.dataset, results))
    first = evaluate_detections(nuts, *results, list(nuts.imgs))
    assert (nuts.dataset, results) == before
    np.testing.assert_equal(evaluate_detections(nuts, *results, list(nuts.imgs)), first)
    assert capsys.readouterr() == ("", "")


# Shared over ranks


def share(image_ids, how, rank):
    """The pictures of one of two ranks."""
    return {
        "every second": image_ids[rank::2],
        "one and the rest": [image_ids[:1], image_ids[1:]][rank],
        "all on the second": [[], image_ids][rank],
    }[how]


def evaluate_shares(rank, truth, results, folder, ways):
    """On each of two ranks: the result for each way of sharing the pictures, and without any detection."""
    distributed.setup("cpu")
    answers = []
    for how in ways:
        own = share(list(truth.imgs), how, rank)
        parts = [[one for one in kind if one["image_id"] in own] for kind in results]
        answers.append(tuple(evaluate_detections(truth, *parts, own)))
        write_results(folder, *parts)
    answers.append(tuple(evaluate_detections(truth, [], [], share(list(truth.imgs), "every second", rank))))
    distributed.cleanup()
    return answers


@pytest.mark.parametrize("data", ["nuts", "nasty"])
def test_two_ranks_get_what_one_process_gets(launch, request, tmp_path, data):
    truth = request.getfixturevalue("nuts") if data == "nuts" else nasty()
    results = noisy_results(truth, 1)
    expected = tuple(evaluate_detections(truth, *results, list(truth.imgs)))
    nothing = tuple(evaluate_detections(truth, [], [], list(truth.imgs)))
    write_results(tmp_path, *results)
    files = [(tmp_path / f"detections_{kind}.json").read_bytes() for kind in IOU_TYPES.values()]
    (tmp_path / "ranks").mkdir()

    ways = ("every second", "one and the rest", "all on the second")
    answers, codes, errors = launch(evaluate_shares, truth, results, tmp_path / "ranks", ways)
    assert codes == [0, 0], errors
    for answer in answers:
        np.testing.assert_equal(answer, [expected, expected, expected, nothing])
    assert [(tmp_path / "ranks" / f"detections_{kind}.json").read_bytes() for kind in IOU_TYPES.values()] == files


# From the network to results


def detections(count, seed=0, image_size=(60, 80)):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([image_size[1], image_size[0]])
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    return {
        "boxes": boxes,
        "labels": torch.randint(1, 4, (count,), generator=generator),
        "scores": torch.rand(count, generator=generator),
        "masks": torch.rand(count, 1, 28, 28, generator=generator),
    }


CATEGORIES = [(90, "suitcase"), (3, "bag"), (17, "cart")]


def test_detections_as_coco_results():
    found = detections(20)
    boxes, masks = encode_detections(found, (60, 80), 12, CATEGORIES)
    assert json.loads(json.dumps([boxes, masks])) == [boxes, masks]
    assert {tuple(one) for one in boxes} == {("image_id", "category_id", "score", "bbox")}
    assert {tuple(one) for one in masks} == {("image_id", "category_id", "score", "segmentation")}
    assert [one["category_id"] for one in boxes] == [CATEGORIES[label - 1][0] for label in found["labels"]]
    assert [one["category_id"] for one in masks] == [one["category_id"] for one in boxes]
    assert [one["score"] for one in boxes] == [one["score"] for one in masks] == found["scores"].tolist()
    x, y, width, height = torch.tensor([one["bbox"] for one in boxes]).T
    torch.testing.assert_close(torch.stack([x, y, x + width, y + height], dim=1), found["boxes"])
    pasted = paste_masks(found["masks"], found["boxes"], (60, 80)) >= 0.5  # (N, 1, h, w)
    for one, mask in zip(masks, pasted[:, 0], strict=True):
        assert one["segmentation"]["size"] == [60, 80]
        np.testing.assert_array_equal(rle.decode(one["segmentation"]), mask.numpy())
    assert pasted.any() and not pasted.all()


def test_a_class_that_the_data_lacks_is_left_out():
    found = detections(20)
    kept = encode_detections(found, (60, 80), 12, [(90, "suitcase"), None, (17, "cart")])
    every = encode_detections(found, (60, 80), 12, CATEGORIES)
    assert 0 < len(kept[0]) < 20
    assert kept == tuple([one for one in kind if one["category_id"] != 3] for kind in every)
    assert encode_detections(found, (60, 80), 12, [None, None, None]) == ([], [])


def test_no_detections_no_results():
    assert encode_detections(detections(0), (60, 80), 12, CATEGORIES) == ([], [])
    assert encode_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (60, 80)) == []


def test_half_precision_gives_plain_numbers():
    found = detections(5)
    half = {name: value.half() if value.is_floating_point() else value for name, value in found.items()}
    boxes, masks = encode_detections(half, (60, 80), 12, CATEGORIES)
    assert boxes[0]["bbox"] == pytest.approx(encode_detections(found, (60, 80), 12, CATEGORIES)[0][0]["bbox"], abs=0.1)
    assert len(masks) == 5 and isinstance(masks[0]["score"], float)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (5, 4), (40, 30)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_run_lengths_are_those_of_pycocotools(height, width, share):
    """Also where a mask touches the corners, goes over from one column to the next, or is everywhere or nowhere."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        mask = generator.random((height, width)) < share
        code = rle.frPyObjects({"size": [height, width], "counts": run_lengths(mask)}, height, width)
        assert code == rle.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_run_lengths_by_hand():
    mask = np.array([[0, 1, 1], [0, 1, 0], [1, 0, 0]], dtype=bool)
    assert run_lengths(mask) == [2, 3, 1, 1, 2]
    assert run_lengths(mask[:, 1:]) == [0, 2, 1, 1, 2]
    assert run_lengths(~mask) == [0, 2, 3, 1, 1, 2]


def test_masks_come_in_order_whatever_the_chunks(monkeypatch):
    found = detections(7)
    whole = encode_masks(found["masks"], found["boxes"], (60, 80))
    paste, sizes = coco_evaluation.paste_mask_chunks, []

    def chunks(*arguments):
        for chunk in paste(*arguments, max_bytes=150_000):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(coco_evaluation, "paste_mask_chunks", chunks)
    assert encode_masks(found["masks"], found["boxes"], (60, 80)) == whole
    assert len(sizes) > 1 and sum(sizes) == 7


def test_detections_of_a_picture_that_is_one_pixel_wide():
    found = detections(3, image_size=(50, 1))
    masks = encode_detections(found, (50, 1), 1, CATEGORIES)[1]
    assert [rle.decode(one["segmentation"]).shape for one in masks] == [(50, 1)] * 3


# What is written


def test_files_are_read_by_pycocotools_and_give_the_same_numbers(nuts, tmp_path):
    boxes, masks = noisy_results(nuts, 2)
    result = evaluate_detections(nuts, boxes, masks, list(nuts.imgs))
    write_results(tmp_path, boxes, masks)
    assert {path.name for path in tmp_path.iterdir()} == {"detections_bbox.json", "detections_segm.json"}
    for kind, iou_type in IOU_TYPES.items():
        written = json.loads((tmp_path / f"detections_{iou_type}.json").read_text())
        assert ("bbox" in written[0]) == (kind == "box") and ("segmentation" in written[0]) == (kind == "mask")
        assert [one["image_id"] for one in written] == sorted(one["image_id"] for one in written)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(nuts, nuts.loadRes(str(tmp_path / f"detections_{iou_type}.json")), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert evaluation.stats[0] == result.metrics[f"{kind}_AP"]


def test_no_detection_is_an_empty_list(tmp_path):
    write_results(tmp_path, [], [])
    for iou_type in IOU_TYPES.values():
        assert json.loads((tmp_path / f"detections_{iou_type}.json").read_text()) == []


def test_tables():
    truth = nasty()
    result = evaluate_detections(truth, *noisy_results(truth, 0), list(truth.imgs))
    summary = summary_table(result).splitlines()
    assert summary[0].split() == list(COCO_NUMBERS) and len({len(line) for line in summary}) == 1
    assert [line.split()[0] for line in summary[1:]] == ["box", "mask"]
    assert float(summary[2].split()[1]) == pytest.approx(100 * result.metrics["mask_AP"], abs=0.051)

    lines = per_class_table(result).splitlines()
    assert lines.pop(0) == "without an instance, left out: none"
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[2].startswith("a very long name of a class ")
    name, count, *numbers = lines[3].split()
    assert (name, count) == ("all", "7")
    means = [result.metrics[name] for name in ("box_AP", "box_AP50", "mask_AP", "mask_AP50")]
    assert list(map(float, numbers)) == pytest.approx([100 * mean for mean in means], abs=0.051)


def test_precision_over_recall(nuts):
    result = evaluate_detections(nuts, *noisy_results(nuts, 0), list(nuts.imgs))
    for kind in ("box", "mask"):
        precision = result.precision[kind]
        assert precision.shape == (10, 101, 3) and (np.diff(precision, axis=1) <= 0).all()
        assert precision.mean() == pytest.approx(result.metrics[f"{kind}_AP"], abs=1e-12)
        assert precision[0].mean() == pytest.approx(result.metrics[f"{kind}_AP50"], abs=1e-12)
        assert precision[5].mean() == pytest.approx(result.metrics[f"{kind}_AP75"], abs=1e-12)
        for number, row in enumerate(result.per_class):
            assert precision[0, :, number].mean() == pytest.approx(getattr(row, f"{kind}_ap50"), abs=1e-12)
