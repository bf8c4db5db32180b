import pytest
import torch
from torchvision.models.detection import rpn as reference
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from core.layers.anchors import AnchorGenerator
from core.models.rpn import RegionProposalNetwork, RPNHead, sample_balanced

SIZES, RATIOS = ((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3
IMAGE_SIZES = [(64, 96), (50, 70)]


@pytest.fixture
def pair():
    """Ours and torchvision's with the same weights, on 8 channels and three levels."""
    torch.manual_seed(0)
    ours = RegionProposalNetwork(
        AnchorGenerator(SIZES, RATIOS), RPNHead(8, 3), pre_nms_top_n=(60, 40), post_nms_top_n=(30, 20)
    )
    top_n = {"training": 60, "testing": 40}, {"training": 30, "testing": 20}
    head = reference.RPNHead(8, 3)
    theirs = reference.RegionProposalNetwork(TorchvisionAnchors(SIZES, RATIOS), head, 0.7, 0.3, 256, 0.5, *top_n, 0.7)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def levels():
    torch.manual_seed(1)
    return [torch.randn(2, 8, *size) for size in ((16, 24), (8, 12), (4, 6))]


def images():
    return ImageList(torch.zeros(2, 3, 64, 96), IMAGE_SIZES)


TARGETS = [
    {"boxes": torch.tensor([[3.0, 4, 30, 40], [20, 10, 90, 60], [1, 1, 9, 9]])},
    {"boxes": torch.zeros(0, 4)},
]


@pytest.mark.parametrize("training", [True, False])
def test_proposals_equal_torchvisions(pair, training):
    maps = levels()
    proposals = [
        pair[0].train(training)(maps, (64, 96), IMAGE_SIZES, TARGETS)[0],
        pair[1].train(training)(images(), dict(enumerate(maps)), TARGETS)[0],
    ]
    for mine, expected, (height, width) in zip(*proposals, IMAGE_SIZES, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-4)
        assert len(mine) == (30 if training else 20) and not mine.requires_grad
        assert (mine >= 0).all() and (mine <= torch.tensor([width, height] * 2)).all()


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_equal_torchvisions(pair, seed):
    for network in pair:
        maps = levels()
        torch.manual_seed(seed)
        if network is pair[0]:
            losses = network(maps, (64, 96), IMAGE_SIZES, TARGETS)[1]
        else:
            losses = network(images(), dict(enumerate(maps)), TARGETS)[1]
        sum(losses.values()).backward()
        if network is pair[0]:
            mine = losses
    torch.testing.assert_close(mine, losses, rtol=1e-6, atol=1e-6)
    gradients = {name: p.grad for name, p in pair[1].named_parameters()}
    torch.testing.assert_close({n: p.grad for n, p in pair[0].named_parameters()}, gradients, rtol=1e-4, atol=1e-6)


def test_proposals_below_the_score_are_dropped(pair):
    network = pair[0].eval()
    with torch.no_grad():
        logits, deltas = network.head(levels())
    scores = torch.cat(logits, dim=1).sigmoid()
    limit = scores.median().item() + 1e-4
    network.score_thresh, network.pre_nms_top_n, network.post_nms_top_n = limit, (9999, 9999), (9999, 9999)
    network.nms_thresh = 1.0
    anchors = network.anchor_generator((64, 96), levels())
    proposals = network.propose(logits, deltas, anchors, [(1000, 1000)] * 2)  # no box is clipped away
    assert [len(boxes) for boxes in proposals] == (scores >= limit).sum(dim=1).tolist()
    network.score_thresh = 1.1
    assert [tuple(b.shape) for b in network(levels(), (64, 96), IMAGE_SIZES)[0]] == [(0, 4), (0, 4)]


def test_not_a_number_is_no_proposal(pair):
    maps = levels()
    maps[1][0] = torch.nan
    proposals, losses = pair[0](maps, (64, 96), IMAGE_SIZES, TARGETS)
    assert all(boxes.isfinite().all() for boxes in proposals)
    assert losses["loss_objectness"].isnan(), "it's the trainer's to see that the loss isn't finite"


def test_autocast_leaves_no_parameter_without_a_gradient(pair):
    """The proposals are made without gradient: autocast must not give their half-precision weights to the losses."""
    network = pair[0].train()
    gradients = []
    for enabled in (True, False):
        torch.manual_seed(0)
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = network(levels(), (64, 96), IMAGE_SIZES, TARGETS)[1]
        sum(losses.values()).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, expected in gradients[1].items():
        assert gradients[0][name] is not None, name
        assert (gradients[0][name] - expected).norm() <= 0.1 * expected.norm(), name


@pytest.mark.parametrize("positives, negatives", [(0, 0), (0, 5), (3, 0), (100, 100), (3, 100), (100, 3)])
def test_sampler_draws_what_torchvisions_draws(positives, negatives):
    labels = torch.cat((torch.full((positives,), 2), torch.zeros(negatives).long(), torch.full((7,), -1)))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(5)
    expected = [torch.where(mask[0])[0] for mask in BalancedPositiveNegativeSampler(20, 0.5)([labels])]
    torch.manual_seed(5)
    mine = sample_balanced(labels, 20, 0.5)
    for part, other in zip(mine, expected, strict=True):
        assert part.tolist() == other.tolist()
    assert len(mine[0]) <= 10 and len(mine[0]) + len(mine[1]) <= 20
    assert (labels[mine[0]] == 2).all() and (labels[mine[1]] == 0).all()


def test_head_worked_by_hand():
    """Two anchors, one channel; the 3x3 convolution is the identity, so negative positions count as 0."""
    head = RPNHead(1, 2)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    head.conv[0][0].weight.data[..., 1, 1] = 1
    head.cls_logits.weight.data[:, 0, 0, 0] = torch.tensor([1.0, 10.0])
    head.bbox_pred.weight.data[:, 0, 0, 0] = torch.arange(8.0)
    logits, deltas = head([torch.tensor([[[[1.0, -5.0], [2.0, 3.0]]]])])
    assert logits[0].tolist() == [[1, 10, 0, 0, 2, 20, 3, 30]]
    assert deltas[0][0, :2].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and deltas[0][0, 7].tolist() == [12, 15, 18, 21]


@pytest.mark.parametrize("count", [0, 1, 300])
def test_head_at_some_anchors_is_the_head_at_all(pair, count):
    """Values and gradients, also at the borders, of levels of a single row, and for an anchor taken twice."""
    head = pair[0].head
    maps = [torch.randn(2, 8, *size, requires_grad=True) for size in ((5, 7), (3, 4), (1, 3))]
    picture, anchor = torch.randint(2, (count,)), torch.randint(3 * (35 + 12 + 3), (count,))
    logits, deltas = (torch.cat(parts, dim=1)[picture, anchor] for parts in head(maps))
    some = head.at_anchors(maps, picture, anchor)
    torch.testing.assert_close(some, (logits, deltas))
    inputs, weight = [*maps, *head.parameters()], torch.randn(count, 5)
    gradients = [
        torch.autograd.grad((a * weight[:, 0]).sum() + (b * weight[:, 1:]).sum(), inputs)
        for a, b in (some, (logits, deltas))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_gradients_at_anchors_have_the_same_bits_every_time():
    """Neighbouring anchors share pixels, whose gradients must not add up in the order in which threads come."""
    head, maps = RPNHead(64, 3), [torch.randn(2, 64, 16, 24, requires_grad=True)]
    picture, anchor = torch.randint(2, (400,)), torch.randint(3 * 16 * 24, (400,))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = [
            torch.autograd.grad(sum(part.sin().sum() for part in head.at_anchors(maps, picture, anchor)), maps)[0]
            for _ in range(10)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
