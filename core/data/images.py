"""Pictures from files: every kind that people have, as 8-bit RGB, or one clear line about the file at fault."""

import functools
import io
import os
import re
import stat
import struct
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError
from tqdm import tqdm

from core.data.damage import END_OF_JPEG, has_all_scans, without_metadata
from core.errors import InputError
from core.files import printable

# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs",
)
# Of pictures that are not read: `say_unread` counts them.
UNREAD_SUFFIXES = (
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".pjpeg", ".pjp", ".dib", ".pcx", ".tga", ".ico", ".icns", ".cur", ".psd",
    ".psb", ".xcf", ".svg", ".svgz", ".eps", ".wmf", ".emf", ".exr", ".hdr", ".pfm", ".pam", ".dds", ".sgi", ".rgb",
    ".ras", ".xbm", ".xpm", ".qoi", ".bpg", ".dcm", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw",
    ".srf", ".sr2", ".raf", ".orf", ".rw2", ".rwl", ".pef", ".srw", ".x3f", ".3fr", ".fff", ".iiq", ".mef", ".mos",
    ".mrw", ".erf", ".dcr", ".kdc", ".gpr",
)
# fmt: on
# Pillow's names of what these hold. It knows more, and for one of them, EPS, runs the program that the file is.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")

# What Pillow raises for damaged bytes: it has no common class for them, and each reader has its own. A reader that
# trusts the bytes may end in any error but those that stop a program (KeyboardInterrupt, SystemExit).
BROKEN_FILE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

DEEP_COLOR = re.compile(";16([BLN])")  # in Pillow's name of how pixels are stored; the letter is the order of bytes
EXIF_ORIENTATION = 0x0112
# How to turn the stored picture upright, by EXIF orientation (1 is upright already).
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACK = {  # what undoes a turn; the others undo themselves
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
}
# Every turn is: first swap x and y, or not; then mirror x, y, both or neither.
SWAPS_SIDES = {TO_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}
MIRRORS_X = {TO_UPRIGHT[orientation] for orientation in (2, 3, 6, 7)}
MIRRORS_Y = {TO_UPRIGHT[orientation] for orientation in (3, 4, 7, 8)}


# Of a picture, unless `limit_megapixels` says otherwise. Phones have fewer; a file of 1 KB may have any number.
MAX_MEGAPIXELS = 200.0
LIMIT = "CAROUSEL_MAX_MEGAPIXELS"  # in the environment, which workers inherit, however they are started
STRIP = 2**20  # pixels that are converted at a time, so that a huge picture is not held in several modes

# Pictures whose headers are read before a run: that takes a second on a disk, and many times that over a network.
MOST_HEADERS = 2000


def read_image(path, bits=16):
    """Read a picture as it is meant to be seen: upright by its EXIF orientation.

    Palette, grey, CMYK and 1-bit pictures become RGB; transparent ones are laid over white, as a browser shows them;
    16-bit values are scaled (the high byte of those bits that are in use), never clipped; of an animation the first
    frame counts.

    Args:
        bits: how many of 16 are in use, as `bits_in_use` finds it for a whole set.

    Returns:
        PIL image, mode RGB.

    Raises:
        InputError: names the file that is missing, empty, truncated, broken, or of a kind without a range (float,
            32-bit), or whose values need more than `bits`. Pillow's LOAD_TRUNCATED_IMAGES stays off: half a picture is
            not a picture.
    """
    picture, turn = read_stored_image(path, bits)
    return picture if turn is None else picture.transpose(turn)


def read_stored_image(path, bits=16):
    """Read a picture as it is stored, which is what boxes and masks are measured on, and how to turn it upright.

    Metadata that can't be read doesn't matter. Of a JPEG the end may be missing, which is said, but no pixel.

    Returns:
        (PIL image in mode RGB, `Image.Transpose` or None). Boxes are turned by `turn_box`.

    Raises:
        InputError, as `read_image`.
    """
    try:
        return _read_stored(path, bits)
    except InputError:
        with suppress(InputError, OSError):  # of the second try; what is raised is about the file as it is
            mended = _mended(path)
            if mended is not None:
                return _read_stored(mended, bits)
        raise


def _read_stored(file, bits):
    with open_image(file) as image:
        has_more = bits < 16 and _is_deep(image)  # than the high byte; asked before it is loaded
        low = _low_bytes(file) if has_more and not image.mode.startswith("I") else None
        if image.format != "TIFF":
            image.load()  # what a PNG has behind its pixels is known then
        turn = turn_of(image)
        image.load()  # in which a TIFF forgets its orientation
        if has_more and _highest(image) >= 2**bits:
            raise ValueError(f"its values reach {_highest(image):,}, those of its set use {bits} bits: store all alike")
        picture = _to_rgb(image, bits, low)
        if turn is not None and image.format == "TIFF":  # the trap: Pillow turns this format, and no other
            picture = picture.transpose(BACK.get(turn, turn))
    return picture, turn


def turn_of(image):
    """How an opened PIL image is turned upright, None where its EXIF orientation says nothing, or nothing readable."""
    try:
        return TO_UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
    except BROKEN_FILE_ERRORS:
        return None


def _mended(path):
    """The bytes of a file that can't be read, without what hindered that; None where its pixels are damaged."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        data = file.read()
    if not data.startswith(b"\xff\xd8"):
        return without_metadata(data)
    data = data.removesuffix(END_OF_JPEG[:1])
    # Where pixels are missing, the decoder makes them of whatever comes next, and two of that differ.
    noise = np.random.default_rng(0).integers(0, 255, 256, np.uint8).tobytes()
    ends = (data + between + END_OF_JPEG for between in (b"", noise))
    if not has_all_scans(data) or ImageChops.difference(*(_read_stored(end, 16)[0] for end in ends)).getbbox():
        return None
    _say_once(f"{path}: the end of the file is missing, and nothing of the picture; it is read")
    return data + END_OF_JPEG


@functools.cache
def _say_once(line):
    tqdm.write(printable(line), file=sys.stderr)


@contextmanager
def open_image(file, formats=FORMATS):
    """The one way to open a picture: `with open_image(path) as image`, a PIL image of which only the header is read.

    Args:
        file: a path, or the bytes of a file.
        formats: Pillow's names of what it may be; one that this Pillow lacks is not recognised.

    Raises:
        InputError: names the file; it has more pixels than `limit_megapixels` allows; also for whatever Pillow raises
            within the `with`, so keep other work out of it.
    """
    _prepare_pillow()
    formats = [name for name in formats if name in Image.OPEN]
    limit = Image.MAX_IMAGE_PIXELS = round(1e6 * float(os.environ.get(LIMIT, MAX_MEGAPIXELS)))
    try:
        if not isinstance(file, bytes):
            _check_file(file)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats) as image:
            if image.width * image.height > limit:  # Pillow itself stops at twice as many
                raise Image.DecompressionBombError
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such picture; check the path") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{file}: has more than {limit / 1e6:g} megapixels; make it smaller, or raise max_megapixels"
        ) from error
    except BROKEN_FILE_ERRORS as error:
        reason = str(error).replace("\n", " ") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"no picture format is recognised, of {', '.join(formats)}"
        raise InputError(f"{file}: can't be read as a picture ({reason}); replace or remove it") from error


@functools.cache
def _prepare_pillow():
    Image.init()  # so that `Image.OPEN` is complete
    for kind in (UserWarning, RuntimeWarning):  # about damage and size, without the file's name; what matters is raised
        warnings.filterwarnings("ignore", category=kind, module=r"PIL\.")


def limit_megapixels(most):
    """Pictures of more millions of pixels are refused from now on, by this process and those that it starts."""
    os.environ[LIMIT] = str(most)


def _check_file(path):
    """Only regular files are opened: a pipe would wait for ever, and a device may never end."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder where a picture is needed; give a file")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is a pipe, a socket or a device where a picture is needed; give a file")
    if status.st_size == 0:
        raise ValueError("the file is empty")


def turn_box(box, turn, width, height):
    """The box (x1, y1, x2, y2) in pixels of a picture of width x height, after `picture.transpose(turn)`."""
    x1, y1, x2, y2 = box
    if turn in SWAPS_SIDES:
        x1, y1, x2, y2, width, height = y1, x1, y2, x2, height, width
    if turn in MIRRORS_X:
        x1, x2 = width - x2, width - x1
    if turn in MIRRORS_Y:
        y1, y2 = height - y2, height - y1
    return x1, y1, x2, y2


def bits_in_use(paths, say, known=16):
    """How many of 16 bits the pictures of a set use, 8 .. 16: the fewest that hold the highest value in any of them.

    A camera of 12 bits stores 0 .. 4,095 in a file of 16, whose high byte would be nearly black. No file says so: of a
    PNG, the sBIT chunk is about values that were scaled to 16 bits. Less than 16 is said in one line.

    It is 16 where no picture has 16 bits, by the headers of `MOST_HEADERS` pictures spread evenly over the set. Where
    one has, every such picture is read, until one of them uses all bits.

    known: bits that a network's own set used, 16 where it had no such pictures: fewer are not taken, so that a picture
    alone looks as it does among others.
    """
    paths, highest = list(paths), 0
    with ThreadPoolExecutor(8) as pool:  # decoding releases the interpreter's lock
        if not any(pool.map(_has_16_bits, paths[:: -(-len(paths) // MOST_HEADERS) or 1])):
            return 16
        for start in tqdm(range(0, len(paths), 64), "bits in use", unit_scale=64, unit="img", disable=None):
            highest = max(highest, *pool.map(_highest_of_16_bits, paths[start : start + 64]))
            if highest >= 2**15:
                return 16
    bits = max(highest.bit_length(), known if known < 16 else 8)
    say(f"pictures of 16 bits use {bits} of them: 0 .. {2**bits - 1:,} is taken as black .. white")
    return bits


def _is_deep(image):
    """Whether an opened PIL image, not loaded yet, has 16 bits a value. Of colour its mode doesn't tell."""
    return image.mode.startswith("I") or any(DEEP_COLOR.search(str(tile[3])) for tile in image.tile)


def _has_16_bits(path):
    try:
        with open_image(path) as image:
            return _is_deep(image)
    except InputError:  # reading it will tell
        return False


def _highest_of_16_bits(path):
    try:
        with open_image(path) as image:
            return _highest(image) if _is_deep(image) else 0
    except InputError:  # reading it will tell
        return 0


def _highest(image):
    """The highest value of a picture of 16 bits: of grey; of colour, whose high bytes Pillow keeps, the highest that it
    can be. Transparency doesn't count."""
    if image.mode.startswith("I"):
        return max(int(np.asarray(strip).max()) for _, strip in strips(image))
    bands = zip(image.getbands(), image.getextrema(), strict=True)
    return max(high for band, (_, high) in bands if band != "A") * 256 + 255


def _low_bytes(path):
    """The low bytes of colour with 16 bits, as a loaded PIL image: what Pillow takes for the high ones when it is told
    the other order of bytes."""
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}

    def swapped(how):  # the raw mode, or a tuple that begins with it
        if isinstance(how, tuple):
            return (swapped(how[0]), *how[1:])
        return DEEP_COLOR.sub(lambda match: ";16" + other[match[1]], how)

    with open_image(path) as image:
        # Tiles are tuples with names, in older Pillow without.
        image.tile = [tuple.__new__(type(tile), (*tile[:3], swapped(tile[3]))) for tile in image.tile]
        image.load()
        return image


def strips(image):
    """Yields (rows above it, PIL image) of an image from top to bottom, in strips of `STRIP` pixels or a row."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _to_rgb(image, bits, low):
    """Loaded PIL image of any mode -> RGB.

    low: of 16-bit colour that uses less, `_low_bytes`; `image` itself holds the high ones.
    """
    if image.mode == "RGB" and low is None and not image.has_transparency_data:
        return image._new(image.im)  # the pixels without the file's decoder; public ways copy them
    picture = Image.new("RGB", image.size)
    for top, strip in strips(image):
        below = low and low.crop((0, top, image.width, top + strip.height))
        picture.paste(_strip_to_rgb(strip, bits, below), (0, top))
    return picture


def _strip_to_rgb(image, bits, low):
    """The trap: Pillow's own conversion of 16-bit grey clips at 255."""
    if low is not None:
        high = image.point(lambda value: value << 16 - bits)
        image = ImageChops.add(high, low.point(lambda value: value >> bits - 8))
    if image.mode == "F":
        raise ValueError("floating-point values have no fixed range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)  # (H, W)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit values have no fixed range: save it with 8 or 16 bits")
        # At 16 bits the high byte, which is also what Pillow keeps of 16-bit colour.
        return Image.fromarray((values >> bits - 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def list_images(folder, recursive=False):
    """Paths of the pictures in `folder`, sorted, known by their suffix in either case; hidden files are left out.

    Raises InputError, as `walk_folders`. An empty list is the caller's to judge.
    """
    return [path for path in list_files(folder, recursive) if path.lower().endswith(IMAGE_SUFFIXES)]


def list_files(folder, recursive=False):
    """Paths of all files in `folder`, with `recursive` also of those below it, sorted; hidden ones are left out."""
    found = []
    for parent, names in walk_folders(folder):
        found += [os.path.join(parent, name) for name in names]
        if not recursive:
            break
    return sorted(found)


def say_unread(files, place, say):
    """Say in one line how many of `files` are pictures of kinds that are not read, by suffix; nothing of none.

    place: where they lie, for the line.
    """
    counts = Counter(os.path.splitext(path)[1].lower() for path in files)
    unread = [f"{count} {suffix}" for suffix, count in counts.most_common() if suffix in UNREAD_SUFFIXES]
    if unread:
        say(f"not read: {', '.join(unread)} pictures in {place}; convert them to JPEG or PNG")


def walk_folders(folder):
    """Yields (path, names of its files) of a folder and of those below it; what is hidden is left out.

    Links are followed. The trap: one to a folder above leads round and round, so no folder is entered twice, under
    whatever name.

    Raises:
        InputError: a folder is none, or may not be read: its pictures would be left out without a word.
    """
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield parent, [name for name in names if not name.startswith(".")]


def folder_entries(folder):
    """The os.DirEntry of all that is in a folder, sorted; none where it isn't there. InputError: it can't be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no folder can have such a name
        return []
    except OSError as error:
        _refuse_folder(error)


def _refuse_folder(error):
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        raise InputError(f"{error.filename}: no such folder; check the path") from error
    raise InputError(
        f"{error.filename}: the folder can't be read ({error.strerror}); give the right to read it, or move it away"
    ) from error
