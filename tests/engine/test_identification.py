import os

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec
from torch import nn

from core.data.transforms import build_transform
from core.engine import identification
from core.engine.trained import Detector, Encoder
from core.errors import InputError
from core.models.reid import ReIDOutput
from core.retrieval import gallery

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 210), "black": (10, 10, 10)}


class MeanColor(nn.Module):
    """Pictures (B, 3, H, W) -> their mean colour, normalised, (B, 3)."""

    embedding_dim = 3

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return ReIDOutput(images.mean((2, 3)), [], [])


def encoder(threshold=None, metric="euclidean"):
    known = threshold and {"distance": threshold, "false_accept_rate": 0.01, "true_accept_rate": 0.9}
    transform = build_transform(8, 4, training=False)
    return Encoder(MeanColor(), transform, metric, known, "f" * 64, "reid.pth", "weights: x", torch.device("cpu"))


def plain(color, width=20, height=30):
    return Image.new("RGB", (width, height), COLORS.get(color, color))


@pytest.fixture
def colors(tmp_path):
    """A gallery of three identities; the first has two pictures."""
    network = encoder()
    names = ["red", "green", "red", "blue"]
    features, _ = identification.embed(network, [plain("red"), plain("green"), plain((120, 60, 60)), plain("blue")])
    path = tmp_path / "colors.gallery"
    entries = gallery.Entries(features, names)
    gallery.build_gallery(path, entries, metric="euclidean", fingerprint=network.fingerprint, info={})
    return gallery.open_gallery(path)


def test_embeddings_come_in_the_order_of_the_pictures_and_in_batches():
    network = encoder()
    alive = []

    def pictures():
        for value in range(70):
            alive.append(value)
            yield plain((value, 0, 0), width=300, height=100)

    features, thumbnails = identification.embed(network, pictures(), thumbnail=60)
    assert features.shape == (70, 3) and features.dtype == torch.float32
    assert network.network.batches == [32, 32, 6]
    expected = (torch.arange(70) / 255 - 0.485) / 0.229
    assert torch.allclose(features[:, 0], expected, atol=1e-5)
    assert {one.size for one in thumbnails} == {(60, 20)} and thumbnails[50].getpixel((0, 0)) == (50, 0, 0)


def test_no_pictures_are_no_embeddings():
    features, thumbnails = identification.embed(encoder(), [])
    assert features.shape == (0, 3) and thumbnails == []


def test_the_picture_itself_stays_as_it_is():
    picture = plain("red", 400, 300)
    _, (small,) = identification.embed(encoder(), [picture])
    assert picture.size == (400, 300) and small.size == (256, 192)


def test_instances_are_cut_out_along_their_masks_or_as_boxes():
    picture = plain("red", 40, 30)
    mask = np.zeros((30, 40), np.uint8, order="F")
    mask[12:16, 10:20] = 1
    found = [{"box": [10, 10, 20, 20], "rle": rle_codec.encode(mask)}]
    (along,) = identification.cut_instances(picture, found, True)
    (whole,) = identification.cut_instances(picture, found, False)
    assert along.size == whole.size == (12, 12)
    assert along.getpixel((0, 0)) != COLORS["red"] and along.getpixel((6, 6)) == COLORS["red"]
    assert whole.getpixel((0, 0)) == COLORS["red"]


def test_a_subject_without_a_detector_is_the_whole_picture():
    picture = plain("red")
    assert identification.cut_subject(picture, None) == (picture, False)


def test_identities_are_folders_then_mvb_names_then_names():
    paths = ["red/0010_g_1.jpg", "red/deep/2.jpg", "0010_g_1.jpg", "0010_p_2.png", "10_g_3.jpg", "my bag.v2.jpg"]
    paths = [os.path.join("root", path) for path in paths]
    names = identification.name_identities(paths, "root")
    assert names == ["red", "red", "0010", "0010", "0010", "my bag.v2"]
    known = ("red", "10", "7")
    assert identification.name_identities(paths[2:], "root/", known) == ["10", "10", "10", "my bag.v2"]
    assert identification.name_identities([], "root") == []
    twins = [os.path.join("root", name) for name in ("bag.jpg", "bag.png", "0012/1.jpg", "12_g_1.jpg")]
    assert identification.name_identities(twins, "root") == ["bag.jpg", "bag.png", "0012", "0012"]


def test_a_folder_without_pictures_is_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for folder, words in ((tmp_path, "no pictures in this folder or its sub-folders"), (tmp_path / "x", "no such")):
        with pytest.raises(InputError, match=words):
            identification.pictures_of_gallery(folder)


def test_the_nearest_identities_and_who_is_accepted(colors):
    features, _ = identification.embed(encoder(), [plain((215, 30, 30)), plain("black")])
    distance = float((features[0] - identification.embed(encoder(), [plain("red")])[0][0]).norm())
    near, far = identification.identify(colors, features, 2, distance + 0.01)
    assert [one["identity"] for one in near] == ["red", "green"] or near[0]["identity"] == "red"
    assert near[0]["row"] == 0 and near[0]["distance"] == pytest.approx(distance, abs=2e-3)
    assert [one["accepted"] for one in near] == [True, False]  # the second is never accepted
    assert len(far) == 2 and not any(one["accepted"] for one in far)
    assert far[0]["row"] == 2  # of the two red pictures the darker one
    assert [identification.answer(one) for one in (near, far)] == ["red", None]


def test_each_identity_is_named_once_and_k_may_exceed_them(colors):
    features, _ = identification.embed(encoder(), [plain("red")])
    (matches,) = identification.identify(colors, features, 99, 0.1)
    assert sorted(one["identity"] for one in matches) == ["blue", "green", "red"]
    assert [one["distance"] for one in matches] == sorted(one["distance"] for one in matches)


def test_without_a_threshold_nobody_is_accepted(colors):
    features, _ = identification.embed(encoder(), [plain("red"), plain("black")])
    for matches in identification.identify(colors, features, 3, None):
        assert [one["accepted"] for one in matches] == [False, False, False]
        assert identification.answer(matches) is None


def test_nothing_to_identify(colors):
    assert identification.identify(colors, torch.zeros(0, 3), 5, 0.1) == []


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "no instances"),
        (["a"], "1 instance: a"),
        (["a", None, "b", None], "4 instances: a, b, 2 unknown"),
        ([None], "1 instance: 1 unknown"),
        (["a"] * 9, "9 instances: a, a, a, a, a, a, 3 more"),
    ],
)
def test_a_scene_in_words(names, words):
    matches = [[{"identity": name or "x", "accepted": name is not None}] for name in names]
    assert identification.describe(matches) == words


def test_two_pictures_are_compared_at_the_threshold():
    pictures = [plain("red"), plain((210, 30, 30))]
    distance = 10 / 255 / 0.229
    verdict, cuts = identification.compare(pictures, encoder(threshold=distance + 0.01), None)
    assert verdict.distance == pytest.approx(distance, abs=1e-4) and verdict.is_same is True
    assert verdict.answer == "yes, the same object"
    assert ": at most 1 % of pairs of two objects pass on whole validation pictures" in verdict.reason
    assert cuts == [None, None]  # nothing was cut out
    verdict, _ = identification.compare(pictures, encoder(threshold=5.0), None, asked=distance - 0.01)
    assert verdict.is_same is False and verdict.answer == "no, two objects"
    assert "1 %" not in verdict.reason and "validation" not in verdict.reason  # this threshold is the person's own
    verdict, _ = identification.compare(pictures, encoder(), None)
    assert verdict.is_same is None and "--threshold" in verdict.reason
    same, _ = identification.compare([pictures[0]] * 2, encoder(metric="cosine"), None, asked=0.0)
    assert same.is_same and "similarity 1.000" in same.reason
    none, _ = identification.compare([pictures[0]] * 2, encoder(threshold=-1.0), None)
    assert none.is_same is False and "nothing is accepted: more than 1 % of pairs" in none.reason
    assert "-1" not in none.reason


class SeesRed(nn.Module):
    """A detector that finds one object: the middle half of a canvas whose middle is red."""

    def forward(self, images, min_score):
        (image,) = images
        height, width = image.shape[1:]
        count = int(image[0, height // 2, width // 2] > 0.5)
        box = torch.tensor([[0.4 * width, 0.4 * height, 0.6 * width, 0.6 * height]])
        found = {"boxes": box, "scores": torch.ones(1), "labels": torch.ones(1).long()}
        return [{name: value[:count] for name, value in (found | {"masks": torch.ones(1, 1, 28, 28)}).items()}]


def test_a_cut_out_is_not_compared_with_a_whole_picture():
    detector = Detector(SeesRed(), [(1, "bag")], [1], "mask.pth", "weights: y", torch.device("cpu"))
    red, green = plain("red"), plain("green")
    _, cuts = identification.compare([red, red], encoder(), detector)
    assert all(cut.size < red.size for cut in cuts)
    whole, _ = identification.compare([red, green], encoder(), None)
    for pictures in ([red, green], [green, red]):
        verdict, cuts = identification.compare(pictures, encoder(), detector)
        assert cuts == [None, None] and verdict.distance == whole.distance


@pytest.mark.parametrize(
    "chosen, asked, rate",
    [(0.123456, None, 0.01), (0.123456, 0.1234, 0.01), (0.1, 0.2, 0), (-1.0, None, 0), (None, None, 0), (None, 0.1, 0)],
)
def test_how_many_strangers_pass(colors, chosen, asked, rate):
    """Every identity of the gallery may be near enough; of a threshold that a person chose nothing is known.

    The checkpoint's own is the same whether it is taken, or typed as it was printed.
    """
    network = encoder(chosen)
    identifier = identification.Identifier(colors, network, identification.settle_threshold(network, asked), 5)
    assert ("at most 1 % of pairs" in str(identifier)) == (rate > 0)
    assert identifier.strangers_accepted() == pytest.approx(1 - (1 - rate) ** len(colors.names))


def test_a_damaged_thumbnail_is_none():
    content = identification.to_jpeg(plain("red", 96, 60))
    for damaged in (bytes(len(content)), content[:40], content[:-200], content[:2] + bytes(len(content) - 2)):
        assert identification.from_jpeg(damaged) is None


def test_thumbnails_go_through_jpeg():
    small = identification.from_jpeg(identification.to_jpeg(plain("red", 96, 60)))
    assert small.size == (96, 60) and np.abs(np.array(small)[30, 40] - np.array(COLORS["red"])).max() < 6
    assert identification.from_jpeg(b"") is None


def test_subjects_come_in_chunks_and_broken_ones_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(identification, "CHUNK", 2)
    for name in ("a", "b", "c", "d", "e"):
        plain((40 * ord(name) % 256, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    for name in "cd":  # a chunk of which nothing is left
        (tmp_path / f"{name}.png").write_bytes(b"")
    paths = identification.pictures_of_gallery(tmp_path)
    subjects = identification.Subjects(paths, list("ABCDE"), encoder(), None)
    chunks = list(subjects)
    assert [chunk.identities for chunk in chunks] == [["A"], ["E"]]
    assert [chunk.sources for chunk in chunks] == [[str(tmp_path / "a.png")], [str(tmp_path / "e.png")]]
    assert [len(chunk.vectors) for chunk in chunks] == [1, 1]
    assert len(subjects.skipped) == 3 and f"{tmp_path}/b.png: can't be read" in subjects.skipped[0]
    assert capsys.readouterr().err.count("skipped: ") == 3
    assert identification.from_jpeg(chunks[0].thumbnails[0]).size == (20, 30)
