"""The pictures of a gallery: whom they show, which can't be read, what is kept of them."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from core.errors import InputError
from recognition import gallery_pictures

RED = (220, 30, 30)


def plain(color, width=20, height=30):
    return Image.new("RGB", (width, height), color)


def test_identities_are_folders_then_mvb_names_then_names():
    paths = ["red/0010_g_1.jpg", "red/deep/2.jpg", "0010_g_1.jpg", "0010_p_2.png", "10_g_3.jpg", "my bag.v2.jpg"]
    paths = [os.path.join("root", path) for path in paths]
    names = gallery_pictures.name_identities(paths, "root")
    assert names == ["red", "red", "0010", "0010", "0010", "my bag.v2"]
    known = ("red", "10", "7")
    assert gallery_pictures.name_identities(paths[2:], "root/", known) == ["10", "10", "10", "my bag.v2"]
    assert gallery_pictures.name_identities([], "root") == []
    twins = [os.path.join("root", name) for name in ("bag.jpg", "bag.png", "0012/1.jpg", "12_g_1.jpg")]
    assert gallery_pictures.name_identities(twins, "root") == ["bag.jpg", "bag.png", "0012", "0012"]


def test_identities_that_grew():
    assert gallery_pictures.grown({"red": 2, "blue": 1, "gone": 1}, {"red": 2, "blue": 2, "new": 3}) == ["blue"]


def test_a_folder_without_pictures_is_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for folder, words in ((tmp_path, "no pictures in this folder or its sub-folders"), (tmp_path / "x", "no such")):
        with pytest.raises(InputError, match=words):
            gallery_pictures.pictures_of_gallery(folder)


def test_what_a_gallery_leaves_out_is_said(tmp_path, no_right_to):
    for name in ("red/1.jfif", "blue/1.HEIC", "blue/2.arw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    said = []
    assert gallery_pictures.pictures_of_gallery(tmp_path, said.append) == [str(tmp_path / "red/1.jfif")]
    assert said == [f"not read: 1 .heic, 1 .arw pictures in {tmp_path}; convert them to JPEG or PNG"]
    no_right_to(tmp_path / "blue")
    with pytest.raises(InputError, match="blue: the folder can't be read"):
        gallery_pictures.pictures_of_gallery(tmp_path)


def test_a_damaged_thumbnail_is_none():
    content = gallery_pictures.to_jpeg(plain(RED, 96, 60))
    for damaged in (bytes(len(content)), content[:40], content[:-200], content[:2] + bytes(len(content) - 2)):
        assert gallery_pictures.from_jpeg(damaged) is None


def test_a_thumbnail_is_a_jpeg_or_nothing(monkeypatch):
    """A gallery may come from anywhere, and Pillow hands EPS to Ghostscript, which runs the program in it."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: started.append(arguments))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n%%EOF\n"
    assert gallery_pictures.from_jpeg(program) is None and started == []
    for name in ("PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
        plain(RED).save(buffer := io.BytesIO(), name)
        assert gallery_pictures.from_jpeg(buffer.getvalue()) is None


def test_thumbnails_go_through_jpeg():
    small = gallery_pictures.from_jpeg(gallery_pictures.to_jpeg(plain(RED, 96, 60)))
    assert small.size == (96, 60) and np.abs(np.array(small)[30, 40] - np.array(RED)).max() < 6
    assert gallery_pictures.from_jpeg(b"") is None


def no_embeddings(encoder, pictures, thumbnail):
    pictures = list(pictures)
    return torch.zeros(len(pictures), 3), pictures


def test_subjects_come_in_chunks_and_broken_ones_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery_pictures, "CHUNK", 2)
    for name in ("a", "b", "c", "d", "e"):
        plain((40 * ord(name) % 256, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    for name in "cd":  # a chunk of which nothing is left
        (tmp_path / f"{name}.png").write_bytes(b"")
    paths = gallery_pictures.pictures_of_gallery(tmp_path)
    monkeypatch.setattr(gallery_pictures, "embed", no_embeddings)
    subjects = gallery_pictures.Subjects(paths, list("ABCDE"), None, None)
    chunks = list(subjects)
    assert [chunk.identities for chunk in chunks] == [["A"], ["E"]]
    assert [chunk.sources for chunk in chunks] == [[str(tmp_path / "a.png")], [str(tmp_path / "e.png")]]
    assert [len(chunk.vectors) for chunk in chunks] == [1, 1]
    assert len(subjects.skipped) == 3 and f"{tmp_path}/b.png: can't be read" in subjects.skipped[0]
    assert capsys.readouterr().err.count("skipped: ") == 3
    assert gallery_pictures.from_jpeg(chunks[0].thumbnails[0]).size == (20, 30)
