"""Baggage: MVB (Multi View Baggage, Zhang et al. 2019, arXiv:1907.11366) in both layouts in use, and sets made like it.

A bag is photographed before security (g, the gallery) and after it (p, the probe, which is the query). MVB has 4,519
identities and 22,660 pictures: 20,176 to train, 1,432 gallery and 1,052 probe pictures of other bags.

Original: `MVB_train/Image`, `MVB_train/Info/train.json`, `MVB_val/Image/{gallery,probe}`, `MVB_val/Info/*.json`.
Converted: `bounding_box_train`, `query`, `bounding_box_test`, with names like 0010_p_3.jpg and 0010_g_1.jpg: identity,
side of security, view. The folder decides what is query and what is gallery.

A camera is a view on one side of security: camera 2 * view + (1 after security).
"""

import json
import re

from core.data.images import folder_entries
from core.data.samples import (
    ReIDDataset,
    Sample,
    check_on_disk,
    clip_box,
    listed_path,
    read_pictures,
    read_text,
    relabel,
)
from core.errors import InputError

PARTS = ("train", "gallery", "probe")
SIDES = {"g": "before security", "p": "after security"}
TEST_PARTS = {"g": "gallery", "p": "probe"}  # what is tested of each side
ORIGINAL = ("MVB_train", "MVB_val")
CONVERTED = {"train": "bounding_box_train", "probe": "query", "gallery": "bounding_box_test"}
INSIDE = (*ORIGINAL, *CONVERTED.values())  # one of these is enough to know the data
# Of a box, a side or a whole picture: JSON's numbers may be nan, infinite, or whole and too long for a float.
MOST_PIXELS = 1e9
# The suitcase set has a number more: 0010_p_3_0.jpg is the first picture of view 3. Identities and cameras are int64.
BAG_NAME = re.compile(r"(\d{1,18})_([pg])_(\d{1,18})(?!\d)")


def load_mvb(root):
    """Read MVB, or data in one of its layouts, from its own folder (Path); of both layouts, the converted.

    Entries of the original layout may have two fields that MVB itself has not: `bbox` (x, y, width, height) in pixels
    and `segmentation` (COCO run lengths), which become the sample's box (x1, y1, x2, y2) and mask.
    Raises InputError for whatever is missing or malformed.
    """
    if find_layout(root)[0] == "original":
        return _load_original(root)
    read = {
        part: read_pictures(root / folder, parse_name, "0010_p_3.jpg", may_lack=part == "train")
        for part, folder in CONVERTED.items()
    }
    return ReIDDataset(relabel(read["train"]), read["probe"], read["gallery"])


def find_layout(root):
    """Which of the layouts is read: "original" or "converted", and whether the other one lies beside it.

    The converted one is read where all of it is there, or nothing of the original.
    """
    original = any((root / split).exists() for split in ORIGINAL)
    converted = [(root / folder).exists() for folder in CONVERTED.values()]
    layout = "original" if original and not all(converted) else "converted"
    return layout, original and any(converted)


def image_folder(split, side):
    """Where MVB_train or MVB_val keeps its pictures of one side of security, from the root on."""
    return f"{split}/Image" if split == "MVB_train" else f"{split}/Image/{TEST_PARTS[side]}"


def picture_path(root, split, side, name):
    """Path of the picture that an entry of MVB_train or MVB_val names; InputError where it leads out of its folder."""
    return listed_path(image_folder(split, side), name, "image_name", root)


def parse_name(file_name):
    """0010_p_3.jpg -> ("0010", 10, camera), or None where the name is of another form."""
    match = BAG_NAME.match(file_name)
    return match and (match[1], int(match[1]), 2 * int(match[3]) + (match[2] == "p"))


def _load_original(root):
    train_list = root / "MVB_train" / "Info" / "train.json"
    train_entries = read_entries(train_list) if train_list.exists() or (root / "MVB_train" / "Image").exists() else []
    info = root / "MVB_val" / "Info"
    lists = [info / entry.name for entry in folder_entries(info) if entry.name.endswith(".json")]
    if not lists:
        raise InputError(f"{info}: no *.json there; expected val_gallery.json and val_probe.json")
    test_entries = [entry for path in lists for entry in read_entries(path)]

    train = _to_samples(train_entries, root, "MVB_train")
    test = _to_samples(test_entries, root, "MVB_val")
    learned = check_on_disk(train["g"] + train["p"], train_list, may_lack=True)
    check_on_disk(test["g"] + test["p"], info)
    for side, part in TEST_PARTS.items():
        if not test[side]:
            raise InputError(f"{info}: no entry with datatype {side!r}, so there is no {part}")
    return ReIDDataset(relabel(sorted(learned)), test["p"], test["g"])


def read_entries(path):
    """The pictures that a JSON file of the original layout describes, checked.

    Returns:
        List of dicts: where ("file, entry 3"), image_name, identity (int where it is a number, so that "0010", "10 "
        and 10 are the same bag, else str), name, datatype ("g" or "p"), and box, mask or None.

    Raises:
        InputError: as `read_list`, or an entry with a field missing or of the wrong type.
    """
    return [check_entry(entry, f"{path}, entry {index}") for index, entry in enumerate(read_list(path))]


def read_list(path):
    """The entries of a JSON file of the original layout, as they are.

    MVB's own files are {"image": [entry, ...]}; a bare list does as well. Raises InputError where it is missing or
    neither of these.
    """
    text = read_text(path)  # out of the try: an InputError is a ValueError too
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists ...
        raise InputError(f"{path}: not JSON ({error})") from error
    entries = data.get("image") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise InputError(f'{path}: expected a list of pictures, or {{"image": [...]}}, found {type(data).__name__}')
    return entries


def check_entry(entry, where):
    """One entry of a list, checked. where: "file, entry 3", for messages.

    Returns:
        dict as in `read_entries`.

    Raises:
        InputError: no object, or a field that is missing or of the wrong type.
    """
    try:
        name = check_name(entry)
        where = f"{where} ({name})"
        bag = check_identity(entry)
        box = check_box(entry.get("bbox"), entry.get("dimsize"))
        mask = check_mask(entry.get("segmentation"))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return {"where": where, "image_name": name, **bag, "box": box, "mask": mask}


# Each of these raises InputError that says what is wrong, and not where.


def check_name(entry):
    """The image_name of an entry."""
    if not isinstance(entry, dict):
        raise InputError(f"expected an object with image_name, id and datatype, found {entry!r:.80}")
    name = entry.get("image_name")
    if not isinstance(name, str) or not name:
        raise InputError(f"needs an image_name, found {name!r:.80}")
    return name


def check_identity(entry):
    """identity, name and datatype (as in `read_entries`) of an entry that has an image_name."""
    # Some copies of MVB_val have the identity and the side in the file name alone.
    match = BAG_NAME.match(entry["image_name"])
    identity = entry.get("id", match and match[1])
    if isinstance(identity, str):
        identity = identity.strip()  # a blank more makes no other bag
    datatype = entry.get("datatype", match and match[2])
    is_known = isinstance(identity, int | str) and not isinstance(identity, bool) and identity != ""
    if not is_known or _is_long(identity):
        raise InputError(f"needs an id, a text or a number of at most 18 digits, found {entry.get('id')!r:.80}")
    if datatype not in ("g", "p"):
        raise InputError(f"needs a datatype, 'g' or 'p', found {datatype!r:.80}")
    number = int(identity) if str(identity).isdecimal() else identity
    return {"identity": number, "name": str(identity), "datatype": datatype}


def _is_long(identity):
    """Whether an id is a number that no tensor of int64 holds."""
    number = isinstance(identity, int) or identity.isdecimal()
    return number and (len(identity) > 18 if isinstance(identity, str) else abs(identity) >= 10**18)


def check_box(bbox, dimsize=None):
    """COCO's (x, y, width, height) -> (x1, y1, x2, y2) within the picture, where (width, height) is known; or None."""
    if bbox is None:
        return None
    if not _are_numbers(bbox, 4) or bbox[2] <= 0 or bbox[3] <= 0:
        raise InputError(f"bbox has to be [x, y, width, height] in pixels, found {bbox!r:.80}")
    x, y, width, height = map(float, bbox)
    box, size = (x, y, x + width, y + height), check_size(dimsize)
    clipped = clip_box(box, *size) if size else box
    if clipped is None:
        raise InputError(f"bbox {bbox} lies outside the picture of {size[0]} x {size[1]} pixels")
    return clipped


def check_size(dimsize):
    """(width, height) of a picture in pixels, or None."""
    if dimsize is None:
        return None
    if not _is_size(dimsize):
        raise InputError(f"dimsize has to be [width, height] in pixels, found {dimsize!r:.80}")
    return tuple(dimsize)


def check_mask(segmentation):
    """COCO run lengths {"size": [height, width], "counts": text or list}, as given, or None; decoding is the user's."""
    if segmentation is None:
        return None
    lengths = segmentation if isinstance(segmentation, dict) else {}
    if not _is_size(lengths.get("size")) or not isinstance(lengths.get("counts"), str | list):
        raise InputError(f"segmentation has to be COCO run lengths (size, counts), found {segmentation!r:.80}")
    return segmentation


def _is_size(values):
    """Whether these are the two sides of a picture in pixels, of which it has fewer than `MOST_PIXELS`."""
    return _are_numbers(values, 2) and min(values) > 0 and values[0] * values[1] < MOST_PIXELS


def _are_numbers(values, count):
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        and all(abs(value) < MOST_PIXELS for value in values)
    )


def _to_samples(entries, root, split):
    """Entries of MVB_train or MVB_val -> {"g": samples, "p": samples}, in the order listed.

    A picture that two files list counts once. Identities keep their number where all have one; else they are numbered
    in the order of their names.
    """
    identities = {entry["identity"] for entry in entries}
    if all(isinstance(identity, int) for identity in identities):
        numbers = {identity: identity for identity in identities}
    else:
        numbers = {identity: number for number, identity in enumerate(sorted(identities, key=str))}
    samples = {}
    for entry in entries:
        try:
            path = picture_path(root, split, entry["datatype"], entry["image_name"])
        except InputError as error:
            raise InputError(f"{entry['where']}: {error}") from error
        parsed = parse_name(entry["image_name"])
        camera = parsed[2] if parsed else int(entry["datatype"] == "p")
        sample = Sample(path, numbers[entry["identity"]], camera, entry["box"], entry["mask"], entry["name"])
        known = samples.setdefault(path, (entry["datatype"], sample))[1]
        if known.id != sample.id:
            raise InputError(f"{entry['where']}: identity {sample.name}, but listed before as {known.name}")
    return {side: [sample for datatype, sample in samples.values() if datatype == side] for side in SIDES}
