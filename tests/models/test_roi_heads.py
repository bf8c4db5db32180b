import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection import roi_heads as reference
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

from core.models.roi_heads import MaskPredictor, RoIHeads, box_losses

PADDED, IMAGE_SIZES = (64, 96), [(64, 96), (50, 70)]


def heads(num_classes=4, **options):
    torch.manual_seed(0)
    return RoIHeads(8, num_classes, **options)


def features():
    torch.manual_seed(1)
    return {str(i): torch.randn(2, 8, 16 >> i, 24 >> i) for i in range(4)}


def random_boxes(count, height=50, width=70):
    corners = torch.rand(count, 2, 2) * torch.tensor([width, height])
    return torch.cat((corners.amin(dim=1), corners.amax(dim=1)), dim=1)


def torchvisions(ours, **options):
    """torchvision's heads, of which the tests use what needs no weights: sampling and post-processing."""
    options = {"score": 0.05, "nms": 0.5, "detections": 100} | options
    return reference.RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, *options.values())


def test_mask_logits_are_the_rows_of_torchvisions():
    ours, theirs = MaskPredictor(6, 5, 4), MaskRCNNPredictor(6, 5, 4)
    theirs.load_state_dict(ours.state_dict())
    x, labels = torch.randn(7, 6, 3, 3, requires_grad=True), torch.randint(4, (7,))
    logits, expected = ours(x, labels), theirs(x)[torch.arange(7), labels]
    torch.testing.assert_close(logits, expected)
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((out * weight).sum(), [x, *network.parameters()])
        for out, network in ((logits, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*gradients)
    assert ours(x[:0], labels[:0]).shape == (0, 6, 6)


@pytest.mark.parametrize("options", [{}, {"score": 0.0, "detections": 7}, {"score": 0.3, "nms": 0.1}])
def test_detections_equal_torchvisions(options):
    names = {"score": "score_thresh", "nms": "nms_thresh", "detections": "detections_per_img"}
    ours = heads(**{names[name]: value for name, value in options.items()})
    proposals = [random_boxes(40), random_boxes(30)]
    logits, deltas = 2 * torch.randn(70, 4), torch.randn(70, 16)
    expected = torchvisions(ours, **options).postprocess_detections(logits, deltas, proposals, IMAGE_SIZES)
    for mine, *other in zip(ours.detect(logits, deltas, proposals, IMAGE_SIZES), *expected, strict=True):
        torch.testing.assert_close([mine["boxes"], mine["scores"], mine["labels"]], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objects", [0, 1, 5])
def test_sample_equals_torchvisions(objects):
    ours = heads(batch_size_per_image=512)
    boxes = random_boxes(objects)
    target = {"boxes": boxes, "labels": torch.randint(1, 4, (objects,)), "masks": torch.zeros(objects, 50, 70)}
    proposals = torch.cat((random_boxes(700), boxes.repeat_interleave(40, dim=0) + 3))
    torch.manual_seed(2)
    chosen, matched, labels, encoded = torchvisions(ours).select_training_samples([proposals], [target])
    torch.manual_seed(2)
    mine = ours.sample(proposals, target)
    torch.testing.assert_close((*mine[:2], mine[2].clamp(min=0)), (chosen[0], labels[0], matched[0]))
    assert ((mine[2] >= 0) == (mine[1] > 0)).all()
    assert len(mine[0]) == 512 and (mine[1] > 0).sum() <= 128 and (mine[1] > 0).any() == (objects > 0)


def test_proposals_between_the_thresholds_are_not_trained_on():
    ours = heads(fg_iou_thresh=0.6, bg_iou_thresh=0.3, batch_size_per_image=10, positive_fraction=1.0)
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([3])}
    proposals = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 7], [0, 0, 10, 2], [20, 20, 30, 30]])  # IoU .5, .7, .2, 0
    boxes, labels, matched = ours.sample(proposals, target)
    assert (
        boxes[:, 3].tolist() == [7, 2, 30, 10]
        and labels.tolist() == [3, 0, 0, 3]
        and matched.tolist() == [0, -1, -1, 0]
    )


def test_box_losses_equal_torchvisions():
    logits, deltas = torch.randn(9, 4, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    labels, targets = torch.tensor([0, 1, 3, 0, 0, 2, 2, 0, 1]), torch.randn(9, 4)
    losses = box_losses(logits, deltas, labels, targets[labels > 0])
    expected = reference.fastrcnn_loss(logits, deltas, [labels], [targets])
    torch.testing.assert_close(losses, expected)
    gradients = [torch.autograd.grad(sum(pair), (logits, deltas)) for pair in (losses, expected)]
    torch.testing.assert_close(*gradients)


def test_box_losses_by_hand():
    """Even logits of two classes: ln 2. The positive's deltas are off by 1 in x: 1 - 1/18 over two proposals."""
    deltas = torch.tensor([[9.0, 9, 9, 9, 1, 0, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9]])
    classifier, box_reg = box_losses(torch.zeros(2, 2), deltas, torch.tensor([1, 0]), torch.zeros(1, 4))
    assert classifier.item() == pytest.approx(math.log(2)) and box_reg.item() == pytest.approx((1 - 1 / 18) / 2)
    empty = box_losses(torch.zeros(0, 2), torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    assert [loss.item() for loss in empty] == [0, 0]


def test_mask_loss_is_on_positives_and_their_own_class_alone():
    network = heads(batch_size_per_image=64).train()
    truth = torch.zeros(2, 50, 70, dtype=torch.uint8)
    truth[0, 5:25, 5:25], truth[1, 20:45, 30:60] = 1, 1
    boxes = torch.tensor([[5.0, 5, 25, 25], [30, 20, 60, 45]])
    targets = [
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64), "masks": truth[:0]},
        {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": truth},
    ]
    seen = []
    network.mask_head.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    losses = network(features(), [random_boxes(20), boxes.repeat(4, 1)], PADDED, IMAGE_SIZES, targets)[1]
    assert seen == [10]  # 4 x 2 proposals on the objects, and the objects; nothing of the picture without objects
    sum(losses.values()).backward()
    rows = network.mask_predictor.mask_fcn_logits.weight.grad.flatten(1).abs().amax(dim=1)
    assert (rows > 0).tolist() == [False, True, False, True]


def test_mask_loss_by_hand():
    """A mask head that says 0 everywhere: ln 2 for each pixel, whatever the true mask is."""
    network = heads(batch_size_per_image=8).train()
    torch.nn.init.zeros_(network.mask_predictor.mask_fcn_logits.weight)
    torch.nn.init.zeros_(network.mask_predictor.mask_fcn_logits.bias)
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[5.0, 5, 25, 25]]), "labels": torch.tensor([1]), "masks": masks}
    losses = network(features(), [random_boxes(4)] * 2, PADDED, IMAGE_SIZES, [target] * 2)[1]
    assert losses["loss_mask"].item() == pytest.approx(math.log(2))


def test_detected_masks_are_probabilities_of_the_detected_class():
    network = heads(score_thresh=0.0, detections_per_img=5).eval()
    maps = features()
    with torch.no_grad():
        detections, losses = network(maps, [random_boxes(6), random_boxes(3)], PADDED, IMAGE_SIZES)
    assert losses == {} and [len(d["boxes"]) for d in detections] == [5, 5]
    labels = torch.cat([d["labels"] for d in detections])
    pooled = network.mask_roi_pool(maps, [d["boxes"] for d in detections], IMAGE_SIZES)
    predictor = network.mask_predictor
    every = predictor.mask_fcn_logits(F.relu(predictor.conv5_mask(network.mask_head(pooled)))).sigmoid()
    expected = every[torch.arange(10), labels][:, None]
    torch.testing.assert_close(torch.cat([d["masks"] for d in detections]), expected, rtol=1e-4, atol=1e-5)
    for detection in detections:
        assert (detection["scores"].diff() <= 0).all()


def test_grids_of_other_sizes():
    options = {"box_roi_output_size": 5, "mask_roi_output_size": 9, "roi_sampling_ratio": 3}
    network = heads(score_thresh=0.0, **options).eval()
    seen = []
    for pool in (network.box_roi_pool, network.mask_roi_pool):
        assert pool.sampling_ratio == 3
        pool.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape[1:])))
    with torch.no_grad():
        detections = network(features(), [random_boxes(6), random_boxes(3)], PADDED, IMAGE_SIZES)[0]
    assert seen == [(8, 5, 5), (8, 9, 9)] and network.box_head.fc6.in_features == 8 * 5 * 5
    assert [tuple(d["masks"].shape[1:]) for d in detections] == [(1, 18, 18)] * 2


def test_degenerate_true_boxes_do_not_crash():
    network = heads(batch_size_per_image=16).train()
    boxes = torch.tensor([[10.0, 10, 10, 10], [20, 20, 15, 40]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": torch.zeros(2, 64, 96, dtype=torch.uint8)}
    losses = network(features(), [random_boxes(5)] * 2, PADDED, IMAGE_SIZES, [target] * 2)[1]
    assert losses["loss_classifier"].isfinite()


def test_gradients_of_the_mask_rows_have_the_same_bits_every_time():
    """Regions of a class share its row, whose gradient must not add up in the order in which threads come."""
    predictor = MaskPredictor(16, 256, 3)
    x, labels = torch.randn(300, 16, 2, 2), torch.randint(3, (300,))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        gradients = [
            torch.autograd.grad(predictor(x, labels).sin().sum(), predictor.mask_fcn_logits.weight)[0]
            for _ in range(10)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
