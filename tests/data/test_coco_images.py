"""COCO pictures with their masks: what an item holds, turned pictures, randomness by key, workers, broken pictures."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from core.data import coco_images
from core.data.coco import CocoAnnotation, CocoCategory, CocoData, CocoPicture, for_training, read_coco
from core.data.coco_images import CocoImages, collate_detection, load_picture, read_as_annotated, split_broken
from core.data.detection_transforms import build_detection_transform
from core.data.images import TO_UPRIGHT
from core.data.loading import batches
from core.data.samplers import AspectRatioBatches, KeyedBatches
from core.errors import InputError
from core.layers.masks import mask_boxes
from core.layers.shapes import fitted_size
from core.models.mask_rcnn import MaskRCNN

HEAVY = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop((20, 20), pad_if_needed=True), v2.ColorJitter(0.5)])


def rectangle(label, x1, y1, x2, y2):
    """An object that fills its box: pixels of columns x1 .. x2 - 1, rows y1 .. y2 - 1."""
    polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
    return CocoAnnotation(label, (x1, y1, x2, y2), [polygon], False, (x2 - x1) * (y2 - y1), 1)


@pytest.fixture
def data(tmp_path):
    """Six noise pictures of two shapes with two objects each, but the last with none."""
    generator = np.random.default_rng(0)
    pictures = []
    for number in range(6):
        width, height = (40, 30) if number % 2 else (24, 32)
        path = str(tmp_path / f"{number}.png")
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        objects = [rectangle(1, 2, 3, 10, 20), rectangle(2, 5, 5, 24, 30)] if number < 5 else []
        pictures.append(CocoPicture(100 + number, path, width, height, objects))
    return CocoData(pictures, [CocoCategory(4, "bag"), CocoCategory(9, "box")], "a.json", [], {})


def loader_of(images, data, num_workers=0, epoch=0, **options):
    sampler = KeyedBatches(AspectRatioBatches([picture[2:4] for picture in data.pictures], 2))
    sampler.set_epoch(epoch)
    return DataLoader(images, batch_sampler=sampler, collate_fn=collate_detection, num_workers=num_workers, **options)


def assert_equal_batches(first, second):
    assert first.keys() == second.keys()
    for key in first.keys() - {"image", "target"}:
        assert first[key] == second[key]
    for ours, theirs in zip(first["image"], second["image"], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(first["target"], second["target"], strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_an_item_holds(data):
    images = CocoImages(data)
    item = images[1]
    assert len(images) == 6 and images.picture(3) == data.pictures[3]
    assert item.keys() == {"image", "target", "image_id", "path", "dropped"}
    assert (item["image_id"], item["path"], item["dropped"]) == (101, data.pictures[1].path, 0)
    stored = torch.from_numpy(np.array(Image.open(item["path"]))).permute(2, 0, 1)
    assert item["image"].dtype == torch.float32 and item["image"].is_contiguous()
    assert torch.equal((item["image"] * 255).round(), stored.float())
    torch.testing.assert_close(item["image"], stored / 255)
    target = item["target"]
    assert all(type(value) is torch.Tensor for value in [item["image"], *target.values()])
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    assert target["boxes"].tolist() == [[2, 3, 10, 20], [5, 5, 24, 30]] and target["labels"].tolist() == [1, 2]
    expected = torch.zeros(2, 30, 40, dtype=torch.uint8)
    expected[0, 3:20, 2:10] = 1
    expected[1, 5:30, 5:24] = 1
    assert target["masks"].dtype == torch.uint8 and torch.equal(target["masks"], expected)


@pytest.mark.parametrize("transform", [None, HEAVY])
def test_a_picture_without_objects(data, transform):
    item = CocoImages(data, transform)[5]
    height, width = item["image"].shape[1:]
    assert item["target"]["boxes"].shape == (0, 4) and item["target"]["boxes"].dtype == torch.float32
    assert item["target"]["labels"].shape == (0,) and item["target"]["labels"].dtype == torch.int64
    assert item["target"]["masks"].shape == (0, height, width) and item["target"]["masks"].dtype == torch.uint8


def test_without_targets(data):
    item = CocoImages(data, with_targets=False)[1]
    assert item.keys() == {"image", "image_id", "path"}
    assert torch.equal(item["image"], CocoImages(data)[1]["image"])


def test_what_a_transform_is_given_and_what_it_drops(data):
    given = []

    def keep_second(loaded):
        given.append(loaded)
        return loaded | {name: loaded[name][1:] for name in ("boxes", "labels", "masks")}

    item = CocoImages(data, keep_second)[1]
    (loaded,) = given
    assert loaded.keys() == {"image", "boxes", "labels", "masks"} and loaded["image"].dtype == torch.uint8
    assert isinstance(loaded["image"], tv_tensors.Image) and isinstance(loaded["masks"], tv_tensors.Mask)
    assert isinstance(loaded["boxes"], tv_tensors.BoundingBoxes) and loaded["boxes"].canvas_size == (30, 40)
    assert item["dropped"] == 1 and item["target"]["labels"].tolist() == [2] and len(item["target"]["masks"]) == 1


def test_a_batch_is_a_dict_of_lists(data):
    batch = next(batches(loader_of(CocoImages(data), data)))
    assert all(type(values) is list and len(values) == 2 for values in batch.values())
    assert [image.shape[1:] for image in batch["image"]] == [target["masks"].shape[1:] for target in batch["target"]]


# --- Large pictures


@pytest.fixture
def photograph(tmp_path):
    """Data of one black picture of 600 x 400 pixels with a red object, outlined by a polygon, and a green one, by
    run lengths."""
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[60:180, 90:240, 0] = 255
    pixels[199:381, 301:589, 1] = 255
    mask = np.asfortranarray(pixels[..., 1] // 255)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    polygon = rectangle(1, 90, 60, 240, 180)
    run_lengths = polygon._replace(label=2, box=(301, 199, 589, 381), segmentation=coco_mask.encode(mask))
    picture = CocoPicture(7, str(tmp_path / "large.png"), 600, 400, [polygon, run_lengths])
    return CocoData([picture], [CocoCategory(1, "bag"), CocoCategory(2, "box")], "a.json", [], {})


@pytest.mark.parametrize("max_side", [None, 600, 1000])
def test_what_is_not_too_large_stays_as_it_is(photograph, max_side):
    item = CocoImages(photograph, max_side=max_side)[0]
    stored = torch.from_numpy(np.array(Image.open(item["path"]))).permute(2, 0, 1)
    assert torch.equal((item["image"] * 255).round(), stored.float())
    assert item["target"]["boxes"].tolist() == [[90, 60, 240, 180], [301, 199, 589, 381]]
    assert torch.equal(item["target"]["masks"], stored[:2] // 255)


@pytest.mark.parametrize("max_side", [300, 217, 599, 61])
def test_boxes_and_masks_of_a_shrunk_picture_stay_on_the_objects(photograph, max_side):
    item = CocoImages(photograph, max_side=max_side)[0]
    image, target = item["image"], item["target"]
    height = round(400 * max_side / 600)
    assert image.shape == (3, height, max_side) and target["masks"].shape == (2, height, max_side)
    assert target["labels"].tolist() == [1, 2] and item["dropped"] == 0 and target["masks"].dtype == torch.uint8
    expected = torch.tensor([[90, 60, 240, 180], [301, 199, 589, 381]]) * torch.tensor(
        [max_side / 600, height / 400] * 2
    )
    torch.testing.assert_close(target["boxes"], expected)
    assert (mask_boxes(target["masks"]) - expected).abs().max() <= 0.5 + 1e-4
    for mask, colour in zip(target["masks"], image, strict=False):
        assert mask[colour > 0.8].all() and not mask[colour < 0.2].any()  # in between, along the edge, either is right


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((80, 80, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    data = CocoData([CocoPicture(1, str(tmp_path / "a.png"), 80, 80, [])], [CocoCategory(1, "bag")], "a.json", [], {})
    item = CocoImages(data, max_side=20)[0]
    assert item["image"].shape == (3, 20, 20) and (item["image"] - 0.5).abs().max() < 0.1
    assert item["target"]["boxes"].shape == (0, 4) and item["target"]["masks"].shape == (0, 20, 20)


def test_an_object_that_shrinking_leaves_no_pixel_of_is_dropped(photograph):
    picture = photograph.pictures[0]
    thin = rectangle(1, 0, 0, 1, 1)
    item = CocoImages(
        photograph._replace(pictures=[picture._replace(annotations=[thin, *picture.annotations])]), max_side=60
    )[0]
    assert item["dropped"] == 1 and item["target"]["labels"].tolist() == [1, 2]
    assert len(item["target"]["boxes"]) == len(item["target"]["masks"]) == 2


def test_the_transform_is_given_the_shrunk_picture(photograph):
    shapes = []

    def look(loaded):
        shapes.append((loaded["image"].shape, loaded["masks"].shape, loaded["boxes"].canvas_size))
        return loaded

    CocoImages(photograph, look, max_side=300)[0]
    assert shapes == [((3, 200, 300), (2, 200, 300), (200, 300))]


def test_a_strip_keeps_a_pixel_of_its_shorter_side(tmp_path):
    Image.new("RGB", (500, 1)).save(tmp_path / "a.png")
    data = CocoData([CocoPicture(1, str(tmp_path / "a.png"), 500, 1, [])], [CocoCategory(1, "bag")], "a.json", [], {})
    assert CocoImages(data, max_side=100)[0]["image"].shape == (3, 1, 100)


@pytest.mark.parametrize("max_side", [None, 300])
@pytest.mark.parametrize("fit", [(100, 120), (97, 400), (390, 1000)])
def test_masks_are_decoded_at_the_size_that_the_network_sees(photograph, max_side, fit):
    for flip in (0.0, 1.0):
        transform = build_detection_transform(1, flip=flip)
        item = CocoImages(photograph, transform, max_side=max_side, fit=fit)[0]
        whole = CocoImages(photograph, transform)[0]
        seen = fitted_size(*item["image"].shape[1:], *fit)
        assert item["target"]["masks"].shape == (2, *min(seen, tuple(item["image"].shape[1:])))
        masks = F.interpolate(whole["target"]["masks"][None], item["target"]["masks"].shape[1:], mode="nearest-exact")[
            0
        ]
        assert (item["target"]["masks"] != masks).float().mean() < 0.01
        assert max_side or torch.equal(item["image"], whole["image"])


def test_the_network_takes_masks_of_its_size(photograph):
    torch.manual_seed(0)
    network = MaskRCNN("resnet18", 3, norm="frozen", min_size=96, max_size=128, rpn_pre_nms_top_n_train=50).train()
    losses = []
    for images in (CocoImages(photograph, fit=(96, 128)), CocoImages(photograph)):
        torch.manual_seed(0)
        with torch.no_grad():
            found = network([images[0]["image"]], [images[0]["target"]])
            losses.append({name: loss.item() for name, loss in found.items()})
    assert losses[0].pop("loss_mask") == pytest.approx(losses[1].pop("loss_mask"), rel=0.01)
    assert losses[0] == losses[1]
    item = CocoImages(photograph, fit=(60, 128))[0]
    with pytest.raises(ValueError, match="masks have shape"):
        network([item["image"]], [item["target"]])


@pytest.mark.parametrize(("most", "side"), [(2**27, 500), (2 * 300 * 200, 300), (2 * 30 * 20, 250)])
def test_many_objects_share_what_their_masks_may_take(photograph, monkeypatch, most, side):
    monkeypatch.setattr(coco_images, "MOST_PIXELS", most)
    item = CocoImages(photograph, max_side=500)[0]
    assert item["image"].shape[2] == side and item["target"]["masks"].shape[1:] == item["image"].shape[1:]


# --- Randomness and workers


def test_augmentation_is_a_function_of_seed_epoch_and_slot(data):
    images = CocoImages(data, HEAVY, seed=1)

    def same(first, second):
        return torch.equal(first["image"], second["image"])

    item = images[3, 17, 2]
    torch.manual_seed(123)  # neither what was drawn before nor the global seed matters
    images[0]
    assert_equal_batches(collate_detection([images[3, 17, 2]]), collate_detection([item]))
    for other in (images[4, 17, 2], images[3, 18, 2], CocoImages(data, HEAVY, seed=2)[3, 17, 2]):
        assert not same(other, item)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    images[0, 0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_forked_workers_change_nothing(data):
    images = CocoImages(data, HEAVY, seed=1)
    alone, together = list(batches(loader_of(images, data))), list(batches(loader_of(images, data, 2)))
    assert len(alone) == len(together) == 4
    for first, second in zip(alone, together, strict=True):
        assert_equal_batches(first, second)


def test_persistent_spawned_workers_see_the_epoch(data):
    images = CocoImages(data, HEAVY)
    loader = loader_of(images, data, 1, multiprocessing_context="spawn", persistent_workers=True)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        assert_equal_batches(next(batches(loader)), next(batches(loader_of(images, data, epoch=epoch))))


def test_annotations_are_packed(data):
    # 20,000 objects of 20 numbers each: what a worker gets is a block of bytes, whatever is in it.
    polygon = [float(number) for number in range(20)]
    crowded = data.pictures[0]._replace(annotations=[rectangle(1, 0, 0, 1, 1)._replace(segmentation=[polygon])] * 20)
    images = CocoImages(data._replace(pictures=[crowded] * 1000))
    assert not [name for name, value in vars(images).items() if isinstance(value, list | tuple | dict)]
    assert images.picture(0) == images.picture(999) == crowded
    assert pickle.loads(pickle.dumps(images)).picture(500) == crowded


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_picture_stops_the_run_in_one_line_that_names_it(data, num_workers):
    path = data.pictures[3].path
    with open(path, "r+b") as file:
        file.truncate(200)
    with pytest.raises(InputError) as caught:
        list(batches(loader_of(CocoImages(data), data, num_workers)))
    assert path in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError):
        CocoImages(data)[3]


def test_split_broken_sorts_them_out(data):
    open(data.pictures[3].path, "w").close()
    pictures = [*data.pictures[:4], data.pictures[4]._replace(width=7), data.pictures[5]]
    readable, errors = split_broken(data._replace(pictures=pictures))
    assert readable == data._replace(pictures=[*data.pictures[:3], data.pictures[5]])
    assert [pictures[number].path in str(error) for number, error in zip((3, 4), errors, strict=True)] == [True] * 2


# --- Turned pictures


def save_turned(path, orientation):
    """A picture of 40 x 30 stored pixels, with one bright rectangle; returns it as stored."""
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[3:9, 2:18] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif)
    return Image.fromarray(stored)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_outlines_fit_whether_drawn_on_stored_or_on_upright_pixels(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    stored = save_turned(path, orientation)
    turn = TO_UPRIGHT.get(orientation)
    upright = stored if turn is None else stored.transpose(turn)
    tells = orientation in (5, 6, 7, 8)  # only a quarter turn shows in width and height
    cases = [(stored, False), (upright, True)] + [(stored, True), (upright, False)] * tells
    for picture, lies_upright in cases:
        rows, columns = np.nonzero(np.asarray(picture)[..., 0])
        box = [int(n) for n in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
        loaded = load_picture(CocoPicture(1, str(path), *picture.size, [rectangle(1, *box)]), upright=lies_upright)
        assert np.array_equal(loaded["image"].permute(1, 2, 0).numpy(), np.asarray(picture))
        assert torch.equal((loaded["image"][0] > 0).byte(), loaded["masks"][0].as_subclass(torch.Tensor))
        assert loaded["boxes"].tolist() == [box]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_wrong_width_and_height_in_the_file(tmp_path, orientation):
    path = tmp_path / "a.png"
    save_turned(path, orientation)
    wrong = [(41, 30), (80, 60), (30, 41)] + ([(30, 40)] if orientation < 5 else [])
    for width, height in wrong:
        with pytest.raises(InputError, match=rf"a.png: the picture has 40x30 .* says {width}x{height}"):
            read_as_annotated(path, width, height)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_masks_lie_on_the_objects_of_square_pictures(tmp_path, orientation, upright):
    """The square one follows what the file's other picture tells: in items, in `split_broken`."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[3:9, 2:18] = 255
    outlined = {False: pixels, True: np.asarray(Image.fromarray(pixels).transpose(TO_UPRIGHT[orientation]))}[upright]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "square.png", exif=exif)
    save_turned(tmp_path / "telling.png", 6)
    mask = np.asfortranarray(outlined[..., 0] // 255)
    code = coco_mask.encode(mask)
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": coco_mask.toBbox(code).tolist(), "area": int(mask.sum())}
    entry["segmentation"] = {"size": [40, 40], "counts": code["counts"].decode()}
    sizes = {"width": 30, "height": 40} if upright else {"width": 40, "height": 30}
    images = [
        {"id": 1, "file_name": "square.png", "width": 40, "height": 40},
        {"id": 2, "file_name": "telling.png", **sizes},
    ]
    content = {"images": images, "annotations": [entry], "categories": [{"id": 1, "name": "bag"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = for_training(read_coco(tmp_path / "a.json", tmp_path))
    assert data.upright is upright and len(data.notes) == 1
    assert split_broken(data) == (data, [])
    item = CocoImages(data)[0]
    assert torch.equal((item["image"][0] > 0).byte(), item["target"]["masks"][0])
    assert np.array_equal(np.asarray(read_as_annotated(tmp_path / "square.png", 40, 40, upright=upright)), outlined)


def test_a_picture_that_tells_of_no_view_is_taken_upright(tmp_path):
    stored = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_as_annotated(tmp_path / "a.png", 10, 10)), np.rot90(stored, -1))


def test_real_photographs(shared_data):
    folder = shared_data / "nuts_coco"
    data = for_training(read_coco(folder / "annotations" / "instances_val.json", folder / "images"))
    images = CocoImages(data)
    seen = 0
    for index, picture in enumerate(data.pictures):
        item = images[index]
        assert item["image"].shape == (3, picture.height, picture.width) and item["image_id"] == picture.id
        for box, mask in zip(item["target"]["boxes"], item["target"]["masks"], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(box.numpy() - tight).max() <= 1.5
            seen += 1
    assert seen == 38
