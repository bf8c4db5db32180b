"""Which view of a picture its objects were outlined on: the stored one, or the one turned by its EXIF orientation.

Some tools show a picture turned upright, others as it is stored. A quarter turn of unequal sides shows in the width and
height of the annotation file. Any other does not: then the other pictures of the file decide.
"""

from collections import Counter

from PIL import Image

from core.data.coco_checks import EntryFault, check_box
from core.data.images import EXIF_ORIENTATION, MOST_HEADERS, SWAPS_SIDES, TO_UPRIGHT, open_image, read_stored_image
from core.errors import InputError


def settle_view(pictures, entries, path, check_sizes, upright):
    """The view of those pictures that don't tell: that of most of the others, or else `upright`.

    At most `MOST_HEADERS` pictures are looked at, spread evenly. One whose header can't be read passes: reading it
    will tell.

    Args:
        pictures: image id -> picture. Changed in place: those without width and height are given the size of their
            view, or taken out where they can't be read.
        entries: image id -> annotations of the picture, as in the file.
        path: of the annotation file.
        check_sizes: whether a width and height that fit neither view are a fault.

    Returns:
        (whether it is the upright view, lines for the log, a line about pictures that are at fault or "")
    """
    sized = [picture for picture in pictures.values() if picture.width is not None]
    unsized = [picture for picture in pictures.values() if picture.width is None]
    count = min(len(sized), MOST_HEADERS)
    views, measured, errors = Counter(), {}, []
    for place in range(count):
        try:
            views[_view_by_header(sized[place * len(sized) // count], check_sizes)] += 1
        except InputError as error:
            errors.append(error)
    for picture in unsized:
        try:
            measured[picture.id] = _view_by_objects(picture.path, entries[picture.id])
        except InputError as error:
            errors.append(error)
            del pictures[picture.id]
    views.update(view for view, _ in measured.values())
    if views["upright"] != views["stored"]:
        upright = views["upright"] > views["stored"]
    for number, (view, sizes) in measured.items():
        width, height = sizes["upright" if view == "upright" or view == "either" and upright else "stored"]
        pictures[number] = pictures[number]._replace(width=width, height=height)
    notes = []
    if measured:
        notes.append(f"{path}: images without width and height ({len(measured)}): those of the pictures themselves")
    if views["either"]:
        name = "upright" if upright else "stored"
        others = views["upright"] + views["stored"]
        notes.append(
            f"{path}: pictures with an EXIF orientation that width and height don't settle ({views['either']} of "
            f"{count + len(measured)} looked at): outlines are taken to lie on the {name} picture, as "
            + (f"in {views[name]} of {others} others" if others else "no other picture tells")
        )
    more = f" (and {len(errors) - 1} more of {count + len(unsized)} looked at)" if len(errors) > 1 else ""
    return upright, notes, f"{errors[0]}{more}" if errors else ""


def _view_by_header(picture, check_sizes):
    """The view with the picture's width and height, "upright" or "stored", or "either"; None without an orientation."""
    said = (picture.width, picture.height)
    try:
        with open_image(picture.path) as image:
            # The trap: `getexif` of a PNG decodes it, for what may stand behind the pixels; a wrong size is worth that.
            exif = Image.Image.getexif(image) if image.size == said else image.getexif()
            turn = TO_UPRIGHT.get(exif.get(EXIF_ORIENTATION))
            # Another: the size of a TIFF is that of the upright picture in newer versions of Pillow.
            stored = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    except InputError:
        return None
    fitting = [view for view, size in _sizes(stored, turn).items() if size == said]
    if check_sizes and not fitting:
        raise wrong_size(picture.path, stored, said)
    return _one_view(fitting, turn) if fitting else None


def _view_by_objects(path, entries):
    """(view as `_view_by_header` names it, sizes of the views) of a picture without width and height: run lengths have
    its size, and boxes lie within it."""
    image, turn = read_stored_image(path)
    sizes = _sizes(image.size, turn)

    def fits(entry, width, height):
        if isinstance(entry.get("segmentation"), dict):
            return entry["segmentation"].get("size") == [height, width]
        try:
            _, _, x2, y2 = check_box(entry.get("bbox"), "")
        except EntryFault:  # it is said where the annotations are read
            return True
        return x2 <= width + 2 and y2 <= height + 2  # some are drawn a little too large

    fitting = [view for view, size in sizes.items() if all(fits(entry, *size) for entry in entries)]
    return _one_view(fitting, turn), sizes


def _sizes(stored, turn):
    return {"stored": stored, "upright": stored[::-1] if turn in SWAPS_SIDES else stored}


def _one_view(fitting, turn):
    if turn is None:
        return None
    return fitting[0] if len(fitting) == 1 else "either"


def wrong_size(path, found, said):
    """The InputError about a picture of another (width, height) than the annotation file says."""
    return InputError(
        f"{path}: the picture has {found[0]}x{found[1]} pixels and the annotation file says {said[0]}x{said[1]}; "
        "correct width and height there, or give the picture that was annotated"
    )
