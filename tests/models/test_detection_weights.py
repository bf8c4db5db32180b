import re

import pytest
import torch
from torchvision.models._meta import _COCO_CATEGORIES
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from core.errors import InputError
from core.layers.norm import freeze_batch_norm
from core.models import weights
from core.models.detection_weights import (
    COCO_CATEGORIES,
    COCO_LABELS,
    HEAD_KEYS,
    PUBLISHED_COCO,
    load_detection_weights,
    rename_old_keys,
)
from core.models.mask_rcnn import MaskRCNN, ResNetFPN
from core.models.reid import build_reid_model
from core.models.resnet import resnet18, resnet34
from core.models.weights import DownloadError

SMALL = {"min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_test": 50, "box_score_thresh": 0.0}


@pytest.fixture(autouse=True)
def narrow_pyramid(request, monkeypatch):
    """Half of a small network is the layer after the pyramid; what isn't beside torchvision's does with less of it."""
    if "torchvisions" not in request.node.name:
        monkeypatch.setattr(ResNetFPN, "out_channels", 8)


def categories(*names):
    return [(10 * i, name) for i, name in enumerate(names, start=1)]


def network(num_classes=3, norm="frozen", seed=0, backbone="resnet18"):
    torch.manual_seed(seed)
    return MaskRCNN(backbone, num_classes, norm=norm, **SMALL)


def saved(content, path):
    torch.save(content, path)
    return str(path)


def checkpoint(model, *names):
    """As `core.engine.detection` writes it, as far as weights go."""
    return {"kind": "mask_rcnn", "model": model.state_dict(), "categories": [list(c) for c in categories(*names)]}


def old_names(state):
    """Today's names -> those of torchvision's file of 2019."""
    state = {re.sub(r"(rpn\.head\.conv|_blocks\.\d)(\.0)+\.", r"\1.", key): value for key, value in state.items()}
    return {
        re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", key): value
        for key, value in state.items()
    }


def same(model, state, without=()):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key not in without)


def heads(model):
    return {key: value.clone() for key, value in model.state_dict().items() if key in HEAD_KEYS}


def test_categories_and_address_are_torchvisions():
    published = MaskRCNN_ResNet50_FPN_Weights.COCO_V1
    assert PUBLISHED_COCO["resnet50"] == published.url
    assert [c and c[1] for c in COCO_LABELS] == [None if name == "N/A" else name for name in _COCO_CATEGORIES[1:]]
    assert len(COCO_CATEGORIES) == 80 and all(COCO_LABELS[id - 1] == (id, name) for id, name in COCO_CATEGORIES)


def test_old_names_load_strictly_and_give_torchvisions_detections():
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    theirs = TorchvisionMaskRCNN(backbone, 3, **SMALL).eval()
    old = old_names(theirs.state_dict())
    expected_names = {
        "rpn.head.conv.weight",
        "backbone.fpn.inner_blocks.0.weight",
        "roi_heads.mask_head.mask_fcn4.bias",
    }
    assert expected_names <= set(old) and len(old) == len(theirs.state_dict())
    assert list(rename_old_keys(old)) == list(theirs.state_dict())
    ours = network(seed=7).eval()
    ours.load_state_dict(old)
    theirs.load_state_dict(old)
    image = torch.rand(3, 50, 80)
    with torch.no_grad():
        mine, expected = ours([image])[0], theirs([image])[0]
    torch.testing.assert_close(mine["boxes"], expected["boxes"], rtol=0, atol=1e-3)
    torch.testing.assert_close(mine["scores"], expected["scores"], rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="Missing key.*rpn.head.conv.0.0.weight"):
        ours.load_state_dict({key: value for key, value in old.items() if key != "rpn.head.conv.weight"})


@pytest.mark.parametrize(
    "old, wrap",
    [
        (False, lambda state: state),
        (True, lambda state: {"model": state}),
        (True, lambda state: {"module." + key: value for key, value in state.items()}),
    ],
)
def test_a_file_of_a_whole_network(old, wrap, tmp_path):
    state = network(norm="batch", seed=1).state_dict()
    path = saved(wrap(old_names(state) if old else state), tmp_path / "w.pth")
    model = network()
    report = load_detection_weights(model, path, "resnet18", categories("nut", "bolt"))
    assert same(model, state) and report.loaded == len(model.state_dict()) and not report.warning
    assert report.message == (
        f"weights: {report.loaded} of {report.loaded} tensors from {path}; "
        "heads kept, its classes without names taken as the data's"
    )


def test_rows_of_the_datas_classes_are_kept_in_its_order(tmp_path):
    source = network(5, seed=1)
    path = saved(checkpoint(source, "cup", "bag", "nut", "box"), tmp_path / "w.pth")
    model = network(3)
    report = load_detection_weights(model, path, "resnet18", categories("nut", "cup"))
    mine, theirs, rows = heads(model), heads(source), [0, 3, 1]
    for key in HEAD_KEYS:
        per_class = 4 if "bbox_pred" in key else 1
        expected = theirs[key].view(5, per_class, *theirs[key].shape[1:])[rows]
        assert torch.equal(mine[key], expected.flatten(0, 1)), key
    assert same(model, source.state_dict(), HEAD_KEYS)
    assert report.message.endswith("; heads kept, with the rows of 2 of 4 classes") and "\n" not in report.message
    before = source.state_dict()
    report = load_detection_weights(again := network(5), path, "resnet18", categories("cup", "bag", "nut", "box"))
    assert same(again, before) and report.message.endswith("w.pth")


@pytest.mark.parametrize("names", [("nut", "saw"), ("saw",), ("nut", "cup", "bag", "box", "saw")])
def test_an_unknown_class_initialises_the_heads_anew(names, tmp_path):
    """Also where the number of classes is the same."""
    path = saved(checkpoint(network(5, seed=1), "cup", "bag", "nut", "box"), tmp_path / "w.pth")
    model = network(len(names) + 1)
    before = heads(model)
    report = load_detection_weights(model, path, "resnet18", categories(*names))
    assert all(torch.equal(value, before[key]) for key, value in heads(model).items())
    expected = f"; heads initialised anew for {len(names) + 1} classes, it doesn't know 'saw': "
    assert report.message.endswith(expected + "cls_score, bbox_pred, mask_fcn_logits")
    assert report.loaded == len(model.state_dict()) - len(HEAD_KEYS)


def test_another_number_of_classes_without_names(tmp_path):
    path = saved(network(7, seed=1).state_dict(), tmp_path / "w.pth")
    report = load_detection_weights(network(3), path, "resnet18", categories("nut", "bolt"))
    assert "; heads initialised anew for 3 classes, it has 7 classes: cls_score" in report.message


def test_cocos_classes_by_name(tmp_path):
    source = network(91, seed=1)
    path = saved(old_names(source.state_dict()), tmp_path / "w.pth")
    model = network(3)
    load_detection_weights(model, path, "resnet18", categories("suitcase", "handbag"))
    expected = source.roi_heads.box_predictor.cls_score.weight[[0, 33, 31]]
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, expected)
    whole = network(91)  # a network of the file's own labels, as the demo uses it
    load_detection_weights(whole, path, "resnet18", COCO_CATEGORIES)
    assert same(whole, source.state_dict())


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A "published" file in the old names, of a network that was trained without eps; `fetch` finds it."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    theirs = TorchvisionMaskRCNN(backbone, 91, **SMALL)
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(1e-4, 2e-3)
    theirs.state_dict()["backbone.body.bn1.running_var"][0] = 6e-45  # as in the real file: a channel that is never on
    theirs.state_dict()["backbone.body.bn1.weight"][0] = 1e-9
    overwrite_eps(theirs, 0.0)
    path = tmp_path / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    torch.save(old_names(theirs.state_dict()), path)
    monkeypatch.setitem(PUBLISHED_COCO, "resnet18", PUBLISHED_COCO["resnet50"])
    monkeypatch.setattr(weights, "fetch", lambda url, timeout=5: path)
    return theirs.eval(), path


@pytest.mark.parametrize("by_path", [False, True])
def test_the_published_file_gives_torchvisions_detections(published, by_path):
    """torchvision sets eps to 0 for this file; ours keeps its eps and makes the weights up for it."""
    theirs, path = published
    model = network(91, seed=5).eval()
    load_detection_weights(model, str(path) if by_path else "coco", "resnet18", COCO_CATEGORIES)
    x = torch.randn(1, 64, 4, 4)
    x[:, 0] = 0
    torch.testing.assert_close(model.backbone.body.bn1(x), theirs.backbone.body.bn1(x), rtol=1e-5, atol=1e-6)
    x = torch.randn(1, 64, 8, 8)
    expected = theirs.backbone.body.layer1(x)
    torch.testing.assert_close(model.backbone.body.layer1(x), expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_torchvisions_published_file_in_half_precision(published):
    """Its channel that is never on needs a scale beyond float16, where infinity times 0 was no number."""
    model = network(91).eval()
    load_detection_weights(model, "coco", "resnet18", COCO_CATEGORIES)
    body, x = model.backbone.body, torch.rand(1, 3, 32, 32)
    body.conv1.weight.data[0] = 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        half = body.bn1(body.conv1(x))
    assert half.dtype == torch.float16 and half.isfinite().all()
    torch.testing.assert_close(half.float(), body.bn1(body.conv1(x)), rtol=0.01, atol=0.05)
    # Nor is a gradient multiplied by 1e14 there.
    scale = model.backbone.body.bn1.weight[0] / 1e-5**0.5
    assert scale.abs() < 1


def test_the_published_file_in_a_trained_batch_norm_has_torchvisions_weights(published):
    _, path = published
    model = network(91, norm="batch")
    load_detection_weights(model, "coco", "resnet18", COCO_CATEGORIES)
    expected = torch.load(path, weights_only=True)["backbone.body.layer1.0.bn1.weight"]
    assert torch.equal(model.backbone.body.layer1[0].bn1.weight, expected)


def test_published_weights_that_cannot_be_had(monkeypatch):
    def no_network(url, timeout=5):
        raise DownloadError("no answer in time")

    monkeypatch.setattr(weights, "fetch", no_network)
    monkeypatch.setitem(PUBLISHED_COCO, "resnet18", PUBLISHED_COCO["resnet50"])
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for source in ("coco", "imagenet"):
        report = load_detection_weights(model, source, "resnet18", categories("nut", "bolt"))
        assert report.warning and report.loaded == 0 and same(model, before)
        assert "can't be had (no answer in time): training from scratch; put the file into" in report.message


def test_coco_for_another_backbone():
    message = "COCO weights are published for resnet50, not for resnet18; use imagenet or a file"
    with pytest.raises(InputError, match=message):
        load_detection_weights(network(), "coco", "resnet18", categories("nut", "bolt"))


@pytest.mark.parametrize("freeze_first", [True, False])
@pytest.mark.parametrize("kind", ["imagenet", "path", "old path", "reid"])
def test_a_resnet_goes_into_the_body(kind, freeze_first, tmp_path, monkeypatch):
    torch.manual_seed(1)
    source = resnet18() if kind != "reid" else build_reid_model("resnet18", 3).backbone
    source(torch.rand(2, 3, 32, 32))  # statistics of its own
    state = source.state_dict()
    if kind == "old path":
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    content = {"kind": "reid", "model": {f"backbone.{k}": v for k, v in state.items()}} if kind == "reid" else state
    path = saved(content, tmp_path / "resnet18.pth")
    monkeypatch.setattr(weights, "fetch", lambda url, timeout=5: tmp_path / "resnet18.pth")
    model = network(norm="frozen" if freeze_first else "batch")
    report = load_detection_weights(model, "imagenet" if kind == "imagenet" else path, "resnet18", categories("a", "b"))
    if not freeze_first:
        freeze_batch_norm(model)
    assert same(model.backbone.body, state) and "num_batches_tracked" not in report.message
    assert report.message.endswith("" if kind == "reid" else "; in the file alone: fc.weight, fc.bias")


def averaged(model):
    """As AveragedModel saves it: beside the weights a counter, and every name with a prefix."""
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    return {"n_averaged": torch.tensor(9)} | state


def test_the_averaged_weights_of_a_checkpoint_are_taken(tmp_path):
    last, mean = network(seed=1), network(seed=2)
    content = checkpoint(last, "nut", "bolt") | {"ema": averaged(mean)}
    path = saved(content, tmp_path / "best.pth")
    report = load_detection_weights(model := network(), path, "resnet18", categories("nut", "bolt"))
    number = len(model.state_dict())
    assert same(model, mean.state_dict())
    assert report.message == f"weights: {number} of {number} tensors from {path} (its averaged weights)"
    path = saved(content | {"ema": None}, tmp_path / "best.pth")
    report = load_detection_weights(model := network(), path, "resnet18", categories("nut", "bolt"))
    assert same(model, last.state_dict()) and "its averaged" not in report.message


def test_the_averaged_weights_of_a_reid_checkpoint_are_taken_for_the_body(tmp_path):
    torch.manual_seed(1)
    last, mean = build_reid_model("resnet18", 3), build_reid_model("resnet18", 3)
    content = {"kind": "reid", "model": last.state_dict(), "ema": averaged(mean)}
    path = saved(content, tmp_path / "best.pth")
    report = load_detection_weights(model := network(norm="batch"), path, "resnet18", categories("a", "b"))
    assert same(model.backbone.body, mean.backbone.state_dict()) and "(its averaged weights)" in report.message


def test_none():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_detection_weights(model, "none", "resnet18", categories("nut", "bolt"))
    assert report[:3] == ("weights: none, training from scratch", 0, False) and same(model, before)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            lambda: network(backbone="resnet34").state_dict(),
            "is of another backbone: it also has backbone.body.layer1.2",
        ),
        (lambda: resnet34().state_dict(), "is of another backbone: it also has layer1.2"),
        (lambda: {"weight": torch.zeros(3)}, "has no tensor that this model could take"),
        (lambda: {"epoch": 3}, "holds no weights"),
    ],
)
def test_files_of_something_else_change_nothing(content, message, tmp_path):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"w.pth.*{re.escape(message)}") as caught:
        load_detection_weights(model, saved(content(), tmp_path / "w.pth"), "resnet18", categories("nut", "bolt"))
    assert "\n" not in str(caught.value) and same(model, before)
    with pytest.raises(InputError, match="no such file"):
        load_detection_weights(model, str(tmp_path / "other.pth"), "resnet18", categories("nut", "bolt"))
