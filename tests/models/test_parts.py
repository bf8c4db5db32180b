"""LightMBN, MGN, PCB and the pyramid: against the originals, and what they share."""

import pytest
import torch
import torch.nn.functional as F

from core.errors import InputError
from core.models.lightmbn import lmbn_n, lmbn_r
from core.models.mgn import mgn
from core.models.osnet import osnet_x0_25
from core.models.parts import split_backbone, stripes_of
from core.models.pcb import pcb
from core.models.published_keys import own_names
from core.models.reid import build_reid_model
from core.models.resnet import resnet18
from tests.models.test_resnet import close


def filled(model, entry, fill_weights):
    """The network with the golden weights, which come under the original's names; the number of parameters is equal."""
    state = {key: fill_weights.fill_value(key, torch.zeros(shape)) for key, shape in entry["keys"].items()}
    own = model.state_dict()
    state = own_names({key: value for key, value in state.items() if not key.startswith("model.fc.")}, own)
    state = {key: own[key] if value is None else value.reshape(own[key].shape) for key, value in state.items()}
    model.load_state_dict(state)
    count = sum(parameter.numel() for parameter in model.parameters())
    unused = 1000 * 2048 + 1000 if "model.fc.weight" in entry["keys"] else 0  # torchvision's classifier, left in by PCB
    assert count == entry["parameter_count"] - unused
    return model.eval()


@pytest.mark.parametrize("name, build", [("LMBN_n", lmbn_n), ("LMBN_r", lmbn_r)])
@torch.no_grad()
def test_lightmbn_golden(name, build, golden, golden_keys, fill_weights):
    arrays = golden(f"model_{name.lower()}")
    model = filled(build(751), golden_keys(f"model_{name.lower()}")[name], fill_weights)
    images = fill_weights.make_input(name, arrays["input_shape"])
    close(images.flatten()[:8], arrays["input_head"])
    shared = model.trunk(images)
    close(shared.mean(dim=(2, 3)), arrays["backone_mean"])
    for branch in ("global", "part", "channel"):
        expected = arrays[f"{'partial' if branch == 'part' else branch}_branch_mean"]
        close(model.branches[branch].deep(shared).mean(dim=(2, 3)), expected)
    expected = torch.as_tensor(arrays["eval_output"])  # (B, 512, 7): global, drop, part, stripes, channels
    close(model(images).embedding, F.normalize(expected, dim=1).transpose(1, 2).flatten(1))

    output = model.train()(fill_weights.make_input(f"{name}_train", (4, *arrays["input_shape"][1:])))
    for got, key in ((output.logits, "train/logits_head"), (output.features, "train/features")):
        expected = torch.as_tensor(arrays[key])
        got = torch.stack(got, dim=2)[:, : expected.shape[1]]
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@torch.no_grad()
def test_mgn_golden(golden, golden_keys, fill_weights):
    arrays = golden("model_mgn")
    model = filled(mgn(751), golden_keys("model_mgn")["MGN"], fill_weights)
    output = model(fill_weights.make_input("MGN", arrays["input_shape"]))
    order = [0, 1, 3, 4, 2, 5, 6, 7]  # the original has the three wholes first
    expected = torch.as_tensor(arrays["eval_output"])[:, :, order]
    close(output.embedding, F.normalize(expected, dim=1).transpose(1, 2).flatten(1))
    close(torch.stack(output.logits, dim=2)[:, :64], arrays["logits_head"][:, :, order])
    close(torch.stack(output.features, dim=2), arrays["eval_output"][:, :, :3])


@pytest.mark.parametrize("parts, dim", [(6, 256), (3, 128)])
@torch.no_grad()
def test_pcb_of_lightmbn_golden(parts, dim, golden, golden_keys, fill_weights):
    arrays, keys = golden("model_lightmbn_pcb"), golden_keys("model_lightmbn_pcb")
    model = filled(pcb(751, parts=parts, feature_dim=dim), keys[f"PCB_{parts}"], fill_weights)
    embedding = model(fill_weights.make_input("lightmbn_pcb", arrays["input_shape"])).embedding
    expected = torch.as_tensor(arrays[f"PCB_{parts}/eval_output"]).roll(1, dims=2)  # there the whole comes last
    close(embedding, F.normalize(expected, dim=1).transpose(1, 2).flatten(1))


@pytest.mark.parametrize("parts", [6, 4])
@torch.no_grad()
def test_pcb_of_torchreid_golden(parts, golden, golden_keys, fill_weights):
    arrays, keys = golden("model_torchreid_pcb"), golden_keys("model_torchreid_pcb")
    model = filled(pcb(751, parts=parts, neck="none"), keys[f"pcb_p{parts}"], fill_weights)
    output = model(fill_weights.make_input("torchreid_pcb", arrays["input_shape"]))
    expected = torch.as_tensor(arrays[f"pcb_p{parts}/feature"]).unflatten(1, (2048, parts))
    close(output.embedding, expected.transpose(1, 2).flatten(1))
    close(torch.stack(output.logits, dim=1)[..., :64], arrays[f"pcb_p{parts}/logits_no_dropout"])


def small(model, **options):
    backbone = "osnet_x0_25" if model == "lmbn_n" else "resnet18"
    return build_reid_model(backbone, 5, model=model, embedding_dim=16, **options)


@pytest.mark.parametrize(
    "model, vectors, compared", [("lmbn_n", 7, 3), ("lmbn_r", 7, 3), ("mgn", 8, 3), ("pcb", 7, 1), ("pyramid", 21, 21)]
)
def test_every_network_gives_what_it_promises_and_every_weight_learns(model, vectors, compared):
    network = small(model)
    images = torch.randn(4, 3, 96, 32)
    output = network(images)
    assert output.embedding.shape == (4, network.embedding_dim) == (4, 16 * vectors)
    assert [scores.shape for scores in output.logits] == [(4, 5)] * vectors == [(4, 5)] * len(network.logit_names)
    assert [feature.shape for feature in output.features] == [(4, 16)] * compared
    assert len(network.feature_names) == compared and output.mask is None
    (sum(scores.square().sum() for scores in output.logits) + output.embedding[:, 0].sum()).backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert all(name.endswith("neck.bias") for name in unused)  # which stays 0

    network.eval()
    with torch.no_grad():
        after = network(images).embedding
        network.embed = "before"
        before = network(images).embedding
        assert network(torch.zeros(0, 3, 96, 32)).embedding.shape == (0, network.embedding_dim)
        maps = network.activation_maps(images)
    assert list(maps) == list(network.branches) and all(len(one) == 4 for one in maps.values())
    assert torch.equal(before, after) == (model in ("mgn", "pyramid"))  # they have no neck
    torch.testing.assert_close(after.unflatten(1, (vectors, 16)).norm(dim=2), torch.ones(4, vectors))
    with pytest.raises(ValueError, match="no mask"):
        network(images, return_mask=True)


def test_the_branches_of_lightmbn_are_a_choice():
    network = small("lmbn_n", branches=("channel", "global"))
    assert network.logit_names == ["global", "drop", "channel_1", "channel_2"]
    assert network.feature_names == ["global", "drop"]
    assert small("lmbn_n", branches=("channel",)).feature_names == ["channel_1", "channel_2"]
    with pytest.raises(InputError, match="branches global, part, channel, not head"):
        small("lmbn_n", branches=("head",))


def test_without_classes_all_that_is_pooled_is_compared():
    network = build_reid_model("osnet_x0_25", 0, model="lmbn_n")
    output = network(torch.randn(2, 3, 64, 32))
    assert output.logits == [] == network.logit_names
    assert len(output.features) == len(network.feature_names) == 7


def test_stripes_that_do_not_divide_the_rows():
    assert [stripe.shape[2] for stripe in stripes_of(torch.zeros(1, 1, 8, 2), 3)] == [3, 3, 2]
    with pytest.raises(InputError, match="6 parts of a map of 4 rows: give fewer parts"):
        small("pcb")(torch.zeros(2, 3, 64, 32))
    assert small("pcb", parts=5)(torch.zeros(2, 3, 96, 32)).embedding.shape == (2, 96)


def test_the_pyramid_by_hand():
    """Rows 1, 2, 4 of one column: average and maximum of each run of neighbours."""
    branch = small("pyramid", parts=3).branches["part"]
    vectors = branch.pooled(torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1))
    assert [vector.item() for vector in vectors] == pytest.approx([2, 4, 8, 1.5 + 2, 3 + 4, 7 / 3 + 4])
    assert branch.names == ["part_1_1", "part_2_2", "part_3_3", "part_1_2", "part_2_3", "part_1_3"]


@pytest.mark.parametrize("backbone", [osnet_x0_25, resnet18])
@torch.no_grad()
def test_trunk_and_deep_part_are_the_backbone(backbone):
    whole = backbone(0).eval()
    images = torch.randn(1, 3, 64, 32)
    expected = whole.forward_stages(images)[-1]
    trunk, (deep, other) = split_backbone(whole, copies=2)
    assert torch.equal(deep(trunk(images)), expected) and torch.equal(other(trunk(images)), expected)
    names = {*trunk.state_dict(), *deep.state_dict()}
    assert names == {key for key in backbone(0).state_dict() if not key.startswith("fc.")}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parts": 4}, "network bot has no choice of parts: leave it out, or use pcb or pyramid"),
        ({"model": "pcb", "branches": ("part",)}, "network pcb has no choice of branches"),
        ({"model": "mgn", "with_mask": True}, "network mgn has no choice of a mask decoder"),
        ({"model": "mgn", "pooling": "gem"}, "network mgn has no choice of gem pooling"),
        ({"model": "lmbn"}, "unknown model 'lmbn'; use one of bot, lmbn_n"),
        ({"attention": "cbam", "attention_stages": (5,)}, "there is no stage 5"),
    ],
)
def test_what_a_network_cannot_have_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_reid_model("resnet18", 5, **options)
