"""From pictures to identities: objects cut out, embedded, looked up in a gallery.

A picture of a gallery shows one object; a scene shows any number. Both are cut out the same way, along their masks or
by their whole boxes, or they could not be compared.
"""

import io
import os
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle_codec
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from core.data.cutouts import cut_out
from core.data.images import BROKEN_FILE_ERRORS, list_images, read_image
from core.data.mvb import parse_name
from core.engine.logger import progress_is_shown
from core.engine.pseudo_masks import object_mask
from core.engine.trained import Encoder
from core.engine.updater import autocast
from core.errors import InputError
from core.files import printable
from core.retrieval import verification
from core.retrieval.distance import pairwise_distance
from core.retrieval.gallery import Entries, Gallery
from core.retrieval.gallery_file import digests_of

BATCH = 32  # pictures that the network sees at once
CHUNK = 128  # pictures between two writes into a gallery
GALLERY_THUMBNAIL = 96  # pixels of its longer side
SHEET_THUMBNAIL = 256
SAME_OBJECT = 0.5  # IoU of two masks; of 81 doubles and strays in 40 scenes 23 remain, of 183 found objects 182


@torch.inference_mode()
def embed(encoder, pictures, thumbnail=SHEET_THUMBNAIL):
    """Embeddings of any number of PIL pictures, and small copies of them: the pictures are taken one by one.

    Args:
        encoder: `core.engine.trained.Encoder`.
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
        batch.append(encoder.transform({"image": functional.to_image(picture)})["image"].as_subclass(torch.Tensor))
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
    one object, and has one identity.
    """
    masks = [one["rle"] for one in found]
    iou = rle_codec.iou(masks, masks, [0] * len(masks)) if masks else ()  # (N, N)
    kept = []
    for number in range(len(found)):
        if all(iou[number][better] < SAME_OBJECT for better in kept):
            kept.append(number)
    return [found[number] for number in kept]


def cut_instances(picture, found, with_masks):
    """The instances of a scene (dicts with box and rle) as pictures of their own, one by one."""
    return (cut_out(picture, one["box"], one["rle"] if with_masks else None) for one in found)


def subject(picture, detector):
    """The picture's one object, as `object_mask` gives it, or None."""
    network, device = detector.network, detector.device
    return object_mask(network, picture, device, amp=detector.amp, labels=detector.labels)


def cut_subject(picture, detector):
    """(the picture's one object cut out along its mask, True); or (the whole picture, False) where there is none.

    detector: `core.engine.trained.Detector`, or None for whole pictures.
    """
    found = detector and subject(picture, detector)
    return (cut_out(picture, found["box"], found["rle"]), True) if found else (picture, False)


def name_identities(paths, root, known=()):
    """Whom each picture in a folder shows: its sub-folder's name, the number of an MVB name, else the name itself.

    Args:
        paths: of pictures in `root` or deeper; the first folder below `root` counts.
        known: identities of the gallery that they join: 10_g_1.jpg is of its "0010".

    Returns:
        List of str.
    """
    places = [os.path.relpath(path, root).split(os.sep) for path in paths]
    folders = {folder for folder, *below in places if below}
    numbers = {int(name): name for name in [*sorted(folders), *known] if name.isdecimal()}
    stems = Counter(os.path.splitext(name)[0] for name, *below in places if not below)
    identities = []
    for folder, *below in places:
        stem, parsed = os.path.splitext(folder)[0], parse_name(folder)
        if below:
            identities.append(folder)
        elif parsed:
            identities.append(numbers.setdefault(parsed[1], parsed[0]))
        else:
            identities.append(stem if stems[stem] == 1 else folder)  # bag.jpg and bag.png are two pictures
    return identities


def renamed(gallery, paths, identities):
    """Those pictures that a gallery has under another identity: list of (path, identity there, identity)."""
    sources = digests_of(os.path.abspath(path) for path in paths)
    _, numbers, rows = np.intersect1d(sources, gallery.source_digests(), return_indices=True)
    there = (
        (paths[number], gallery.identity_of(row), identities[number]) for number, row in zip(numbers, rows, strict=True)
    )
    return sorted((path, before, now) for path, before, now in there if before != now)


def pictures_of_each(gallery):
    """How many pictures a gallery has of each identity: dict by name."""
    return dict(zip(gallery.names, np.bincount(gallery.numbers, minlength=len(gallery.names)).tolist(), strict=True))


def pictures_of_gallery(root):
    """Paths of the pictures in a folder and its sub-folders. Raises InputError where there are none."""
    paths = list_images(root, recursive=True)
    if not paths:
        raise InputError(f"{root}: no pictures in this folder or its sub-folders; a gallery is made of pictures")
    return paths


class Subjects:
    """The pictures of a gallery, embedded in their order: an iterable of `Entries`, `CHUNK` pictures in each.

    Args:
        paths, identities: as from `pictures_of_gallery` and `name_identities`.
        encoder, detector: `core.engine.trained`; without a detector whole pictures are embedded.

    Attributes, complete at the end:
        skipped: a line for each picture that can't be read. whole: paths of those in which no object was found, though
            there is a detector.
    """

    def __init__(self, paths, identities, encoder, detector):
        self.pairs = list(zip(paths, identities, strict=True))
        self.encoder, self.detector = encoder, detector
        self.skipped, self.whole = [], []

    def __iter__(self):
        with tqdm(total=len(self.pairs), unit="picture", disable=not progress_is_shown()) as self.bar:
            for start in range(0, len(self.pairs), CHUNK):
                read = []
                cuts = self._cut_outs(self.pairs[start : start + CHUNK], read)
                features, thumbnails = embed(self.encoder, cuts, GALLERY_THUMBNAIL)
                if read:
                    identities, sources = [name for _, name in read], [os.path.abspath(path) for path, _ in read]
                    yield Entries(features, identities, sources, list(map(to_jpeg, thumbnails)))

    def _cut_outs(self, pairs, read):
        for path, identity in pairs:
            self.bar.update()
            try:
                picture = read_image(path)
            except InputError as error:
                self.skipped.append(str(error))
                self.bar.write(f"skipped: {printable(error)}", file=sys.stderr)
                continue
            cut, is_found = cut_subject(picture, self.detector)
            if self.detector and not is_found:
                self.whole.append(path)
            read.append((path, identity))
            yield cut


def to_jpeg(picture):
    """Bytes of a small PIL picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def from_jpeg(content):
    """PIL picture, or None where a gallery keeps none, or a damaged one."""
    try:
        return Image.open(io.BytesIO(content)).convert("RGB") if content else None
    except BROKEN_FILE_ERRORS:
        return None


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
    """A few words about who is in a scene: "3 instances: 0061, 0075, 1 unknown"."""
    known = [name for name in map(answer, matches) if name is not None]
    words = known[:limit] + ([f"{len(known) - limit} more"] if len(known) > limit else [])
    if len(known) < len(matches):
        words.append(f"{len(matches) - len(known)} unknown")
    count = f"{len(matches) or 'no'} instance{'s' * (len(matches) != 1)}"
    return f"{count}: {', '.join(words)}" if words else count


class Verdict(NamedTuple):
    """Of two pictures: distance; threshold, or None; is_same, None without a threshold; in words: answer, reason."""

    distance: float
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
    likeness = f"{encoder.metric} distance {distance:.3f}"
    if encoder.metric == "cosine":
        likeness = f"similarity {1 - distance:.3f}, {likeness}"
    answers = {None: "no threshold, no answer", True: "yes, the same object", False: "no, two objects"}
    reason = f"{likeness}; {explain_threshold(encoder, threshold)}"
    return Verdict(distance, threshold, is_same, answers[is_same], reason), cuts


def settle_threshold(encoder, asked):
    """The distance up to which two are the same: what a person asked for, else what the checkpoint carries, or None.

    That of the checkpoint was chosen on whole validation pictures; for cut-outs it is a first guess. It is taken as it
    is printed: who types it as --threshold gets the same answers.
    """
    if asked is not None or encoder.threshold is None:
        return asked
    return verification.as_typed(encoder.threshold["distance"])


class Identifier(NamedTuple):
    """Who is known, and how they are recognised.

    gallery: its info says, under "masks", whether its pictures were cut out along masks.
    threshold: distance up to which two are the same, or None. num_matches: identities to answer with.
    """

    gallery: Gallery
    encoder: Encoder
    threshold: float | None
    num_matches: int

    def __str__(self):
        cut = "cut out along masks" if self.gallery.info.get("masks") else "whole"
        limit = "no threshold" if self.threshold is None else explain_threshold(self.encoder, self.threshold)
        return f"gallery: {size_of(self.gallery)}, {cut}; {self.encoder.message}; {limit}"

    def strangers_accepted(self):
        """The share of strangers that somebody here is near enough to, in [0, 1]; 0 where that is not known.

        The threshold lets a share f of pairs pass, and a stranger is paired with each of n identities: 1 - (1 - f)^n,
        were these independent.
        """
        if not _is_checkpoints(self.encoder, self.threshold) or self.threshold < 0:
            return 0.0
        return 1 - (1 - self.encoder.threshold["false_accept_rate"]) ** len(self.gallery.names)


def gallery_info(encoder, detector, classes=None):
    """What a gallery keeps about how it was made."""
    segment = detector and os.path.abspath(detector.path)
    reid = os.path.abspath(encoder.path)
    return {"reid": reid, "segment": segment, "masks": detector is not None, "classes": classes}


def size_of(gallery):
    """150 pictures of 30 identities."""
    counts = ((len(gallery), "picture", "pictures"), (len(gallery.names), "identity", "identities"))
    return " of ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts)


def explain_threshold(encoder, threshold):
    """What is taken for the same, in words."""
    if threshold is None:
        return "the checkpoint carries no threshold, --threshold DISTANCE sets one"
    if _is_checkpoints(encoder, threshold):
        words = verification.describe_threshold(threshold, encoder.threshold["false_accept_rate"])
        return f"{words} on whole validation pictures"
    return f"threshold {threshold:g}"


def _is_checkpoints(encoder, threshold):
    return encoder.threshold is not None and verification.as_typed(encoder.threshold["distance"]) == threshold
