"""Box and mask go where the picture goes, through every operation; on images the policy equals torchvision's."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from core.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_POLICY,
    IMAGENET_STD,
    AutoAugment,
    HideBackground,
    RandomPatch,
    apply_operation,
    build_transform,
    denormalise,
)
from core.errors import InputError

HEIGHT, WIDTH = 96, 64


def picture(seed=0, height=HEIGHT, width=WIDTH):
    noise = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return tv_tensors.Image(noise)


def make_sample(box=(20, 30, 44, 70), height=HEIGHT, width=WIDTH):
    """A picture whose object is a rectangle, in white on black and as a mask."""
    left, top, right, bottom = box
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 1
    boxes = tv_tensors.BoundingBoxes([list(box)], format="XYXY", canvas_size=(height, width), dtype=torch.float32)
    return {"image": tv_tensors.Image(mask.expand(3, -1, -1) * 255), "box": boxes, "mask": tv_tensors.Mask(mask)}


def box_of(mask):
    """Half-open box around the nonzero pixels of (1, H, W)."""
    rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def assert_together(sample, tight, pixels=1.0):
    """The box encloses the mask, tightly or not, and the mask is where the object's pixels are."""
    found, box = box_of(sample["mask"]), sample["box"].as_subclass(torch.Tensor)[0]
    assert (box[:2] <= found[:2] + pixels).all() and (box[2:] >= found[2:] - pixels).all(), (box, found)
    if tight:
        assert (box - found).abs().max() <= pixels, (box, found)
    height, width = sample["mask"].shape[-2:]
    assert tuple(sample["box"].canvas_size) == (height, width) == tuple(sample["image"].shape[-2:])


def seeds(count):
    for seed in range(count):
        torch.manual_seed(seed)
        yield seed


@pytest.fixture(autouse=True)
def keep_generator():
    with torch.random.fork_rng(devices=[]):
        yield


def test_evaluation_resizes_and_normalises_and_the_rest_follows():
    sample = build_transform(48, 128, training=False)(make_sample())
    assert sample["image"].shape == (3, 48, 128) and sample["image"].dtype == torch.float32
    assert sample["box"].tolist() == [[40, 15, 88, 35]]  # x doubled, y halved
    assert torch.equal(box_of(sample["mask"]), torch.tensor([40.0, 15, 88, 35]))
    white = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(sample["image"][:, 25, 64], white)
    assert torch.allclose(denormalise(sample["image"])[:, 25, 64], torch.ones(3), atol=1e-6)


def test_denormalise_undoes_normalise():
    image = build_transform(HEIGHT, WIDTH, training=False)({"image": picture()})["image"]
    assert torch.allclose(denormalise(image[None])[0], picture() / 255, atol=1e-6)


def test_flip_worked_out_by_hand():
    sample = build_transform(HEIGHT, WIDTH, training=True, flip=1.0, pad=0)(make_sample())
    assert sample["box"].tolist() == [[WIDTH - 44, 30, WIDTH - 20, 70]]
    assert torch.equal(box_of(sample["mask"]), sample["box"].as_subclass(torch.Tensor)[0])


def test_pad_and_crop_shift_picture_box_and_mask_by_at_most_the_padding():
    transform = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=10)
    shifts = set()
    for _ in seeds(60):
        sample = transform(make_sample())
        assert_together(sample, tight=True, pixels=0)
        assert torch.equal(denormalise(sample["image"])[:1] > 0.5, sample["mask"].bool())
        shifts.add(tuple((sample["box"][0, :2] - torch.tensor([20.0, 30.0])).tolist()))
    assert len(shifts) > 40 and max(abs(shift) for pair in shifts for shift in pair) == 10


def test_the_whole_training_pipeline_keeps_them_together():
    rare = {"translation": 0.5, "color_jitter": 0.3, "random_patch": 0.5, "cutout": 0.3, "erasing_value": "noise"}
    transform = build_transform(80, 80, training=True, autoaugment=True, blur=0.3, erasing=0.7, **rare)
    for _ in seeds(60):
        assert_together(transform(make_sample()), tight=False, pixels=2)


@pytest.mark.parametrize("strength", [-30.0, -8.0, 0.0, 17.0, 30.0])
def test_rotation(strength):
    assert_operation_moves_all_three("rotate", strength, tight=False)


@pytest.mark.parametrize("strength", [-0.3, 0.0, 0.1667, 0.3])
def test_shear(strength):
    assert_operation_moves_all_three("shear_x", strength, tight=False)


COLOURS = {
    "color": 0.9,
    "contrast": -0.9,
    "sharpness": 0.7,
    "posterize": 4,
    "solarize": 100.0,
    "autocontrast": None,
    "equalize": None,
    "invert": None,
}


@pytest.mark.parametrize("name", COLOURS)
def test_colour_operations_leave_box_and_mask(name):
    assert_operation_moves_all_three(name, COLOURS[name], tight=True, pixels=0)
    image = functional.adjust_brightness(picture(), 0.5)  # so that autocontrast has something to do
    assert not torch.equal(apply_operation(image, name, COLOURS[name]), image)


def assert_operation_moves_all_three(name, strength, tight, pixels=1.0):
    before = make_sample()
    after = {key: apply_operation(value, name, strength, fill=0) for key, value in before.items()}
    assert [type(value) for value in after.values()] == [type(value) for value in before.values()]
    assert_together(after, tight, pixels)
    if name in ("rotate", "shear_x"):
        # The image is bilinear and the mask nearest: they agree but for the object's border.
        assert ((after["image"][:1] > 127) != after["mask"].bool()).float().mean() < 0.01
        # The box is the one around the moved corners: not larger than the mask's by more than a pixel for a rectangle.
        assert (after["box"].as_subclass(torch.Tensor)[0] - box_of(after["mask"])).abs().max() <= 1.5
    else:
        assert torch.equal(after["mask"], before["mask"])


def test_policy_on_images_equals_torchvision():
    ours = AutoAugment(fill=128)
    theirs = v2.AutoAugment(interpolation=v2.InterpolationMode.BILINEAR, fill=128)
    changed = 0
    for seed in seeds(400):
        image = picture(seed % 7, 24, 16)
        expected = theirs(image)
        torch.manual_seed(seed)
        got = ours({"image": image, **{key: make_sample()[key] for key in ("box", "mask")}})["image"]
        assert torch.equal(got, expected), seed
        changed += not torch.equal(got, image)
    assert changed > 300


def test_policy_has_25_sub_policies_and_draws_them_all():
    assert len(IMAGENET_POLICY) == 25
    drawn = {name for _ in seeds(200) for name, _ in AutoAugment().make_params([])["operations"]}
    assert drawn == {"rotate", "shear_x", *COLOURS}


def test_a_box_may_leave_the_picture():
    sample = make_sample((0, 0, 4, 4))
    rotated = {key: apply_operation(value, "rotate", 30.0) for key, value in sample.items()}
    box = rotated["box"].as_subclass(torch.Tensor)[0]
    assert ((box[2:] - box[:2]).prod() == 0) and not rotated["mask"].any()
    assert (box >= 0).all()
    transform = build_transform(HEIGHT, WIDTH, training=True, autoaugment=True)
    for _ in seeds(40):
        left, top, right, bottom = transform(make_sample((0, 0, 2, 2)))["box"][0].tolist()
        assert 0 <= left <= right <= WIDTH and 0 <= top <= bottom <= HEIGHT


def test_erasing_hides_pixels_and_leaves_box_and_mask():
    plain = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0)(make_sample())
    transform = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0, erasing=1.0)
    areas = []
    for _ in seeds(50):
        sample = transform(make_sample())
        assert torch.equal(sample["box"], plain["box"]) and torch.equal(sample["mask"], plain["mask"])
        changed = (sample["image"] != plain["image"]).any(0)
        assert (sample["image"][:, changed] == 0).all()  # the mean colour after normalisation
        areas.append(changed.float().mean().item())
    assert min(areas) > 0.01 and 0.25 < max(areas) < 0.42


AUGMENTATIONS = ("flip", "translation", "color_jitter", "random_patch", "blur", "erasing", "cutout", "hide_background")


@pytest.mark.parametrize("size", [(6, 6), (1, 7), (2, 3), (13, 5)])
def test_tiny_pictures_can_be_augmented(size):
    everything = dict.fromkeys(AUGMENTATIONS, 1.0)
    transform = build_transform(*size, training=True, pad=10, autoaugment=True, **everything)
    for seed in range(20):
        torch.manual_seed(seed)
        for stored in ((1, 1), (6, 6), (3, 40)):
            image = transform(make_sample((0, 0, 1, 1), *stored))["image"]
            assert image.shape == (3, *size) and image.isfinite().all()


def test_a_single_pixel_is_refused():
    with pytest.raises(InputError, match="pictures of a single pixel"):
        build_transform(1, 1, training=False)


def test_erasing_and_blur_happen_as_often_as_asked():
    plain = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0)({"image": picture()})["image"]
    for option in ("erasing", "blur"):
        transform = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0, **{option: 0.3})
        changed = [not torch.equal(transform({"image": picture()})["image"], plain) for _ in seeds(300)]
        assert 0.2 < sum(changed) / 300 < 0.4


@pytest.mark.parametrize(("value", "wanted"), [("mean", IMAGENET_MEAN), ("zero", (0.0, 0.0, 0.0)), ("noise", None)])
def test_cutout_is_a_square_of_a_twelfth_of_the_area(value, wanted):
    sample = {**make_sample(), "image": picture()}
    plain = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0)(sample)
    transform = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0, cutout=1.0, erasing_value=value)
    side, places = round((HEIGHT * WIDTH / 12) ** 0.5), set()  # 23
    for _ in seeds(20):
        cut = transform(sample)
        assert torch.equal(cut["box"], plain["box"]) and torch.equal(cut["mask"], plain["mask"])
        rows, columns = torch.where((cut["image"] != plain["image"]).any(0))
        top, left = int(rows.min()), int(columns.min())
        assert int(rows.max()) - top + 1 == int(columns.max()) - left + 1 == side
        square = cut["image"][:, top : top + side, left : left + side]
        if wanted is None:
            assert abs(square.mean()) < 0.2 and 0.9 < square.std() < 1.1
        else:
            assert torch.allclose(denormalise(square), torch.tensor(wanted)[:, None, None].expand_as(square), atol=1e-6)
        places.add((top, left))
    assert len(places) > 15


def test_a_patch_is_covered_by_a_part_of_the_same_picture():
    image, areas = picture(), []
    places = {tuple(color) for color in image.flatten(1).T.tolist()}
    for _ in seeds(30):
        patched = RandomPatch(1.0)(image)
        changed = (patched != image).any(0)
        assert {tuple(color) for color in patched.flatten(1).T.tolist()} <= places
        areas.append(changed.float().mean().item())
    assert min(areas) < 0.1 and 0.3 < max(areas) < 0.51
    assert torch.equal(image, picture())  # the sample itself is as it was
    assert torch.equal(RandomPatch(0.0)(image), image)


def test_translation_is_a_crop_of_the_picture_an_eighth_larger():
    transform = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0, translation=1.0)
    corners = set()
    for _ in seeds(40):
        sample = transform(make_sample())
        assert tuple(sample["image"].shape[-2:]) == (HEIGHT, WIDTH)
        assert_together(sample, tight=True, pixels=1)
        left, top, right, bottom = sample["box"][0].tolist()
        assert (right - left, bottom - top) == (1.125 * 24, 1.125 * 40)
        assert -8 <= left - 1.125 * 20 <= 0 and -12 <= top - 1.125 * 30 <= 0
        corners.add((left, top))
    assert len(corners) > 30


def test_new_augmentations_happen_as_often_as_asked_and_leave_box_and_mask():
    sample = {**make_sample(), "image": picture()}
    plain = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0)(sample)
    for option in ("color_jitter", "random_patch", "cutout", "translation"):
        transform = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0, **{option: 0.3})
        changed = 0
        for _ in seeds(100):
            got = transform(sample)
            changed += not torch.equal(got["image"], plain["image"])
            if option != "translation":
                assert torch.equal(got["box"], plain["box"]) and torch.equal(got["mask"], plain["mask"])
        assert 15 < changed < 45, option


def test_training_without_any_augmentation_is_evaluation():
    sample = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0)(make_sample())
    expected = build_transform(HEIGHT, WIDTH, training=False)(make_sample())
    assert all(torch.equal(sample[key], expected[key]) for key in expected)


def test_what_is_hidden_is_the_background():
    sample = make_sample()
    plain = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0)(sample)
    hidden = build_transform(HEIGHT, WIDTH, training=True, flip=0.0, pad=0, hide_background=1.0)(sample)
    inside = sample["mask"].expand(3, -1, -1) > 0
    assert torch.equal(hidden["image"][inside], plain["image"][inside])
    assert (hidden["image"][~inside] == 0).all() and (plain["image"][~inside] != 0).all()
    assert torch.equal(hidden["box"], plain["box"]) and torch.equal(hidden["mask"], plain["mask"])


def test_an_object_that_has_left_the_picture_takes_nothing_with_it():
    sample = {**make_sample(), "mask": tv_tensors.Mask(torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8))}
    assert HideBackground(1.0)(sample)["image"] is sample["image"]


def test_hiding_draws_one_number_whatever_the_sample():
    following = set()
    for p in (0.0, 1.0):
        torch.manual_seed(0)
        HideBackground(p)(make_sample())
        following.add(float(torch.rand(())))
    assert len(following) == 1
