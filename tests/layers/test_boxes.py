import math

import pytest
import torch
import torchvision.ops
from torchvision.models.detection._utils import BoxCoder, Matcher

from core.layers import boxes as boxes_module
from core.layers.boxes import (
    batched_nms,
    box_area,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    large_enough,
    match,
    nms,
)

WEIGHTS = {"ones": (1.0, 1.0, 1.0, 1.0), "heads": (10.0, 10.0, 5.0, 5.0)}


@pytest.fixture
def arrays(golden):
    return {name: torch.from_numpy(array) for name, array in golden("ops_detection").items()}


def random_boxes(count, seed=0, spread=300, size=150):
    """Boxes (count, 4) whose corners are not negative, and distinct scores (count,)."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * spread
    boxes = torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * size), dim=1)
    return boxes, torch.randperm(count, generator=generator) / count


def crowded_boxes(count, seed=0, centres=12):
    """As a trained network proposes them: a few objects, each with many boxes around it."""
    generator = torch.Generator().manual_seed(seed)
    objects, _ = random_boxes(centres, seed, spread=600, size=200)
    chosen = objects[torch.randint(centres, (count,), generator=generator)]
    jitter = 8 * torch.randn(count, 4, generator=generator)
    return (chosen + jitter).clamp(min=0), torch.randperm(count, generator=generator) / count


def nasty_boxes(count, seed=0):
    """Whole-pixel boxes, some outside the picture, without area, reversed, equal, infinite, NaN; scores that tie."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(-4, 12, (count, 2), generator=generator).float()
    boxes = torch.cat((corner, corner + torch.randint(-2, 12, (count, 2), generator=generator)), dim=1)
    boxes[::17] = torch.tensor([2.0, 3.0, 11.0, 12.0])
    boxes[5::29] = math.nan
    boxes[7::31, 2:] = math.inf
    scores = torch.randint(0, 6, (count,), generator=generator) / 5
    scores[3::23] = math.nan
    scores[4::37] = -math.inf
    return boxes, scores


# ------------------------------------------------------------------------------------ area, IoU, clipping, small boxes


def test_area_iou_clip_and_small_golden(arrays):
    boxes = arrays["nms/boxes"]
    torch.testing.assert_close(box_iou(boxes[:10], boxes[10:25]), arrays["box_iou"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip_boxes(boxes, (50, 70)), arrays["clip/boxes"], rtol=0, atol=0)
    assert large_enough(boxes, 10).nonzero()[:, 0].tolist() == arrays["remove_small/keep_min_10"].tolist()


@pytest.mark.parametrize("make", [random_boxes, nasty_boxes])
def test_area_iou_clip_and_small_against_torchvision(make):
    (a, _), (b, _) = make(50, seed=1), make(70, seed=2)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(box_area(a), torchvision.ops.box_area(a), **same)
    torch.testing.assert_close(box_iou(a, b), torchvision.ops.box_iou(a, b), **same)
    torch.testing.assert_close(clip_boxes(a, (9, 7)), torchvision.ops.clip_boxes_to_image(a, (9, 7)), **same)
    assert a[large_enough(a, 4.0)].equal(a[torchvision.ops.remove_small_boxes(a, 4.0)])


def test_area_iou_clip_and_small_by_hand():
    a = torch.tensor([[0.0, 0.0, 4.0, 2.0], [1.0, 1.0, 1.0, 5.0]])
    b = torch.tensor([[2.0, 0.0, 6.0, 2.0], [0.0, 0.0, 4.0, 2.0], [4.0, 0.0, 8.0, 2.0], [1.0, 1.0, 1.0, 5.0]])
    assert box_area(a).tolist() == [8.0, 0.0]
    expected = [[4 / 12, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, math.nan]]  # edges that only touch share nothing
    torch.testing.assert_close(box_iou(a, b), torch.tensor(expected), equal_nan=True)
    clipped = clip_boxes(torch.tensor([[-3.0, -1.0, 12.0, 9.0], [20.0, 20.0, 30.0, 30.0]]), (8, 10))
    assert clipped.tolist() == [[0.0, 0.0, 10.0, 8.0], [10.0, 8.0, 10.0, 8.0]]
    assert large_enough(a, 2.0).tolist() == [True, False] and large_enough(a, 2.5).tolist() == [False, False]


def test_empty_boxes():
    none, some = torch.zeros(0, 4), torch.rand(3, 4)
    assert box_area(none).shape == (0,) and clip_boxes(none, (5, 5)).shape == (0, 4)
    assert box_iou(none, some).shape == (0, 3) and box_iou(some, none).shape == (3, 0)
    assert large_enough(none, 1.0).shape == (0,)


def test_clipping_and_small_boxes_of_a_batch():
    boxes = torch.randn(2, 5, 4) * 20
    assert clip_boxes(boxes, (8, 9)).equal(torch.stack([clip_boxes(part, (8, 9)) for part in boxes]))
    assert large_enough(boxes, 3.0).equal(torch.stack([large_enough(part, 3.0) for part in boxes]))


def test_iou_and_clipping_gradient():
    a = torch.tensor([[0.0, 0.0, 4.0, 3.0], [2.0, 1.0, 7.0, 6.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 0.5, 5.0, 4.0], [3.0, 2.0, 9.0, 5.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(box_iou, (a, b))
    assert torch.autograd.gradcheck(lambda boxes: clip_boxes(boxes, (5, 8)), (a + 0.3,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    boxes = torch.tensor([[0.0, 0.0, 600.0, 600.0], [0.0, 0.0, 600.0, 300.0]]).to(dtype)
    area = box_area(boxes)
    assert area.dtype == torch.float32 and area.isfinite().all()  # 360,000 is beyond float16
    iou = box_iou(boxes, boxes)
    assert iou.dtype == dtype
    assert iou.equal(box_iou(boxes.float(), boxes.float()).to(dtype))
    assert nms(boxes, torch.tensor([0.5, 0.9], dtype=dtype), 0.4).tolist() == [1]
    assert box_iou(boxes.long(), boxes.long()).dtype == torch.float32


# -------------------------------------------------------------------------------------------------------------- coding


@pytest.mark.parametrize("name", WEIGHTS)
def test_coding_golden(arrays, name):
    reference, proposals = arrays["nms/boxes"][:20], arrays["box_coder/proposals"]
    encoded = encode_boxes(reference, proposals, WEIGHTS[name])
    torch.testing.assert_close(encoded, arrays[f"box_coder_{name}/encoded"], rtol=1e-5, atol=1e-5)
    decoded = decode_boxes(arrays["box_coder/codes"], proposals, WEIGHTS[name])
    torch.testing.assert_close(decoded, arrays[f"box_coder_{name}/decoded"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_coding_against_torchvision(name):
    torch.manual_seed(0)
    coder = BoxCoder(WEIGHTS[name])
    (reference, _), (proposals, _) = random_boxes(200, seed=1), random_boxes(200, seed=2)
    expected = coder.encode_single(reference, proposals)
    torch.testing.assert_close(encode_boxes(reference, proposals, WEIGHTS[name]), expected, rtol=0, atol=0)
    deltas = 4 * torch.randn(200, 12)
    deltas[::9, 2:4] = 1e4  # clipped, not infinite
    decoded = decode_boxes(deltas, proposals, WEIGHTS[name])
    torch.testing.assert_close(decoded, coder.decode(deltas, [proposals]), rtol=0, atol=0)
    assert decoded.isfinite().all()


def test_coding_by_hand_and_back():
    proposal = torch.tensor([[10.0, 20.0, 30.0, 30.0]])  # centre (20, 25), size 20 x 10
    reference = torch.tensor([[15.0, 20.0, 55.0, 25.0]])  # centre (35, 22.5), size 40 x 5
    expected = torch.tensor([[0.75, -0.25, math.log(2), -math.log(2)]])
    torch.testing.assert_close(encode_boxes(reference, proposal), expected)
    weighted = encode_boxes(reference, proposal, WEIGHTS["heads"])
    torch.testing.assert_close(weighted, expected * torch.tensor(WEIGHTS["heads"]))
    torch.testing.assert_close(decode_boxes(weighted, proposal, WEIGHTS["heads"]), reference[:, None])
    wild = decode_boxes(torch.tensor([[0.0, 0.0, 90.0, 0.0]]), proposal)[0, 0]
    torch.testing.assert_close(wild[2] - wild[0], torch.tensor(20 * 1000 / 16))


def test_coding_of_nothing():
    assert encode_boxes(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert decode_boxes(torch.zeros(0, 12), torch.zeros(0, 4)).shape == (0, 3, 4)


def test_coding_gradient():
    torch.manual_seed(0)
    (reference, _), (proposals, _) = random_boxes(4, seed=1), random_boxes(4, seed=2)
    reference, proposals = reference.double().requires_grad_(), proposals.double().requires_grad_()
    deltas = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: encode_boxes(a, b, WEIGHTS["heads"]), (reference, proposals))
    assert torch.autograd.gradcheck(lambda a, b: decode_boxes(a, b, WEIGHTS["heads"]), (deltas, proposals))


def test_half_precision_deltas_on_float32_proposals_give_float32_boxes():
    torch.manual_seed(0)
    proposals, _ = random_boxes(20, spread=2000)
    deltas = torch.randn(20, 4).half()
    boxes = decode_boxes(deltas, proposals)
    assert boxes.dtype == torch.float32 and boxes.equal(decode_boxes(deltas.float(), proposals))
    assert decode_boxes(deltas, proposals.half()).dtype == torch.float16
    assert encode_boxes(proposals.half(), proposals.half()).dtype == torch.float16


# ------------------------------------------------------------------------------------------------------------ matching


def test_match_golden(arrays):
    iou = arrays["matcher/iou"]
    assert match(iou, 0.7, 0.3, True).tolist() == arrays["matcher/high_0.7_low_0.3_allow_low"].tolist()
    assert match(iou, 0.5, 0.5).tolist() == arrays["matcher/high_0.5_low_0.5"].tolist()


@pytest.mark.parametrize("make", [random_boxes, nasty_boxes])
@pytest.mark.parametrize("allow_low_quality", [True, False])
def test_match_against_torchvision(make, allow_low_quality):
    iou = box_iou(make(9, seed=1)[0], make(300, seed=2)[0])
    expected = Matcher(0.6, 0.3, allow_low_quality)(iou)
    assert match(iou, 0.6, 0.3, allow_low_quality).equal(expected)


def test_match_by_hand():
    iou = torch.tensor([[0.7, 0.3, 0.29, 0.1, 0.0], [0.1, 0.5, 0.29, 0.2, 0.2]])
    assert match(iou, 0.7, 0.3).tolist() == [0, -2, -1, -1, -1]  # both thresholds belong to the upper side
    assert match(iou, 0.7, 0.3, True).tolist() == [0, 1, -1, -1, -1]
    # The second true box is best served, twice, by proposals that the first one covers better: they stay the first's.
    iou = torch.tensor([[0.9, 0.6, 0.4], [0.2, 0.2, 0.1]])
    assert match(iou, 0.7, 0.3, True).tolist() == [0, 0, -2]


def test_match_without_true_boxes_or_proposals():
    assert match(torch.zeros(0, 3), 0.7, 0.3, True).tolist() == [-1, -1, -1]
    assert match(torch.zeros(2, 0), 0.7, 0.3, True).shape == (0,)
    assert match(torch.zeros(0, 0), 0.7, 0.3, True).dtype == torch.int64


# --------------------------------------------------------------------------------------------- non-maximum suppression


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms_golden(arrays, threshold):
    boxes, scores, classes = arrays["nms/boxes"], arrays["nms/scores"], arrays["nms/classes"]
    assert nms(boxes, scores, threshold).tolist() == arrays[f"nms/keep_iou_{threshold}"].tolist()
    expected = arrays[f"batched_nms/keep_iou_{threshold}"].tolist()
    assert batched_nms(boxes, scores, classes, threshold).tolist() == expected


@pytest.fixture(params=[1, 7, 64, 1024])
def block(request, monkeypatch):
    """Every size of block gives the same; 1024 is that of the other devices."""
    monkeypatch.setattr(boxes_module, "BLOCK_CPU", request.param)


@pytest.mark.parametrize("make", [random_boxes, crowded_boxes, nasty_boxes])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 700])
def test_nms_against_torchvision(block, make, count):
    boxes, scores = make(count, seed=count)
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
        assert nms(boxes, scores, threshold).equal(torchvision.ops.nms(boxes, scores, threshold))
    boxes, scores = boxes.double(), scores.double()
    assert nms(boxes, scores, 0.3).equal(torchvision.ops.nms(boxes, scores, 0.3))


@pytest.mark.parametrize("make", [random_boxes, crowded_boxes])
@pytest.mark.parametrize("count, groups", [(1, 1), (300, 1), (300, 5), (900, 90), (1000, 300), (1001, 300), (3000, 5)])
def test_batched_nms_against_torchvision(make, count, groups):
    boxes, scores = make(count, seed=count)
    index = torch.randint(groups, (count,), generator=torch.Generator().manual_seed(1))
    for threshold in (0.3, 0.5, 0.7):
        expected = torchvision.ops.batched_nms(boxes, scores, index, threshold)
        assert batched_nms(boxes, scores, index, threshold).equal(expected)


def test_batched_nms_of_groups_of_every_size(block):
    """One group that goes on over many blocks, small ones that share a block, ids that are neither dense nor sorted."""
    boxes, scores = crowded_boxes(1500)
    groups = torch.cat((torch.full((900,), 7), torch.arange(100, 200), torch.tensor([3, -5]).repeat(250)))
    groups = groups[torch.randperm(1500, generator=torch.Generator().manual_seed(0))]
    expected = torchvision.ops.batched_nms(boxes, scores, groups, 0.5)
    assert batched_nms(boxes, scores, groups, 0.5).equal(expected)


@pytest.mark.parametrize("count", [400, 1200])
def test_batched_nms_of_nasty_boxes_is_nms_of_each_group(count):
    """Also with coordinates below zero, where torchvision's shifted groups may touch; ties are settled by order."""
    boxes, scores = nasty_boxes(count)
    boxes = boxes.nan_to_num(nan=0.0, posinf=20.0)
    groups = torch.arange(count) % 3
    keep = torch.cat([
        (groups == group).nonzero()[:, 0][nms(boxes[groups == group], scores[groups == group], 0.5)]
        for group in range(3)
    ]).sort().values  # fmt: skip
    keep = keep[scores[keep].argsort(descending=True, stable=True)]
    assert batched_nms(boxes, scores, groups, 0.5).equal(keep)


def test_batched_nms_does_not_let_groups_touch():
    """Shifting the groups apart by the largest coordinate would lay the second box onto the first."""
    boxes = torch.tensor([[8.0, 8.0, 9.0, 9.0], [-2.0, -2.0, -1.0, -1.0]])
    assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


def test_batched_nms_rounds_as_torchvision_does():
    """An IoU of 0.7002 becomes 0.7 where group 900 begins, at 1.8 million pixels; above 1,000 boxes nothing moves."""
    boxes = torch.tensor([[0.0, 0.0, 100.0, 1.0], [0.0, 0.0, 70.02, 1.0], [2000.0, 2000.0, 2001.0, 2001.0]])
    scores, groups = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([900, 900, 0])
    assert nms(boxes, scores, 0.7).tolist() == [0, 2]
    assert torchvision.ops.batched_nms(boxes, scores, groups, 0.7).tolist() == [0, 1, 2]
    assert batched_nms(boxes, scores, groups, 0.7).tolist() == [0, 1, 2]
    boxes = torch.cat((boxes, boxes[2:].repeat(1000, 1)))
    scores, groups = torch.cat((scores, torch.zeros(1000))), torch.cat((groups, torch.zeros(1000, dtype=torch.int64)))
    assert torchvision.ops.batched_nms(boxes, scores, groups, 0.7).tolist() == [0, 2]
    assert batched_nms(boxes, scores, groups, 0.7).tolist() == [0, 2]


def test_nms_by_hand():
    boxes = torch.tensor([
        [0.0, 0.0, 10.0, 10.0],
        [0.0, 0.0, 10.0, 6.0],  # IoU 0.6 with the first, 2/3 with the third
        [0.0, 0.0, 10.0, 4.0],  # IoU 0.4 with the first
        [0.0, 0.0, 10.0, 10.0],  # the first again
        [50.0, 50.0, 60.0, 60.0],
    ])  # fmt: skip
    scores = torch.tensor([0.9, 0.8, 0.7, 0.9, 0.1])
    assert nms(boxes, scores, 0.5).tolist() == [0, 2, 4]  # what is struck out strikes out nothing
    assert nms(boxes, scores, 0.65).tolist() == [0, 1, 4]
    assert nms(boxes, scores, 0.39).tolist() == [0, 4]
    assert batched_nms(boxes, scores, torch.tensor([0, 0, 0, 1, 1]), 0.5).tolist() == [0, 3, 2, 4]
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7, math.nan, 0.1]), 0.5).tolist() == [3, 2, 4]


@pytest.mark.parametrize("inner, threshold", [(3, 0.3), (6, 0.6), (7, 0.7), (1, 0.1), (9, 0.9), (5, 0.5), (2, 0.2)])
def test_nms_compares_with_the_threshold_itself(inner, threshold):
    """3/10 in float32 is larger than 0.3, 7/10 smaller than 0.7: rounding the threshold as well would hide that."""
    boxes, scores = torch.tensor([[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, inner, 1.0]]), torch.tensor([0.9, 0.8])
    expected = [0, 1] if (torch.tensor(float(inner)) / 10).item() <= threshold else [0]
    assert nms(boxes, scores, threshold).tolist() == expected
    assert torchvision.ops.nms(boxes, scores, threshold).tolist() == expected


def test_nms_of_a_chain():
    """Each box overlaps only the next, so every second one stays: the longest way for the choice inside a block."""
    start = 4.0 * torch.arange(200)
    boxes = torch.stack((start, torch.zeros(200), start + 10, torch.ones(200)), dim=1)
    scores = torch.arange(200, 0, -1).float()
    assert nms(boxes, scores, 0.4).tolist() == list(range(0, 200, 2))


def test_nms_of_one_spot():
    boxes = torch.tensor([[5.0, 5.0, 9.0, 9.0]]).repeat(300, 1)
    assert nms(boxes, torch.zeros(300), 0.5).tolist() == [0]
    points = torch.tensor([[5.0, 5.0, 5.0, 5.0]]).repeat(300, 1)
    assert nms(points, torch.zeros(300), 0.5).tolist() == list(range(300))  # 0 / 0 overlaps nothing


def test_nms_of_nothing():
    none, scores = torch.zeros(0, 4), torch.zeros(0)
    for keep in (nms(none, scores, 0.5), batched_nms(none, scores, torch.zeros(0, dtype=torch.int64), 0.5)):
        assert keep.shape == (0,) and keep.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nms_in_half_precision_is_that_of_the_same_numbers_in_float32(dtype):
    boxes, scores = crowded_boxes(400)
    boxes, scores = boxes.to(dtype), scores.to(dtype)  # now many scores tie
    groups = torch.arange(400) % 80
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keep, batched = nms(boxes, scores, 0.5), batched_nms(boxes, scores, groups, 0.5)
    assert keep.equal(torchvision.ops.nms(boxes.float(), scores.float(), 0.5))
    assert batched.equal(torchvision.ops.batched_nms(boxes.float(), scores.float(), groups, 0.5))


def test_nms_leaves_its_input_alone_and_needs_no_gradient():
    boxes, scores = crowded_boxes(300)
    before = boxes.clone()
    boxes.requires_grad_(), scores.requires_grad_()
    keep = nms(boxes, scores, 0.5)
    assert keep.equal(batched_nms(boxes, scores, torch.zeros(300, dtype=torch.int64), 0.5))
    assert boxes.detach().equal(before)
    boxes = before.T.contiguous().T  # edges already in rows: nothing to copy, but they still are the caller's
    nms(boxes, torch.arange(300, 0, -1), 0.5)
    assert boxes.equal(before)


# ------------------------------------------------------------------------------------------------------- wrong shapes


FOUR, FIVE, SCORES = torch.rand(3, 4), torch.rand(3, 5), torch.rand(3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: box_area(FIVE), "boxes have shape (3, 5), expected (..., 4)"),
        (lambda: box_iou(FIVE, FOUR), "a has shape (3, 5), expected (N, 4)"),
        (lambda: box_iou(FOUR, FIVE), "b has shape (3, 5), expected (M, 4)"),
        (lambda: box_iou(FOUR[0], FOUR), "a has shape (4,), expected (N, 4)"),
        (lambda: clip_boxes(torch.rand(3, 6), (5, 5)), "boxes have shape (3, 6), expected (..., 4)"),
        (lambda: large_enough(torch.rand(3, 3), 1.0), "boxes have shape (3, 3), expected (..., 4)"),
        (lambda: encode_boxes(FOUR[:1], FOUR), "reference has shape (1, 4), expected (3, 4)"),
        (lambda: encode_boxes(FOUR, FIVE), "proposals have shape (3, 5), expected (..., 4)"),
        (lambda: decode_boxes(FOUR[:1], FOUR), "deltas have shape (1, 4), expected (3, 4 * k)"),
        (lambda: decode_boxes(FOUR, FOUR[:1]), "deltas have shape (3, 4), expected (1, 4 * k)"),
        (lambda: decode_boxes(FIVE, FOUR), "deltas have shape (3, 5), expected (..., 4 * k)"),
        (lambda: match(torch.rand(5), 0.7, 0.3), "iou has shape (5,), expected (G, N)"),
        (lambda: nms(FOUR, SCORES[:2], 0.5), "scores have shape (2,), expected (3,)"),
        (lambda: nms(FOUR[:2], SCORES, 0.5), "scores have shape (3,), expected (2,)"),
        (lambda: nms(FOUR, SCORES[:, None], 0.5), "scores have shape (3, 1), expected (3,)"),
        (lambda: nms(FIVE, SCORES, 0.5), "boxes have shape (3, 5), expected (N, 4)"),
        (lambda: batched_nms(FOUR, SCORES[:2], SCORES.long(), 0.5), "scores have shape (2,), expected (3,)"),
        (lambda: batched_nms(FOUR, SCORES, SCORES.long()[:2], 0.5), "groups have shape (2,), expected (3,)"),
        (lambda: batched_nms(FIVE, SCORES, SCORES.long(), 0.5), "boxes have shape (3, 5), expected (N, 4)"),
    ],
)
def test_other_shapes_are_refused_by_name(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_coding_of_whole_numbers_is_not_cut():
    proposals, reference = torch.tensor([[10, 20, 30, 30]]), torch.tensor([[15, 20, 55, 25]])
    deltas = encode_boxes(reference, proposals)
    assert deltas.dtype == torch.float32 and deltas.equal(encode_boxes(reference.float(), proposals.float()))
    shift = torch.tensor([[1, 0, 0, 0]])
    assert decode_boxes(shift, proposals).equal(decode_boxes(shift.float(), proposals.float()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_box_that_is_not_finite_spoils_no_other_group(value):
    boxes, scores = crowded_boxes(300)
    groups = torch.arange(300) % 3
    expected = batched_nms(boxes, scores, groups, 0.5)
    strange = torch.tensor([[5.0, 5.0, value, 9.0]])
    keep = batched_nms(
        torch.cat((boxes, strange)), torch.cat((scores, torch.zeros(1))), torch.cat((groups, groups[:1])), 0.5
    )
    assert keep[keep < 300].equal(expected)
