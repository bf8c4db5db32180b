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
from core.engine.reid import ReIDData
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
    monkeypatch.setattr(reid_pictures, "rank_list_sheet", lambda path, rows: caught.extend(rows))
    return caught


def samples(*ids_and_cameras, part):
    return [Sample(f"{part}{i}.png", *pair, name=f"bag {pair[0]}") for i, pair in enumerate(ids_and_cameras)]


def test_a_row_holds_the_nearest_that_the_protocol_leaves(rows):
    query = samples((7, 0), part="q")
    gallery = samples((7, 0), (8, 0), (7, 1), (9, 1), part="g")
    data = ReIDData([], query, gallery, "", "", "market1501")
    features = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    reid_pictures.draw_rank_list("sheet.png", *features, data, "euclidean", k=3)
    assert rows[0].query_path == "q0.png" and rows[0].query_name == "bag 7"
    assert rows[0].match_paths == ["g1.png", "g2.png", "g3.png"]  # g0 is of the query's own camera
    assert rows[0].match_names == ["bag 8", "bag 7", "bag 9"] and rows[0].correct == [False, True, False]
    assert rows[0].distances == [2, 3, 4] and rows[0].bits == 16
    reid_pictures.draw_rank_list("sheet.png", *features, data._replace(protocol="no_camera"), "euclidean", k=2)
    assert rows[1].match_paths == ["g0.png", "g1.png"] and rows[1].correct == [True, False]
    deep = data._replace(query=[sample._replace(bits=12) for sample in query])
    reid_pictures.draw_rank_list("sheet.png", *features, deep, "euclidean", k=2)
    assert rows[2].bits == 12


def test_the_own_picture_is_no_match_where_query_and_gallery_are_one_set(rows):
    both = samples((1, 0), (1, 0), (2, 0), (2, 0), part="v")
    features = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    data = ReIDData([], both, both, "", "", "vehicleid")
    reid_pictures.draw_rank_list("sheet.png", features, features, data, "euclidean", num_rows=2)
    assert [row.query_path for row in rows] == ["v0.png", "v3.png"]
    assert [row.match_paths for row in rows] == [["v1.png", "v2.png", "v3.png"], ["v2.png", "v1.png", "v0.png"]]
    assert [row.correct for row in rows] == [[True, False, False]] * 2


def test_sheets_appear(baggage, tmp_path):
    data = ReIDData(*load_reid_dataset("mvb", baggage), "mvb", baggage, "no_camera")
    training = build_transform(32, 32, training=True, pad=2, erasing=1.0)
    for name, with_masks in (("boxes.png", False), ("masks.png", True)):
        reid_pictures.draw_augmentations(tmp_path / name, ReIDImages(data.train, training, with_masks=with_masks))
    without = [sample._replace(box=None) for sample in data.train[:2]]
    reid_pictures.draw_augmentations(tmp_path / "neither.png", ReIDImages(without, training))

    features = torch.randn(len(data.query), 4), torch.randn(len(data.gallery), 4)
    reid_pictures.draw_rank_list(tmp_path / "rank_list.png", *features, data, "cosine")

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
    monkeypatch.setattr(reid_pictures, "augmentation_sheet", lambda *given: setattr(caught, "given", given))
    reid_pictures.draw_augmentations("sheet.png", Images())
    assert len(asked) == 24 and asked[0] == (1, 0, 0) and asked[-1] == (1, 23, 49)
    path, pictures, boxes, masks = caught.given
    assert pictures.shape == (24, 3, 4, 4) and boxes.shape == (24, 4) and masks is None


@pytest.fixture
def sheet(monkeypatch):
    """What is handed to the sheet of heat maps, which is not drawn."""
    caught = SimpleNamespace()
    monkeypatch.setattr(reid_pictures, "heat_sheet", lambda *given: setattr(caught, "given", given))
    return caught


def test_activation_map_by_hand():
    """The mean of (3, 4), (0, 0), (-2, 0), (-1, 0) is (0, 1): products 4, 0, 0, 0. Of a stage of zeros: 0."""
    stage = torch.tensor([[[3.0, 0.0], [-2.0, -1.0]], [[4.0, 0.0], [0.0, 0.0]]])  # (2, 2, 2)
    others = torch.tensor([[[2.0, 1.0], [0.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])  # mean (0.5, 0): 1, 0.5, 0, -0.5
    stages = [torch.randn(3, 1, 8, 8)] * 3 + [torch.stack([stage, torch.zeros_like(stage), others])]
    network = build_reid_model("resnet18", 0, neck="none")
    network.backbone.forward_stages = lambda pictures: stages
    maps = reid_pictures.activation_maps(network, torch.zeros(3, 3, 64, 64))["global"]
    assert maps.shape == (3, 1, 2, 2)
    torch.testing.assert_close(maps[:, 0], torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 0.5], [0, 0]]]))


@pytest.mark.parametrize("mask_pooling", ["off", "branch"])
def test_activation_map_adds_up_to_the_embedding(mask_pooling):
    """Through reduction and neck: the mean of the products is the embedding's squared norm, as equation 3 says."""
    torch.manual_seed(0)
    network = build_reid_model("resnet18_with_mask", 3, embedding_dim=5, mask_size=[8, 8], mask_pooling=mask_pooling)
    network(torch.randn(8, 3, 32, 32))  # the necks have seen pictures
    network.eval()
    with torch.no_grad():
        stage = network.backbone.forward_stages(torch.randn(1, 3, 64, 32))[-1]  # (1, 512, 4, 2)
        whole = network.head(stage)[0][0]
        parts = torch.stack([network.head(stage[:, :, [y]][..., [x]])[0][0] for y in range(4) for x in range(2)])
        network.backbone.forward_stages = lambda pictures: [None, None, None, stage]
        found = reid_pictures.activation_maps(network, None)["global"].flatten()
    products = parts @ whole
    torch.testing.assert_close(products.mean(), whole.square().sum())
    torch.testing.assert_close(found, products.clamp(min=0) / products.max())


@pytest.mark.parametrize("with_mask", [False, True])
def test_activations_of_spread_queries_and_masks_where_there_is_a_decoder(baggage, sheet, with_mask):
    data = load_reid_dataset("mvb", baggage)
    network = build_reid_model("resnet18", 0, with_mask=with_mask, mask_size=[8, 8]).train()
    images = ReIDImages(data.query, build_transform(64, 32, training=False))
    reid_pictures.draw_activations("sheet.png", network, images, torch.device("cpu"), 3)
    path, pictures, drawn, captions = sheet.given
    assert path == "sheet.png" and pictures.shape == (3, 3, 64, 32) and pictures.min() >= 0 and pictures.max() <= 1
    assert list(drawn) == ["activation", "predicted mask"][: 1 + with_mask]
    assert captions == {"picture": [data.query[index].name for index in (0, 2, 5)]}
    assert drawn["activation"].shape == (3, 1, 4, 2) and (drawn["activation"].amax((1, 2, 3)) == 1).all()
    assert not network.training  # as in evaluation
    if with_mask:
        expected = network(images[5]["image"][None], return_mask=True).mask
        torch.testing.assert_close(drawn["predicted mask"][2:], expected)


@pytest.mark.parametrize("model", ["pcb", "mgn"])
def test_activation_maps_of_branches(model):
    """Of averages the mean product is that of the vectors' unit lengths; a maximum counts where it is."""
    torch.manual_seed(0)
    network = build_reid_model("resnet18", 0, model=model, **({"parts": 2} if model == "pcb" else {})).eval()
    pictures = torch.randn(2, 3, 96, 48)
    maps = reid_pictures.activation_maps(network, pictures)
    assert list(maps) == {"pcb": ["part"], "mgn": ["p1", "p2", "p3"]}[model]
    for name, x in network.activation_maps(pictures).items():
        assert maps[name].shape == (2, 1, *x.shape[2:])
        assert maps[name].min() >= 0 and (maps[name].amax((1, 2, 3)) == 1).all()


def test_a_maximum_counts_where_it_is(monkeypatch):
    """Two channels, of which each is highest at one place: |e|^2 = 1 there and what stands above the mean."""
    network = build_reid_model("resnet18", 0, model="mgn", neck="none").eval()
    x = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]])[None]  # (1, 2, 2, 2)
    monkeypatch.setattr(network, "activation_maps", lambda pictures: {"p1": x})
    network.heads["p1"] = torch.nn.Module()
    network.heads["p1"].forward = lambda vector: (vector, vector, None)
    # e = (3, 4) / 5; gradients e / 5 at the two places, times 4 positions and 3 - 0.75 or 4 - 1; elsewhere 0.
    products = torch.tensor([[1 + 4 * 2.25 * 0.12, 1], [1, 1 + 4 * 3 * 0.16]])
    found = reid_pictures.activation_maps(network, None)["p1"][0, 0]
    torch.testing.assert_close(found, products / products.max())


def test_a_column_for_each_branch(baggage, sheet):
    data = load_reid_dataset("mvb", baggage)
    network = build_reid_model("resnet18", 0, model="mgn")
    images = ReIDImages(data.query, build_transform(96, 32, training=False))
    reid_pictures.draw_activations("sheet.png", network, images, torch.device("cpu"), 2)
    assert list(sheet.given[2]) == ["p1", "p2", "p3"]


def test_embeddings_are_those_that_retrieval_compares(tmp_path, monkeypatch):
    caught = []
    monkeypatch.setattr(reid_pictures, "embedding_plot", lambda *given: caught.append(given))
    query, gallery = samples((7, 0), part="q"), samples((7, 0), (8, 0), part="g")
    features = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    data = ReIDDataset([], query, gallery)
    for metric in ("cosine", "euclidean"):
        reid_pictures.draw_embeddings("plot.png", *features, data, metric)
    _, cosine, names, explained, is_query, title = caught[0]
    assert names == ["bag 7", "bag 7", "bag 8"] and is_query == [True, False, False]
    assert torch.dist(cosine[0], cosine[1]) == 0 and explained[0] == pytest.approx(1)  # one direction
    assert torch.dist(caught[1][1][0], caught[1][1][1]) == pytest.approx(2)
    assert "3 pictures of 2 identities" in title
    reid_pictures.draw_embeddings("plot.png", features[1], features[1], ReIDDataset([], gallery, gallery), "cosine")
    assert len(caught[2][1]) == 2 and caught[2][4] is None  # VehicleID: each picture once


def test_clusters_are_drawn_the_largest_first_and_outliers_are_not(monkeypatch):
    caught = []
    monkeypatch.setattr(reid_pictures, "cluster_sheet", lambda path, rows: caught.extend(rows))
    pictures = samples(*[(0, 0)] * 9, part="t")
    reid_pictures.draw_clusters("sheet.png", pictures, torch.tensor([0, 0, -1, 1, 2, 2, 2, 2, 3]), num_pictures=3)
    assert [title for title, _ in caught] == ["4 pictures", "2 pictures"]
    assert [path for path, _ in caught[0][1]] == ["t4.png", "t6.png", "t7.png"]
