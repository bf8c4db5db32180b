import copy

import pytest
import torch
import torchvision
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from core.errors import InputError
from core.models import mask_rcnn
from core.models.mask_rcnn import BACKBONES, NORMS, MaskRCNN, paste_masks

SMALL = {
    "min_size": 128,
    "max_size": 192,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 50,
    "rpn_batch_size_per_image": 64,
    "box_batch_size_per_image": 32,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 20,
}


def target(height, width, rectangles, labels=None):
    """Rectangles (x1, y1, x2, y2) as boxes and masks."""
    masks = torch.zeros(len(rectangles), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, rectangles, strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = list(range(1, len(rectangles) + 1)) if labels is None else labels
    boxes = torch.tensor(rectangles, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


def pictures_and_targets():
    """Three pictures of different sizes, the second without objects."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in ((60, 90), (100, 64), (64, 64))]
    rectangles = [(5, 7, 40, 50), (30, 10, 85, 31)], [], [(8, 20, 50, 60)]
    return images, [target(*image.shape[1:], r) for image, r in zip(images, rectangles, strict=True)]


def small_pair(norm="batch", **options):
    """Ours and torchvision's resnet18-FPN with the same weights."""
    options = SMALL | options
    torch.manual_seed(0)
    ours = MaskRCNN("resnet18", 5, norm=norm, **options)
    layer = {"norm_layer": torch.nn.BatchNorm2d} if norm == "batch" else {}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5, **layer)
    theirs = TorchvisionMaskRCNN(backbone, 5, **options)
    for name, value in ours.state_dict().items():  # proposals and detections that differ from each other
        if name.endswith(("bbox_pred.weight", "cls_logits.weight", "cls_score.weight")):
            value.mul_(5)
        if "running_var" in name:
            value.uniform_(0.5, 2)
        if "running_mean" in name:
            value.normal_(0, 0.1)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture(scope="module")
def golden_network():
    """The network of model_maskrcnn.npz, as its README describes it, not filled yet."""
    return MaskRCNN(
        norm="frozen",
        min_size=128,
        max_size=192,
        box_score_thresh=0.0,
        box_detections_per_img=20,
        rpn_batch_size_per_image=10**6,
        box_batch_size_per_image=10**6,
    )


@pytest.fixture
def filled(golden_network, fill_weights):
    fill_weights.fill_state_dict(golden_network)
    for key, tensor in golden_network.state_dict().items():
        if key.endswith(("bbox_pred.weight", "bbox_pred.bias")):
            tensor.mul_(0.2)
        elif key.endswith("cls_logits.weight"):
            tensor.mul_(3)
        elif key.endswith("cls_score.weight"):
            tensor.mul_(2)
    return golden_network


def close(actual, expected):
    """The tolerance of model_maskrcnn.npz."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@torch.no_grad()
def test_golden_parts(golden, filled):
    arrays = golden("model_maskrcnn")
    image = torch.from_numpy(arrays["image"])
    network = filled.eval()
    size = network._new_size(image)
    batch = network._batch([image], [size])
    assert [*size, *batch.shape[2:]] == arrays["transform/size"].tolist()
    close(batch.mean(dim=(2, 3)), arrays["transform/tensor_mean"])
    close(batch[:, :, :4, :4], arrays["transform/corner"])

    features = network.backbone(batch)
    for name in ("0", "1", "2", "3", "pool"):
        close(features[name].mean(dim=(2, 3)), arrays[f"fpn/{name}_mean"])
        close(features[name][:, :8, 0, 0], arrays[f"fpn/{name}_corner"])

    levels = list(features.values())
    logits, deltas = network.rpn.head(levels)
    close(logits[2].view(1, 8, 12, 3).permute(0, 3, 1, 2), arrays["rpn/objectness_level2"])
    close(deltas[3].view(1, 4, 6, 12).permute(0, 3, 1, 2), arrays["rpn/deltas_level3"])
    anchors = network.rpn.anchor_generator(tuple(batch.shape[2:]), levels)
    assert len(anchors) == arrays["rpn/anchor_count"]
    close(anchors[:12], arrays["rpn/anchors_head"])
    proposals, losses = network.rpn(levels, tuple(batch.shape[2:]), [size])
    assert len(proposals[0]) == arrays["rpn/proposal_count"] and losses == {}
    close(proposals[0][:50], arrays["rpn/proposals_head"])

    heads, boxes = network.roi_heads, [torch.from_numpy(arrays["fixed_boxes"])]
    hidden = heads.box_head(heads.box_roi_pool(features, boxes, [size]))
    close(hidden[:, :64], arrays["box_head/feature_head"])
    logits, deltas = heads.box_predictor(hidden)
    close(logits, arrays["box_head/class_logits"])
    close(deltas, arrays["box_head/box_regression"])
    maps = heads.mask_head(heads.mask_roi_pool(features, boxes, [size]))
    for i, label in enumerate((1, 90)):
        close(heads.mask_predictor(maps, torch.full((4,), label)), arrays["mask_head/logits_class1_class90"][:, i])


@torch.no_grad()
def test_golden_detections(golden, filled):
    arrays = golden("model_maskrcnn")
    detections = filled.eval()([torch.from_numpy(arrays["image"])])[0]
    assert detections["labels"].tolist() == arrays["eval/labels"].tolist()
    close(detections["boxes"], arrays["eval/boxes"])
    close(detections["scores"], arrays["eval/scores"])
    masks = paste_masks(detections["masks"], detections["boxes"], (96, 128))
    close(masks.mean(dim=(1, 2, 3)), arrays["eval/mask_mean"])
    close(masks[0, 0], arrays["eval/mask0"])


def test_golden_losses_and_gradients(golden, filled):
    arrays = golden("model_maskrcnn")
    rows = arrays["train/gt_mask_rectangles"].tolist()
    truth = target(96, 128, [(x1, y1, x2, y2) for y1, y2, x1, x2 in rows], arrays["train/gt_labels"].tolist())
    truth["boxes"] = torch.from_numpy(arrays["train/gt_boxes"])
    losses = filled.train()([torch.from_numpy(arrays["image"])], [truth])
    for name, loss in losses.items():
        close(loss, arrays[f"train/{name}"])
    sum(losses.values()).backward()
    for name, parameter in filled.named_parameters():
        if f"train/grad_norm/{name}" in arrays:
            close(parameter.grad.norm(), arrays[f"train/grad_norm/{name}"])
    filled.zero_grad()


@pytest.mark.parametrize("norm, case", [("frozen", "frozen_bn"), ("batch", "trainable_bn"), ("sync", "trainable_bn")])
def test_keys_and_shapes_are_torchvisions(norm, case, golden_keys):
    expected = golden_keys("model_maskrcnn")[f"maskrcnn_resnet50_fpn_{case}"]
    with torch.device("meta"):
        network = MaskRCNN(norm=norm, trainable_layers=3 if norm == "frozen" else 5)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == expected["keys"]
    parameters = list(network.parameters())
    assert sum(p.numel() for p in parameters) == expected["parameter_count"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == expected["trainable_parameter_count"]


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_losses_and_gradients_equal_torchvisions_under_the_same_seed(norm):
    """The pictures are not resized: with batch statistics a rounding error in them grows a thousandfold."""
    ours, theirs = small_pair(norm)
    images = [torch.rand(3, 128, 160), torch.rand(3, 128, 128)]
    targets = [target(128, 160, [(5, 7, 40, 50), (60, 20, 150, 61)]), target(128, 128, [])]
    losses = {}
    for name, network in (("ours", ours), ("theirs", theirs)):
        torch.manual_seed(3)
        losses[name] = network.train()(images, copy.deepcopy(targets))
        sum(losses[name].values()).backward()
    assert set(losses["ours"]) == set(losses["theirs"])
    for name, expected in losses["theirs"].items():
        torch.testing.assert_close(losses["ours"][name], expected, rtol=1e-5, atol=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # By the norm: where a ReLU is next to 0, rounding decides on single numbers.
        assert (parameter.grad - gradients[name]).norm() <= 2e-3 * gradients[name].norm(), name


def test_losses_of_resized_pictures_equal_torchvisions_under_the_same_seed():
    ours, theirs = small_pair("frozen", min_size=(96, 112, 128))
    images, targets = pictures_and_targets()
    for seed in range(3):
        torch.manual_seed(seed)
        losses = ours.train()(images, targets)
        torch.manual_seed(seed)
        for name, expected in theirs.train()(images, copy.deepcopy(targets)).items():
            torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=1e-5)


def test_detections_equal_torchvisions():
    ours, theirs = small_pair("frozen")
    images, _ = pictures_and_targets()
    with torch.no_grad():
        results = ours.eval()(images), theirs.eval()(images)
    for image, mine, expected in zip(images, *results, strict=True):
        assert len(expected["boxes"]) == 20 and mine["labels"].tolist() == expected["labels"].tolist()
        torch.testing.assert_close(mine["boxes"], expected["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(mine["scores"], expected["scores"], rtol=0, atol=1e-5)
        assert mine["masks"].shape == (20, 1, 28, 28)
        pasted = paste_masks(mine["masks"], mine["boxes"], image.shape[1:])
        torch.testing.assert_close(pasted, expected["masks"], rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_least_score_gives_what_choosing_afterwards_would():
    network, _ = small_pair("frozen")
    images, _ = pictures_and_targets()
    network.eval()
    everything = network(images)
    least = everything[0]["scores"][4].item()  # five of twenty reach it, the fifth exactly
    chosen = network(images, min_score=least)
    assert len(chosen[0]["boxes"]) == 5
    for all_found, some in zip(everything, chosen, strict=True):
        for name, value in some.items():
            torch.testing.assert_close(value, all_found[name][all_found["scores"] >= least], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(60, 90), (300, 100), (16, 16), (7, 200), (1, 1), (97, 201)])
def test_resizing_and_batching_equal_torchvisions(size):
    network = MaskRCNN("resnet18", 2, min_size=(50, 128), max_size=192)
    reference = GeneralizedRCNNTransform((50, 128), 192, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    image = torch.rand(3, *size)
    truth = target(*size, [(0, 0, size[1], size[0])])
    for training in (True, False):
        for seed in range(4):
            torch.manual_seed(seed)
            expected, expected_truth = reference.train(training)([image], [truth])
            torch.manual_seed(seed)
            new_size = network.train(training)._new_size(image)
            batch = network._batch([image], [new_size])
            assert new_size == expected.image_sizes[0]
            torch.testing.assert_close(batch, expected.tensors, rtol=1e-5, atol=1e-5)
            resized = mask_rcnn.resize_target(truth, image, new_size)
            torch.testing.assert_close(resized["boxes"], expected_truth[0]["boxes"])
            assert torch.equal(resized["masks"], expected_truth[0]["masks"])


def test_pictures_without_objects_give_every_parameter_a_gradient():
    """No positives at all, which DDP must survive: the losses on boxes and masks are 0, and so are their gradients."""
    network = MaskRCNN("resnet18", 3, **SMALL).train()
    losses = network([torch.rand(3, 64, 64)] * 2, [target(64, 64, [])] * 2)
    assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
    assert losses["loss_objectness"] > 0 and losses["loss_classifier"] > 0
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
    assert gradients["roi_heads.mask_head.0.0.weight"].abs().max() == 0


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (8, 700)])
@torch.no_grad()
def test_pictures_of_any_size(size):
    network = MaskRCNN("resnet18", 3, **SMALL)
    detections = network.eval()([torch.rand(3, *size)])[0]
    assert (detections["boxes"] <= torch.tensor([size[1], size[0]] * 2) + 1e-4).all()
    losses = network.train()([torch.rand(3, *size)] * 2, [target(*size, [(0, 0, size[1], size[0])])] * 2)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("size, padded", [((40, 40), (64, 64)), ((16, 16), (32, 32)), ((22, 300), (32, 320))])
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_small_pictures_are_those_of_the_maps(size, padded, training):
    """A picture of 40 pixels is padded to 64: its finest map of 16 has the stride 4, and not 40 / 16."""
    network = MaskRCNN("resnet18", 3, **SMALL | {"min_size": min(size), "max_size": max(size)}).train(training)
    strides = {"0": 4, "1": 8, "2": 16, "3": 32}
    pooled = []

    def compare(pool, inputs, out):
        features, boxes, _ = inputs
        # Boxes of such pictures are below 112 pixels, all but those of a thin one: read from the finest map.
        small = torch.cat([(b[:, 2:] - b[:, :2]).prod(dim=1) < 110**2 for b in boxes])
        expected = torchvision.ops.roi_align(features["0"], list(boxes), pool.output_size, 1 / strides["0"], 2)
        torch.testing.assert_close(out[small], expected[small], rtol=1e-5, atol=1e-5)
        every = torchvision.ops.MultiScaleRoIAlign(list(strides), pool.output_size, 2)(features, list(boxes), [padded])
        torch.testing.assert_close(out, every, rtol=1e-5, atol=1e-5)
        pooled.append(int(small.sum()))

    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        pool.register_forward_hook(compare)
    with torch.no_grad():
        network([torch.rand(3, *size)] * 2, [target(*size, [(2, 3, 15, 14)])] * 2 if training else None)
    assert len(pooled) == 2 and min(pooled) > 0


def test_several_anchor_sizes_a_level_equal_torchvisions():
    options = {name: value for name, value in SMALL.items() if name != "box_batch_size_per_image"}
    sizes, ratios = [(8, 12), (16, 24), (32, 48), (64, 96), (128, 192)], (0.5, 1.0)
    torch.manual_seed(0)
    ours = MaskRCNN("resnet18", 5, norm="frozen", anchor_sizes=sizes, aspect_ratios=ratios, **options)
    assert ours.rpn.head.cls_logits.out_channels == 4
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    anchors = AnchorGenerator(tuple(sizes), (ratios,) * 5)
    theirs = TorchvisionMaskRCNN(backbone, 5, rpn_anchor_generator=anchors, **options)
    ours.state_dict()["rpn.head.cls_logits.weight"].mul_(5)
    theirs.load_state_dict(ours.state_dict())
    images, targets = pictures_and_targets()
    torch.manual_seed(1)
    losses = ours.train()(images, targets)
    torch.manual_seed(1)
    for name, expected in theirs.train()(images, copy.deepcopy(targets)).items():
        torch.testing.assert_close(losses[name], expected, rtol=1e-5, atol=1e-5)
    sum(losses.values()).backward()
    with torch.no_grad():
        results = ours.eval()(images), theirs.eval()(images)
    for mine, expected in zip(*results, strict=True):
        assert len(mine["boxes"]) == 20
        torch.testing.assert_close(mine["boxes"], expected["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(mine["scores"], expected["scores"], rtol=0, atol=1e-5)


def test_region_grids_of_other_sizes():
    """The masks are twice the grid of the mask branch, in the losses as in detections, and are pasted as any others."""
    options = {"box_roi_output_size": 5, "mask_roi_output_size": 8, "roi_sampling_ratio": 1}
    network = MaskRCNN("resnet18", 5, norm="frozen", **SMALL, **options)
    images, targets = pictures_and_targets()
    losses = network.train()(images, targets)
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0
    with torch.no_grad():
        detection = network.eval()(images)[0]
    assert detection["masks"].shape == (20, 1, 16, 16)
    assert paste_masks(detection["masks"], detection["boxes"], (60, 90)).shape == (20, 1, 60, 90)
    with torch.device("meta"):
        again = MaskRCNN(**network.options)
    assert again.roi_heads.box_head.fc6.weight.shape == (1024, 256 * 5 * 5)
    assert again.roi_heads.mask_roi_pool.output_size == (8, 8) and again.roi_heads.mask_roi_pool.sampling_ratio == 1


@torch.no_grad()
def test_nothing_found():
    network = MaskRCNN("resnet18", 3, **SMALL | {"box_score_thresh": 1.0}).eval()
    detections = network([torch.rand(3, 50, 60), torch.rand(3, 40, 40)])
    shapes = {"boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, 28, 28)}
    for detection in detections:
        assert {name: tuple(value.shape) for name, value in detection.items()} == shapes
        assert paste_masks(detection["masks"], detection["boxes"], (50, 60)).shape == (0, 1, 50, 60)


@torch.no_grad()
def test_no_proposals():
    """A score that no proposal reaches: evaluation finds nothing, training learns from the true boxes alone."""
    network = MaskRCNN("resnet18", 3, **SMALL | {"rpn_score_thresh": 1.1})
    assert len(network.eval()([torch.rand(3, 50, 60)])[0]["boxes"]) == 0
    losses = network.train()([torch.rand(3, 50, 60)] * 2, [target(50, 60, [(5, 5, 30, 30)]), target(50, 60, [])])
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_mask"] > 0
    losses = network([torch.rand(3, 50, 60)] * 2, [target(50, 60, [])] * 2)
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_classifier"] == 0


@pytest.mark.parametrize("device, dtype", [("cpu", torch.bfloat16), ("cuda", torch.float16), ("cuda", torch.bfloat16)])
def test_half_precision_stays_finite(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    network = small_pair("frozen")[0].to(device)
    images, targets = pictures_and_targets()
    images = [image.to(device) for image in images]
    targets = [{name: value.to(device) for name, value in t.items()} for t in targets]
    losses = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            losses.append(network.train()(images, targets))
    sum(losses[1].values()).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses[1].values())
    for name in ("loss_objectness", "loss_rpn_box_reg"):  # the others are about proposals, which may be other ones
        torch.testing.assert_close(losses[1][name], losses[0][name], rtol=0.05, atol=0.01)
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        detections = network.eval()(images)
    for detection in detections:
        assert all(value.isfinite().all() for value in detection.values())
        assert {detection[name].dtype for name in ("boxes", "scores", "masks")} == {torch.float32}


def test_masks_may_be_bool_and_inputs_stay_as_they_are():
    network = MaskRCNN("resnet18", 5, norm="frozen", **SMALL).train()
    images, targets = pictures_and_targets()
    before = copy.deepcopy((images, targets))
    losses = []
    for masks in (torch.uint8, torch.bool):
        torch.manual_seed(0)
        losses.append(network(images, [t | {"masks": t["masks"].to(masks)} for t in targets]))
    assert losses[0] == losses[1]
    torch.testing.assert_close((images, targets), before, rtol=0, atol=0)


def test_channels_last_weights_get_channels_last_pictures():
    network = MaskRCNN("resnet18", 2, **SMALL).eval()
    images = [torch.rand(3, 60, 90), torch.rand(3, 64, 64)]
    with torch.no_grad():
        expected = network(images)
        network.to(memory_format=torch.channels_last)
        batch = network._batch(images, [network._new_size(image) for image in images])
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for mine, other in zip(network(images), expected, strict=True):
            torch.testing.assert_close(mine["scores"], other["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable_layers", range(6))
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_trainable_layers_are_torchvisions(trainable_layers, norm):
    layer = {"norm_layer": torch.nn.BatchNorm2d} if norm == "batch" else {}
    with torch.device("meta"):
        ours = MaskRCNN("resnet18", 2, norm=norm, trainable_layers=trainable_layers).backbone
        theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=trainable_layers, **layer)
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
        name: p.requires_grad for name, p in theirs.named_parameters()
    }


def test_options_build_the_same_network_again(tmp_path):
    options = {"norm": "frozen", "min_size": [100, 120], "anchor_sizes": [[8, 16]] * 5, "box_reg_weights": [1, 1, 1, 1]}
    network = MaskRCNN("resnet18", 4, **options)
    torch.save(network.options, tmp_path / "options.pth")
    again = MaskRCNN(**torch.load(tmp_path / "options.pth", weights_only=True))
    assert again.options == network.options and again.roi_heads.box_reg_weights == (1, 1, 1, 1)
    again.load_state_dict(network.state_dict())
    assert network.rpn.head.cls_logits.out_channels == 6  # 2 sizes x 3 ratios


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backbone_name": "vgg16"}, "backbone_name 'vgg16' is unknown; known are resnet18, resnet34"),
        ({"norm": "group"}, "norm 'group' is unknown; known are batch, frozen, sync"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"trainable_layers": 6}, "trainable_layers is 6; it goes from 0 to 5"),
        ({"min_size": 0}, "min_size is 0; give numbers above 0"),
        ({"min_size": ()}, r"min_size is \(\); give"),
        ({"max_size": -5}, "max_size is -5; give"),
        ({"image_std": (1.0, 0.0, 1.0)}, "image_std is"),
        ({"aspect_ratios": (0.5, -1)}, "aspect_ratios is"),
        ({"box_roi_output_size": 0}, "box_roi_output_size is 0; give a whole number above 0"),
        ({"mask_roi_output_size": -14}, "mask_roi_output_size is -14; give"),
        ({"roi_sampling_ratio": 0}, "roi_sampling_ratio is 0; give"),
        ({"box_roi_output_size": 7.5}, "box_roi_output_size is 7.5; give"),
        ({"anchor_sizes": (32, 64)}, "anchor_sizes is .* 5 levels P2 to P6"),
        ({"anchor_sizes": (8, 16, 32, 64, (128, 256))}, "anchor_sizes is .* equally many"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        MaskRCNN(**{"backbone_name": "resnet18"} | options)
    assert "\n" not in str(caught.value)


def changed(**values):
    """Targets of two pictures of (3, 60, 90), of which the second has other `values`; None takes one away."""
    truth = target(60, 90, [(5, 7, 40, 50), (30, 10, 85, 31)])
    other = {name: value for name, value in {**truth, **values}.items() if value is not None}
    return [truth, other]


BOXES, LABELS = target(60, 90, [(5, 7, 40, 50), (30, 10, 85, 31)])["boxes"], torch.tensor([1, 2])
MASKS = torch.ones(2, 60, 90, dtype=torch.uint8)


@pytest.mark.parametrize(
    "targets, message",
    [
        (None, "training needs targets: 0 for 2 images"),
        (changed()[:1], "training needs targets: 1 for 2 images"),
        (changed() * 2, "training needs targets: 4 for 2 images"),
        (changed(masks=None), r"targets\[1\] has no masks"),
        (changed(labels=None), r"targets\[1\] has no labels"),
        (changed(boxes=None), r"targets\[1\] has no boxes"),
        (changed(masks=MASKS[:0]), r"targets\[1\] masks have shape \(0, 60, 90\), expected \(2, 60, 90\)"),
        (changed(masks=MASKS[:1]), r"targets\[1\] masks have shape \(1, 60, 90\), expected \(2, 60, 90\)"),
        (changed(masks=MASKS[:, :30]), r"targets\[1\] masks have shape \(2, 30, 90\), expected \(2, 60, 90\)"),
        (changed(masks=MASKS.mT), r"targets\[1\] masks have shape \(2, 90, 60\), expected \(2, 60, 90\)"),
        (changed(masks=MASKS[:, None]), r"targets\[1\] masks have shape \(2, 1, 60, 90\), expected \(2, 60, 90\)"),
        (changed(labels=LABELS[:1]), r"targets\[1\] labels have shape \(1,\), expected \(2,\)"),
        (changed(labels=LABELS[:, None]), r"targets\[1\] labels have shape \(2, 1\), expected \(2,\)"),
        (changed(labels=LABELS.float()), r"targets\[1\] labels are torch.float32, expected torch.int64"),
        (changed(labels=LABELS.int()), r"targets\[1\] labels are torch.int32, expected torch.int64"),
        (changed(boxes=BOXES[:, [0, 1, 2, 3, 0]]), r"targets\[1\] boxes have shape \(2, 5\), expected \(G, 4\)"),
        (changed(boxes=BOXES[:1]), r"targets\[1\] labels have shape \(2,\), expected \(1,\)"),
        (changed(boxes=torch.zeros(0)), r"targets\[1\] boxes have shape \(0,\), expected \(G, 4\)"),
        (changed(boxes=BOXES[:, [0, 1, 0, 3]]), r"targets\[1\], object 0: box .* and label 1, expected x1 < x2"),
        (changed(boxes=BOXES[:, [2, 1, 0, 3]]), r"targets\[1\], object 0: box"),
        (changed(boxes=BOXES * torch.tensor([[1.0], [0.0]])), r"targets\[1\], object 1: box \[0.0, 0.0, 0.0, 0.0\]"),
        (changed(boxes=BOXES.where(BOXES != 85, torch.inf)), r"targets\[1\], object 1: box .* inf"),
        (changed(boxes=BOXES.where(BOXES != 85, torch.nan)), r"targets\[1\], object 1: box .* nan"),
        (changed(labels=LABELS - 1), r"targets\[1\], object 0: .* label 0, .* a label of 1 .. 4"),
        (changed(labels=LABELS + 3), r"targets\[1\], object 1: .* label 5, .* a label of 1 .. 4"),
        (changed(labels=-LABELS), r"targets\[1\], object 0: .* label -1"),
    ],
)
def test_targets_that_train_nothing_right_are_refused(targets, message):
    network = MaskRCNN("resnet18", 5, **SMALL).train()
    network.backbone = None  # before any work
    with pytest.raises(ValueError, match=message) as caught:
        network([torch.rand(3, 60, 90)] * 2, targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "image, message",
    [
        (torch.rand(60, 90), r"images\[1\] has shape \(60, 90\), expected \(3, H, W\)"),
        (torch.rand(4, 60, 90), r"images\[1\] has shape \(4, 60, 90\), expected \(3, H, W\)"),
        (torch.rand(60, 90, 3), r"images\[1\] has shape \(60, 90, 3\), expected \(3, H, W\)"),
        (torch.rand(1, 3, 60, 90), r"images\[1\] has shape \(1, 3, 60, 90\), expected \(3, H, W\)"),
        (torch.zeros(3, 60, 90, dtype=torch.uint8), r"images\[1\] is torch.uint8, expected floats in \[0, 1\]"),
    ],
)
def test_pictures_of_another_kind_are_refused(training, image, message):
    network = MaskRCNN("resnet18", 5, **SMALL).train(training)
    with pytest.raises(ValueError, match=message):
        network([torch.rand(3, 60, 90), image], changed() if training else None)


def test_targets_of_other_types_are_the_same_objects():
    """Whole-number boxes; masks of 255, of floats, of probabilities. Evaluation doesn't look at targets."""
    network = MaskRCNN("resnet18", 5, norm="frozen", **SMALL).train()
    images, losses = [torch.rand(3, 60, 90)], []
    truth = changed()[0]
    for values in ({}, {"boxes": truth["boxes"].long()}, {"boxes": truth["boxes"].double(), "more": "ignored"}):
        torch.manual_seed(0)
        losses.append(network(images, [truth | values]))
    for masks in (255 * truth["masks"], truth["masks"].float(), truth["masks"] * 0.6 + 0.2, truth["masks"].long()):
        torch.manual_seed(0)
        losses.append(network(images, [truth | {"masks": masks}]))
    assert all(loss == losses[0] for loss in losses)
    with torch.no_grad():
        assert len(network.eval()(images, [{}])) == 1


@pytest.mark.parametrize("name", BACKBONES)
def test_a_function_for_each_backbone(name):
    with torch.device("meta"):
        network = getattr(mask_rcnn, f"mask_rcnn_{name}_fpn")(7, norm="frozen")
        assert network.options == MaskRCNN(name, 7, norm="frozen").options
    assert set(NORMS) == {"batch", "frozen", "sync"}
