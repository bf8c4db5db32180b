import math
from pathlib import Path

import pytest
import torch
import torchvision.ops
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from core.layers import masks as module
from core.layers.masks import mask_boxes, paste_mask_chunks, paste_masks, project_masks


@pytest.fixture
def arrays(golden):
    return {name: torch.from_numpy(array) for name, array in golden("ops_detection").items()}


def random_boxes(count, size, seed=0, smallest=0.0):
    """(count, 4) boxes inside a picture of height, width."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size[1], size[0]])
    ends = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * limit  # (count, 2, 2)
    ends[:, 1] = (ends[:, 1] + smallest).minimum(limit)
    return ends.flatten(1)


def random_masks(count, side=28, seed=0):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ paste


def test_golden_paste(arrays):
    out = paste_masks(arrays["paste/masks"], arrays["paste/boxes"], (48, 40))
    torch.testing.assert_close(out, arrays["paste/out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(130, 150), (7, 400), (300, 16), (1, 1)])
@pytest.mark.parametrize("side", [28, 5, 1])
def test_paste_equals_torchvision(size, side):
    masks, boxes = random_masks(30, side), random_boxes(30, size)
    out = paste_masks(masks, boxes, size)
    assert out.shape == (30, 1, *size)
    torch.testing.assert_close(out, paste_masks_in_image(masks, boxes, size), rtol=1e-5, atol=1e-5)


def test_paste_boxes_beyond_the_picture():
    boxes = torch.tensor(
        [[-30, -20, 40, 35], [10, 20, 200, 300], [-50, -50, 250, 250], [5, 6, 5, 6], [49.5, 39.5, 50, 40]]
    )
    masks = random_masks(5)
    torch.testing.assert_close(
        paste_masks(masks, boxes, (40, 50)), paste_masks_in_image(masks, boxes, (40, 50)), rtol=1e-5, atol=1e-5
    )


def test_paste_boxes_that_miss_the_picture():
    boxes = torch.tensor([[-90, 5, -40, 20], [5, 70, 20, 90], [1e4, 1e4, 2e4, 2e4], [30, 30, 10, 10], [math.nan] * 4])
    masks = torch.ones(5, 1, 28, 28)
    for max_bytes in (1, 2**30):  # one by one, and together
        out = torch.cat(list(paste_mask_chunks(masks, boxes, (40, 50), max_bytes=max_bytes)))
        assert out.shape == (5, 40, 50) and not out[:4].any()
    assert not paste_masks(masks, boxes, (40, 50))[:4].any()


def test_paste_by_hand():
    """A mask of one pixel in a box 3 wide: with its border it is 3 pixels on 9, and grows and falls by thirds."""
    out = paste_masks(torch.ones(1, 1, 1, 1), torch.tensor([[3.0, 3, 6, 6]]), (12, 12))[0, 0]
    # centre 4.5, half 1.5 * 3: pixels 0 to 9, ten of them
    ramp = ((torch.arange(10) + 0.5) * 0.3 - 0.5).clamp(0, 2)
    ramp = torch.cat((1 - (ramp - 1).abs(), torch.zeros(2)))
    torch.testing.assert_close(out, ramp[:, None] * ramp[None])


def test_paste_nothing():
    masks, boxes = torch.zeros(0, 1, 28, 28), torch.zeros(0, 4)
    assert paste_masks(masks, boxes, (5, 6)).shape == (0, 1, 5, 6)
    assert list(paste_mask_chunks(masks, boxes, (5, 6))) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_paste_half_precision(dtype):
    masks, boxes = random_masks(6).to(dtype), random_boxes(6, (50, 60))
    out = paste_masks(masks, boxes, (50, 60))
    assert out.dtype == dtype
    assert torch.equal(out, paste_masks(masks.float(), boxes, (50, 60)).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(paste_masks(masks.float(), boxes, (50, 60)).to(dtype), out)


@pytest.mark.parametrize("max_bytes", [1, 200_000, 2**30])
@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_chunks_are_the_pasted_masks_in_order(max_bytes, threshold):
    size = (60, 80)
    masks, boxes = random_masks(25), random_boxes(25, size, smallest=5)
    chunks = list(paste_mask_chunks(masks, boxes, size, threshold, max_bytes))
    assert all(chunk.dtype == torch.bool and chunk.shape[1:] == size for chunk in chunks)
    expected = {1: 25, 200_000: 13, 2**30: 1}
    assert len(chunks) == expected[max_bytes]
    values = paste_masks_in_image(masks, boxes, size)[:, 0]
    clear = (values - threshold).abs() > 1e-5  # a rounding is a pixel there
    assert torch.equal(torch.cat(chunks) & clear, (values >= threshold) & clear)
    assert clear.float().mean() > 0.99


def test_chunks_at_24_megapixels_stay_small():
    """Two masks over all of a 6000 x 4000 picture: 7 bytes per pixel at a time, 160 MiB, not 4 per pixel and mask."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("peak memory is read from /proc")

    def resident(which):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(which)) // 1024

    masks, boxes = random_masks(2), torch.tensor([[0.0, 0, 6000, 4000]]).repeat(2, 1)
    reset.write_text("5")
    before = resident("VmRSS")
    count = sum(int(chunk[0, 2000, 3000]) + 1 for chunk in paste_mask_chunks(masks, boxes, (4000, 6000)))
    assert count >= 2
    assert resident("VmHWM") - before < 185


# --------------------------------------------------------------------------------------------------- mask targets


def test_golden_mask_target(arrays):
    boxes = torch.tensor([[3, 4, 30, 33], [10.2, 7.7, 41, 39]])
    out = project_masks(arrays["mask_target/gt"], boxes, torch.tensor([0, 1]), 14)
    torch.testing.assert_close(out, arrays["mask_target/out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_floats", [2**24, 2 * 90 * 120, 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_project_equals_torchvision(monkeypatch, dtype, max_floats):
    monkeypatch.setattr(module, "MAX_FLOATS", max_floats)
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(5, 90, 120, generator=generator) > 0.5).to(dtype)
    boxes = torch.cat(
        (random_boxes(30, (90, 120)), torch.tensor([[-20, -30, 140, 200], [3, 3, 3, 3], [200, 9, 300, 40]]))
    )
    matched = torch.randint(5, (33,), generator=generator)
    out = project_masks(masks, boxes, matched, 28)
    torch.testing.assert_close(out, project_masks_on_boxes(masks, boxes, matched, 28), rtol=1e-5, atol=1e-5)


def test_project_by_hand():
    masks = torch.zeros(2, 20, 20, dtype=torch.uint8)
    masks[1, :, 10:] = 1
    boxes = torch.tensor([[2.0, 2, 18, 18], [2, 2, 18, 18]])
    out = project_masks(masks, boxes, torch.tensor([1, 0]), 4)  # bins of 4 pixels, sampled at 2.5, 3.5, ... 17.5
    # 9.5 is half way between the pixels 9 and 10
    torch.testing.assert_close(out[0], torch.tensor([0, 0.125, 1, 1]).expand(4, 4))
    assert not out[1].any()


def test_project_nothing():
    masks = torch.zeros(2, 9, 9, dtype=torch.uint8)
    assert project_masks(masks, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 28).shape == (0, 28, 28)
    assert project_masks(masks[:0], torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 28).shape == (0, 28, 28)


def test_project_under_autocast_and_in_half_precision():
    masks = (torch.rand(3, 40, 50) > 0.5).to(torch.uint8)
    boxes, matched = random_boxes(8, (40, 50)).round(), torch.arange(8) % 3
    exact = project_masks(masks, boxes, matched, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project_masks(masks, boxes, matched, 14), exact)
    half = project_masks(masks, boxes.half(), matched, 14)  # whole pixels, so that the boxes are the same
    assert half.dtype == torch.float16 and torch.equal(half, exact.half())


@pytest.mark.parametrize("max_floats", [2**24, 1])
@pytest.mark.parametrize("count, numbers, wrong", [(0, [0, 0, 0], 3), (2, [0, 2, 1], 1), (2, [-1, 1, 5], 2)])
def test_boxes_of_objects_without_mask_are_refused(monkeypatch, count, numbers, wrong, max_floats):
    """The memory of their targets would be what it was before."""
    monkeypatch.setattr(module, "MAX_FLOATS", max_floats)
    masks = torch.zeros(count, 20, 30, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"matched has {wrong} of 3 numbers outside of the {count} masks"):
        project_masks(masks, random_boxes(3, (20, 30)), torch.tensor(numbers), 14)


def test_targets_of_whole_number_boxes_are_not_cut():
    masks = (torch.rand(2, 40, 50, generator=torch.Generator().manual_seed(0)) > 0.5).to(torch.uint8)
    boxes, matched = random_boxes(4, (40, 50), smallest=3).round(), torch.arange(4) % 2
    out = project_masks(masks, boxes.long(), matched, 7)
    assert out.dtype == torch.float32 and out.equal(project_masks(masks, boxes, matched, 7))


MASKS, SMALL = torch.rand(3, 20, 30), torch.rand(3, 1, 14, 14)
BOXES, NUMBERS = torch.tensor([[2.0, 3, 12, 15]]).repeat(3, 1), torch.arange(3)
WITH_SCORE = torch.cat((BOXES, torch.ones(3, 1)), dim=1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: project_masks(MASKS, WITH_SCORE, NUMBERS, 14), "boxes have shape (3, 5), expected (N, 4)"),
        (lambda: project_masks(MASKS, BOXES, NUMBERS[:2], 14), "matched has shape (2,), expected (3,)"),
        (lambda: project_masks(MASKS, BOXES[:2], NUMBERS, 14), "matched has shape (3,), expected (2,)"),
        (lambda: project_masks(MASKS[0], BOXES, NUMBERS, 14), "masks have shape (20, 30), expected (G, H, W)"),
        (lambda: paste_masks(SMALL[:2], BOXES, (20, 30)), "boxes have shape (3, 4), expected (2, 4)"),
        (lambda: paste_masks(SMALL, BOXES[:2], (20, 30)), "boxes have shape (2, 4), expected (3, 4)"),
        (lambda: paste_masks(SMALL, WITH_SCORE, (20, 30)), "boxes have shape (3, 5), expected (3, 4)"),
        (lambda: paste_masks(SMALL[:, 0], BOXES, (20, 30)), "masks have shape (3, 14, 14), expected (N, 1, M, M)"),
        (lambda: paste_masks(SMALL[..., :9], BOXES, (20, 30)), "masks have shape (3, 1, 14, 9), expected (N, 1, M, M)"),
        (lambda: list(paste_mask_chunks(SMALL[:2], BOXES, (20, 30))), "boxes have shape (3, 4), expected (2, 4)"),
        (lambda: mask_boxes(SMALL), "masks have shape (3, 1, 14, 14), expected (N, H, W)"),
    ],
)
def test_other_shapes_are_refused_by_name(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------------- mask boxes


def test_mask_boxes_by_hand():
    masks = torch.zeros(4, 7, 9, dtype=torch.uint8)
    masks[0, 2:5, 3:8] = 1
    masks[1, 6, 8] = 255
    masks[2, 0, 0] = masks[2, 6, 8] = 1
    expected = torch.tensor([[3.0, 2, 8, 5], [8, 6, 9, 7], [0, 0, 9, 7], [0, 0, 0, 0]])
    for dtype in (torch.uint8, torch.bool, torch.float32):
        out = mask_boxes(masks.to(dtype))
        assert out.dtype == torch.float32 and torch.equal(out, expected)
    assert mask_boxes(masks[:0]).shape == (0, 4)


def test_mask_boxes_equal_torchvision(arrays):
    masks = arrays["masks_to_boxes/masks"]
    past = torch.tensor([0, 0, 1, 1])
    assert torch.equal(mask_boxes(masks), arrays["masks_to_boxes/boxes"] + past)
    masks = torch.rand(20, 30, 40, generator=torch.Generator().manual_seed(0)) > 0.997
    masks = masks[masks.flatten(1).any(dim=1)]
    assert torch.equal(mask_boxes(masks), torchvision.ops.masks_to_boxes(masks) + past)
