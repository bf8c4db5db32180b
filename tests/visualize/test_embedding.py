"""Embeddings on a plane: who is highlighted, and how query and gallery differ."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from core.visualize.embedding import embedding_plot


@pytest.fixture
def plot(tmp_path, monkeypatch):
    """Function: (arguments of embedding_plot) -> its axes and the texts of its legend."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))

    def draw(*arguments, **options):
        embedding_plot(tmp_path / "plot.png", *arguments, **options)
        assert min(Image.open(tmp_path / "plot.png").size) >= 90
        figure = figures[-1]
        return figure.axes[0], [text.get_text()[1:] for text in figure.legends[0].get_texts()] if figure.legends else []

    return draw


def points(collection):
    return np.asarray(collection.get_offsets()).tolist()


def test_query_and_gallery_of_each_identity(plot):
    coordinates = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [9, 9]])
    is_query = [True, False, False, True, False]
    axes, legend = plot(coordinates, ["a", "a", "b$", "b$", "lonely"], [0.5, 0.251], is_query, "Bags")
    others, *groups = axes.collections
    assert points(others) == [[9, 9]]  # one point shows nothing about its identity
    assert [points(group) for group in groups] == [[[1, 1]], [[0, 0]], [[2, 2]], [[3, 3]]]  # gallery, query of each
    assert legend == ["query", "gallery", "a", r"b\$", "others: 1"]
    gallery, query = groups[:2]
    assert query.get_sizes()[0] > gallery.get_sizes()[0] and query.get_linewidths()[0] > gallery.get_linewidths()[0]
    assert (gallery.get_facecolor()[0][:3] == query.get_facecolor()[0][:3]).all()
    assert axes.get_xlabel() == "first component, 50.0 % of the variance" and "25.1 %" in axes.get_ylabel()
    assert axes.get_aspect() == 1


def test_each_highlighted_identity_has_colour_and_shape_of_its_own(plot):
    identities = [f"{number:02}" for number in range(60) for _ in range(2)]
    axes, legend = plot(np.random.default_rng(0).normal(size=(120, 2)), identities, [0.2, 0.1])
    looks = {(tuple(group.get_facecolor()[0]), str(group.get_paths()[0].vertices)) for group in axes.collections[1::2]}
    assert len(looks) == 42 and len(legend) == 43 and legend[0] == "00" and legend[-2:] == ["59", "others: 36"]


def test_few_points(plot):
    axes, legend = plot(np.zeros((1, 2)), [7], [0, 0])
    assert legend == ["7"] and points(axes.collections[1]) == [[0, 0]]
    plot(np.zeros((0, 2)), [], [0, 0])
