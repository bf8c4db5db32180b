"""What every ReID script shares: targets, features and metrics on one process and on two, one epoch, the data."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from baggage import synthetic
from core.data.images import list_images
from core.data.reid_datasets import load_reid_dataset
from core.data.samples import ReIDDataset, Sample
from core.engine import distributed, reid
from core.engine.updater import Updater
from core.errors import InputError
from core.losses.spec import build_loss
from core.models.reid import ReIDOutput, build_reid_model

CPU = torch.device("cpu")
OPTIONS = {
    "height": 16, "width": 16, "workers": 0, "eval_batch_size": 2, "ids_per_batch": 2, "images_per_id": 2, "seed": 0,
    "iterations_per_epoch": 0, "flip": 0.5, "pad": 2, "autoaugment": False, "blur": 0.0, "erasing": 0.5,
    "mask_target": "gaussian", "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0, "epochs": 3,
    "schedule": "step", "milestones": [], "step_size": 9, "gamma": 0.1, "min_lr": 0.0, "warmup_epochs": 0,
    "warmup_factor": 0.0, "clip_gradient": 0.0, "accumulate": 1, "ema": 0.0, "amp": "off", "channels_last": False,
    "center_lr": 0.5, "dataset": None, "data": None, "protocol": None, "skip_broken": False, "loss": "cross_entropy",
    "hide_background": 0.0, "mask_checkpoint": None,
}  # fmt: skip


def options(**changes):
    return Namespace(**{**OPTIONS, **changes})


# What a mask decoder learns


def test_a_run_of_before_mask_pooling_can_be_continued():
    network = build_reid_model("resnet18", 2)
    how = {"backbone": "resnet18", "mask_decoder": "full", "mask_pooling": "off"}
    loss = build_loss("cross_entropy", 2, network.feature_dim)
    updater = Updater(network, loss, options(), CPU)
    state = {"model": network.state_dict(), "loss": loss.state_dict(), **updater.state_dict()}
    reid.restore({**state, "network": {"backbone": "resnet18"}}, "last.pth", network, how, loss, updater)
    with pytest.raises(InputError, match="mask_pooling is off there and soft here"):
        reid.restore(
            {**state, "network": {"backbone": "resnet18"}}, "last.pth", network, {**how, "mask_pooling": "soft"}, loss,
            updater,
        )  # fmt: skip


def test_box_and_gaussian_targets_by_hand():
    batch = {"box": torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.0, 0.0, 1.0, 0.5]])}
    boxes = reid.target_masks(batch, "box", (4, 4), 0.1, CPU)  # (2, 1, 4, 4)
    middle = torch.zeros(4, 4)
    middle[1:3, 1:3] = 1
    assert torch.equal(boxes[0, 0], middle)
    assert torch.equal(boxes[1, 0], torch.tensor([[1.0] * 4] * 2 + [[0.0] * 4] * 2))
    gaussian = reid.target_masks(batch, "gaussian", (5, 3), 0.5, CPU)  # (2, 1, 5, 3): rows at 0, 1/4, ...
    assert gaussian.shape == (2, 1, 5, 3)
    assert gaussian[0, 0, 2, 1] == 1
    assert gaussian[0, 0, 3, 1].item() == pytest.approx(math.exp(-0.5))  # 0.25 off, sigma 0.5 * 0.5: one sigma
    assert gaussian[1, 0, 2, 1].item() == pytest.approx(math.exp(-0.5))  # the second box is as wide, half as high
    assert gaussian[1, 0, 1, 0].item() == pytest.approx(math.exp(-0.5))


def test_instance_targets_are_the_true_mask_in_the_size_of_the_decoder():
    mask = torch.zeros(1, 1, 8, 4, dtype=torch.uint8)
    mask[..., :2] = 1
    target = reid.target_masks({"mask": mask}, "instance", (4, 2), 0.1, CPU)
    assert target.dtype == torch.float32 and torch.equal(target[0, 0], torch.tensor([[1.0, 0.0]] * 4))


# Features, on one process and on two


class Pixels(nn.Module):
    """A few pixels as embedding, not the same for a mirrored picture."""

    embedding_dim = 6

    def forward(self, images):
        return ReIDOutput(images[:, :, :2, 0].flatten(1), [], [])


def embed(args, samples, flip=False):
    return reid.extract_features(Pixels(), reid.build_eval_loader(args, samples, CPU), CPU, flip=flip)


def embed_on_a_rank(rank, args, samples, flip):
    distributed.setup("cpu", timeout_minutes=0.5)
    features = embed(args, samples, flip).numpy(), embed(args, samples[:1], flip).numpy()
    distributed.cleanup()
    return features


@pytest.fixture
def query(baggage):
    return load_reid_dataset("mvb", baggage).query[:5]  # two processes have shares of three and two


def test_features_are_in_the_order_of_the_pictures(query):
    loader = reid.build_eval_loader(options(), query, CPU)
    images = torch.stack([loader.dataset[i]["image"] for i in range(5)])
    plain, mirrored = Pixels()(images).embedding, Pixels()(images.flip(-1)).embedding
    assert torch.equal(embed(options(), query), plain) and not torch.equal(plain, mirrored)
    assert torch.equal(embed(options(workers=1, eval_batch_size=4), query), plain)
    torch.testing.assert_close(embed(options(), query, flip=True), (plain + mirrored) / 2)


def test_the_normalisation_is_that_of_the_checkpoint(query):
    plain, shifted = (
        reid.query_gallery_loaders(
            options(), ReIDDataset([], query, query[:3]), CPU, {"mean": [mean] * 3, "std": [0.5] * 3}
        )
        for mean in (0.0, 0.5)
    )
    for ours, theirs in zip(plain, shifted, strict=True):
        torch.testing.assert_close(ours.dataset[0]["image"] - 1, theirs.dataset[0]["image"])


@pytest.mark.parametrize("flip", [False, True])
def test_two_processes_have_the_features_of_one(launch, query, flip):
    one = embed(options(), query, flip).numpy()
    results, codes, _ = launch(embed_on_a_rank, options(), query, flip)
    assert codes == [0, 0]
    for features, of_the_first in results:  # of a single picture rank 1 has no share
        assert np.array_equal(features, one) and np.array_equal(of_the_first, one[:1])


def test_the_network_is_in_evaluation_mode_and_gives_float32():
    class Modes(Pixels):
        def forward(self, images):
            assert not self.training and not torch.is_grad_enabled()
            return ReIDOutput(images.flatten(1)[:, :6].bfloat16(), [], [])

    loader = [{"image": torch.ones(2, 3, 4, 4)}]
    assert reid.extract_features(Modes().train(), loader, CPU).dtype == torch.float32


def test_a_set_that_is_query_and_gallery_is_embedded_once(query, monkeypatch):
    calls = []
    monkeypatch.setattr(reid, "extract_features", lambda *_, description, **__: calls.append(description) or object())
    loaders = reid.query_gallery_loaders(options(), ReIDDataset([], query, list(query)), CPU)
    first, second = reid.extract_query_gallery(Pixels(), loaders, CPU)
    assert loaders[0] is loaders[1] and first is second and calls == ["query"]
    loaders = reid.query_gallery_loaders(options(), ReIDDataset([], query, query[:3]), CPU)
    first, second = reid.extract_query_gallery(Pixels(), loaders, CPU)
    assert first is not second and calls == ["query", "query", "gallery"]


# Metrics, with the queries shared out


def ranking_case(protocol, num_query):
    """Random features with identities that some queries find, and (market1501) some find in their own camera alone."""
    generator = torch.Generator().manual_seed(num_query)

    def part(count):
        features = torch.randn(count, 8, generator=generator)
        ids, cameras = torch.arange(count) % 4, torch.randint(0, 2, (count,), generator=generator)
        return features, [Sample("", *pair) for pair in zip(ids.tolist(), cameras.tolist(), strict=True)]

    (query, query_samples), (gallery, gallery_samples) = part(num_query), part(13)
    if protocol == "vehicleid":
        gallery, gallery_samples = query, query_samples
    return query, gallery, ReIDDataset([], query_samples, gallery_samples)


def rank_case(cases, metric):
    results = [reid.rank_embeddings(*ranking_case(*case), case[0], metric) for case in cases]
    return [(r.cmc.tolist(), r.mean_ap, r.mean_inp, r.num_valid_queries) for r in results]


def threshold_case(cases, metric):
    rate = {"false_accept_rate": 0.2, "distance": metric}
    return [tuple(reid.threshold(*ranking_case(*case), options(protocol=case[0], **rate))) for case in cases]


def rank_on_a_rank(rank, cases, metric):
    distributed.setup("cpu", timeout_minutes=0.5)
    results = rank_case(cases, metric), threshold_case(cases, metric)
    distributed.cleanup()
    return results


def test_two_processes_have_the_metrics_of_one_exactly(launch):
    """Odd and even numbers of queries, and a single one, of which rank 1 has no share."""
    cases = [(protocol, count) for protocol in ("market1501", "no_camera", "vehicleid") for count in (11, 8)]
    cases += [("market1501", 1), ("no_camera", 1)]
    alone = rank_case(cases, "cosine")
    results, codes, _ = launch(rank_on_a_rank, cases, "cosine")
    assert codes == [0, 0]
    assert [metrics for metrics, _ in results] == [alone, alone]
    assert results[0][1] == results[1][1]  # thresholds
    for shared, single in zip(results[0][1], threshold_case(cases, "cosine"), strict=True):
        assert shared == pytest.approx(single, nan_ok=True)  # a product of fewer rows may round differently
    assert all(0 < mean_ap < 1 for _, mean_ap, *_ in alone[:2])
    assert alone[-1][-1] == 1  # one valid query


def test_metrics_are_the_columns_of_the_log():
    query, gallery, data = ranking_case("no_camera", 11)
    result = reid.rank_embeddings(query, gallery, data, "no_camera", "euclidean")
    columns = reid.metrics(result)
    assert list(columns) == ["mAP", "mINP", "rank1", "rank5", "rank10"]
    assert columns["rank5"] == result.cmc[4] and columns["mAP"] == result.mean_ap
    assert reid.evaluate(None, None, ReIDDataset([], [], []), options(), CPU) is None


# One epoch


class Tiny(nn.Module):
    """A network with dropout for pictures of 16x16."""

    def __init__(self, num_classes):
        super().__init__()
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Dropout(0.5))
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, images):
        feature = self.embed(images)
        return ReIDOutput(feature, [feature], [self.classifier(feature)])


def parts_for(data, args, network=None):
    torch.manual_seed(0)
    network = network or Tiny(len({sample.id for sample in data.train}))
    loss = build_loss("cross_entropy+0.5*triplet", 6, 8)
    return network, loss, Updater(network, loss, args, CPU)


def train(data, epochs, loader=None, network=None, **changes):
    """Weights after each epoch."""
    args = options(**changes)
    network, loss, updater = parts_for(data, args, network)
    loader = loader or reid.build_train_loader(args, data, CPU)
    weights = []
    for epoch in epochs:
        reid.train_one_epoch(network, loss, loader, updater, epoch=epoch, seed=0, device=CPU)
        weights.append(torch.cat([value.flatten().clone() for value in network.state_dict().values()]))
    return weights


@pytest.fixture
def data(baggage):
    return load_reid_dataset("mvb", baggage)


def test_the_number_of_workers_changes_nothing(data):
    """Neither the pictures nor dropout, in no epoch: a loader draws seeds for its workers, and more in its first."""
    alone, with_worker = (train(data, (1, 2), workers=workers) for workers in (0, 1))
    for first, second in zip(alone, with_worker, strict=True):
        assert torch.equal(first, second)


def test_an_epoch_is_the_same_for_a_loader_that_is_new_and_one_that_is_not(data):
    args = options(workers=1)
    used = reid.build_train_loader(args, data, CPU)
    train(data, (1,), loader=used)
    torch.rand(7)  # nor does it matter what was drawn before
    assert torch.equal(train(data, (2,), loader=used)[0], train(data, (2,), workers=1)[0])
    assert not torch.equal(train(data, (1,))[0], train(data, (2,))[0])


def test_a_real_network_with_dropout_on_any_number_of_workers(data):
    def weights(workers):
        torch.manual_seed(1)
        network = build_reid_model("resnet18", 6, dropout=0.5)
        args = options(workers=workers, height=32, width=32)
        loss = build_loss("cross_entropy", 6, network.feature_dim)
        updater = Updater(network, loss, args, CPU)
        loader = reid.build_train_loader(args, data, CPU)
        reid.train_one_epoch(network, loss, loader, updater, epoch=1, seed=0, device=CPU)
        return network.state_dict()

    first, second = weights(0), weights(1)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_an_epoch_reports_means_of_the_parts_as_they_are_minimised(data):
    args = options()
    network, loss, updater = parts_for(data, args)
    seen, modes = [], []

    def spy(output, labels, targets):
        modes.append((network.training, network.embed.training))
        parts = loss(output, labels, targets)
        seen.append({name: value.item() for name, value in parts.items()})
        return parts

    loader = reid.build_train_loader(args, data, CPU)
    row = reid.train_one_epoch(
        network, spy, loader, updater, epoch=1, seed=0, device=CPU, frozen=[network.embed]
    )  # fmt: skip
    assert list(row) == ["loss", "cross_entropy", "triplet", "images_per_second"] and row["images_per_second"] > 0
    assert len(seen) == len(loader) == 6 and set(modes) == {(True, False)}
    for name in ("cross_entropy", "triplet"):
        assert row[name] == pytest.approx(sum(parts[name] for parts in seen) / len(seen))
    assert row["loss"] == pytest.approx(row["cross_entropy"] + row["triplet"])


def test_targets_are_made_of_each_batch(data):
    args = options()
    network, _, updater = parts_for(data, args)
    received = []

    def loss(output, labels, targets):
        received.append(targets)
        return {"some": output.logits[0].square().mean()}

    def make_targets(batch):
        return reid.target_masks(batch, "box", (4, 4), 0.1, CPU)

    loader = reid.build_train_loader(args, data, CPU)
    reid.train_one_epoch(network, loss, loader, updater, epoch=1, seed=0, device=CPU, make_targets=make_targets)
    assert len(received) == len(loader) and all(targets.shape == (4, 1, 4, 4) for targets in received)


def nan_on_rank_1(rank, data, whole_script):
    """The message that stops the epoch, and the pictures of the batch that this rank was at."""
    batches = []

    def main(_):
        distributed.setup("cpu", timeout_minutes=0.5)
        args = options(ids_per_batch=2)
        network, loss, updater = parts_for(data, args)
        model = distributed.wrap(network, CPU)

        def spoilt(output, labels, targets):
            parts = loss(output, labels, targets)
            step = len(batches) - 1
            return {**parts, "triplet": parts["triplet"] * math.nan} if (rank, step) == (1, 1) else parts

        reid.train_one_epoch(
            model, spoilt, reid.build_train_loader(args, data, CPU), updater,
            epoch=3, seed=0, device=CPU, make_targets=lambda batch: batches.append(batch["path"]),
        )  # fmt: skip

    if whole_script:
        distributed.run_script(main, None)
    try:
        main(None)
    except InputError as error:
        distributed.barrier()
        distributed.cleanup()
        return str(error), batches


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_its_report(launch, data):
    results, codes, _ = launch(nan_on_rank_1, data, False)
    assert codes == [0, 0]
    (message, batches_of_0), (same, batches_of_1) = results
    assert message == same and len(batches_of_0) == len(batches_of_1) == 2  # both in the second step
    assert "not finite in epoch 3, step 1, on rank 1 (cross_entropy " in message and "triplet nan)" in message
    assert "cross_entropy nan" not in message
    assert message.endswith("pictures of the batch: " + " ".join(batches_of_1[-1]))
    assert not set(batches_of_0[-1]) & set(batches_of_1[-1])


def test_a_script_ends_with_that_one_line(launch, data):
    _, codes, errors = launch(nan_on_rank_1, data, True)
    assert codes == [2, 2]
    assert errors[0].startswith("error: the loss is not finite") and errors[0].count("\n") == 1


# The data that options name


def test_load_data_settles_the_options(baggage, monkeypatch, tmp_path):
    said, made = [], []
    monkeypatch.chdir(tmp_path)
    args = options(dataset="mvb", data=str(baggage))
    data = reid.load_data(args, said.append, training=True)
    assert args.protocol == "no_camera" and len(data.train) == 24 and said == []
    assert reid.describe(data) == (
        "train 24 pictures of 6 identities, query 6 pictures of 3 identities, gallery 6 pictures of 3 identities"
    )
    assert reid.load_data(options(dataset="mvb", data=str(baggage), protocol="no_camera")).train == data.train

    monkeypatch.setattr(synthetic, "make_synthetic_baggage", lambda root, background: made.append((root, background)))
    monkeypatch.setattr(reid, "load_reid_dataset", lambda name, root: data)
    args = options()
    reid.load_data(args)
    assert (args.dataset, args.data, args.protocol) == ("synthetic", "data/synthetic", "no_camera")
    reid.load_data(options(dataset="synthetic_hard"))
    assert made == [("data/synthetic", "plain"), ("data/synthetic_hard", "hard")]
    args = options(dataset="market1501", protocol="no_camera")
    reid.load_data(args)
    assert (args.data, args.protocol) == ("data/market1501", "no_camera") and len(made) == 2


def test_data_without_query_and_gallery_train_only(data, monkeypatch):
    said = []
    monkeypatch.setattr(reid, "load_reid_dataset", lambda name, root: ReIDDataset(data.train, [], []))
    reid.load_data(options(dataset="vehiclex"), said.append, training=True)
    assert said == ["vehiclex has no query and gallery: the run trains without evaluation"]
    with pytest.raises(InputError, match="nothing to evaluate"):
        reid.load_data(options(dataset="vehiclex"))
    monkeypatch.setattr(reid, "load_reid_dataset", lambda name, root: data._replace(train=[]))
    with pytest.raises(InputError, match="no training pictures"):
        reid.load_data(options(dataset="folder"), training=True)
    assert reid.load_data(options(dataset="folder")).query == data.query


def test_a_note_tells_of_queries_that_can_find_nothing(data, monkeypatch):
    said = []
    some = data._replace(gallery=[s for s in data.gallery if s.id != data.query[0].id])
    monkeypatch.setattr(reid, "load_reid_dataset", lambda name, root: some)
    reid.load_data(options(dataset="mvb"), said.append)
    assert len(said) == 1 and said[0].startswith("2 of 6 query pictures have no match")


def test_skip_broken_leaves_out_pictures_of_every_part_and_numbers_identities_anew(tmp_path):
    for part, identities in (("train", "abc"), ("query", "de"), ("gallery", "de")):
        for identity in identities:
            folder = tmp_path / part / identity
            folder.mkdir(parents=True)
            for number in (1, 2):
                Image.new("RGB", (8, 8), (90 * number, 20, ord(identity))).save(folder / f"{number}.png")
    for broken in (*list_images(tmp_path / "train" / "b"), tmp_path / "query" / "d" / "1.png"):
        open(broken, "wb").close()
    said = []
    data = reid.load_data(options(dataset="folder", data=tmp_path, skip_broken=True), said.append, training=True)
    assert [(s.name, s.id) for s in data.train] == [("a", 0), ("a", 0), ("c", 1), ("c", 1)]
    assert [s.name for s in data.query] == ["d", "e", "e"] and len(data.gallery) == 4
    assert said[2] == "--skip-broken: 2 of 6 train pictures left out"
    assert said[4] == "--skip-broken: 1 of 4 query pictures left out" and len(said) == 5
    assert all(line.startswith("left out: ") for line in said[:2] + said[3:4])


def test_too_few_identities_for_the_ranks(data, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(InputError, match="for each of 4 processes.*set --ids-per-batch to 1"):
        reid.build_train_loader(options(ids_per_batch=2), data, CPU)
