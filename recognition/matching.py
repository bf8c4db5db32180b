"""From pictures to identities: objects cut out, embedded, looked up in a gallery.

A picture of a gallery shows one object; a scene shows any number. Both are cut out the same way, along their masks or
by their whole boxes, or they could not be compared.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle_codec

from core.data.transforms import to_image
from core.engine.object_masks import object_mask
from core.engine.step import autocast
from core.retrieval.distance import pairwise_distance
from core.retrieval.impostors import strangers_accepted
from core.retrieval.threshold import as_typed, describe_threshold
from recognition.cutouts import cut_out
from recognition.gallery import Gallery
from recognition.networks import Encoder

# Of an instance that is identified. Lower than where objects are shown alone, for one that isn't found is lost, and of
# most strays it is said that nobody knows them: of 163 known bags in 40 validation scenes 107 are named rightly, and 89
# at 0.5; about as many instances remain there (244) as there are objects (226).
LEAST_SCORE = 0.35
RATES = ("false_accept_rate", "true_accept_rate", "identities", "lower", "upper", "strangers")
BATCH = 32  # pictures that the network sees at once
SHEET_THUMBNAIL = 256  # pixels of its longer side
SAME_OBJECT = 0.5  # IoU of two masks; of 81 doubles and strays in 40 scenes 23 remain, of 183 found objects 182
COVERED = 0.5  # of a mask, by another of the same identity: two of one kind that stand side by side stay two


@torch.inference_mode()
def embed(encoder, pictures, thumbnail=SHEET_THUMBNAIL):
    """Embeddings of any number of PIL pictures, and small copies of them: the pictures are taken one by one.

    Args:
        encoder: `recognition.networks.Encoder`.
        pictures: an iterable; of a generator only one picture is held at a time.
        thumbnail: pixels of the longer side of the copies, at most.

    Returns:
        (features (N, D) float32 on the CPU, list of N PIL pictures)
    """
    features, batch, thumbnails = [torch.zeros(0, encoder.network.embedding_dim)], [], []

    def flush():
        with autocast(encoder.device, encoder.amp):
            embedding = encoder.network(torch.stack(batch).to(encoder.device)).embedding  # (B, D)
        features.append(embedding.float().cpu())
        batch.clear()

    for picture in pictures:
        batch.append(encoder.transform({"image": to_image(picture)})["image"].as_subclass(torch.Tensor))
        picture = picture.copy()
        picture.thumbnail((thumbnail, thumbnail))
        thumbnails.append(picture)
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    return torch.cat(features), thumbnails


def one_per_object(found):
    """The instances of a scene, the best first, without those whose mask lies on the mask of a better one.

    The network suppresses doubles within a class, so an object that looks like two of them is found twice; but it is
    one object, and has one identity. `also` of each lists the other classes that were seen in it: (label, score).
    """
    masks = [one["rle"] for one in found]
    iou = rle_codec.iou(masks, masks, [0] * len(masks)) if masks else ()  # (N, N)
    kept = {}  # number -> the classes seen in it, each with its best score
    for number, one in enumerate(found):
        on = next((better for better in kept if iou[number][better] >= SAME_OBJECT), number)
        kept.setdefault(on, {}).setdefault(one["label"], one["score"])
    return [{**found[number], "also": list(classes.items())[1:]} for number, classes in kept.items()]


def one_per_identity(found, matches):
    """Numbers of the instances; of those of the same identity that lie on each other, parts of one object, the nearest.

    An identity may still be there twice, where there are many of its kind.
    """
    if not found:
        return []
    masks, names = [one["rle"] for one in found], np.array(list(map(answer, matches)), object)
    share = rle_codec.iou(masks, masks, [1] * len(masks))  # (N, N) of each mask that lies on the other
    same = (np.maximum(share, share.T) >= COVERED) & (names[:, None] == names) & (names != None)  # noqa: E711
    objects, before = np.arange(len(found)), None
    while not np.array_equal(objects, before):  # the parts of one object take its lowest number
        objects, before = np.where(same, objects, objects[:, None]).min(1), objects
    nearest = {}
    for number in sorted(range(len(found)), key=lambda number: matches[number][0]["distance"]):
        nearest.setdefault(objects[number], number)
    return sorted(nearest.values())


def subject(picture, detector):
    """The picture's one object, as `object_mask` gives it, or None."""
    network, device = detector.network, detector.device
    return object_mask(network, picture, device, amp=detector.amp, labels=detector.labels)


def cut_subject(picture, detector):
    """(the picture's one object cut out along its mask, True); or (the whole picture, False) where there is none.

    detector: `recognition.networks.Detector`, or None for whole pictures.
    """
    found = detector and subject(picture, detector)
    return (cut_out(picture, found["box"], found["rle"]), True) if found else (picture, False)


class Identifier(NamedTuple):
    """Who is known, and how they are recognised.

    threshold: distance up to which two are the same, or None. num_matches: identities to answer with.
    """

    gallery: Gallery
    encoder: Encoder
    threshold: float | None
    num_matches: int

    def __str__(self):
        cut = "cut out along masks" if self.gallery.masks else "whole"
        limit = "no threshold" if self.threshold is None else explain_threshold(self.encoder, self.threshold)
        return f"gallery: {size_of(self.gallery)}, {cut}; {self.encoder.message}; {limit}"

    def strangers_accepted(self):
        """(share of strangers that somebody here is near enough to, in [0, 1]; whether it may be more; the number of
        identities that it was measured on), or None where nothing is known of the threshold."""
        rates, identities = rates_of(self.encoder, self.threshold), len(self.gallery.names)
        if not rates.get("strangers"):
            return None
        measured = strangers_accepted(rates["strangers"], identities, len(self.gallery) / identities)
        return *measured, rates["identities"]


def size_of(gallery):
    """150 pictures of 30 identities."""
    counts = ((len(gallery), "picture", "pictures"), (len(gallery.names), "identity", "identities"))
    return " of ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts)


def identify_instances(identifier, picture, found):
    """Who the instances of a scene are; each is cut out as the pictures of the gallery were.

    Args:
        picture: the scene, PIL. found: its instances, as `one_per_object` gives them.

    Returns:
        (found, cuts, matches), of one length: those of `one_per_identity`, small copies of their cut-outs, and what
        `identify` says of each.
    """
    with_masks = identifier.gallery.masks
    cuts = (cut_out(picture, one["box"], one["rle"] if with_masks else None) for one in found)
    features, cuts = embed(identifier.encoder, cuts)
    device = identifier.encoder.device
    matches = identify(identifier.gallery, features, identifier.num_matches, identifier.threshold, device)
    kept = one_per_identity(found, matches)
    return tuple([values[number] for number in kept] for values in (found, cuts, matches))


def identify(gallery, features, k, threshold, device="cpu"):
    """For each query (Q, D) its k nearest identities: lists of dicts identity, distance, row, accepted.

    Args:
        threshold: distance; the nearest identity is accepted within it. Without one, None, nobody is.
        device: where the gallery is searched.
    """
    if not len(features):
        return []
    distances, identities, rows = gallery.identify(features, k, device)
    return [
        [
            {
                "identity": gallery.names[name],
                "distance": distance,
                "row": row,
                "accepted": threshold is not None and not place and distance <= threshold,
            }
            for place, (distance, name, row) in enumerate(zip(*columns, strict=True))
        ]
        for columns in zip(distances.tolist(), identities.tolist(), rows.tolist(), strict=True)
    ]


def answer(matches):
    """The identity of a query by its matches, or None for an unknown one."""
    return matches[0]["identity"] if matches and matches[0]["accepted"] else None


def describe(matches, limit=6):
    """A few words about who is in a scene: "4 instances: 0061 x2, 0075, 1 unknown"."""
    known = Counter(name for name in map(answer, matches) if name is not None)
    words = [f"{name} x{count}" if count > 1 else name for name, count in list(known.items())[:limit]]
    if len(known) > limit:
        words.append(f"{sum(list(known.values())[limit:])} more")
    if known.total() < len(matches):
        words.append(f"{len(matches) - known.total()} unknown")
    count = f"{len(matches) or 'no'} instance{'s' * (len(matches) != 1)}"
    return f"{count}: {', '.join(words)}" if words else count


class Verdict(NamedTuple):
    """Of two pictures: distance; similarity, their cosine, None where the network has another distance; threshold, or
    None; is_same, None without a threshold; in words: answer, reason."""

    distance: float
    similarity: float | None
    threshold: float | None
    is_same: bool | None
    answer: str
    reason: str


def compare(pictures, encoder, detector, asked=None):
    """Do two PIL pictures show the same object?

    Args:
        detector: to cut both out along their masks, or None for whole pictures. Where it finds the object in one only,
            both are taken whole: a cut-out is not compared with a picture that still has its background.
        asked: threshold; None takes that of the ReID checkpoint.

    Returns:
        (`Verdict`, [small copies of both cut-outs, or None twice where the pictures were taken whole])
    """
    subjects = [cut_subject(picture, detector) for picture in pictures]
    are_cut = all(is_found for _, is_found in subjects)
    features, cuts = embed(encoder, (cut for cut, _ in subjects) if are_cut else pictures)
    cuts = cuts if are_cut else [None] * len(pictures)
    distance = pairwise_distance(features[:1], features[1:], encoder.metric).item()
    threshold = settle_threshold(encoder, asked)
    is_same = None if threshold is None else distance <= threshold
    similarity = 1 - distance if encoder.metric == "cosine" else None
    likeness = f"{encoder.metric} distance {distance:.3f}"
    if similarity is not None:
        likeness = f"similarity {similarity:.3f}, {likeness}"
    answers = {None: "no threshold, no answer", True: "yes, the same object", False: "no, two objects"}
    reason = f"{likeness}; {explain_threshold(encoder, threshold)}"
    return Verdict(distance, similarity, threshold, is_same, answers[is_same], reason), cuts


def settle_threshold(encoder, asked):
    """The distance up to which two are the same: what a person asked for, else what the checkpoint carries, or None.

    That of the checkpoint was chosen on whole validation pictures; for cut-outs it is a first guess. It is taken as it
    is printed: who types it as --threshold gets the same answers.
    """
    if asked is not None or encoder.threshold is None:
        return asked
    return as_typed(encoder.threshold["distance"])


def explain_threshold(encoder, threshold):
    """What is taken for the same, in words."""
    if threshold is None:
        return "the checkpoint carries no threshold, --threshold DISTANCE sets one"
    if rates := rates_of(encoder, threshold):
        named = {name: value for name, value in rates.items() if name != "strangers"}
        return f"{describe_threshold(threshold, **named)}, on whole validation pictures"
    return f"threshold {threshold:g}"


def rates_of(encoder, threshold):
    """What passes this threshold, if it is the checkpoint's own, or {}: of one that a person chose nothing is known.

    Returns:
        dict of `RATES`, as `core.retrieval.threshold.Threshold` has them; old checkpoints have the first two only.
    """
    known = encoder.threshold
    if known is None or as_typed(known["distance"]) != threshold:
        return {}
    return {name: known[name] for name in RATES if name in known}
