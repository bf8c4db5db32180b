import io
import os
import re
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from core.data import images
from core.data.images import (
    TO_UPRIGHT,
    bits_in_use,
    folder_entries,
    limit_megapixels,
    list_files,
    list_images,
    open_image,
    read_image,
    read_stored_image,
    say_unread,
    turn_box,
    walk_folders,
)
from core.data.transforms import to_image
from core.engine.options import Parser, add_size_limit
from core.errors import InputError


def pixels(path):
    picture = read_image(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)  # (H, W, 3)


def save(path, array, mode=None, **options):
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def colour_picture(height=6, width=8):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_rgb_is_unchanged(tmp_path):
    colours = colour_picture()
    np.testing.assert_array_equal(pixels(save(tmp_path / "a.png", colours)), colours)


def test_grey_and_one_bit_are_repeated(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    np.testing.assert_array_equal(pixels(save(tmp_path / "grey.png", grey)), np.repeat(grey[..., None], 3, axis=2))
    bits = grey % 2 * 255
    one_bit = save(tmp_path / "bits.png", bits, mode="1")
    np.testing.assert_array_equal(pixels(one_bit), np.repeat(bits[..., None], 3, axis=2))


def test_palette_gives_its_colours(tmp_path):
    indices = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], dtype=np.uint8)
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette(palette.tobytes())
    picture.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(pixels(tmp_path / "palette.png"), palette[indices])


def test_palette_with_a_transparent_colour_shows_white_there(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "palette.gif", transparency=1)
    np.testing.assert_array_equal(pixels(tmp_path / "palette.gif")[0], [[255, 0, 0], [255, 255, 255]])


def test_transparency_is_laid_over_white(tmp_path):
    colours = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    # 51 / 255 = 0.2 of black over white leaves 0.8 * 255 = 204
    expected = [[255, 0, 0], [255, 255, 255], [204, 204, 204]]
    np.testing.assert_array_equal(pixels(save(tmp_path / "rgba.png", colours))[0], expected)
    grey = Image.merge("LA", [Image.new("L", (2, 1), 0), Image.fromarray(np.array([[255, 51]], dtype=np.uint8))])
    grey.save(tmp_path / "la.png")
    np.testing.assert_array_equal(pixels(tmp_path / "la.png")[0], [[0, 0, 0], [204, 204, 204]])


def test_cmyk_jpeg_is_close_to_its_colours(tmp_path):
    path = save(tmp_path / "cmyk.jpg", np.full((16, 16, 3), (200, 30, 60), dtype=np.uint8), mode="CMYK", quality=95)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    assert np.abs(pixels(path).astype(int) - (200, 30, 60)).max() < 8


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    path = save(tmp_path / f"deep.{suffix}", values)
    np.testing.assert_array_equal(pixels(path)[0, :, 0], [0, 0, 1, 128, 255])


def deep_png(path, values, *chunks):
    """A PNG of 16 bits out of (H, W, C) values, which Pillow can't write: grey, grey and alpha, RGB, RGBA."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def deep_tiff(path, values, order, packed=False):
    """A TIFF of 16 bits out of (H, W, 3) values, in one strip, in the order of bytes "<" or ">"."""
    height, width, _ = values.shape
    data = values.astype(f"{order}u2").tobytes()
    compression, data = (8, zlib.compress(data)) if packed else (1, data)
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8 + len(data)), (259, 3, 1, compression),
               (262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    bits = struct.pack(f"{order}3H", 16, 16, 16)
    table = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        table += struct.pack(f"{order}HHI", tag, kind, count)
        table += struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data) + len(bits))
    path.write_bytes(start + data + bits + table + bytes(4))
    return path


def test_16_bit_colour_is_scaled_not_clipped(tmp_path):
    values = np.array([[[0, 255, 256], [32768, 65535, 4096]]])  # (1, 2, 3)
    for path in (deep_png(tmp_path / "a.png", values), deep_tiff(tmp_path / "a.tif", values, "<")):
        np.testing.assert_array_equal(pixels(path), values >> 8)


# Bits in use


def bits_of(*paths):
    """(bits in use, lines that were said)."""
    said = []
    return bits_in_use(map(str, paths), said.append), said


def test_a_picture_alone_uses_no_fewer_bits_than_the_set_that_its_network_knows(tmp_path):
    """So that it is no brighter than among others; more are taken where it needs them."""
    path = deep_png(tmp_path / "a.png", deep_values(10))
    assert [bits_in_use([path], print, known) for known in (8, 10, 12, 16)] == [10, 10, 12, 10]
    assert bits_in_use([deep_png(tmp_path / "b.png", deep_values(14))], print, 12) == 14
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    assert bits_in_use([tmp_path / "c.png"], print, 12) == 16


def deep_values(bits, channels=1, seed=0):
    """(6, 8, C): 0 and the highest value of `bits` bits are among them."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (6, 8, channels))
    values[0, 0], values[0, 1] = 0, 2**bits - 1
    return values


def write_deep(path, values, kind):
    """A picture of 16 bits of (H, W, C) values in one of KINDS."""
    if kind == "png":
        return deep_png(path, values)
    if kind.startswith("tif "):
        return deep_tiff(path, values, kind[4], "packed" in kind)
    return save(path, values[..., 0].astype(np.uint16), format=kind)


KINDS = [("png", 1), ("TIFF", 1), ("PPM", 1), ("png", 3), ("png", 4), ("tif <", 3), ("tif >", 3), ("tif < packed", 3)]


@pytest.mark.parametrize(("kind", "channels"), KINDS)
@pytest.mark.parametrize("bits", range(8, 17))
def test_the_bits_that_a_set_uses_are_shown(tmp_path, kind, channels, bits):
    """12 bits of 16, 0 .. 4,095: a value is shown by the highest 8 of these 12, in every picture of the set."""
    values = deep_values(bits, channels)
    if channels == 4:
        values[..., 3] = 65535  # opaque
    darker = values // 8
    if channels == 4:
        darker[..., 3] = 65535
    path, dark = (write_deep(tmp_path / name, each, kind) for name, each in (("a", values), ("b", darker)))
    plain = save(tmp_path / "c.jpg", colour_picture())
    found, said = bits_of(plain, dark, path, tmp_path / "absent.png")
    line = f"pictures of 16 bits use {bits} of them: 0 .. {2**bits - 1:,} is taken as black .. white"
    assert found == bits and said == [line] * (bits < 16)
    for each, one in ((path, values), (dark, darker)):
        shown = np.broadcast_to(one[..., :3] >> bits - 8, (6, 8, 3))
        np.testing.assert_array_equal(np.asarray(read_image(each, bits)), shown)
        np.testing.assert_array_equal(np.asarray(read_stored_image(each, bits)[0]), shown)
    np.testing.assert_array_equal(np.asarray(read_image(plain, bits)), pixels(plain))


def test_12_bits_that_a_tiff_packs(tmp_path):
    """The file says 12 bits; Pillow gives 0 .. 4,095."""
    values = deep_values(12)[..., 0]  # (6, 8)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    entries = [(256, 3, 8), (257, 3, 6), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 6),
               (279, 4, len(data))]  # fmt: skip
    table = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in entries
    )
    path = tmp_path / "packed.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + table + bytes(4))
    assert bits_of(path)[0] == 12
    np.testing.assert_array_equal(np.asarray(read_image(path, 12))[..., 0], values >> 4)


def test_a_png_says_by_sbit_that_it_was_scaled_to_16_bits(tmp_path):
    """PNG specification, 11.3.2.4: 12 significant bits, of samples that were scaled to the full 16."""
    path = deep_png(tmp_path / "a.png", deep_values(12) << 4, (b"sBIT", b"\x0c"))
    assert bits_of(path) == (16, [])
    as_they_are = deep_png(tmp_path / "b.png", deep_values(12), (b"sBIT", b"\x0c"))  # against the specification
    assert bits_of(as_they_are)[0] == 12


def test_sets_without_16_bits_have_nothing_to_say(tmp_path):
    colours = colour_picture()
    paths = [save(tmp_path / f"a.{suffix}", colours) for suffix in ("jpg", "png", "bmp", "gif", "webp", "tif", "ppm")]
    paths += [save(tmp_path / "grey.png", colours[..., 0]), save(tmp_path / "bits.png", colours[..., 0], mode="1")]
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert bits_of(*paths, tmp_path / "empty.png", tmp_path / "pipe.png") == (16, []) and bits_of() == (16, [])
    black = deep_png(tmp_path / "black.png", np.zeros((6, 8, 1), np.int64))
    assert bits_of(*paths, black)[0] == 8 and not np.asarray(read_image(black, 8)).any()


def test_headers_spread_over_the_set_tell_whether_all_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_HEADERS", 10)
    deep = [write_deep(tmp_path / f"{number}.png", deep_values(bits), "png") for number, bits in enumerate((9, 12, 10))]
    plain = save(tmp_path / "plain.png", colour_picture())
    paths = [plain] * 100
    assert bits_of(*paths) == (16, [])
    paths[40] = deep[0]  # the headers of 0, 10, 20, ... are read
    assert bits_of(*paths)[0] == 9
    paths[41], paths[99] = deep[1:]
    assert bits_of(*paths)[0] == 12
    paths[7] = write_deep(tmp_path / "full.png", deep_values(16), "png")
    assert bits_of(*paths) == (16, [])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_that_needs_more_bits_than_its_set_is_one_line(tmp_path, channels):
    path = deep_png(tmp_path / "a.png", deep_values(13, channels))
    with pytest.raises(InputError, match=r"its values reach 8,191, those of its set use 12 bits"):
        read_image(path, 12)


def test_16_bit_grey_with_transparency_over_white(tmp_path):
    values = deep_values(16, 2)
    values[..., 1] = 65535
    np.testing.assert_array_equal(pixels(deep_png(tmp_path / "a.png", values))[..., 0], values[..., 0] >> 8)
    assert bits_of(deep_png(tmp_path / "b.png", np.stack([values[..., 0] >> 4, values[..., 1]], axis=2)))[0] == 12
    with pytest.raises(InputError, match="b.png: can't be read as a picture"):  # Pillow gives its high bytes alone
        read_image(tmp_path / "b.png", 12)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(tmp_path, orientation, suffix):
    # A camera that stores `stored` with this orientation saw `upright`: left half dark, upper left corner brightest.
    upright = np.full((32, 48, 3), 60, dtype=np.uint8)
    upright[:, 24:] = 140
    upright[:16, :16] = 250
    seen = Image.fromarray(upright)
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = seen if orientation == 1 else seen.transpose(back.get(orientation, TO_UPRIGHT[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    if path.suffix not in Image.registered_extensions():
        pytest.skip(f"this Pillow knows no {suffix}")
    stored.save(path, exif=exif)
    assert np.abs(pixels(path).astype(int) - upright).max() < 30
    # Pillow itself turns a TIFF while loading: it is neither turned twice nor taken for the stored pixels.
    picture, turn = read_stored_image(path)
    as_stored = np.asarray(picture).astype(int)
    assert turn == TO_UPRIGHT.get(orientation)
    assert as_stored.shape == np.asarray(stored).shape
    assert np.abs(as_stored - np.asarray(stored)).max() < 30


def test_exif_orientation_6_by_hand(tmp_path):
    # Orientation 6: the stored first row is the right-hand column of the scene, read downwards.
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "six.png", np.array([[10, 20], [30, 40]], dtype=np.uint8), exif=exif)
    np.testing.assert_array_equal(pixels(path)[..., 0], [[30, 10], [40, 20]])


# A box over the pixels of column 1, rows 0 and 1, of a stored picture of 4 x 3 pixels; where it is in the upright one.
@pytest.mark.parametrize(
    ("orientation", "box"),
    [
        (2, (2, 0, 3, 2)), (3, (2, 1, 3, 3)), (4, (1, 1, 2, 3)),
        (5, (0, 1, 2, 2)), (6, (1, 1, 3, 2)), (7, (1, 2, 3, 3)), (8, (0, 2, 2, 3)),
    ],
)  # fmt: skip
def test_a_box_turns_with_its_picture(orientation, box):
    assert turn_box((1, 0, 2, 2), TO_UPRIGHT[orientation], 4, 3) == box
    stored = np.zeros((3, 4), np.uint8)
    stored[0:2, 1] = 1
    upright = np.asarray(Image.fromarray(stored).transpose(TO_UPRIGHT[orientation]))
    x1, y1, x2, y2 = box
    assert upright.sum() == 2 and upright[y1:y2, x1:x2].all()


@pytest.mark.parametrize(("options", "suffix"), [({}, "jpg"), ({"progressive": True}, "jpg"), ({}, "png"), ({}, "bmp")])
def test_truncated_file_is_named(tmp_path, options, suffix):
    path = save(tmp_path / f"half.{suffix}", colour_picture(64, 64), **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"half\.{suffix}: can't be read as a picture"):
        read_image(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_zero_bytes_text_folder_and_absent_file_are_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture\n" * 20)
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in [
        ("empty.jpg", "the file is empty"),
        ("text.jpg", "no picture format"),
        ("folder.jpg", "a folder"),
        ("absent.jpg", "no such picture"),
    ]:
        with pytest.raises(InputError, match=f"{name}.*{reason}") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_pictures_without_a_range_are_refused(tmp_path, values):
    with pytest.raises(InputError, match="no fixed range"):
        read_image(save(tmp_path / "range.tif", values))


# What is opened, and how a broken picture is met


def broken_line(path):
    """The one line about a picture that can't be read."""
    with pytest.raises(InputError) as caught:
        read_image(path)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and line.split(": ", 1)[-1]
    return line


def test_no_program_in_a_picture_is_run(tmp_path, monkeypatch):
    """Pillow hands an EPS file of whatever name to Ghostscript, which runs it: { } loop never ends."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: started.append(arguments))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n%%EOF\n"
    for name in ("bag.jpg", "bag.png", "bag.tif", "bag.eps", "bag"):
        (tmp_path / name).write_bytes(program)
        assert "no picture format is recognised, of JPEG, PNG, " in broken_line(tmp_path / name)
    assert started == []


def test_pictures_are_opened_in_one_place():
    root = Path(__file__).resolve().parents[2]
    rooms = [path for room in ("core", "baggage", "recognition") for path in (root / room).rglob("*.py")]
    sources = [*root.glob("*.py"), *rooms]
    found = {path.relative_to(root).as_posix() for path in sources if "Image.open(" in path.read_text("utf-8")}
    assert found == {"core/data/images.py"} and len(sources) > 80


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may have about 100 bytes
    os.mkfifo("pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket.jpg")
    for name in ("pipe.jpg", "link.jpg", "socket.jpg", "/dev/zero", "/dev/null"):
        assert f"{name} is a pipe, a socket or a device" in broken_line(name)
    listening.close()


def written(tmp_path):
    """Name -> path of a picture of 32 x 24 pixels, in every format that Pillow can write here, and in further modes.

    All are called .jpg; written into memory, since Pillow's writer of SPIDER takes a file's suffix for its own.
    """
    Image.init()
    colours = Image.fromarray(colour_picture(24, 32))
    deep = Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80)
    wanted = [(name, mode, {}) for name in sorted(Image.SAVE) for mode in ("RGB", "L", "1")]
    wanted += [("GIF", "P", {}), ("PNG", "RGBA", {}), ("WEBP", "RGBA", {}), ("JPEG", "CMYK", {}), ("TIFF", "CMYK", {})]
    wanted += [(name, "I;16", {}) for name in ("PNG", "TIFF", "PPM")]
    wanted += [("TIFF", mode, {"compression": "tiff_lzw"}) for mode in ("RGB", "I;16")]
    paths = {}
    for name, mode, options in wanted:
        picture = deep if mode == "I;16" else colours.convert(mode)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                picture.save(buffer := io.BytesIO(), name, **options)
        except (OSError, ValueError):  # this Pillow can't write it, or not in this mode
            continue
        path = paths[f"{name} {mode} {options}"] = tmp_path / f"{len(paths)}.jpg"
        path.write_bytes(buffer.getvalue())
    return paths


# A phone's JPEG with a second picture in it is MPO to Pillow, which opens it as JPEG.
READ = {*images.FORMATS, "MPO"}


def is_read(name):
    return name.split()[0] in READ


def test_of_all_that_pillow_knows_the_formats_of_pictures_are_read(tmp_path):
    for name, path in written(tmp_path).items():
        if is_read(name):
            assert read_image(path).size == (32, 24), name
        else:
            assert "no picture format is recognised" in broken_line(path), name


def test_a_phone_s_picture_with_a_second_one_in_it(tmp_path):
    first, second = (Image.new("RGB", (32, 24), color) for color in ("red", "blue"))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    with open_image(tmp_path / "phone.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert pixels(tmp_path / "phone.jpg")[0, 0, 0] > 240


def test_a_format_that_this_pillow_lacks_is_one_line(tmp_path, monkeypatch):
    colours = colour_picture()
    path, other = save(tmp_path / "a.webp", colours, lossless=True), save(tmp_path / "b.png", colours)
    monkeypatch.delitem(Image.OPEN, "WEBP")
    assert "no picture format is recognised, of " in (line := broken_line(path)) and "WEBP" not in line
    np.testing.assert_array_equal(pixels(other), colours)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), IndexError(), AttributeError("a"), AssertionError(), OverflowError("o"), ZeroDivisionError(),
     RuntimeError("r"), NotImplementedError(), RecursionError(), MemoryError(), SystemError("s"), EOFError(),
     BufferError(), SyntaxError("two\nlines"), TypeError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
     UnboundLocalError("u"), ImportError("i"), OSError(5, "Input/output error"), zlib.error("z"), struct.error("t")],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path, monkeypatch, error):
    def fail(image):
        raise error

    path = save(tmp_path / "a.png", colour_picture())
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert f"can't be read as a picture ({str(error).splitlines()[0] if str(error) else type(error).__name__}" in (
        broken_line(path)
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_stops_a_program_stops_it(tmp_path, monkeypatch, stop):
    def fail(image):
        raise stop

    path = save(tmp_path / "a.png", colour_picture())
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(stop):
        read_image(path)


def test_damaged_bytes_of_every_format_are_a_picture_or_one_line(tmp_path):
    """Bits flipped, bytes overwritten, the end cut off or repeated: nothing but InputError comes out."""
    random, counts = np.random.default_rng(0), {"read": 0, "broken": 0}
    paths = {name: path for name, path in written(tmp_path).items() if is_read(name)}
    for name, path in paths.items():
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for trial in range(12):
            bytes_ = whole.copy()
            header = min(len(whole), 200) if trial % 2 else len(whole)
            places = random.integers(0, header, 1 + trial // 3)
            if trial % 3 == 0:
                bytes_[places] ^= 1 << random.integers(0, 8, len(places)).astype(np.uint8)
            elif trial % 3 == 1:
                bytes_[places] = random.choice([0, 1, 127, 128, 255], len(places))
            else:
                bytes_ = np.concatenate([bytes_[: places[0]], bytes_[places[0] + 4 * trial :]])
            path.write_bytes(bytes_.tobytes())
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert read_image(path).mode == "RGB"
                counts["read"] += 1
            except InputError as error:
                assert re.fullmatch(rf"{re.escape(str(path))}[: ].+", str(error)), (name, trial)
                counts["broken"] += 1
    assert min(counts.values()) > 50


# Size


@pytest.fixture
def limit(monkeypatch):
    """Function: pictures of more pixels than this are refused."""
    monkeypatch.setenv(images.LIMIT, "200")
    return lambda pixels: limit_megapixels(pixels / 1e6)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # silenced once a process, pytest undoes it
def test_one_limit_of_pixels_for_all_formats(tmp_path, limit):
    for name, path in written(tmp_path).items():  # 32 x 24
        if is_read(name):
            limit(768)
            assert read_image(path).size == (32, 24)
            for most in (767, 383, 10):  # Pillow has a warning of its own, and from twice as many on an error
                limit(most)
                line = f"{path}: has more than {most / 1e6:g} megapixels; make it smaller, or raise max_megapixels"
                assert broken_line(path) == line, name


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_a_huge_picture_is_refused_by_its_header(tmp_path):
    bomb = deep_png(tmp_path / "a.png", np.zeros((1, 1, 1))).read_bytes()
    start = bomb[:16] + struct.pack(">II", 10**6, 201) + bomb[24:29]
    (tmp_path / "a.png").write_bytes(start + struct.pack(">I", zlib.crc32(start[12:])) + bomb[33:])
    assert "has more than 200 megapixels" in broken_line(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_option_raises_the_limit(tmp_path, limit):
    path = save(tmp_path / "a.png", colour_picture())  # 48 pixels
    parser = Parser("", "x")
    add_size_limit(parser)
    parser.parse_args(["--max-megapixels", "4.7e-5"])
    assert "more than 4.7e-05 megapixels" in broken_line(path)
    parser.parse_args(["--max-megapixels", "4.8e-5"])
    read_image(path)
    parser.parse_args([])
    assert os.environ[images.LIMIT] == "200.0"


def test_pillow_s_own_warnings_are_not_shown(tmp_path, limit):
    """They name no file; of size there is one limit, and what is wrong with a file is raised."""
    limit(48)
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    path = save(tmp_path / "a.png", colour_picture(), exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images._prepare_pillow.cache_clear()
        read_image(path)
    images._prepare_pillow.cache_clear()
    assert caught == []


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize(
    ("mode", "suffix", "bytes_a_pixel"),
    [("RGB", "bmp", 4), ("L", "bmp", 5), ("1", "png", 5), ("P", "gif", 5), ("RGBA", "tif", 8), ("LA", "tif", 8),
     ("CMYK", "tif", 8), ("I;16", "tif", 6)],
)  # fmt: skip
def test_a_huge_picture_is_held_once_as_it_is_stored_and_once_as_rgb(
    tmp_path, monkeypatch, mode, suffix, bytes_a_pixel
):
    monkeypatch.setattr(images, "STRIP", 2**16)
    path, side = tmp_path / f"a.{suffix}", 2000
    Image.new(mode, (side, side)).save(path)
    read_image(path)  # what is loaded and made once
    before = peak_of_memory(reset=True)
    picture = read_image(path)
    assert peak_of_memory() - before < (bytes_a_pixel + 0.6) * side**2
    before = peak_of_memory(reset=True)
    assert to_image(picture).shape == (3, side, side)
    assert peak_of_memory() - before < 3.6 * side**2


def peak_of_memory(reset=False):
    """Bytes that this process has held at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_strips_change_no_value(tmp_path, monkeypatch):
    paths = [(path, 16) for name, path in written(tmp_path).items() if is_read(name)]
    paths += [(deep_png(tmp_path / f"{channels}.png", deep_values(12, channels)), 12) for channels in (1, 3)]
    whole = [np.asarray(read_image(*how)) for how in paths]
    monkeypatch.setattr(images, "STRIP", 64)  # two rows, or eight
    for how, expected in zip(paths, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(read_image(*how)), expected)
        np.testing.assert_array_equal(to_image(read_image(*how)).permute(1, 2, 0), expected)


# Folders


def test_list_images_is_sorted_and_knows_suffixes_in_either_case(tmp_path):
    for name in ["b.JPG", "a.png", "c.jpeg", "notes.txt", "Thumbs.db", "._a.png", "deeper/d.jpg", ".hidden/e.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert list_images(tmp_path) == [str(tmp_path / name) for name in ["a.png", "b.JPG", "c.jpeg"]]
    assert list_images(tmp_path, recursive=True)[-1] == str(tmp_path / "deeper/d.jpg")
    assert len(list_images(tmp_path, recursive=True)) == 4
    with pytest.raises(InputError, match="absent: no such folder"):
        list_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert list_images(tmp_path / "empty") == []


NAMES = [
    "a.jpg", "a.JPEG", "a.jpe", "a.jfif", "a.png", "a.bmp", "a.gif", "a.webp", "a.tif", "a.tiff", "a.ppm", "a.pgm",
    "a.jp2", "a.Avif",
]  # fmt: skip


def test_what_is_read_is_listed_and_what_only_looks_like_a_picture_is_counted_once(tmp_path):
    others = ["a.heic", "b.HEIC", "c.heif", "d.jxl", "e.psd", "f.svg", "g.tga", "h.cr2", "i.CR3", "j.nef", "k.arw",
              "l.dng", "m.raw", "n.eps", "o.ico", "p.orf", "deeper/q.Heic"]  # fmt: skip
    no_pictures = ["notes.txt", "a.jpg.txt", "heic", ".b.heic", "mask.npy", "list.json", ".hidden/c.heic"]
    for name in NAMES + others + no_pictures:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path, recursive=True) == sorted(str(tmp_path / name) for name in NAMES)
    said = []
    say_unread(list_files(tmp_path, recursive=True), "bags", said.append)
    assert len(said) == 1 and said[0].startswith("not read: 3 .heic, 1 ")
    assert said[0].endswith(" pictures in bags; convert them to JPEG or PNG") and said[0].count(", ") == 14
    say_unread([*NAMES, "notes.txt", "a.jpg.txt", "heic"], "bags", said.append)
    assert len(said) == 1


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "jp2", "j2k", "apng", "pnm", "mpo"])
def test_what_is_listed_is_read(tmp_path, suffix):
    name = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "j2k": "JPEG2000"}.get(suffix)
    Image.init()
    if name and name not in Image.SAVE:
        pytest.skip(f"this Pillow can't write {name}")
    path = tmp_path / f"a.{suffix}"
    name = name or {"apng": "PNG", "pnm": "PPM", "mpo": "MPO"}[suffix]
    Image.new("RGB", (32, 24), (200, 30, 60)).save(path, format=name)
    assert list_images(tmp_path) == [str(path)]
    assert np.abs(pixels(path).astype(int) - (200, 30, 60)).max() < 8


def test_a_folder_that_can_not_be_read_is_named(tmp_path, no_right_to):
    for name in ("set/a.jpg", "set/deeper/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    no_right_to(tmp_path / "set/deeper")
    assert list_images(tmp_path / "set") == [str(tmp_path / "set/a.jpg")]  # it isn't looked into
    line = r"set/deeper: the folder can't be read \(Permission denied\)"
    for listing in (lambda: list_images(tmp_path / "set", True), lambda: list(walk_folders(tmp_path / "set"))):
        with pytest.raises(InputError, match=line):
            listing()
    with pytest.raises(InputError, match=line):
        folder_entries(tmp_path / "set/deeper")
    with pytest.raises(InputError, match=line):
        list_images(tmp_path / "set/deeper")
    assert [entry.name for entry in folder_entries(tmp_path / "set")] == ["a.jpg", "deeper"]
    for nothing in ("absent", "set/a.jpg", "a\0b"):
        assert folder_entries(f"{tmp_path}/{nothing}") == []


def test_list_images_follows_links_and_none_of_them_round_and_round(tmp_path):
    for name in ("elsewhere/c.jpg", "set/a.jpg", "set/deeper/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "set/deeper/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/deeper/self").symlink_to(".")
    (tmp_path / "set/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set/deeper")
    names = ["a.jpg", "deeper/b.jpg", "link/c.jpg"]
    assert list_images(tmp_path / "set", recursive=True) == [str(tmp_path / "set" / name) for name in names]
    assert list_images(tmp_path / "set/link") == [str(tmp_path / "set/link/c.jpg")]
