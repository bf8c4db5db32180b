"""Damaged files: each reader gives what is right, or raises InputError with one clear line; nothing else.

Here a few hundred cases; by hand tens of thousands: FUZZ_CASES=20000 FUZZ_SEED=1 pytest tests/fuzz
"""

import io
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from core.data.coco import coco_paths, for_training, read_coco
from core.data.images import read_image
from core.data.mvb import load_mvb
from core.engine.checkpoint import load_checkpoint
from core.engine.reid import network_from_checkpoint
from core.errors import InputError
from core.files import printable
from core.models.reid import build_reid_model
from recognition.gallery import Entries, build_gallery
from recognition.gallery_reader import open_gallery
from tests.fuzz.damage import ODD, damaged_bytes, damaged_tree

CASES, SEED = int(os.environ.get("FUZZ_CASES", 200)), int(os.environ.get("FUZZ_SEED", 0))


def attempt(read, case):
    """Whether `read()` took what it got. Fails where it neither does nor raises InputError with one line."""
    try:
        read()
    except InputError as error:
        line = printable(str(error))  # as scripts print it
        assert 10 < len(line) < 1000 and "\n" not in line, f"case {case}: {line!r}"
        return False
    except Exception as error:
        raise AssertionError(f"case {case}: {error!r}") from error
    return True


def cases(name, share=1):
    """(number, generator) of each case of a reader; share: of all cases, for slow ones."""
    for case in range(max(1, int(CASES * share))):
        yield case, random.Random(f"{name} {SEED} {case}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_pictures(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    stored = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    how = {} if kind in ("GIF", "BMP") else {"exif": exif}
    Image.fromarray(pixels).save(stored, kind, **how)
    path = tmp_path / "picture"
    taken = 0
    for case, chance in cases(kind, share=0.5):
        path.write_bytes(damaged_bytes(chance, stored.getvalue()))
        taken += attempt(lambda: read_image(path), case)
    assert 0 < taken < CASES / 2  # some damage is to pixels alone


def test_coco_files(shapes, tmp_path):
    images, annotations = coco_paths(shapes, "train")
    content = json.loads(annotations.read_text())
    path = tmp_path / "annotations.json"
    for case, chance in cases("coco"):
        if case % 4:
            path.write_text(json.dumps(damaged_tree(chance, content)))
        else:
            path.write_bytes(damaged_bytes(chance, annotations.read_bytes()))
        attempt(lambda: for_training(read_coco(path, images)), case)


def test_mvb_files(baggage, tmp_path):
    lists = sorted(path.relative_to(baggage) for path in baggage.rglob("*.json"))
    root = tmp_path / "mvb"
    shutil.copytree(baggage, root)
    for case, chance in cases("mvb", share=0.5):
        name = chance.choice(lists)
        content = json.loads((baggage / name).read_text())
        (root / name).write_text(json.dumps(damaged_tree(chance, content)))
        attempt(lambda: load_mvb(root), case)
        shutil.copy(baggage / name, root / name)


def test_bytes_of_checkpoints(tmp_path):
    stored = io.BytesIO()
    torch.save({"kind": "gan", "model": {"weight": torch.arange(12.0)}, "network": {"blocks": 1}}, stored)
    path = tmp_path / "checkpoint.pth"
    for case, chance in cases("checkpoint"):
        path.write_bytes(damaged_bytes(chance, stored.getvalue()))
        attempt(lambda: load_checkpoint(path), case)


def test_fields_of_checkpoints(tmp_path):
    options = {"backbone": "osnet_x0_25", "num_classes": 3}
    model = build_reid_model(**options).state_dict()
    odd = [value for value in ODD if not isinstance(value, int) or abs(value) < 2**63]  # torch.save knows no more
    state = {"kind": "reid", "network": options, "ema": [], "input_size": [64, 64], "threshold": None, "epoch": 3}
    path = tmp_path / "checkpoint.pth"
    for case, chance in cases("fields", share=0.05):
        fields = damaged_tree(chance, state, odd)
        if isinstance(fields, dict):
            fields["model"] = damaged_tree(chance, model, [*odd, torch.zeros(2, 3)]) if case % 2 else model
        torch.save(fields, path)
        attempt(lambda: network_from_checkpoint(path, "cpu"), case)


def test_galleries(tmp_path):
    whole, path = tmp_path / "whole.gallery", tmp_path / "bags.gallery"
    vectors = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    build_gallery(whole, Entries(vectors, list("aabbcc"), list("uvwxyz"), [b"thumbnail"] * 6), fingerprint="a" * 64)

    def answers(file):
        with open_gallery(file) as gallery:
            distances, rows = gallery.search(vectors, 2)
            return (
                distances.tolist(),
                rows.tolist(),
                [(gallery.source(row), gallery.thumbnail(row)) for row in range(6)],
            )

    right, stored = answers(whole), whole.read_bytes()
    for case, chance in cases("gallery"):
        path.write_bytes(damaged_bytes(chance, stored))
        if attempt(lambda: answers(path), case):  # what lies between its sections does not matter
            assert answers(path) == right, f"case {case}"
