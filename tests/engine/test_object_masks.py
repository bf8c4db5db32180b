import functools
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from core.data.images import EXIF_ORIENTATION, read_stored_image
from core.data.reid_images import load_sample
from core.data.samples import Sample
from core.engine import distributed, object_masks
from core.engine.object_masks import object_mask, predicted_masks
from core.errors import InputError
from core.models.mask_rcnn import MaskRCNN

CPU = torch.device("cpu")
SCORES = {"red": 0.9, "green": 0.9, "blue": 0.4}  # of what ColorDetector finds


class ColorDetector(nn.Module):
    """Finds what is red, green or blue, with masks that fill their boxes; keeps the pictures that it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images, min_score):
        self.seen += images
        found = [self.detect(image > 0.5) for image in images]
        return [{name: value[one["scores"] >= min_score] for name, value in one.items()} for one in found]

    def detect(self, bright):
        boxes, scores = [], []
        for channel, score in enumerate(SCORES.values()):
            rows, columns = (bright[channel] & (bright.sum(dim=0) == 1)).nonzero().unbind(1)
            if len(rows):
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                scores.append(score)
        found = {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "scores": torch.tensor(scores)}
        return {**found, "labels": torch.ones(len(boxes)).long(), "masks": torch.ones(len(boxes), 1, 28, 28)}


def picture(size=(100, 80), **boxes):
    """A black picture with a rectangle for each colour."""
    canvas = Image.new("RGB", size)
    for color, box in boxes.items():
        canvas.paste({"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}[color], box)
    return canvas


def find(image, **options):
    return object_mask(ColorDetector(), image, CPU, **options)


def iou(rle, box):
    """Of a mask and a box (x1, y1, x2, y2) of whole pixels."""
    mask = coco_mask.decode(rle).astype(bool)
    wanted = np.zeros_like(mask)
    x1, y1, x2, y2 = box
    wanted[y1:y2, x1:x2] = True
    return (mask & wanted).sum() / (mask | wanted).sum()


# One picture ----------------------------------------------------------------------------------------------------------


def test_the_mask_is_where_the_object_is_in_the_picture():
    found = find(picture(red=(20, 30, 70, 60)))
    assert found["rle"]["size"] == [80, 100]
    assert found["box"] == pytest.approx((20, 30, 70, 60)) and found["score"] == pytest.approx(0.9)
    assert iou(found["rle"], (20, 30, 70, 60)) > 0.9
    assert json.loads(json.dumps(found["rle"])) == found["rle"]


def test_the_network_sees_the_picture_in_the_middle_of_a_canvas_in_the_colour_of_its_rim():
    image = Image.new("RGB", (40, 20), (51, 102, 0))
    image.paste((255, 0, 0), (10, 5, 30, 15))
    detector = ColorDetector()
    object_mask(detector, image, CPU, canvas=2)
    (seen,) = detector.seen
    assert seen.shape == (3, 40, 80)
    assert torch.equal((255 * seen[:, 10:30, 20:60]).round().byte(), torch.tensor(np.array(image)).permute(2, 0, 1))
    for part in (seen[:, :10], seen[:, 30:], seen[:, :, :20], seen[:, :, 60:]):
        assert torch.allclose(part, torch.tensor([0.2, 0.4, 0.0])[:, None, None].expand_as(part))
    object_mask(detector, image, CPU, canvas=1)
    assert detector.seen[1].shape == (3, 20, 40)


def test_the_object_in_the_middle_is_meant_and_not_its_neighbour():
    beside, middle = (0, 0, 28, 80), (30, 10, 80, 70)
    assert find(picture(red=beside, green=middle))["box"] == pytest.approx(middle)
    assert find(picture(green=beside, red=middle))["box"] == pytest.approx(middle)
    # A box says otherwise.
    assert find(picture(red=beside, green=middle), box=(2, 3, 30, 78))["box"] == pytest.approx(beside)


def test_a_whole_object_is_rather_meant_than_a_part_of_the_same_score():
    assert find(picture(red=(10, 5, 90, 75), green=(40, 30, 60, 50)))["score"] == pytest.approx(0.9)
    whole = (10, 5, 90, 75)
    image = picture(red=whole)
    image.paste((0, 255, 0), (40, 30, 60, 50))
    assert find(image)["box"] == pytest.approx(whole)


def test_between_two_as_well_placed_the_score_decides():
    assert find(picture(blue=(10, 10, 50, 70), red=(50, 10, 90, 70)))["score"] == pytest.approx(0.9)


def test_nothing_found_is_none():
    assert find(picture()) is None
    assert find(picture(red=(0, 0, 10, 10))) is None  # nowhere near the middle
    assert find(picture(red=(0, 0, 10, 10)), box=(60, 60, 90, 80)) is None
    assert find(picture(red=(0, 0, 10, 10)), box=(0, 0, 12, 12)) is not None


def test_what_scores_too_little_is_not_found():
    image = picture(blue=(20, 20, 80, 60))
    assert find(image, min_score=0.3)["score"] == pytest.approx(0.4)
    assert find(image, min_score=0.5) is None


@pytest.mark.parametrize("flip", [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM])
def test_the_mask_of_a_mirrored_picture_is_mirrored(flip):
    image = picture(red=(20, 30, 70, 60))
    mask, mirrored = (coco_mask.decode(find(one)["rle"]) for one in (image, image.transpose(flip)))
    expected = np.asarray(Image.fromarray(mask).transpose(flip))
    assert (mirrored & expected).sum() > 0.9 * (mirrored | expected).sum()


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (4000, 3), (3000, 2000)])
def test_pictures_of_any_size(size):
    detector = ColorDetector()
    width, height = size
    box = (width // 4, height // 4, width - width // 4, height - height // 4)
    found = object_mask(detector, picture(size, red=box), CPU)
    assert max(detector.seen[0].shape) <= 3 * 1333 + 1  # bounded memory
    assert found["rle"]["size"] == [height, width]
    assert found["box"] == pytest.approx(box, abs=2) and iou(found["rle"], box) > 0.9


def test_what_reaches_out_of_the_picture_is_clipped():
    class Beyond(nn.Module):
        def forward(self, images, min_score):
            masks = torch.ones(1, 1, 28, 28)
            box = torch.tensor([[-50.0, 50.0, 500.0, 150.0]])
            return [{"boxes": box, "scores": torch.ones(1), "labels": torch.ones(1), "masks": masks}]

    found = object_mask(Beyond(), picture((100, 100)), CPU)  # on the canvas it lies at (100, 100)
    assert found["box"] == (0, 0, 100, 50) and iou(found["rle"], (0, 0, 100, 50)) > 0.9


# A data set -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def networks_are_built_once():
    """They take longer to build than to use; each test has the true ones."""
    with pytest.MonkeyPatch.context() as patch:
        build = functools.lru_cache(maxsize=1)(object_masks.detection.network_from_checkpoint)
        patch.setattr(object_masks.detection, "network_from_checkpoint", build)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a network that was never trained, but sees something everywhere."""
    torch.manual_seed(0)
    small = {"min_size": 64, "max_size": 96, "box_detections_per_img": 4, "rpn_post_nms_top_n_test": 50}
    network = MaskRCNN("resnet18", 2, box_roi_output_size=2, mask_roi_output_size=7, **small)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([-2.0, 1.0]))
    state = {"kind": "mask_rcnn", "model": network.state_dict(), "ema": None, "network": network.options, "args": {}}
    path = tmp_path_factory.mktemp("weights") / "best.pth"
    torch.save({**state, "categories": [[1, "bag"]], "epoch": 1, "best": 0.1}, path)
    return path


@pytest.fixture
def bags(tmp_path, baggage):
    """(folder, samples) of four pictures of the synthetic set, in a folder of their own."""
    folder = tmp_path / "bags"
    folder.mkdir()
    paths = sorted((baggage / "MVB_train" / "Image").glob("*.jpg"))[:4]
    return folder, [Sample(shutil.copy(path, folder), number, 0) for number, path in enumerate(paths)]


@pytest.fixture
def looked_at(monkeypatch):
    """Counts the pictures that are looked at, by their size."""
    counts = Counter()
    original = object_masks.object_mask

    def counted(network, image, *arguments, **options):
        counts["all"] += 1
        return original(network, image, *arguments, **options)

    monkeypatch.setattr(object_masks, "object_mask", counted)
    return counts


def cache_of(folder):
    (path,) = folder.glob("masks-*.json")
    return path


def test_every_sample_gets_the_mask_that_the_network_finds(bags, checkpoint):
    folder, samples = bags
    said = []
    masked = predicted_masks(samples, folder, checkpoint, CPU, say=said.append)
    assert [sample._replace(mask=None) for sample in masked] == samples
    network, _ = object_masks.detection.network_from_checkpoint(checkpoint, CPU)
    for sample in masked:
        expected = object_mask(network, read_stored_image(sample.path)[0], CPU)
        assert sample.mask == expected["rle"]
        assert load_sample(sample, with_mask=True)["mask"].sum() == coco_mask.area(sample.mask) > 0
    assert len(said) == 1 and "4 pictures" in said[0]


def test_what_is_found_is_kept_beside_the_data(bags, checkpoint, looked_at):
    folder, samples = bags
    first = predicted_masks(samples, folder, checkpoint, CPU)
    assert looked_at["all"] == 4
    said = []
    assert predicted_masks(samples, folder, checkpoint, CPU, say=said.append) == first
    assert looked_at["all"] == 4 and said == []
    # A picture that has changed, and a box that is new, are looked at again; they push nothing else out.
    os.utime(samples[1].path, ns=(1, 1))
    boxed = samples[2]._replace(box=(3.0, 4.0, 50.0, 60.0))
    predicted_masks([samples[0], samples[1], boxed], folder, checkpoint, CPU)
    assert looked_at["all"] == 6
    predicted_masks([*samples, boxed], folder, checkpoint, CPU)
    assert looked_at["all"] == 6
    assert not list(folder.glob(".*"))


def test_a_data_set_that_was_moved_keeps_its_masks_and_another_network_has_its_own(bags, checkpoint, looked_at):
    folder, samples = bags
    predicted_masks(samples[:1], folder, checkpoint, CPU)
    moved = folder.rename(folder.with_name("moved"))
    sample = samples[0]._replace(path=str(moved / os.path.basename(samples[0].path)))
    predicted_masks([sample], moved, checkpoint, CPU)
    assert looked_at["all"] == 1
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["roi_heads.mask_predictor.mask_fcn_logits.bias"] += 1
    torch.save(state, moved / "other.pth")
    predicted_masks([sample], moved, moved / "other.pth", CPU)
    assert looked_at["all"] == 2 and len(list(moved.glob("masks-*.json"))) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"version": 0, "masks": {}}', "another version"),
        ('{"version": 2, "masks": [1]}', "damaged"),
        ('{"version": 2, "masks": {"a": {"file": null}}}', "damaged"),
    ],
)
def test_a_cache_that_is_damaged_or_of_another_version_is_not_used(bags, checkpoint, looked_at, content, reason):
    folder, samples = bags
    first = predicted_masks(samples[:1], folder, checkpoint, CPU)
    path = cache_of(folder)
    path.write_text(content)
    said = []
    assert predicted_masks(samples[:1], folder, checkpoint, CPU, say=said.append) == first
    assert looked_at["all"] == 2
    assert str(path) in said[0] and reason in said[0] and "\n" not in said[0]
    assert json.loads(path.read_text())["version"] == object_masks.VERSION  # and it is replaced


def test_where_the_cache_cannot_be_written_the_masks_are_found_all_the_same(bags, checkpoint):
    folder, samples = bags
    expected = predicted_masks(samples, folder, checkpoint, CPU)
    path = cache_of(folder)
    path.unlink()
    path.mkdir()  # stands in the way, for root as well
    said = []
    assert predicted_masks(samples, folder, checkpoint, CPU, say=said.append) == expected
    assert [text for text in said if "can't be read" in text] and [text for text in said if "can't be written" in text]
    assert len(said) == 3


def finds_in(numbers, monkeypatch):
    """Let the network find something in the pictures of these numbers alone, in the order in which it sees them."""
    original, seen = object_masks.object_mask, iter(range(100))
    monkeypatch.setattr(
        object_masks, "object_mask", lambda *a, **b: original(*a, **b) if next(seen) in numbers else None
    )


def test_where_nothing_is_found_the_box_or_the_middle_is_the_mask_and_it_is_said(bags, checkpoint, monkeypatch):
    folder, samples = bags
    finds_in([2, 3], monkeypatch)
    width, height = read_stored_image(samples[0].path)[0].size
    boxed = [samples[0]._replace(box=(10.0, 20.5, 40.0, 1000.0)), *samples[1:]]
    for _ in range(2):  # from the cache it is said as well
        said = []
        first, second, *_ = predicted_masks(boxed, folder, checkpoint, CPU, say=said.append)
        assert iou(first.mask, (10, 20, 40, height)) == 1
        size = read_stored_image(samples[1].path)[0].size
        assert iou(second.mask, (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4)) > 0.9
        assert said[-1].startswith(
            "masks: nothing found in 2 of 4 pictures: the mask there is the middle of the picture"
        )


def test_misses_in_more_than_half_of_the_pictures_are_a_warning(bags, checkpoint, monkeypatch):
    folder, samples = bags
    finds_in([3], monkeypatch)
    boxed = [sample._replace(box=(10.0, 20.0, 40.0, 50.0)) for sample in samples]
    said = []
    predicted_masks(boxed, folder, checkpoint, CPU, say=said.append)
    assert said[-1].startswith("warning: masks: nothing found in 3 of 4 pictures: the mask there is the box")


def test_where_nothing_is_found_at_all_there_is_nothing_to_learn_from(bags, checkpoint, monkeypatch):
    folder, samples = bags
    finds_in([], monkeypatch)
    for _ in range(2):  # from the cache as well
        with pytest.raises(InputError, match=r"finds nothing in any of the 4 pictures of .*bags: give .*") as caught:
            predicted_masks(samples, folder, checkpoint, CPU)
        message = str(caught.value)
        assert str(checkpoint) in message and "--mask-checkpoint" in message and "\n" not in message


def test_finding_masks_draws_no_random_numbers(bags, checkpoint, monkeypatch):
    """The same seed gives the same ReID network, whichever masks it learns from."""
    folder, samples = bags
    build = object_masks.detection.network_from_checkpoint.__wrapped__  # anew, not from the cache of this file
    monkeypatch.setattr(object_masks.detection, "network_from_checkpoint", build)
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    predicted_masks(samples[:1], folder, checkpoint, CPU)
    assert torch.equal(torch.rand(5), expected)


def test_a_mask_is_one_of_the_stored_pixels(bags, checkpoint, tmp_path):
    folder, samples = bags
    upright = read_stored_image(samples[0].path)[0]
    upright.save(folder / "upright.png")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned by 270 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    box = (8.0, 4.0, 80.0, 90.0)
    turned_box = (4.0, upright.width - 80.0, 90.0, upright.width - 8.0)
    samples = [Sample(str(folder / "upright.png"), 0, 0, box), Sample(str(folder / "turned.png"), 0, 0, turned_box)]
    first, second = predicted_masks(samples, folder, checkpoint, CPU)
    assert second.mask["size"] == first.mask["size"][::-1]
    first, second = (load_sample(sample, with_mask=True) for sample in (first, second))
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["mask"], second["mask"])


def test_a_broken_picture_is_named_and_what_was_found_is_kept(bags, checkpoint, looked_at):
    folder, samples = bags
    with open(samples[0].path, "wb") as file:
        file.write(b"no picture")
    with pytest.raises(InputError, match="can't be read as a picture"):
        predicted_masks(samples, folder, checkpoint, CPU)
    assert len(json.loads(cache_of(folder).read_text())["masks"]) == 3
    os.remove(samples[0].path)
    with pytest.raises(InputError, match="no such picture"):
        predicted_masks(samples, folder, checkpoint, CPU)
    predicted_masks(samples[1:], folder, checkpoint, CPU)
    assert looked_at["all"] == 3


def test_the_cache_is_written_by_the_clock_at_the_end_and_before_an_error(bags, checkpoint, monkeypatch):
    folder, samples = bags
    written, write = [], object_masks._write_cache

    def counted(path, known, say):
        written.append(len(known))
        return write(path, known, say)

    monkeypatch.setattr(object_masks, "_write_cache", counted)
    monkeypatch.setattr(object_masks, "ROUND", 1)
    predicted_masks(samples, folder, checkpoint, CPU)
    assert written == [4]
    cache_of(folder).unlink()
    monkeypatch.setattr(object_masks, "WRITE_SECONDS", 0)
    predicted_masks(samples, folder, checkpoint, CPU)
    assert written == [4, 1, 2, 3, 4]
    cache_of(folder).unlink()
    monkeypatch.setattr(object_masks, "WRITE_SECONDS", 60)
    with open(samples[2].path, "wb") as file:
        file.write(b"no picture")
    with pytest.raises(InputError, match="can't be read as a picture"):
        predicted_masks(samples, folder, checkpoint, CPU)
    assert written == [4, 1, 2, 3, 4, 2] and len(json.loads(cache_of(folder).read_text())["masks"]) == 2


def test_no_pictures_are_no_masks(tmp_path, checkpoint):
    assert predicted_masks([], tmp_path, checkpoint, CPU) == [] and not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    torch.save({"kind": "reid", "model": {}}, tmp_path / "reid.pth")
    with pytest.raises(InputError, match="kind reid, mask_rcnn is needed"):
        predicted_masks([], tmp_path, tmp_path / "reid.pth", CPU)


def masks_of_a_rank(rank, samples, folder, checkpoint):
    device = distributed.setup("cpu", timeout_minutes=0.5)
    object_masks.ROUND = 1
    masked = predicted_masks(samples, folder, checkpoint, device, say=lambda _: None)
    with open(samples[2].path, "wb") as file:
        file.write(b"no picture")
    distributed.barrier()
    try:
        predicted_masks(samples, folder, checkpoint, device, say=lambda _: None)
    except InputError as error:
        refusal = str(error)
    distributed.cleanup()
    return masked, refusal


@pytest.mark.slow
def test_two_ranks_share_the_work_and_know_the_same(bags, checkpoint, launch):
    folder, samples = bags
    samples = samples[:3]
    results, codes, errors = launch(masks_of_a_rank, samples, folder, checkpoint)
    assert codes == [0, 0], errors
    masked = [predicted_masks(samples[:2], folder.parent, checkpoint, CPU)[number].mask for number in (0, 1)]
    for result, refusal in results:
        assert [sample.mask for sample in result[:2]] == masked and result[2].mask
        assert refusal.startswith(samples[2].path)
