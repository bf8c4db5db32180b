import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from core.data.images import TO_UPRIGHT, list_images, read_image, read_stored_image, turn_box
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


def test_16_bit_colour_is_scaled_not_clipped(tmp_path):
    values = np.array([[[0, 255, 256], [32768, 65535, 4096]]], dtype=">u2")  # (1, 2, 3)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)  # width, height, 16 bits, colour type RGB
    rows = zlib.compress(b"\0" + values.tobytes())
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(pixels(path), values.astype(np.int64) >> 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
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
