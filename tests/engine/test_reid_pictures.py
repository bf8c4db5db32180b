"""The picture sheets of a ReID run: they appear, and show the right pictures."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from core.data.reid_datasets import load_reid_dataset
from core.data.reid_images import ReIDImages
from core.data.samples import ReIDDataset, Sample
from core.data.transforms import build_transform
from core.engine import reid_pictures
from core.models.reid import build_reid_model


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(9, 3, [0, 4, 8]), (8, 3, [0, 4, 7]), (4, 4, [0, 1, 2, 3]), (3, 8, [0, 1, 2]), (5, 1, [0]), (0, 8, [])],
)
def test_spread_by_hand(count, wanted, expected):
    assert reid_pictures.spread(count, wanted) == expected


@pytest.fixture
def rows(monkeypatch):
    """The rows that `draw_rank_list` hands to the sheet, which is not drawn."""
    caught = []
    monkeypatch.setattr(reid_pictures.visualize, "rank_list_sheet", lambda path, rows: caught.extend(rows))
    return caught


def samples(*ids_and_cameras, part):
    return [Sample(f"{part}{i}.png", *pair, name=f"bag {pair[0]}") for i, pair in enumerate(ids_and_cameras)]


def test_a_row_holds_the_nearest_that_the_protocol_leaves(rows):
    query = samples((7, 0), part="q")
    gallery = samples((7, 0), (8, 0), (7, 1), (9, 1), part="g")
    data = ReIDDataset([], query, gallery)
    features = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    reid_pictures.draw_rank_list("sheet.png", *features, data, "market1501", "euclidean", k=3)
    assert rows[0].query_path == "q0.png" and rows[0].query_name == "bag 7"
    assert rows[0].match_paths == ["g1.png", "g2.png", "g3.png"]  # g0 is of the query's own camera
    assert rows[0].match_names == ["bag 8", "bag 7", "bag 9"] and rows[0].correct == [False, True, False]
    assert rows[0].distances == [2, 3, 4]
    reid_pictures.draw_rank_list("sheet.png", *features, data, "no_camera", "euclidean", k=2)
    assert rows[1].match_paths == ["g0.png", "g1.png"] and rows[1].correct == [True, False]


def test_the_own_picture_is_no_match_where_query_and_gallery_are_one_set(rows):
    both = samples((1, 0), (1, 0), (2, 0), (2, 0), part="v")
    features = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    reid_pictures.draw_rank_list(
        "sheet.png", features, features, ReIDDataset([], both, both), "vehicleid", "euclidean", num_rows=2
    )
    assert [row.query_path for row in rows] == ["v0.png", "v3.png"]
    assert [row.match_paths for row in rows] == [["v1.png", "v2.png", "v3.png"], ["v2.png", "v1.png", "v0.png"]]
    assert [row.correct for row in rows] == [[True, False, False]] * 2


def test_sheets_appear(baggage, tmp_path):
    data = load_reid_dataset("mvb", baggage)
    training = build_transform(32, 32, training=True, pad=2, erasing=1.0)
    for name, with_masks in (("boxes.png", False), ("masks.png", True)):
        reid_pictures.draw_augmentations(tmp_path / name, ReIDImages(data.train, training, with_masks=with_masks))
    without = [sample._replace(box=None) for sample in data.train[:2]]
    reid_pictures.draw_augmentations(tmp_path / "neither.png", ReIDImages(without, training))

    features = torch.randn(len(data.query), 4), torch.randn(len(data.gallery), 4)
    reid_pictures.draw_rank_list(tmp_path / "rank_list.png", *features, data, "no_camera", "cosine")

    network = build_reid_model("resnet18", 0, with_mask=True, mask_size=[8, 8]).train()
    images = ReIDImages(data.query, build_transform(32, 32, training=False))
    reid_pictures.draw_masks(tmp_path / "predicted.png", network, images, torch.device("cpu"))

    sheets = list(tmp_path.iterdir())
    assert len(sheets) == 5 and all(min(Image.open(sheet).size) > 100 for sheet in sheets)


def test_augmentations_are_those_of_the_first_epoch(tmp_path, monkeypatch):
    """The keys are the training loop's, so the sheet shows what the network will see."""
    asked = []

    class Images:
        has_boxes, with_masks = True, False

        def __len__(self):
            return 50

        def __getitem__(self, key):
            asked.append(key)
            return {"image": torch.zeros(3, 4, 4), "box": torch.tensor([0.0, 0.0, 1.0, 1.0])}

    caught = SimpleNamespace()
    monkeypatch.setattr(reid_pictures.visualize, "augmentation_sheet", lambda *given: setattr(caught, "given", given))
    reid_pictures.draw_augmentations("sheet.png", Images())
    assert len(asked) == 24 and asked[0] == (1, 0, 0) and asked[-1] == (1, 23, 49)
    path, pictures, boxes, masks = caught.given
    assert pictures.shape == (24, 3, 4, 4) and boxes.shape == (24, 4) and masks is None
