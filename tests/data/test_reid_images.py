"""Items from keys: what they hold, that randomness is a function of the key, and what happens to broken pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from core.data.loading import batches
from core.data.reid_images import CENTRE_BOX, ReIDImages, collate, load_sample, split_broken
from core.data.samplers import KeyedBatches, PKSampler
from core.data.samples import Sample
from core.data.transforms import build_transform
from core.errors import InputError

WIDTH, HEIGHT = 40, 60
BOX = (10, 15, 30, 45)
PLAIN = build_transform(HEIGHT, WIDTH, training=False)
RARE = {"translation": 0.5, "color_jitter": 0.5, "random_patch": 0.5, "cutout": 0.5, "erasing_value": "noise"}
HEAVY = build_transform(48, 32, training=True, autoaugment=True, blur=0.5, erasing=0.5, **RARE)


def run_lengths(box=BOX, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return coco_mask.encode(mask)


@pytest.fixture
def samples(tmp_path):
    """8 identities with 3 noise pictures each, with box and mask."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(24):
        path = tmp_path / f"{number:02d}.png"
        Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
        found.append(Sample(str(path), number // 3, number % 2, BOX, run_lengths()))
    return found


def break_picture(sample):
    with open(sample.path, "r+b") as file:
        file.truncate(200)


def loader_of(images, num_workers, epoch=0):
    sampler = KeyedBatches(PKSampler([sample.id for sample in images.samples], 4, 2))
    sampler.set_epoch(epoch)
    return DataLoader(images, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)


def assert_equal_items(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key], key


def test_what_an_item_holds(samples):
    images = ReIDImages(samples, PLAIN, with_masks=True)
    item = images[4]
    assert len(images) == 24 and images.has_boxes and images.has_masks
    assert (item["id"], item["camera"], item["index"], item["path"]) == (1, 0, 4, samples[4].path)
    assert type(item["image"]) is type(item["box"]) is type(item["mask"]) is torch.Tensor
    assert item["image"].shape == (3, HEIGHT, WIDTH) and item["image"].dtype == torch.float32
    assert item["box"].tolist() == [0.25, 0.25, 0.75, 0.75]
    assert item["mask"].dtype == torch.uint8 and item["mask"].shape == (1, HEIGHT, WIDTH)
    assert item["mask"].sum() == 20 * 30 and item["mask"][0, 15:45, 10:30].all()
    assert "mask" not in ReIDImages(samples, PLAIN)[4]


def test_a_batch(samples):
    batch = next(batches(loader_of(ReIDImages(samples, HEAVY, with_masks=True), 0)))
    assert batch["image"].shape == (8, 3, 48, 32) and batch["mask"].shape == (8, 1, 48, 32)
    assert batch["box"].shape == (8, 4) and (batch["box"] >= 0).all() and (batch["box"] <= 1).all()
    assert batch["id"].dtype == torch.int64
    assert batch["path"] == [samples[index].path for index in batch["index"]]


def test_without_box_the_centre_of_the_picture(samples):
    images = ReIDImages([sample._replace(box=None) for sample in samples], PLAIN)
    assert not images.has_boxes and images.has_masks
    assert torch.allclose(images[0]["box"], torch.tensor(CENTRE_BOX))


def test_augmentation_is_a_function_of_seed_epoch_and_slot(samples):
    images = ReIDImages(samples, HEAVY, seed=1, with_masks=True)
    item = images[3, 17, 5]
    torch.manual_seed(123)  # neither what was drawn before nor the global seed matters
    images[0]
    assert_equal_items(images[3, 17, 5], item)
    others = [images[4, 17, 5], images[3, 18, 5], ReIDImages(samples, HEAVY, seed=2)[3, 17, 5]]
    assert not any(torch.equal(other["image"], item["image"]) for other in others)


def test_torchs_generator_is_left_alone(samples):
    images = ReIDImages(samples, HEAVY)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    images[0, 0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_number_of_workers_changes_nothing(samples):
    images = ReIDImages(samples, HEAVY, seed=1, with_masks=True)
    alone, together = list(batches(loader_of(images, 0))), list(batches(loader_of(images, 2)))
    assert len(alone) == len(together) > 1
    for first, second in zip(alone, together, strict=True):
        assert_equal_items(first, second)
    other_epoch = next(batches(loader_of(images, 0, epoch=1)))
    assert not torch.equal(other_epoch["image"], alone[0]["image"])


def test_persistent_workers_see_the_epoch(samples):
    images = ReIDImages(samples, HEAVY)
    sampler = KeyedBatches(PKSampler([sample.id for sample in samples], 4, 2))
    loader = DataLoader(images, batch_sampler=sampler, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected = next(batches(loader_of(images, 0, epoch)))
        assert_equal_items(list(batches(loader))[0], expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_picture_stops_the_run_in_one_line_that_names_it(samples, num_workers):
    break_picture(samples[7])
    with pytest.raises(InputError) as caught:
        list(batches(loader_of(ReIDImages(samples, PLAIN), num_workers)))
    assert samples[7].path in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError):
        ReIDImages(samples, PLAIN)[7]


def test_split_broken_sorts_them_out(samples):
    break_picture(samples[7])
    open(samples[20].path, "w").close()
    samples[3] = samples[3]._replace(box=(100, 100, 120, 120))
    readable, errors = split_broken(samples)
    assert readable == [sample for number, sample in enumerate(samples) if number not in (3, 7, 20)]
    assert [samples[number].path in str(error) for number, error in zip((3, 7, 20), errors, strict=True)] == [True] * 3
    assert split_broken(readable) == (readable, []) and split_broken([]) == ([], [])


def test_a_box_is_clipped_to_its_picture(samples):
    images = ReIDImages([samples[0]._replace(box=(-5, 30, 20, 600.0))], PLAIN)
    assert images[0]["box"].tolist() == [0, 0.5, 0.5, 1]


@pytest.mark.parametrize(
    "box", [(40, 0, 50, 60), (-9, 0, 0, 60), (5, 20, 5, 30), (30, 0, 10, 60), (float("nan"), 0, 9, 9)]
)
def test_nothing_of_the_box_in_the_picture_is_an_input_error(samples, box):
    images = ReIDImages([samples[0]._replace(box=box)], PLAIN)
    with pytest.raises(InputError, match="00.png.*40x60"):
        images[0]


# The upper left pixel of the stored picture and its right-hand neighbour, seen upright: (row, column) of each. By the
# table of the EXIF standard, which says on what side of the scene the stored first row and first column are.
CORNER = {
    1: ((0, 0), (0, 1)),  # top, left
    2: ((0, -1), (0, -2)),  # top, right
    3: ((-1, -1), (-1, -2)),  # bottom, right
    4: ((-1, 0), (-1, 1)),  # bottom, left
    5: ((0, 0), (1, 0)),  # left, top
    6: ((0, -1), (1, -1)),  # right, top
    7: ((-1, -1), (-2, -1)),  # right, bottom
    8: ((-1, 0), (-2, 0)),  # left, bottom
}


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", CORNER)
def test_box_and_mask_of_stored_pixels_follow_the_exif_orientation(tmp_path, orientation, suffix):
    stored = np.zeros((3, 4, 3), np.uint8)
    stored[0, 0], stored[0, 1] = 250, 100
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif)
    box = (0, 0, 2, 1)  # the two bright pixels
    sample = Sample(str(tmp_path / f"a.{suffix}"), 0, 0, box, run_lengths(box, 3, 4))
    loaded = load_sample(sample, with_mask=True)
    image, mask = loaded["image"][0], loaded["mask"][0]
    first, second = CORNER[orientation]
    assert image.shape == mask.shape == loaded["box"].canvas_size == ((3, 4) if orientation < 5 else (4, 3))
    assert (image[first], image[second]) == (250, 100)
    assert torch.equal(mask.as_subclass(torch.Tensor), (image > 0).as_subclass(torch.Tensor).byte())
    rows, columns = np.nonzero(image.numpy())
    assert loaded["box"].tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    alone = load_sample(sample._replace(box=None, mask=None))
    assert torch.equal(alone["image"], loaded["image"])
    height, width = image.shape
    assert alone["box"].tolist() == [[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]]


def test_masks_as_lists_of_counts(samples):
    # Column by column: 10 columns of 60 without, then 20 columns of 15 without, 30 with, 15 without.
    counts = [10 * 60 + 15] + [30, 30] * 19 + [30, 15 + 10 * 60]
    sample = samples[0]._replace(mask={"size": [HEIGHT, WIDTH], "counts": counts})
    expected = ReIDImages(samples, PLAIN, with_masks=True)[0]
    assert_equal_items(ReIDImages([sample], PLAIN, with_masks=True)[0], expected)


def test_masks_that_do_not_fit(samples):
    with pytest.raises(InputError, match="00.png.*60x40.*40x60"):
        ReIDImages([samples[0]._replace(mask=run_lengths(BOX, WIDTH, HEIGHT))], PLAIN, with_masks=True)[0]
    with pytest.raises(InputError, match="02.png.*the mask target"):
        ReIDImages([*samples[:2], samples[2]._replace(mask=None)], PLAIN, with_masks=True)


@pytest.mark.parametrize(
    "counts",
    [[10, 20, 50], [], [10, "a"], [10, -5, WIDTH * HEIGHT - 5], [0, 2**40], [WIDTH * HEIGHT + 1], "", "zz~~zz", "é"]
    + [b"", b"zz~~zz", "\ud800"],
)
def test_damaged_run_lengths_are_one_line(samples, counts):
    damaged = samples[0]._replace(mask={"size": [HEIGHT, WIDTH], "counts": counts})
    with pytest.raises(InputError, match="00.png: its run lengths are damaged.*40x60") as caught:
        ReIDImages([damaged], PLAIN, with_masks=True)[0]
    assert "\n" not in str(caught.value)
    readable, errors = split_broken([damaged, samples[1]], with_masks=True)
    assert readable == [samples[1]] and len(errors) == 1
