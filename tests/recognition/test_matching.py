import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec
from torch import nn

from core.data.transforms import build_transform
from core.models.reid import ReIDOutput
from recognition import gallery, matching
from recognition.networks import Detector, Encoder

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


def encoder(threshold=None, metric="euclidean", **more):
    known = threshold and {"distance": threshold, "false_accept_rate": 0.01, "true_accept_rate": 0.9, **more}
    transform = build_transform(8, 4, training=False)
    return Encoder(MeanColor(), transform, metric, known, "f" * 64, "reid.pth", "weights: x", torch.device("cpu"))


def plain(color, width=20, height=30):
    return Image.new("RGB", (width, height), COLORS.get(color, color))


@pytest.fixture
def colors(tmp_path):
    """A gallery of three identities; the first has two pictures."""
    network = encoder()
    names = ["red", "green", "red", "blue"]
    features, _ = matching.embed(network, [plain("red"), plain("green"), plain((120, 60, 60)), plain("blue")])
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

    features, thumbnails = matching.embed(network, pictures(), thumbnail=60)
    assert features.shape == (70, 3) and features.dtype == torch.float32
    assert network.network.batches == [32, 32, 6]
    expected = (torch.arange(70) / 255 - 0.485) / 0.229
    assert torch.allclose(features[:, 0], expected, atol=1e-5)
    assert {one.size for one in thumbnails} == {(60, 20)} and thumbnails[50].getpixel((0, 0)) == (50, 0, 0)


def test_no_pictures_are_no_embeddings():
    features, thumbnails = matching.embed(encoder(), [])
    assert features.shape == (0, 3) and thumbnails == []


def test_the_picture_itself_stays_as_it_is():
    picture = plain("red", 400, 300)
    _, (small,) = matching.embed(encoder(), [picture])
    assert picture.size == (400, 300) and small.size == (256, 192)


def test_a_subject_without_a_detector_is_the_whole_picture():
    picture = plain("red")
    assert matching.cut_subject(picture, None) == (picture, False)


def test_the_nearest_identities_and_who_is_accepted(colors):
    features, _ = matching.embed(encoder(), [plain((215, 30, 30)), plain("black")])
    distance = float((features[0] - matching.embed(encoder(), [plain("red")])[0][0]).norm())
    near, far = matching.identify(colors, features, 2, distance + 0.01)
    assert [one["identity"] for one in near] == ["red", "green"] or near[0]["identity"] == "red"
    assert near[0]["row"] == 0 and near[0]["distance"] == pytest.approx(distance, abs=2e-3)
    assert [one["accepted"] for one in near] == [True, False]  # the second is never accepted
    assert len(far) == 2 and not any(one["accepted"] for one in far)
    assert far[0]["row"] == 2  # of the two red pictures the darker one
    assert [matching.answer(one) for one in (near, far)] == ["red", None]


def test_each_identity_is_named_once_and_k_may_exceed_them(colors):
    features, _ = matching.embed(encoder(), [plain("red")])
    (matches,) = matching.identify(colors, features, 99, 0.1)
    assert sorted(one["identity"] for one in matches) == ["blue", "green", "red"]
    assert [one["distance"] for one in matches] == sorted(one["distance"] for one in matches)


def test_without_a_threshold_nobody_is_accepted(colors):
    features, _ = matching.embed(encoder(), [plain("red"), plain("black")])
    for matches in matching.identify(colors, features, 3, None):
        assert [one["accepted"] for one in matches] == [False, False, False]
        assert matching.answer(matches) is None


def scene_of(*places, size=(40, 60)):
    """A grey scene and its instances: (colour, columns x1, x2) each, the mask a stripe in the middle of the box."""
    picture, found = plain((128, 128, 128), *size), []
    for color, x1, x2 in places:
        picture.paste(plain(color, x2 - x1, 20), (x1, 10))
        mask = np.zeros((size[1], size[0]), np.uint8, order="F")
        mask[16:24, x1:x2] = 1
        found.append({"box": [x1, 10, x2, 30], "rle": rle_codec.encode(mask), "label": color, "score": 0.5, "also": []})
    return picture, found


@pytest.mark.parametrize("with_masks", [False, True])
def test_who_the_instances_of_a_scene_are(tmp_path, with_masks):
    """Each is cut out as the gallery's pictures were, and an object that was found twice is there once."""
    network = encoder()
    features, _ = matching.embed(network, [plain("red"), plain("green")])
    entries = gallery.Entries(features, ["red", "green"])
    path = tmp_path / "colors.gallery"
    options = {"metric": "euclidean", "fingerprint": network.fingerprint, "info": {"masks": with_masks}}
    gallery.build_gallery(path, entries, **options)
    picture, found = scene_of(("green", 5, 15), ("red", 20, 36))
    with gallery.open_gallery(path) as known:
        identifier = matching.Identifier(known, network, 0.5, 1)
        objects = matching.one_per_object([*found, found[0]])
        kept, cuts, matches = matching.identify_instances(identifier, picture, objects)
    assert kept == found
    assert [one[0]["identity"] for one in matches] == ["green", "red"]
    assert all((one[0]["distance"] < 0.5) == one[0]["accepted"] for one in matches)
    corners = [cut.getpixel((cut.width // 2, 4)) for cut in cuts]  # in the box and not on the mask
    assert [corner == COLORS[one["label"]] for corner, one in zip(corners, found, strict=True)] == [not with_masks] * 2


def test_nothing_to_identify(colors):
    assert matching.identify(colors, torch.zeros(0, 3), 5, 0.1) == []


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "no instances"),
        (["a"], "1 instance: a"),
        (["a", None, "b", None], "4 instances: a, b, 2 unknown"),
        (["a", "a", "b", "a", "a"], "5 instances: a x4, b"),
        (["a", "a", *"bcdefggh"], "10 instances: a x2, b, c, d, e, f, 3 more"),
        ([None], "1 instance: 1 unknown"),
        (["a"] * 9, "9 instances: a x9"),
    ],
)
def test_a_scene_in_words(names, words):
    matches = [[{"identity": name or "x", "accepted": name is not None}] for name in names]
    assert matching.describe(matches) == words


def test_two_pictures_are_compared_at_the_threshold():
    pictures = [plain("red"), plain((210, 30, 30))]
    distance = 10 / 255 / 0.229
    verdict, cuts = matching.compare(pictures, encoder(threshold=distance + 0.01), None)
    assert verdict.distance == pytest.approx(distance, abs=1e-4) and verdict.is_same is True
    assert verdict.answer == "yes, the same object"
    rates = ": 90 % of pairs of one object pass, and at most 1 % of pairs of two, on whole validation pictures"
    assert rates in verdict.reason and verdict.similarity is None
    assert cuts == [None, None]  # nothing was cut out
    verdict, _ = matching.compare(pictures, encoder(threshold=5.0), None, asked=distance - 0.01)
    assert verdict.is_same is False and verdict.answer == "no, two objects"
    assert "1 %" not in verdict.reason and "validation" not in verdict.reason  # this threshold is the person's own
    verdict, _ = matching.compare(pictures, encoder(), None)
    assert verdict.is_same is None and "--threshold" in verdict.reason
    same, _ = matching.compare([pictures[0]] * 2, encoder(metric="cosine"), None, asked=0.0)
    assert same.is_same and "similarity 1.000" in same.reason and same.similarity == pytest.approx(1)
    none, _ = matching.compare([pictures[0]] * 2, encoder(threshold=-1.0), None)
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
    _, cuts = matching.compare([red, red], encoder(), detector)
    assert all(cut.size < red.size for cut in cuts)
    whole, _ = matching.compare([red, green], encoder(), None)
    for pictures in ([red, green], [green, red]):
        verdict, cuts = matching.compare(pictures, encoder(), detector)
        assert cuts == [None, None] and verdict.distance == whole.distance


STRANGERS = {"identities": [1, 2, 4], "pictures": [1, 2], "rates": [[0.1, 0.2, 0.3], [0.2, 0.4, 0.5]]}
MEASURED = {"identities": 5, "lower": 0.002, "upper": 0.031, "strangers": STRANGERS}


@pytest.mark.parametrize(
    "chosen, asked, is_known",
    [
        (0.123456, None, True),
        (0.123456, 0.1234, True),  # typed as it was printed
        (0.1, 0.2, False),  # of a threshold that a person chose nothing is known
        (-1.0, None, True),
        (None, None, False),
        (None, 0.1, False),
    ],
)
def test_how_many_strangers_pass(colors, chosen, asked, is_known):
    """As measured for galleries of that many identities with that many pictures: here three with four."""
    network = encoder(chosen, **MEASURED)
    identifier = matching.Identifier(colors, network, matching.settle_threshold(network, asked), 5)
    assert ("more than 1 % of pairs" in str(identifier)) == (chosen == -1)
    words = "at most 1 % of pairs of two among 5 identities (of others 0.2 to 3.1 %, at 95 % confidence)"
    assert (words in str(identifier)) == (is_known and chosen > 0)
    if is_known:
        rate, may_be_more, identities = identifier.strangers_accepted()
        identities_part, pictures_part = np.log2(3) - 1, np.log2(4 / 3)
        one, two = 0.2 + 0.1 * identities_part, 0.4 + 0.1 * identities_part
        assert rate == pytest.approx(one + (two - one) * pictures_part)
        assert (may_be_more, identities) == (False, 5)
    else:
        assert identifier.strangers_accepted() is None
    few = {**STRANGERS, "identities": [1, 2], "rates": [[0.1, 0.2], [0.2, 0.4]]}
    network = encoder(0.1, **{**MEASURED, "strangers": few})
    rate, may_be_more, _ = matching.Identifier(colors, network, 0.1, 5).strangers_accepted()
    assert may_be_more and 0.2 < rate < 0.4


def test_a_checkpoint_of_before_says_what_it_knows(colors):
    network = encoder(0.1)
    identifier = matching.Identifier(colors, network, 0.1, 5)
    assert "at most 1 % of pairs of two, on whole validation pictures" in str(identifier)
    assert identifier.strangers_accepted() is None


def test_an_object_found_as_two_classes_is_there_once():
    def rle(x1, x2):
        mask = np.zeros((10, 40), np.uint8, order="F")
        mask[:, x1:x2] = 1
        return rle_codec.encode(mask)

    places = (("a", 0, 10), ("b", 1, 11), ("c", 6, 16), ("a", 0, 9), ("d", 0, 11), ("b", 0, 10), ("none", 0, 0))
    found = [
        {"rle": rle(*ends), "label": name, "score": 0.9 - 0.1 * number} for number, (name, *ends) in enumerate(places)
    ]
    kept = matching.one_per_object([*found, found[-1]])
    assert [one["label"] for one in kept] == ["a", "c", "none", "none"]
    assert [one["also"] for one in kept] == [[("b", 0.8), ("d", 0.5)], [], [], []]
    assert matching.one_per_object([]) == []


@pytest.mark.parametrize(
    "instances, kept",
    [
        ([("x", 0, 10, 0.3), ("x", 0, 30, 0.1)], [1]),  # a part that lies in the whole, found first
        ([("x", 0, 30, 0.2), ("x", 2, 6, 0.1), ("x", 20, 28, 0.3)], [1]),  # two parts of one whole
        ([("x", 0, 10, 0.1), ("x", 6, 16, 0.2)], [0, 1]),  # side by side, one a little behind the other
        ([("x", 0, 10, 0.1), ("x", 20, 30, 0.1)], [0, 1]),
        ([("x", 0, 10, 0.1), ("y", 0, 10, 0.1)], [0, 1]),
        ([(None, 0, 10, 0.1), (None, 2, 8, 0.1), ("x", 2, 8, 0.1)], [0, 1, 2]),  # nobody knows whose parts these are
        ([], []),
    ],
)
def test_instances_of_one_identity_that_lie_on_each_other_are_one(instances, kept):
    masks = np.zeros((len(instances), 10, 40), np.uint8)
    for mask, (_, start, end, _) in zip(masks, instances, strict=True):
        mask[:, start:end] = 1
    found = [{"rle": rle_codec.encode(np.asfortranarray(mask))} for mask in masks]
    matches = [
        [{"identity": name or "x", "distance": far, "accepted": name is not None}] for name, *_, far in instances
    ]
    assert matching.one_per_identity(found, matches) == kept
