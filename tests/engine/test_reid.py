"""What every ReID script shares: targets, features and metrics on one process and on two, the data."""

import hashlib
import math
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from baggage import synthetic
from core.data.images import list_images
from core.data.reid_datasets import load_reid_dataset
from core.data.reid_images import load_sample
from core.data.samples import ReIDDataset, Sample
from core.data.transforms import denormalise
from core.engine import distributed, reid, reid_pictures
from core.engine.reid import ReIDData
from core.engine.reid_training import build_step
from core.errors import InputError
from core.losses.spec import build_loss
from core.models.reid import ReIDOutput, build_reid_model
from core.retrieval.ranking import METRIC_NAMES

CPU = torch.device("cpu")
OPTIONS = {
    "height": 16, "width": 16, "workers": 0, "eval_batch_size": 2, "ids_per_batch": 2, "images_per_id": 2, "seed": 0,
    "iterations_per_epoch": 0, "flip": 0.5, "pad": 2, "autoaugment": False, "blur": 0.0, "erasing": 0.5,
    "mask_target": "gaussian", "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0, "epochs": 3,
    "schedule": "step", "milestones": [], "step_size": 9, "gamma": 0.1, "min_lr": 0.0, "warmup_steps": 0,
    "warmup_factor": 0.0, "clip_gradient": 0.0, "accumulate": 1, "ema": 0.0, "amp": "off", "channels_last": False,
    "center_lr": 0.5, "dataset": None, "data": None, "protocol": None, "skip_broken": False, "loss": "cross_entropy",
    "val_fraction": 0.2,
    "hide_background": 0.0, "mask_checkpoint": None, "head_lr": 0.0,
}  # fmt: skip


def options(**changes):
    return Namespace(**{**OPTIONS, **changes})


# What a mask decoder learns


def test_a_run_of_before_mask_pooling_can_be_continued():
    network = build_reid_model("resnet18", 2)
    how = {"backbone": "resnet18", "mask_decoder": "full", "mask_pooling": "off"}
    loss = build_loss("cross_entropy", 2, network.feature_dim)
    step = build_step(network, loss, options(), CPU, batches_per_epoch=1)
    state = {"model": network.state_dict(), "loss": loss.state_dict(), **step.state_dict()}
    state |= {"network": {"backbone": "resnet18"}, "identities": ["a", "b"]}
    data = ReIDDataset([Sample("", 0, 0, name="a"), Sample("", 1, 0, name="b")], [], [])
    reid.resume(state, "last.pth", network, how, loss, step, data)
    with pytest.raises(InputError, match="mask_pooling is off there and soft here"):
        reid.resume(state, "last.pth", network, {**how, "mask_pooling": "soft"}, loss, step, data)


@pytest.mark.parametrize(
    "names, found", [("abd", r"\['c', 'd'\]"), ("ab", r"\['c'\]"), ("abcd", r"\['d'\]"), ("acb", "another order")]
)
def test_a_run_is_continued_on_its_own_identities_alone(names, found):
    """Renamed, gone, new or in another order: the classes behind would be others."""
    data = ReIDDataset([Sample("", number, 0, name=name) for number, name in enumerate(names)], [], [])
    with pytest.raises(InputError, match=f"trained on 3 identities, .* differ \\({found}\\)"):
        reid.resume({"identities": ["a", "b", "c"]}, "last.pth", None, {}, None, None, data)


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
    return query, gallery, ReIDData([], query_samples, gallery_samples, "", "", protocol)


def rank_case(cases, metric):
    results = [reid.rank_embeddings(*ranking_case(*case), metric) for case in cases]
    return [(r.cmc.tolist(), r.mean_ap, r.mean_inp, r.num_valid_queries) for r in results]


def threshold_case(cases, metric):
    rate = {"false_accept_rate": 0.2, "false_accept_of_others": False, "distance": metric}
    return [tuple(reid.threshold(*ranking_case(*case), options(**rate))) for case in cases]


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
        assert shared[:-1] == pytest.approx(single[:-1], nan_ok=True)  # a product of fewer rows may round differently
        assert shared[-1] == single[-1]
    assert all(0 < mean_ap < 1 for _, mean_ap, *_ in alone[:2])
    assert alone[-1][-1] == 1  # one valid query


def test_metrics_are_the_columns_of_the_log():
    query, gallery, data = ranking_case("no_camera", 11)
    result = reid.rank_embeddings(query, gallery, data, "euclidean")
    columns = result.metrics()
    assert list(columns) == list(METRIC_NAMES) == ["mAP", "mINP", "rank1", "rank5", "rank10"]
    assert columns["rank5"] == result.cmc[4] and columns["mAP"] == result.mean_ap
    assert reid.evaluate(None, None, data._replace(query=[], gallery=[]), options(), CPU) is None


# The data that options name


@pytest.fixture
def data(baggage):
    return load_reid_dataset("mvb", baggage)


def read_instead(monkeypatch, dataset):
    """Whatever the data's name and folder, this is what is read."""
    monkeypatch.setattr(reid, "find_dataset", lambda name, root: root)
    monkeypatch.setattr(reid, "load_reid_dataset", lambda name, root, val_fraction: dataset)


def test_load_data_returns_what_it_settled(baggage, monkeypatch, tmp_path):
    said, made = [], []
    monkeypatch.chdir(tmp_path)
    args = options(dataset="mvb", data=str(baggage))
    data = reid.load_data(args, said.append, training=True)
    assert data.protocol == "no_camera" and len(data.train) == 24 and said == []
    assert args == options(dataset="mvb", data=str(baggage))  # it stays as it was
    assert reid.describe(data) == (
        "train 24 pictures of 6 identities, query 6 pictures of 3 identities, gallery 6 pictures of 3 identities"
    )
    assert reid.load_data(options(dataset="mvb", data=str(baggage), protocol="no_camera")).train == data.train

    monkeypatch.setattr(synthetic, "make_synthetic_baggage", lambda root, background: made.append((root, background)))
    read_instead(monkeypatch, ReIDDataset(*data[:3]))
    made_set = reid.load_data(options())
    assert (made_set.name, made_set.root, made_set.protocol) == ("synthetic", "data/synthetic", "no_camera")
    reid.load_data(options(dataset="synthetic_hard"))
    assert made == [("data/synthetic", "plain"), ("data/synthetic_hard", "hard")]
    data = reid.load_data(options(dataset="market1501", protocol="no_camera"))
    assert (data.root, data.protocol) == ("data/market1501", "no_camera") and len(made) == 2


def test_data_without_query_and_gallery_train_only(data, monkeypatch):
    said = []
    read_instead(monkeypatch, ReIDDataset(data.train, [], []))
    reid.load_data(options(dataset="vehiclex"), said.append, training=True)
    assert said == ["vehiclex has no query and gallery: the run trains without evaluation"]
    with pytest.raises(InputError, match="nothing to evaluate"):
        reid.load_data(options(dataset="vehiclex"))
    read_instead(monkeypatch, data._replace(train=[]))
    with pytest.raises(InputError, match="no training pictures"):
        reid.load_data(options(dataset="folder"), training=True)
    assert reid.load_data(options(dataset="folder")).query == data.query


WHO = (("train", "a"), ("train", "b"), ("test", "x"))


def two_folders(root):
    """Photographs of a and b (trained), x and y (tested), in two folders; the same names, other pictures."""
    for place in ("one", "two"):
        paint(root, *(f"{place}/{part}/{who}/{n}.png" for part, who in WHO for n in "12"))
    return [str(root / "one"), str(root / "two")]


def test_several_sets_are_read_as_one(tmp_path, baggage):
    said, roots = [], two_folders(tmp_path)
    data = reid.load_data(options(dataset="folder+folder", data=roots), said.append, training=True)
    assert (data.name, data.root, data.protocol, said) == ("folder+folder", roots, "no_camera", [])
    assert reid.identities_of(data.train) == ["folder-1/a", "folder-1/b", "folder-2/a", "folder-2/b"]
    assert [(s.name, s.id, s.camera) for s in data.query] == [("folder-1/x", 0, 0), ("folder-2/x", 1, 1)]
    mixed = options(dataset="folder+mvb", data=[roots[0], str(baggage)])
    assert "mvb/0001" in reid.identities_of(reid.load_data(mixed, training=True).train)


def test_what_several_sets_may_not_be(tmp_path):
    roots = two_folders(tmp_path)
    for dataset, data, said in (
        ("folder+folder", [roots[0], roots[0] + "/."], "a set is given twice"),
        ("folder+folder", roots[0], "names 2 sets and --data 1 folders"),
        ("folder", roots, "names 1 sets and --data 2 folders"),
        ("folder+nofolder", roots, "unknown data set 'nofolder'"),
        ("folder+vehicleid", None, "folder: no such folder"),
    ):
        with pytest.raises(InputError, match=said):
            reid.load_data(options(dataset=dataset, data=data), training=True)


def test_sets_of_different_protocols_need_one_that_is_given(data, monkeypatch, tmp_path):
    read_instead(monkeypatch, data)
    for root in ("a", "b"):
        (tmp_path / root).mkdir()
    two = {"dataset": "market1501+mvb", "data": [str(tmp_path / "a"), str(tmp_path / "b")]}
    with pytest.raises(InputError, match=r"market1501\+mvb: its sets differ in protocol; give one --protocol for all"):
        reid.load_data(options(**two))
    assert reid.load_data(options(**two, protocol="no_camera")).protocol == "no_camera"


def test_a_note_tells_of_queries_that_can_find_nothing(data, monkeypatch):
    said = []
    some = data._replace(gallery=[s for s in data.gallery if s.id != data.query[0].id])
    read_instead(monkeypatch, some)
    reid.load_data(options(dataset="mvb"), said.append)
    assert len(said) == 1 and said[0].startswith("2 of 6 query pictures have no match")


def test_skip_broken_leaves_out_pictures_of_every_part_and_numbers_identities_anew(tmp_path):
    for part, identities in (("train", "abc"), ("query", "de"), ("gallery", "de")):
        for identity in identities:
            folder = tmp_path / part / identity
            folder.mkdir(parents=True)
            for number in (1, 2):
                shown = Image.new("RGB", (8, 8), (90 * number, len(part), ord(identity)))
                shown.save(folder / f"{number}.png")
    for broken in (*list_images(tmp_path / "train" / "b"), tmp_path / "query" / "d" / "1.png"):
        open(broken, "wb").close()
    said = []
    data = reid.load_data(options(dataset="folder", data=tmp_path, skip_broken=True), said.append, training=True)
    assert [(s.name, s.id) for s in data.train] == [("a", 0), ("a", 0), ("c", 1), ("c", 1)]
    assert [s.name for s in data.query] == ["d", "e", "e"] and len(data.gallery) == 4
    assert said[2] == "--skip-broken: 2 of 6 train pictures left out"
    assert said[4] == "--skip-broken: 1 of 4 query pictures left out" and len(said) == 5
    assert all(line.startswith("left out: ") for line in said[:2] + said[3:4])


def paint(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        color = tuple(hashlib.md5(name.encode()).digest()[:3])  # no two alike: copies are said
        Image.new("RGB", (8, 8), color).save(root / name, format="PNG")


# Each layout, its pictures, and what a phone or a camera left there of a third identity.
LAYOUTS = {
    "folder": (["train/a/1.png", "train/b/1.jfif", "test/x/1.png", "test/x/2.png"], ["train/c/1.heic", "test/y/1.CR2"]),
    "market1501": (
        [f"{part}/000{i}_c{i}_0.png" for part in ("bounding_box_train", "bounding_box_test") for i in (1, 2)]
        + ["query/0001_c2_0.png"],
        ["bounding_box_train/0003_c1_0.heic", "bounding_box_test/0003_c1_0.CR2"],
    ),
    "mvb": (
        [f"bounding_box_train/000{i}_{side}_1.png" for i in (1, 2) for side in "gp"]
        + ["query/0003_p_1.png", "bounding_box_test/0003_g_1.png"],
        ["bounding_box_train/0004_g_1.heic", "query/0005_p_1.CR2"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("around", [False, True])
def test_pictures_of_kinds_that_are_not_read_are_said_once(tmp_path, name, around):
    pictures, others = LAYOUTS[name]
    published = {"market1501": "Market-1501-v15.09.15", "mvb": "MVB"}.get(name, "") if around else ""
    paint(tmp_path / published, *pictures)
    paint(tmp_path, "beside/originals.nef", ".hidden/1.heic")
    said = []
    args = options(dataset=name, data=str(tmp_path))
    reid.load_data(args, said.append, training=True)
    assert not [line for line in said if "not read" in line]
    paint(tmp_path / published, *others)
    data = reid.load_data(args, said.append, training=True)
    said = [line for line in said if "not read" in line]
    assert said == [f"not read: 1 .heic, 1 .cr2 pictures in {tmp_path / published}; convert them to JPEG or PNG"] or (
        said == [f"not read: 1 .cr2, 1 .heic pictures in {tmp_path / published}; convert them to JPEG or PNG"]
    )
    assert len({sample.id for sample in data.train}) == 2


@pytest.mark.parametrize(
    ("name", "folder"),
    [("folder", "."), ("folder", "train"), ("folder", "train/b"), ("folder", "test/x"), ("market1501", "query"),
     ("market1501", "bounding_box_train"), ("mvb", "bounding_box_test")],
)  # fmt: skip
def test_a_folder_without_permission_is_named(tmp_path, no_right_to, name, folder):
    paint(tmp_path, *LAYOUTS[name][0])
    if folder == ".":  # whoever may enter it, and not list it, finds what has a known name
        (tmp_path / "train").rename(tmp_path / "hidden")
        (tmp_path / "test").rename(tmp_path / "hidden too")
    no_right_to(tmp_path / folder)
    with pytest.raises(InputError, match=rf"{tmp_path / folder}: the folder can't be read \(Permission denied\)"):
        reid.load_data(options(dataset=name, data=str(tmp_path)), print, training=True)


def paint_12_bits(root, *names):
    """Grey pictures of 16 bits that use 12, the last one all of them, the others less."""
    values = {}
    for number, name in enumerate(names):
        highest = 4095 if name == names[-1] else 900 + number
        values[str(root / name)] = np.linspace(0, highest, 64).astype(np.uint16).reshape(8, 8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values[str(root / name)]).save(root / name)
    return values


NAMES = [
    f"{part}/{who}/{number}.png" for part, who in (("train", "a"), ("train", "b"), ("test", "x")) for number in "12"
]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_12_bits_of_16_are_found_over_the_whole_set_and_said_once(tmp_path, suffix):
    names = [name.replace("png", suffix) for name in NAMES]
    values, said = paint_12_bits(tmp_path, *names), []
    data = reid.load_data(options(dataset="folder", data=str(tmp_path)), said.append, training=True)
    assert said == ["pictures of 16 bits use 12 of them: 0 .. 4,095 is taken as black .. white"]
    assert {sample.bits for part in data[:3] for sample in part} == {12}
    for sample in [*data.train, *data.query, *data.gallery]:
        image = load_sample(sample)["image"]  # (3, 8, 8)
        assert np.array_equal(image[0], values[sample.path] >> 4)
    for workers in (0, 2):  # which have a copy of the samples
        loader = reid.build_eval_loader(options(height=8, width=8, workers=workers), data.gallery, CPU)
        shown = denormalise(next(iter(loader))["image"])[0, 0] * 255
        assert (shown - torch.from_numpy((values[data.gallery[0].path] >> 4).astype(np.float32))).abs().max() <= 1
    again = reid.load_data(options(dataset="folder", data=str(tmp_path), skip_broken=True), said.append)  # evaluate.py
    assert again.gallery == data.gallery and said[1:] == said[:1]


def test_all_16_bits_in_use_or_none_is_not_worth_a_line(tmp_path):
    paint_12_bits(tmp_path, *NAMES)
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / "train/a/3.png")
    said = []
    data = reid.load_data(options(dataset="folder", data=str(tmp_path)), said.append, training=True)
    assert said == [] and {sample.bits for part in data[:3] for sample in part} == {16}


def load_on_a_rank(rank, root):
    distributed.setup("cpu", timeout_minutes=0.5)
    said = []
    data = reid.load_data(options(dataset="folder", data=root), said.append, training=True)
    distributed.cleanup()
    return len(said), {sample.bits for part in data[:3] for sample in part}


def test_all_ranks_read_by_the_bits_that_rank_0_found(tmp_path, launch):
    paint_12_bits(tmp_path, *NAMES)
    (tmp_path / "train/a/3.heic").touch()
    results, codes, errors = launch(load_on_a_rank, str(tmp_path))
    assert codes == [0, 0], errors
    assert list(results) == [(2, {12}), (0, {12})]


def test_the_sheet_of_ranks_shows_12_bits(tmp_path, monkeypatch):
    paint_12_bits(tmp_path, *NAMES)
    data = reid.load_data(options(dataset="folder", data=str(tmp_path)), print)
    caught = []
    monkeypatch.setattr(reid_pictures, "rank_list_sheet", lambda path, rows: caught.extend(rows))
    reid_pictures.draw_rank_list("", torch.zeros(1, 2), torch.zeros(1, 2), data, "euclidean")
    assert [row.bits for row in caught] == [12]


def leaky_folder(root):
    """query/d/1.png is gallery/d/1.png and train/a/1.png; the identity d is trained on."""
    for part, identities in (("train", "abd"), ("query", "de"), ("gallery", "de")):
        for identity in identities:
            (root / part / identity).mkdir(parents=True)
            Image.new("RGB", (8, 8), (len(part), 20, ord(identity))).save(root / part / identity / "1.png")
    for copy in ("gallery/d/2.png", "train/a/2.png"):
        shutil.copy(root / "query/d/1.png", root / copy)
    return options(dataset="folder", data=root)


def test_leaks_are_said_and_end_nothing(tmp_path):
    args, said = leaky_folder(tmp_path), []
    data = reid.load_data(args, said.append, training=True)
    assert len(data.train) == 4 and [line.split(" are in ")[0] for line in said] == [
        "warning: 2 of 5 pictures of query and gallery",
        "warning: 1 of 2 identities of query and gallery",
        "warning: 1 of 2 query pictures",
    ]
    said.clear()
    reid.load_data(args, said.append)  # whose network learned from what other data?
    assert len(said) == 1 and said[0].startswith("warning: 1 of 2 query pictures are in the gallery")


def test_msmt17_numbers_its_test_persons_anew(data, monkeypatch):
    said, same = [], [sample._replace(name="0000") for sample in data.train]
    dataset = data._replace(train=same, gallery=[sample._replace(name="0000") for sample in data.gallery])
    read_instead(monkeypatch, dataset)
    for name, count in (("msmt17", 0), ("mvb", 1)):
        said.clear()
        reid.load_data(options(dataset=name, protocol="no_camera"), said.append, training=True)
        assert len(said) == count


def leaks_on_a_rank(rank, args):
    distributed.setup("cpu", timeout_minutes=0.5)
    looked, said, leaks = [], [], reid.reid_leaks
    reid.reid_leaks = lambda *args: looked.append(args) or leaks(*args)
    reid.load_data(args, said.append, training=True)
    distributed.cleanup()
    return said, len(looked)


def test_rank_0_looks_for_leaks_and_all_know(launch, tmp_path):
    results, codes, errors = launch(leaks_on_a_rank, leaky_folder(tmp_path / "data"))
    assert codes == [0, 0], errors
    (said, looked), (said_too, looked_too) = results
    assert said == said_too and len(said) == 3 and (looked, looked_too) == (1, 0)


def test_too_few_identities_for_the_ranks(data, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(InputError, match="for each of 4 processes.*set ids_per_batch to 1"):
        reid.build_train_loader(options(ids_per_batch=2), data, CPU)


def test_freezing_stops_the_part_and_names_what_must_stay_in_evaluation_mode():
    network = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.BatchNorm1d(2))
    assert reid.freeze(network, network[0], frozen=True) == [network[0]]
    assert [p.requires_grad for p in network.parameters()] == [False] * 4 + [True] * 2
    assert reid.freeze(network, network[0], frozen=False) == []
    assert all(p.requires_grad for p in network.parameters())
    assert reid.freeze(network, network[0], frozen=False, batch_norm=True) == [network[0][1], network[1]]
