"""Pictures whose pixels are whole and whose rest is damaged: they are read; half a picture is not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from core.data import images
from core.data.damage import has_all_scans
from core.data.images import read_image
from core.errors import InputError

# Pillow's warnings about these files are silenced once a process, and pytest brings them back.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{start}") for start in ("Corrupt EXIF data", "Tag data larger")]

NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE).resize((64, 48))
ORIENTATION = Image.Exif()
ORIENTATION[0x0112], ORIENTATION[0x010F] = 6, "a maker of cameras"
EXIF = ORIENTATION.tobytes()
DAMAGED_EXIF = {
    "no header": b"Exif\0\0garbagegarbage",
    "nothing": b"Exif\0\0",
    "an offset beyond its end": EXIF[:10] + b"\xff\xff\xff\x7f" + EXIF[14:],
    "cut off": EXIF[:20],
    "too many entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0",
    "an orientation of text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0a\0\0\0\0\0\0\0",
}


def encoded(kind, picture=PICTURE, **how):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow can't write {kind}")
    picture.save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


def read(tmp_path, data, name="a.picture"):
    (tmp_path / name).write_bytes(data)
    return np.asarray(read_image(tmp_path / name))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", DAMAGED_EXIF)
def test_damaged_exif_does_not_matter(tmp_path, kind, exif):
    plain = read(tmp_path, encoded(kind))
    np.testing.assert_array_equal(read(tmp_path, encoded(kind, exif=DAMAGED_EXIF[exif])), plain)


@pytest.mark.parametrize(("start", "end"), [(0, 2), (4, 8), (8, 10), (10, 12), (14, 18)])
def test_damaged_exif_of_avif_does_not_matter(tmp_path, start, end):
    """Which libavif doesn't write: so bytes are overwritten. The file itself says, too, how the picture is turned."""
    data = encoded("AVIF", exif=EXIF)
    place = data.index(EXIF[6:14])
    damaged = data[: place + start] + b"\xfe" * (end - start) + data[place + end :]
    np.testing.assert_array_equal(read(tmp_path, damaged), np.rot90(read(tmp_path, encoded("AVIF")), -1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "AVIF", "TIFF"])
def test_large_profiles_and_texts_do_not_matter(tmp_path, kind):
    plain, much = read(tmp_path, encoded(kind)), b"\0" * 3_000_000
    np.testing.assert_array_equal(read(tmp_path, encoded(kind, icc_profile=much)), plain)
    if kind == "PNG":
        for method, zipped in (("add_text", True), ("add_text", False), ("add_itxt", True), ("add_itxt", False)):
            info = PngImagePlugin.PngInfo()
            getattr(info, method)("Comment", "a" * 3_000_000, zip=zipped)
            turned = read(tmp_path, encoded(kind, pnginfo=info, exif=EXIF))
            np.testing.assert_array_equal(turned, np.rot90(plain, -1))  # the orientation is not lost with the text


def png_chunk(kind, data, broken=False):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ broken)


@pytest.mark.parametrize("is_broken", [False, True])
@pytest.mark.parametrize(
    ("kind", "data"),
    [(b"tEXt", b"a\0b"), (b"zTXt", b"a\0\7b"), (b"zTXt", b"a"), (b"iTXt", b"a\0\1\7"), (b"iCCP", b"a\0\7b"),
     (b"pHYs", b"a"), (b"iCCP", b"a\0\0b"), (b"gAMA", b"a"), (b"cHRM", b"a"), (b"sRGB", b""), (b"eXIf", b"a"),
     (b"tIME", b""), (b"acTL", b"a"), (b"fcTL", b"a"), (b"prVt", b"a")],
)  # fmt: skip
def test_a_damaged_chunk_of_png_that_holds_no_pixels_does_not_matter(tmp_path, kind, data, is_broken):
    png, chunk = encoded("PNG"), png_chunk(kind, data, is_broken)
    for place in (33, -12):  # behind the header, and behind the pixels
        read_back = read(tmp_path, png[:place] + chunk + png[place:])
        np.testing.assert_array_equal(read_back, np.asarray(PICTURE))


def test_a_damaged_chunk_of_pixels_does(tmp_path):
    png = encoded("PNG")
    place = png.index(b"IDAT") + 40
    for damaged in (png[:place] + b"\0\1\2" + png[place + 3 :], png[: len(png) // 2], png[:20] + b"\7" + png[21:]):
        with pytest.raises(InputError, match="can't be read as a picture"):
            read(tmp_path, damaged)


def test_damaged_metadata_behind_the_pixels_of_webp_does_not_matter(tmp_path):
    plain = read(tmp_path, encoded("WEBP", quality=80))
    data = encoded("WEBP", quality=80, exif=EXIF, xmp=b"<x/>" * 25, icc_profile=b"a" * 51)
    turned = np.rot90(plain, -1)
    np.testing.assert_array_equal(read(tmp_path, data), turned)
    for cut in (1, 2, 50):  # of XMP, which comes last
        np.testing.assert_array_equal(read(tmp_path, data[:-cut]), turned)
    place = data.rindex(b"EXIF") + 4
    damaged = data[:place] + struct.pack("<I", 10**6) + data[place + 4 :]
    np.testing.assert_array_equal(read(tmp_path, damaged), plain)
    with pytest.raises(InputError, match="can't be read as a picture"):
        read(tmp_path, data[: data.index(b"VP8 ") + 200])


# JPEG


JPEGS = {
    "baseline": {},
    "fine": {"quality": 98, "subsampling": 0},
    "progressive": {"progressive": True},
    "turned": {"exif": EXIF},
    "restarts": {"restart_marker_blocks": 3},
    "thumbnail": {"exif": EXIF + encoded("JPEG", PICTURE.resize((8, 8)))},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("how", JPEGS)
def test_a_jpeg_that_lacks_its_end_is_read_with_a_word(tmp_path, capsys, mode, how):
    data = encoded("JPEG", PICTURE.convert(mode), **JPEGS[how])
    whole = read(tmp_path, data)
    assert capsys.readouterr().err == ""
    for number, cut in enumerate((1, 2)):
        path = tmp_path / f"{number}.jpg"
        for _ in range(2):
            np.testing.assert_array_equal(read(tmp_path, data[:-cut], path.name), whole)
        lines = capsys.readouterr().err.splitlines()
        assert lines in ([], [f"{path}: the end of the file is missing, and nothing of the picture; it is read"])
        try:  # Pillow itself may need no more than the padding before the end
            assert images._read_stored(path, 16) and not lines
        except InputError:
            assert lines


@pytest.mark.parametrize("how", JPEGS)
def test_a_jpeg_that_lacks_pixels_is_not_read(tmp_path, capsys, how):
    data = encoded("JPEG", **JPEGS[how])
    scans = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    ends = [len(data) - cut for cut in (6, 10, 40)]
    if how == "progressive":  # in all but the last of its scans the picture is whole and coarse
        ends += [place + step for place in scans[1:] for step in (0, 2, 12)]
    for end in ends:
        with pytest.raises(InputError, match="can't be read as a picture"):
            read(tmp_path, data[:end])
    assert capsys.readouterr().err == "" and len(ends) > (20 if how == "progressive" else 2)


def test_scans_of_a_jpeg():
    progressive = encoded("JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    assert has_all_scans(encoded("JPEG")) and has_all_scans(progressive)
    assert not has_all_scans(progressive[:last])
    for damaged in (b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8" + bytes(100), progressive[:30], progressive[: last + 5]):
        assert not has_all_scans(damaged)


def test_what_is_no_file_is_not_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "open", None, raising=False)
    for name in ("absent", "."):
        with pytest.raises(InputError):
            read_image(tmp_path / name)
