import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.models.head import CosineClassifier, Head, linear_reduction
from core.models.parts import PartsModel
from core.models.published_keys import own_names
from core.models.reid import build_reid_model


@pytest.mark.parametrize("name", ["BNNeck", "BNNeck3"])
def test_golden(name, golden, golden_keys, fill_weights):
    """LightMBN's heads: with and without a reduction before the neck."""
    arrays, keys = golden("model_heads_attention"), golden_keys("model_heads_attention")[name]["keys"]
    dim = keys["bn.weight"][0]
    head = Head(dim, 7, linear_reduction(16, dim, bias=False) if name == "BNNeck3" else None)
    own = head.state_dict()
    for key, shape in keys.items():
        value = fill_weights.fill_value(key, torch.zeros(shape))
        if value is not None:
            key = key.replace("bn.", "neck.")
            own[key].copy_(value.reshape(own[key].shape))
    pooled = torch.as_tensor(arrays[f"{name}/input"]).flatten(1)
    for mode in ("eval", "train"):
        head.train(mode == "train")
        feature, embedding, logits = head(pooled)
        for got, what in ((feature, "before_neck"), (embedding, "after_neck"), (logits, "score")):
            torch.testing.assert_close(got, torch.as_tensor(arrays[f"{name}/{mode}_{what}"]), rtol=1e-4, atol=1e-5)


def test_a_cosine_classifier_gives_cosines():
    classifier = CosineClassifier(3, 2, bias=False)
    x = torch.randn(4, 3)
    expected = F.cosine_similarity(x[:, None], classifier.weight[None], dim=2)
    torch.testing.assert_close(classifier(x), expected)
    torch.testing.assert_close(classifier(5 * x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier(x).dtype == torch.float32


def test_without_classes_the_neck_does_not_learn():
    head = Head(4, 0)
    assert head.classifier is None and not head.neck.weight.requires_grad
    feature, embedding, logits = head(torch.zeros(0, 4)) if not head.training else head.eval()(torch.zeros(0, 4))
    assert feature.shape == embedding.shape == (0, 4) and logits is None


def test_names_of_other_projects():
    own = {"backbone.conv1.weight", "neck.weight", "classifier.weight", "pooling.p", "reduction.weight"}
    one = torch.ones(1)
    for theirs in (
        # reid-strong-baseline, fast-reid (old and new), OpenUnReID, LightMBN, wrappers
        ("base.conv1.weight", "bottleneck.weight", "classifier.weight"),
        ("module.backbone.conv1.weight", "heads.bottleneck.0.weight", "heads.weight", "heads.pool_layer.p"),
        ("backbone.conv1.weight", "heads.bnneck.weight", "heads.classifier.weight"),
        ("backbone.conv1.weight", "head.feat_bn.weight", "head.feat_reduction.weight", "global_pooling.p"),
        ("model.conv1.weight", "classifier.bn.weight", "classifier.classifier.weight"),
        ("net.module.conv1.weight",),
    ):
        named = own_names(dict.fromkeys(theirs, one), own)
        assert set(named) <= own and len(named) == len(theirs), theirs


def test_a_name_for_each_copy_of_the_backbone():
    deep = nn.ModuleDict({"deep": nn.ModuleDict({"layer4": nn.Linear(1, 1)})})
    own = [f"branches.{branch}.{key}" for branch in ("a", "b") for key in deep.state_dict()]
    named = own_names({"backbone.layer4.weight": torch.ones(1), "layer4.bias": torch.ones(1)}, own)
    assert set(named) == set(own) and PartsModel.mask_decoder is None


def test_class_block_golden(golden, golden_keys, fill_weights):
    """The head of LightMBN without neck: a linear layer and BatchNorm, which losses and retrieval compare."""
    arrays, keys = golden("model_heads_attention"), golden_keys("model_heads_attention")["ClassBlock"]["keys"]
    head = Head(12, 7, nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12)), neck="none")
    for key, shape in keys.items():
        value = fill_weights.fill_value(key, torch.zeros(shape))
        if value is not None:
            own = key.replace("add_block", "reduction").replace("classifier.0", "classifier")
            head.state_dict()[own].copy_(value)
    for mode in ("eval", "train"):
        head.train(mode == "train")
        feature, embedding, logits = head(torch.as_tensor(arrays["ClassBlock/input"]).flatten(1))
        for got, what in ((feature, "feature"), (embedding, "feature_again"), (logits, "score")):
            torch.testing.assert_close(got, torch.as_tensor(arrays[f"ClassBlock/{mode}_{what}"]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_strong_baseline_of_lightmbn_golden(golden, golden_keys, fill_weights):
    """Its file under its own names: features before and after the neck."""
    arrays, keys = golden("model_lightmbn_pcb"), golden_keys("model_lightmbn_pcb")["ResNet50_bnneck"]["keys"]
    model = build_reid_model("resnet50", 751)
    state = {key: fill_weights.fill_value(key, torch.zeros(shape)) for key, shape in keys.items()}
    state = own_names({key: value for key, value in state.items() if value is not None}, model.state_dict())
    model.load_state_dict({key: value for key, value in state.items() if "model.fc." not in key}, strict=False)
    images = fill_weights.make_input("lightmbn_pcb", arrays["input_shape"])
    for embed in ("after", "before"):
        model.eval().embed = embed
        expected = torch.as_tensor(arrays[f"ResNet50_bnneck/eval_output_{embed}"])
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(model(images).embedding, expected, rtol=1e-4, atol=atol)
