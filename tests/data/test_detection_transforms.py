"""Picture, boxes, masks and labels move together at every level; what must stay stays; chance is torch's alone."""

import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from core.data.detection_transforms import (
    LEVELS,
    MEAN_COLOUR,
    LargeScaleJitter,
    MasksByPlace,
    MotionBlur,
    SafeCrop,
    TightBoxes,
    build_detection_transform,
    geometric_steps,
    training_sizes,
)
from core.errors import InputError

HEIGHT, WIDTH = 120, 160


def make_sample(masks, image=None, boxes=None):
    """Masks (G, H, W), labels 1 .. G, tight boxes; the object of label k has channel k - 1 alone, all else is black."""
    masks = torch.as_tensor(masks, dtype=torch.uint8)
    count, height, width = masks.shape
    if image is None:
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        for channel, mask in enumerate(masks):
            image[channel] = 255 * mask
    boxes = torch.stack([box_of(mask) for mask in masks]) if count and boxes is None else boxes
    boxes = torch.zeros(0, 4) if boxes is None else torch.as_tensor(boxes, dtype=torch.float32)
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "masks": tv_tensors.Mask(masks),
        "labels": torch.arange(1, count + 1),
    }


def three_objects():
    """A rectangle, an ellipse at the border and a triangle, apart from each other."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    rectangle = (y >= 20) & (y < 50) & (x >= 30) & (x < 75)
    ellipse = ((y - 85) / 25.0) ** 2 + ((x - 140) / 30.0) ** 2 < 1
    triangle = (y >= 70) & (y < 110) & (x >= 20) & (x < 20 + (y - 70))
    return make_sample(torch.stack([rectangle, ellipse, triangle]))


def empty_sample(height=HEIGHT, width=WIDTH):
    return make_sample(torch.zeros(0, height, width))


def box_of(mask):
    """Half-open box around the nonzero pixels of (H, W)."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def assert_sound(sample):
    """Kinds, sizes and counts, whatever has happened to the sample."""
    image, boxes, masks, labels = (sample[key] for key in ("image", "boxes", "masks", "labels"))
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
    assert isinstance(masks, tv_tensors.Mask) and masks.dtype == torch.uint8
    assert isinstance(boxes, tv_tensors.BoundingBoxes) and boxes.dtype == torch.float32
    assert masks.shape[-2:] == image.shape[-2:] == tuple(boxes.canvas_size) and image.shape[0] == 3
    assert len(boxes) == len(masks) == len(labels) and boxes.shape[1] == 4
    assert labels.dtype == torch.int64


def assert_tight(sample):
    for box, mask in zip(sample["boxes"].as_subclass(torch.Tensor), sample["masks"], strict=True):
        assert torch.equal(box, box_of(mask)), (box, box_of(mask))


def within(inner, outer, pixels):
    """Whether every pixel of (H, W) `inner` is at most so many pixels away from `outer`, sideways and diagonally."""
    wide = F.max_pool2d(outer[None].float(), 2 * pixels + 1, 1, pixels)[0]
    return not (inner.bool() & (wide == 0)).any()


def assert_painted(sample, pixels=1):
    """Each mask lies where the colour of its label is, and each colour where a mask of that label is."""
    image = sample["image"].as_subclass(torch.Tensor).int()
    for channel in range(3):
        others = [other for other in range(3) if other != channel]
        painted = (image[channel] > 160) & (image[others] < 80).all(0)  # not a mixture with its neighbours
        found = sample["masks"][sample["labels"] == channel + 1].as_subclass(torch.Tensor)
        assert len(found) <= 1
        mask = found.any(0) if len(found) else torch.zeros_like(painted)
        assert within(painted, mask, pixels)
        solid = ~(F.max_pool2d((~mask)[None].float(), 2 * pixels + 1, 1, pixels)[0] > 0)  # eroded
        assert (painted | ~solid).all()


def seeds(count):
    for seed in range(count):
        torch.manual_seed(seed)
        yield seed


@pytest.fixture(autouse=True)
def keep_generator():
    with torch.random.fork_rng(devices=[]):
        yield


def equal(a, b):
    return all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def test_level_0_changes_nothing():
    sample = three_objects()
    assert equal(build_detection_transform(0, flip=1.0, vertical_flip=1.0)(sample), sample)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_no_level_changes_the_sample_it_was_given(level):
    sample, before = three_objects(), three_objects()
    transform = build_detection_transform(level)
    for _ in seeds(10):
        transform(sample)
        assert equal(sample, before)


def test_flips_worked_out_by_hand():
    masks = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 1]]])
    sample = make_sample(masks, boxes=[[0.0, 0, 1.5, 1], [3, 1, 4, 2]])
    flipped = build_detection_transform(1, flip=1.0)(sample)
    assert flipped["masks"].tolist() == [[[0, 0, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 0, 0, 0]]]
    assert flipped["boxes"].tolist() == [[2.5, 0, 4, 1], [0, 1, 1, 2]]  # the file's box, not the mask's
    assert_painted(flipped, pixels=0)
    turned = build_detection_transform(1, flip=0.0, vertical_flip=1.0)(sample)
    assert turned["masks"].tolist() == [[[0, 0, 0, 0], [1, 1, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]]]
    assert turned["boxes"].tolist() == [[0, 1, 1.5, 2], [3, 0, 4, 1]]
    assert_painted(turned, pixels=0)


def test_flips_have_their_probability():
    sample = three_objects()
    transform = build_detection_transform(1, flip=0.25)
    flipped = sum(not equal(transform(sample), sample) for _ in seeds(200))
    assert 25 <= flipped <= 75


def test_level_2_changes_colours_and_moves_nothing_but_flips():
    sample = three_objects()
    transform = build_detection_transform(2, flip=0.0)
    images = [transform(sample) for _ in seeds(30)]
    assert all(torch.equal(one["masks"], sample["masks"]) for one in images)
    assert all(torch.equal(one["boxes"], sample["boxes"]) for one in images)
    changed = sum(not torch.equal(one["image"], sample["image"]) for one in images)
    grey = sum(torch.equal(one["image"][0], one["image"][1]) for one in images)
    assert 15 <= changed <= 29 and 1 <= grey <= 8


@pytest.mark.parametrize("crop_size", [None, (90, 200), (240, 100)])
def test_pixels_masks_and_boxes_move_together(crop_size):
    sample = three_objects()
    transform = v2.Compose([*geometric_steps(crop_size), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
    sizes = set()
    for _ in seeds(60):
        moved = transform(sample)
        assert_sound(moved)
        assert_tight(moved)
        assert_painted(moved)
        sizes.add(tuple(moved["image"].shape[-2:]))
    assert (crop_size or (HEIGHT, WIDTH)) in sizes and len(sizes) > 10  # jitter's size, and those of safe crops


def test_level_3_as_a_whole_keeps_dark_objects_under_their_masks():
    sample = three_objects()
    white = 255 * (1 - sample["masks"].as_subclass(torch.Tensor).amax(0))
    sample["image"] = tv_tensors.Image(white.expand(3, -1, -1).contiguous())
    transform = build_detection_transform(3, vertical_flip=0.5)
    counts = []
    for _ in seeds(60):
        moved = transform(sample)
        assert_sound(moved)
        assert_tight(moved)
        # Under any jitter black stays below 90, and white and what lies outside above; blur widens the seam.
        dark = moved["image"].as_subclass(torch.Tensor).amax(0) < 85
        mask = moved["masks"].as_subclass(torch.Tensor).any(0)
        assert within(dark, mask, 2)
        solid = ~(F.max_pool2d((~mask)[None].float(), 7, 1, 3)[0] > 0)
        assert (dark | ~solid).all()
        counts.append(len(moved["labels"]))
    assert min(counts) < 3 == max(counts)  # large-scale jitter does lose some


def test_labels_stay_with_their_masks_when_some_are_lost():
    sample = three_objects()
    jitter = v2.Compose([LargeScaleJitter(scale=(1.6, 2.0)), TightBoxes()])
    lost = [jitter(sample) for _ in seeds(40)]
    assert {2} < {len(one["labels"]) for one in lost}
    for one in lost:
        assert_painted(one)


def test_large_scale_jitter_has_the_size_asked_for_and_the_scales_of_its_range():
    full = make_sample(torch.ones(1, 60, 80))
    for size, scale in (((100, 100), (0.1, 0.1)), ((60, 80), (1.0, 1.0)), ((30, 90), (0.5, 0.5)), (None, (0.25, 0.25))):
        moved = v2.Compose([LargeScaleJitter(size, scale), TightBoxes()])(full)
        height, width = size or (60, 80)
        assert moved["image"].shape == (3, height, width)
        factor = scale[0] * min(height / 60, width / 80)
        x1, y1, x2, y2 = moved["boxes"].tolist()[0]
        assert (y2 - y1, x2 - x1) == (round(60 * factor), round(80 * factor))
        outside = moved["image"].as_subclass(torch.Tensor)[:, moved["masks"][0] == 0]
        assert (outside == torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None]).all()
    doubled = LargeScaleJitter(scale=(2.0, 2.0))(full)
    assert (doubled["masks"] == 1).all() and (doubled["image"][0] == 255).all()


def test_downscaled_masks_take_the_middle_of_what_they_stand_for():
    """Four columns become one: the object covers columns 2 and 3 of each, or those left of the middle, none."""
    columns = torch.arange(32) % 4
    right = (columns >= 2).expand(32, 32)
    moved = LargeScaleJitter((8, 8), scale=(1.0, 1.0))(make_sample(torch.stack([right, ~right])))
    assert moved["masks"].flatten(1).float().mean(1).tolist() == [1.0, 0.0]


def test_places_of_small_pictures_reach_every_corner():
    full = make_sample(torch.ones(1, 8, 8))
    jitter = v2.Compose([LargeScaleJitter(scale=(0.5, 0.5)), TightBoxes()])
    corners = torch.stack([jitter(full)["boxes"][0, :2] for _ in seeds(200)])
    assert len(corners.unique(dim=0)) == 25  # 0..4 in both directions


def test_crops_of_large_pictures_reach_every_corner():
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    sample = make_sample(torch.zeros(0, 8, 8), image=torch.stack([y, x, x]).to(torch.uint8))
    jitter = LargeScaleJitter((4, 4), scale=(2.0, 2.0))  # the scale of the pixels stays, and a quarter of them
    corners = torch.stack([jitter(sample)["image"][:2, 0, 0] for _ in seeds(200)])
    assert len(corners.unique(dim=0)) == 25


def test_safe_crop_keeps_every_pixel_of_every_instance():
    sample = three_objects()
    areas = sample["masks"].flatten(1).sum(1)
    sizes = set()
    for _ in seeds(100):
        cropped = SafeCrop()(sample)
        assert_sound(cropped)
        assert torch.equal(cropped["masks"].flatten(1).sum(1), areas)
        assert_tight(cropped)
        assert_painted(cropped, pixels=0)
        sizes.add(tuple(cropped["image"].shape[-2:]))
    assert len(sizes) > 50 and max(sizes)[0] <= HEIGHT


def test_safe_crop_goes_down_to_half_a_side_and_no_further():
    dot = torch.zeros(1, 40, 60)
    dot[0, 5, 55] = 1
    cropped = [SafeCrop()(make_sample(dot))["masks"] for _ in seeds(300)]
    assert all(int(mask.sum()) == 1 for mask in cropped)
    heights, widths = ({mask.shape[side] for mask in cropped} for side in (1, 2))
    assert (min(heights), max(heights)) == (20, 40) and (min(widths), max(widths)) == (30, 60)


def test_safe_crop_of_a_full_picture_is_the_picture():
    full = make_sample(torch.ones(1, 10, 12))
    assert all(equal(SafeCrop()(full), full) for _ in seeds(10))


def test_safe_crop_without_instances_goes_anywhere():
    x = torch.arange(WIDTH, dtype=torch.uint8).expand(3, HEIGHT, WIDTH)
    sample = make_sample(torch.zeros(0, HEIGHT, WIDTH), image=x.contiguous())
    cropped = [SafeCrop()(sample)["image"][0, 0] for _ in seeds(300)]
    assert min(int(row[0]) for row in cropped) == 0 and max(int(row[-1]) for row in cropped) == WIDTH - 1
    assert max(int(row[0]) for row in cropped) > 0.4 * WIDTH


def test_tight_boxes_worked_out_by_hand():
    masks = torch.zeros(3, 6, 8)
    masks[0, 2:4, 3:7] = 1
    masks[2, 5, 0] = 1
    sample = make_sample(masks, boxes=[[0.0, 0, 8, 6], [1, 1, 3, 3], [0, 0, 8, 6]])
    tight = TightBoxes()(sample)
    assert tight["boxes"].tolist() == [[3, 2, 7, 4], [0, 5, 1, 6]]
    assert tight["labels"].tolist() == [1, 3]
    assert torch.equal(tight["masks"], sample["masks"][[0, 2]])
    assert_sound(tight)


def test_motion_blur_spreads_a_dot_along_a_line():
    lengths, angles = [], []
    for _ in seeds(50):
        dot = torch.zeros(3, 101, 101, dtype=torch.uint8)
        dot[:, 50, 50] = 255
        blurred = MotionBlur(max_length=0.2)(tv_tensors.Image(dot))
        assert isinstance(blurred, tv_tensors.Image) and blurred.dtype == torch.uint8
        places = blurred[0].nonzero().double() - 50  # (pixels, 2)
        assert abs(blurred[0].double().sum() - 255) <= len(places) / 2  # each pixel is rounded
        assert places.mean(0).abs().max() < 0.51  # centred: the masks need not move
        across, along = torch.linalg.svdvals(places - places.mean(0)).flip(0)
        assert across / len(places) ** 0.5 < 0.6 and along > across  # a line, but for the rounding to whole pixels
        reach = places.norm(dim=1).max()
        assert 0.9 <= reach <= 10.8  # up to half of 0.2 x 101
        lengths.append(float(reach))
        angles.append(float(torch.atan2(places[-1, 0], places[-1, 1])))  # the last lies below, or to the right
    assert max(lengths) > 8 and min(lengths) < 3
    assert torch.histc(torch.tensor(angles), bins=4, min=0, max=torch.pi).min() >= 4  # every direction


def test_motion_blur_leaves_a_plain_picture_as_it_is():
    plain = tv_tensors.Image(torch.tensor([10, 200, 255], dtype=torch.uint8)[:, None, None].expand(3, 30, 20).clone())
    assert all(torch.equal(MotionBlur(0.5)(plain), plain) for _ in seeds(20))


def test_masks_move_by_their_places_as_they_would_themselves():
    for number in range(12):
        turn = v2.Compose([v2.RandomRotation(10), v2.RandomPerspective(0.4, p=0.8)])
        expected, moved = [], []
        for transform, into in ((turn, expected), (MasksByPlace(turn), moved)):
            torch.manual_seed(number)
            into.append(transform(three_objects()))
        assert all(torch.equal(moved[0][key], expected[0][key]) for key in ("image", "boxes", "masks", "labels"))
        assert isinstance(moved[0]["masks"], tv_tensors.Mask) and moved[0]["masks"].dtype == torch.uint8


@pytest.mark.parametrize("level", LEVELS)
def test_pictures_without_instances(level):
    transform = build_detection_transform(level, vertical_flip=0.5)
    for _ in seeds(30):
        moved = transform(empty_sample())
        assert_sound(moved)
        assert len(moved["labels"]) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (3, 300), (4, 4), (16, 16)])
def test_tiny_pictures(size):
    transforms = [build_detection_transform(3, crop_size=crop_size) for crop_size in (None, (32, 20), (2, 2))]
    samples = [make_sample(torch.ones(2, *size), torch.zeros(3, *size, dtype=torch.uint8)), empty_sample(*size)]
    for _ in seeds(20):
        for transform in transforms:
            for sample in samples:
                moved = transform(sample)
                assert_sound(moved)
                assert_tight(moved)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_seed_of_torch_decides_alone(level):
    sample = three_objects()
    transform = build_detection_transform(level)
    results = []
    for other in (0, 1):
        random.seed(other)
        np.random.seed(other)
        results.append([transform(sample) for _ in seeds(10)])
    assert all(equal(a, b) for a, b in zip(*results, strict=True))
    assert len({one["image"].numpy().tobytes() for one in results[0]}) > 1


@pytest.mark.parametrize("level", LEVELS)
def test_spawned_workers_can_have_it(level):
    transform = build_detection_transform(level, crop_size=(50, 60))
    copy = pickle.loads(pickle.dumps(transform))
    for seed in seeds(3):
        once = transform(three_objects())
        torch.manual_seed(seed)
        assert equal(copy(three_objects()), once)


def test_further_entries_of_a_sample_pass_through():
    moved = build_detection_transform(3)({**three_objects(), "path": "a.jpg", "image_id": 7})
    assert (moved["path"], moved["image_id"]) == ("a.jpg", 7)


def test_training_sizes():
    assert training_sizes(0, 800) == training_sizes(1, 800) == (800,)
    assert training_sizes(2, 800) == training_sizes(3, 800) == (640, 672, 704, 736, 768, 800)
    assert training_sizes(2, 256)[-1] == 256 and len(training_sizes(2, 256)) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": 4}, "level 4"),
        ({"level": -1}, "0, 1, 2, 3"),
        ({"level": 1, "flip": 1.5}, "flip"),
        ({"level": 1, "vertical_flip": -0.1}, "vertical flip"),
        ({"level": 1, "flip": float("nan")}, "flip"),
        ({"level": 3, "crop_size": (0, 100)}, "crop size 0x100"),
        ({"level": 3, "crop_size": (100, 1)}, "at least 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, words):
    with pytest.raises(InputError, match=words) as error:
        build_detection_transform(**options)
    assert "\n" not in str(error.value)
