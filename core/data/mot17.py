"""MOT17 (Milan et al. 2016): the persons of its training sequences, cut out of the annotated tracks.

A track is an identity, its sequence the camera; of a sequence's three copies (DPM, FRCNN, SDP: same frames and tracks,
other detections) one is read. What counts, from mmdetection's mot2reid.py: pedestrians (class 1) of which 0.3 or more
is visible. Of the frames every tenth is taken, since neighbours are nearly the same picture. The last third of the
sequences, 11 and 13 of seven, is tested: the first picture of a person asks, the others are the gallery.
"""

import math
import os
import re

import numpy as np
from tqdm import tqdm

from core.data.images import folder_entries, read_image
from core.data.samples import clip_box, read_text
from core.errors import InputError
from core.files import folder_beside

SEQUENCE = re.compile(r"MOT17-(\d+)(-\w+)?")
VISIBILITY = 0.3
STEP = 10  # frames


def cut_persons(root):
    """The folder `<root>/reid` in Market-1501's layout; 020017_c2_000031.jpg is track 17 of sequence 2 in frame 31.

    Where it isn't there it is made, whole or not at all; a training then reads persons, and not frames of 2 megapixels.
    root: Path with `train/MOT17-02-FRCNN/{gt/gt.txt,img1}` and the like.
    Raises InputError where there are no two sequences, one is damaged, or `root` can't be written to.
    """
    out = root / "reid"
    if out.is_dir():
        return out
    entries = sorted(folder_entries(root / "train"), key=lambda entry: "FRCNN" in entry.name)
    sequences = {int(match[1]): entry.path for entry in entries if (match := SEQUENCE.fullmatch(entry.name))}
    if len(sequences) < 2:
        raise InputError(f"{root / 'train'}: expected two sequences or more, MOT17-02-FRCNN, MOT17-04-FRCNN, ...")
    tested = sorted(sequences)[-max(1, len(sequences) // 3) :]
    try:
        with folder_beside(out) as partial:
            for part in ("bounding_box_train", "query", "bounding_box_test"):
                (partial / part).mkdir()
            for number, path in tqdm(sequences.items(), "cutting persons out", leave=False, disable=None):
                _cut_sequence(path, number, partial, number in tested)
            os.rename(partial, out)
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error.strerror or error}), and persons are cut into it") from error
    return out


def _cut_sequence(path, number, out, is_tested):
    rows, seen = _read_tracks(os.path.join(path, "gt", "gt.txt")), set()
    for frame in np.unique(rows[:, 0]):
        image = read_image(os.path.join(path, "img1", f"{int(frame):06d}.jpg"))
        for _, track, left, top, width, height in rows[rows[:, 0] == frame]:
            box = clip_box((left, top, left + width, top + height), *image.size)
            if box is None:
                continue
            asks = track not in seen and (rows[:, 1] == track).sum() > 1
            seen.add(track)
            part = ("query" if asks else "bounding_box_test") if is_tested else "bounding_box_train"
            name = f"{number:02d}{int(track):04d}_c{number}_{int(frame):06d}.jpg"
            corners = (*map(math.floor, box[:2]), *map(math.ceil, box[2:]))
            image.crop(corners).save(out / part / name, quality=95)


def _read_tracks(path):
    """Of each box that counts: frame, track, left, top, width, height (pixels); (N, 6)."""
    lines = read_text(path).splitlines()
    if not lines:
        raise InputError(f"{path}: lists nothing; it is not whole, get the set again")
    try:  # ..., 1 unless it is to be ignored, class, visible part
        rows = np.loadtxt(lines, delimiter=",", ndmin=2, usecols=range(9))
    except ValueError as error:
        raise InputError(f"{path}: not a list of lines of 9 numbers ({error})") from error
    counts = (rows[:, 6] == 1) & (rows[:, 7] == 1) & (rows[:, 8] >= VISIBILITY) & (rows[:, 0] % STEP == 1)
    return rows[counts, :6]
