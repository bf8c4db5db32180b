import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch

from benchmarks.gallery import kill_while_adding
from core.errors import InputError
from core.retrieval.distance import pairwise_distance
from recognition import gallery as gallery_writer
from recognition import gallery_reader
from recognition.gallery import (
    Entries,
    add_to_gallery,
    build_gallery,
    merge_galleries,
    open_gallery,
    remove_from_gallery,
)

OURS, OTHER = "a" * 64, "b" * 64


def features(count, dim=16, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def entries(count, name="bag", seed=0, dim=16, identities=5):
    numbers = range(count)
    return Entries(
        features(count, dim, seed),
        [f"{name}-{i % identities}" for i in numbers],
        [f"{name}/{i}.jpg" for i in numbers],
        [bytes([i % 256]) * i for i in numbers],
    )


@pytest.fixture
def path(tmp_path):
    """A gallery of 12 entries of 5 identities."""
    build_gallery(tmp_path / "bags.gallery", entries(12), fingerprint=OURS)
    return tmp_path / "bags.gallery"


@pytest.fixture
def chunks_of(monkeypatch):
    """Function: (rows, their dimensions): so many are read at a time."""
    return lambda rows, dim: monkeypatch.setattr(gallery_reader, "CHUNK_ELEMENTS", rows * dim)


def content(path):
    with open_gallery(path) as gallery:
        rows = range(len(gallery))
        return [(gallery.identity_of(row), gallery.source(row), gallery.thumbnail(row)) for row in rows]


def test_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery_writer, "DTYPE", "float32")
    vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 5.0]])
    path = tmp_path / "bags.gallery"
    build_gallery(path, Entries(vectors, ["red", "blue", "red", "green"]), fingerprint=OURS)
    with open_gallery(path) as gallery:
        np.testing.assert_allclose(gallery.vectors(), [[0.6, 0.8], [0, 1], [-1, 0], [0, 1]], rtol=1e-6)
        assert gallery.names == ["red", "blue", "green"] and gallery.numbers.tolist() == [0, 1, 0, 2]
        distances, rows = gallery.search(torch.tensor([[0.0, 7.0], [1.0, 0.0], [0.0, 0.0]]), 4)
        assert rows.tolist() == [[1, 3, 0, 2], [0, 1, 3, 2], [0, 1, 2, 3]]
        expected = torch.tensor([[0, 0, 0.2, 1], [0.4, 1, 1, 2], [1, 1, 1, 1]])  # a zero vector has cosine 0
        torch.testing.assert_close(distances, expected)
        distances, identities, rows = gallery.identify(torch.tensor([[0.0, 7.0]]), 9)
        assert identities.tolist() == [[1, 2, 0]] and rows.tolist() == [[1, 3, 0]]
        torch.testing.assert_close(distances, torch.tensor([[0.0, 0.0, 0.2]]))
        assert gallery.source(3) == "" and gallery.thumbnail(3) == b"" and not gallery.has_source.any()
    path = tmp_path / "euclidean.gallery"
    build_gallery(path, Entries(vectors, list("abcd")), fingerprint=OURS, metric="euclidean")
    with open_gallery(path) as gallery:
        distances, rows = gallery.search(np.array([[0.0, 5.0]]), 3)
        assert rows.tolist() == [[3, 1, 0]] and gallery.metric == "euclidean"
        torch.testing.assert_close(distances, torch.tensor([[0.0, 3.0, 10**0.5]]))


def hard_vectors(count, dim, seed):
    """Repeated vectors, vectors that are nearly so, and an order in which each chunk is nearer than the last."""
    vectors = features(count, dim, seed)
    vectors[100:140] = vectors[5]
    vectors[140:160] = vectors[5] + 1e-3 * features(20, dim, seed + 1)
    target = features(1, dim, seed + 2)
    vectors[200:] = vectors[200:] + torch.linspace(0, 3, count - 200)[:, None] * target
    queries = torch.cat([features(10, dim, seed + 3), vectors[[5, 150, 399]], target, torch.zeros(1, dim)])
    return vectors, queries


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_equals_brute_force_whatever_the_chunks(tmp_path, chunks_of, monkeypatch, metric, dtype, offset):
    monkeypatch.setattr(gallery_writer, "DTYPE", dtype)
    vectors, queries = hard_vectors(400, 24, 0)
    vectors, queries = vectors + offset, queries + offset
    names = [f"bag-{i % 7 if i < 300 else i}" for i in range(400)]
    build_gallery(tmp_path / "g", Entries(vectors, names), fingerprint=OURS, metric=metric)
    with open_gallery(tmp_path / "g") as gallery:
        stored = torch.from_numpy(gallery.vectors()).double()
        exact = pairwise_distance(queries.double(), stored, metric).float()  # (Q, N)
        order = exact.argsort(dim=1, stable=True)
        for k, rows_at_a_time in ((1, 3), (6, 400), (6, 64), (50, 7), (999, 130)):
            chunks_of(rows_at_a_time, 24)
            distances, rows = gallery.search(queries, k)
            torch.testing.assert_close(distances, exact.gather(1, rows), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(distances, exact.gather(1, order[:, :k]), rtol=1e-5, atol=1e-7)
            assert (distances[:, 1:] >= distances[:, :-1]).all()
            tied = distances[:, 1:] == distances[:, :-1]
            assert (rows[:, 1:] > rows[:, :-1])[tied].all()
            assert all(len(set(row)) == len(row) == min(k, 400) for row in rows.tolist())
        assert gallery.search(queries[10:11], 41)[1].tolist() == [[5, *range(100, 140)]]  # equal ones, in their order
        reference = gallery.search(queries, 400)
        for k, rows_at_a_time in ((1, 400), (5, 3), (5, 64), (12, 7), (200, 130)):
            chunks_of(rows_at_a_time, 24)
            distances, identities, rows = gallery.identify(queries, k)
            for query in range(len(queries)):
                seen = {}
                for distance, row in zip(reference[0][query].tolist(), reference[1][query].tolist(), strict=True):
                    seen.setdefault(names[row], (distance, row))
                expected = list(seen.items())[:k]
                assert [gallery.names[i] for i in identities[query]] == [name for name, _ in expected]
                assert list(zip(distances[query].tolist(), rows[query].tolist(), strict=True)) == [
                    v for _, v in expected
                ]


def test_many_queries_and_few_identities(tmp_path, monkeypatch):
    """Queries in several blocks; fewer identities than are asked for, so that no limit is ever known."""
    monkeypatch.setattr("core.retrieval.distance.CHUNK_ELEMENTS", 500)
    monkeypatch.setattr(gallery_reader, "CHUNK_ELEMENTS", 16 * 40)
    build_gallery(tmp_path / "g", entries(300, identities=3), fingerprint=OURS)
    with open_gallery(tmp_path / "g") as gallery:
        queries = features(90, seed=9)
        distances, identities, rows = gallery.identify(queries, 5)
        assert distances.shape == identities.shape == rows.shape == (90, 3)
        exact = pairwise_distance(queries, torch.from_numpy(gallery.vectors()), "cosine")
        nearest = torch.stack([exact[:, i::3].min(1).values for i in range(3)], 1)  # (Q, identities)
        torch.testing.assert_close(distances, nearest.gather(1, identities))
        assert (identities.sort().values == torch.arange(3)).all()
        torch.testing.assert_close(gallery.search(queries, 4)[0], exact.topk(4, largest=False).values)


def test_queries_none_and_bad(path):
    with open_gallery(path) as gallery:
        distances, rows = gallery.search(torch.zeros(0, 16), 20)
        assert distances.shape == rows.shape == (0, 12)
        for queries, k, message in (
            (torch.ones(1, 8), 1, "8 dimensions and those of the gallery .* 16"),
            (torch.full((1, 16), float("nan")), 1, "not finite"),
            (torch.full((1, 16), 1e30), 1, "too large"),
            (torch.ones(16), 1, "shape"),
            (torch.ones(1, 16), 0, "k 0"),
        ):
            with pytest.raises(InputError, match=message):
                gallery.search(queries, k)


def test_what_goes_in_comes_out(tmp_path):
    sources = ["a.jpg", "böses Ölbild.jpg", os.fsdecode(b"not-\xff-utf8.jpg"), "", ""]
    thumbnails = [b"", b"\xff\xd8picture", b"x", b"", b"\0\0"]
    info = {"reid": "runs/reid/best.pth", "masks": True, "size": [256, 128], "none": None}
    names = ["0061", "rot, groß", "0061", "b", "0010"]
    path = tmp_path / "link.gallery"
    path.symlink_to(tmp_path / "bags.gallery")
    count = build_gallery(path, Entries(features(5), names, sources, thumbnails), fingerprint=OURS, info=info)
    with open_gallery(path) as gallery:
        assert count == len(gallery) == 5 and gallery.dim == 16 and gallery.fingerprint == OURS
        assert gallery.info == info and gallery.names == ["0061", "rot, groß", "b", "0010"]
        assert [gallery.source(torch.tensor(row)) for row in range(5)] == sources
        assert [gallery.thumbnail(row) for row in range(5)] == thumbnails
        assert [gallery.identity_of(row) for row in range(5)] == names
        assert gallery.source(-3) == sources[2]
        with pytest.raises(IndexError):
            gallery.source(5)
        norms = np.linalg.norm(gallery.vectors(1, 4).astype(np.float32), axis=1)
        assert gallery.vectors().dtype == np.float16 and norms == pytest.approx([1, 1, 1], abs=1e-3)
    assert path.is_symlink() and sorted(file.name for file in tmp_path.iterdir()) == ["bags.gallery", "link.gallery"]


def test_chunks_make_the_same_file(tmp_path):
    whole = entries(50)
    spans = [(0, 1), (1, 1), (1, 30), (30, 50)]  # one of them has nothing in it
    parts = (Entries(*(part[start:stop] for part in whole)) for start, stop in spans)
    build_gallery(tmp_path / "whole", whole, fingerprint=OURS)
    build_gallery(tmp_path / "parts", parts, fingerprint=OURS)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def changed(index, value):
    vectors = features(4)
    vectors[index] = value
    return vectors


IDS = list("abcd")


@pytest.mark.parametrize(
    ("vectors", "rest", "options", "message"),
    [
        (changed(2, float("nan")), (IDS, ["1", "2", "3.jpg", "4"]), {}, "embedding of 3.jpg is not finite"),
        (changed((1, 3), float("inf")), (IDS,), {"metric": "euclidean"}, "embedding of entry 1 is not finite"),
        (changed(1, 0), (IDS,), {}, "entry 1 is zero"),
        (changed(1, 1e5), (IDS,), {"metric": "euclidean"}, "too large for float16"),
        (features(4)[0], (IDS,), {}, "shape"),
        (torch.zeros(4, 0), (IDS,), {}, "shape"),
        (torch.zeros(0, 4), ([],), {}, "nothing to build"),
        (features(4), (["a", "b", 10, "d"],), {}, "identity 10 is no text; give names, such as '10'"),
        (features(4), (IDS[:3],), {}, "4 embeddings with 3 identities"),
        (features(4), (IDS, ["a.jpg", "", "", "a.jpg"]), {}, "'a.jpg' is given twice"),
        (features(4), (IDS,), {"metric": "manhattan"}, "metric 'manhattan'"),
    ],
)
def test_bad_entries_are_named_and_leave_nothing(tmp_path, vectors, rest, options, message):
    with pytest.raises(InputError, match=message) as caught:
        build_gallery(tmp_path / "g", Entries(vectors, *rest), fingerprint=OURS, **options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_unequal_chunks_no_chunks_and_bad_places(tmp_path):
    with pytest.raises(InputError, match="8 dimensions and those of the gallery 16"):
        build_gallery(tmp_path / "g", [entries(3), entries(3, "b", dim=8)], fingerprint=OURS)
    with pytest.raises(InputError, match="nothing to build"):
        build_gallery(tmp_path / "g", [], fingerprint=OURS)
    with pytest.raises(InputError, match="can't write .*No such file"):
        build_gallery(tmp_path / "missing" / "g", entries(3), fingerprint=OURS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder exists"):
        build_gallery(tmp_path / "folder", entries(3), fingerprint=OURS)
    with pytest.raises(InputError, match="folder is there already"):
        merge_galleries(tmp_path / "folder", [tmp_path / "g"])
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_an_existing_gallery_is_kept(path):
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists; remove it, or give another name"):
        build_gallery(path, entries(3, "new"), fingerprint=OURS)
    assert path.read_bytes() == before


def test_add_appends_and_replaces(path):
    before = content(path)
    with open_gallery(path) as old:
        vectors = old.vectors()
        more = Entries(features(3, seed=1), ["new", "bag-4", "bag-1"], ["new.jpg", "bag/7.jpg", ""], [b"n", b"7", b""])
        assert add_to_gallery(path, more, fingerprint=OURS) == (2, 1)
        assert len(old) == 12 and old.source(7) == "bag/7.jpg"  # who has it open sees what it was
    expected = before[:7] + before[8:] + [("new", "new.jpg", b"n"), ("bag-4", "bag/7.jpg", b"7"), ("bag-1", "", b"")]
    assert content(path) == expected
    with open_gallery(path) as gallery:
        assert np.array_equal(gallery.vectors(0, 11), np.delete(vectors, 7, 0))
        distances, rows = gallery.search(more.vectors, 1)
        assert rows[:, 0].tolist() == [11, 12, 13] and (distances < 1e-6).all()
    assert add_to_gallery(path, more._replace(sources=None), fingerprint=OURS) == (3, 0)  # no source, no double
    assert add_to_gallery(path, [], fingerprint=OURS) == (0, 0) and len(content(path)) == 17
    assert [file.name for file in path.parent.iterdir()] == ["bags.gallery"]


def test_refused_additions_change_nothing(path):
    before = path.read_bytes()

    def broken():
        yield entries(2, "x")
        raise InputError("picture 3 can't be read")

    for new, options, message in (
        (entries(2, "x"), {"fingerprint": OTHER}, "built with network aaaaaaaaaaaa and .* is bbbbbbbbbbbb"),
        (entries(2, "x", dim=8), {}, "8 dimensions and those of the gallery 16"),
        (entries(2, "x")._replace(sources=["same", "same"]), {}, "'same' is given twice"),
        (broken(), {}, "picture 3 can't be read"),
    ):
        with pytest.raises(InputError, match=message):
            add_to_gallery(path, new, **{"fingerprint": OURS, **options})
        assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    with pytest.raises(InputError, match="no such gallery; check the path, or build one"):
        add_to_gallery(path.with_name("none"), entries(2), fingerprint=OURS)


def test_a_full_disk_leaves_the_old_gallery(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device; what was there before is whole"):
        add_to_gallery(path, entries(2, "x"), fingerprint=OURS)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists the open files of this process")
@pytest.mark.parametrize("change", ["add", "remove", "merge"])
def test_a_gallery_is_closed_when_it_is_replaced(path, monkeypatch, change):
    """Windows refuses to replace a file that is open."""
    links, replace = [], os.replace

    def spy(source, target):
        links.extend(os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    if change == "add":
        add_to_gallery(path, entries(2, "x"), fingerprint=OURS)
    elif change == "remove":
        remove_from_gallery(path, ["bag-0"])
    else:
        merge_galleries(path, [path, path])
    assert links and os.path.realpath(path) not in links
    assert [file.name for file in path.parent.iterdir()] == ["bags.gallery"]


def test_remove(path):
    before = content(path)
    assert remove_from_gallery(path, ["bag-1", "bag-3"]) == 5
    rest = [entry for i, entry in enumerate(before) if i % 5 not in (1, 3)]
    assert content(path) == rest
    with open_gallery(path) as gallery:
        assert gallery.names == ["bag-0", "bag-2", "bag-4"]
    with pytest.raises(InputError, match="no identity 'bag-1' and no picture .*/bag-1; nothing was removed"):
        remove_from_gallery(path, ["bag-0", "bag-1"])
    assert content(path) == rest and len(list(path.parent.iterdir())) == 1
    assert remove_from_gallery(path, ["bag-2", "bag-4", "bag-0"]) == 7
    with open_gallery(path) as gallery:
        assert len(gallery) == 0 and gallery.names == [] and gallery.fingerprint == OURS
        with pytest.raises(InputError, match="is empty: there is nothing to search"):
            gallery.search(torch.ones(1, 16), 1)
    assert add_to_gallery(path, entries(2, "x"), fingerprint=OURS) == (2, 0)


@pytest.mark.parametrize(
    "names, rows",
    [
        (["bag/3.jpg"], [3]),
        (["bag/1.jpg", "bag/1"], None),  # no part of a name
        (["bag/1.jpg", "bag-0"], [0, 1, 5, 10]),
        (["bag"], range(12)),  # a folder
        (["bag/"], range(12)),
        (["bag/3.jpg", "bag/99.jpg"], None),
        (["bag-3", "ba"], None),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_pictures_and_folders_are_taken_out(tmp_path, monkeypatch, names, rows, absolute):
    """By their path, from where a person stands, though the files are gone; of an unknown one nothing is removed."""
    monkeypatch.chdir(tmp_path)
    content = entries(12)
    sources = [os.path.abspath(source) for source in content.sources] if absolute else content.sources
    build_gallery("bags.gallery", content._replace(sources=sources), fingerprint=OURS)
    if rows is None:
        with pytest.raises(InputError, match="nothing was removed"):
            remove_from_gallery("bags.gallery", names)
        rows = []
    else:
        assert remove_from_gallery("bags.gallery", names) == len(rows)
    with open_gallery("bags.gallery") as gallery:
        assert list(gallery.sources()) == [source for row, source in enumerate(sources) if row not in rows]


def test_one_picture_under_two_paths(tmp_path):
    thumbnails = [b"", b"a", b"b", b"", b"a", b"ab", b"b", b"a"]
    content = Entries(features(8), list("xxxxyyyy"), [f"{i}.jpg" for i in range(8)], thumbnails)
    build_gallery(tmp_path / "bags.gallery", content, fingerprint=OURS)
    with open_gallery(tmp_path / "bags.gallery") as gallery:
        assert gallery.twins() == [(4, 1), (6, 2), (7, 4)]
    build_gallery(tmp_path / "none.gallery", content._replace(thumbnails=None), fingerprint=OURS)
    with open_gallery(tmp_path / "none.gallery") as gallery:
        assert gallery.twins() == []


def test_merge(path):
    folder = path.parent
    a, b, both = folder / "a", folder / "b", folder / "both"
    build_gallery(a, entries(4, "a"), fingerprint=OURS, info={"masks": False, "reid": "x.pth"})
    build_gallery(b, entries(3, "b", seed=1), fingerprint=OURS, info={"masks": False, "reid": "y.pth"})
    assert merge_galleries(both, [a, b, path, a]) == (19, [])
    assert content(both) == content(a) + content(b) + content(path)
    with open_gallery(both) as merged, open_gallery(b) as part:
        assert merged.info == {} and np.array_equal(merged.vectors(4, 7), part.vectors())
    with pytest.raises(InputError, match="both is there already: merge it, too, or give another name"):
        merge_galleries(both, [a, b])
    more = entries(2, "b")._replace(identities=["new", "a-3"], sources=None)
    add_to_gallery(b, more, fingerprint=OURS)
    (folder / "link").symlink_to(b)
    assert merge_galleries(a, [folder / "link", a, b]) == (9, ["a-3"])  # one of them twice, with pictures of no source
    assert content(a)[3:5] == [("new", "", b""), ("a-3", "", b"\1")]
    with open_gallery(a) as merged:
        assert merged.info == {"masks": False}
    with pytest.raises(InputError, match="no galleries"):
        merge_galleries(folder / "c", [])


def test_merging_what_does_not_fit(path):
    folder = path.parent
    moved = entries(12)._replace(identities=["elsewhere"] * 12)
    for number, (options, new, message) in enumerate(
        [
            ({"fingerprint": OTHER}, entries(2, "x"), "built with network bbbbbbbbbbbb and that of .* is aaaaaaaaaaaa"),
            ({"metric": "euclidean"}, entries(2, "x"), "has metric cosine and .* euclidean"),
            ({}, entries(2, "x", dim=8), "has dim 16 and .* 8"),
            ({"info": {"masks": True}}, entries(2, "x"), "were cut out along masks and the others taken whole"),
            ({}, entries(12, seed=1), "different entries from 'bag/0.jpg'; remove it from one"),
            ({}, moved, "different entries from 'bag/0.jpg'"),
        ]
    ):
        build_gallery(folder / f"{number}", new, **{"fingerprint": OURS, **options})
        with pytest.raises(InputError, match=message):
            merge_galleries(folder / "out", [path, folder / f"{number}"])
        assert not (folder / "out").exists()


def test_a_gallery_of_float32_grows_and_is_not_merged_with_one_of_float16(path, monkeypatch):
    monkeypatch.setattr(gallery_writer, "DTYPE", "float32")
    other = path.with_name("other")
    build_gallery(other, entries(3, "x"), fingerprint=OURS)
    monkeypatch.undo()
    add_to_gallery(other, entries(2, "y"), fingerprint=OURS)
    with open_gallery(other) as gallery:
        assert len(gallery) == 5 and gallery.dtype == "float32"
    with pytest.raises(InputError, match="has dtype float16 and .*other float32: they can't be merged"):
        merge_galleries(path.with_name("out"), [path, other])


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "own.gallery"
    build_gallery(path, entries(3), fingerprint=OURS, info={"reid": "runs/old/best.pth"})
    with open_gallery(path) as gallery:
        gallery.require(OURS, "runs/new/best.pth")
        message = r"aaaaaaaaaaaa \(runs/old/best.pth\) and runs/new/best.pth is bbbbbbbbbbbb: .* build it again"
        with pytest.raises(InputError, match=message):
            gallery.require(OTHER, "runs/new/best.pth")
        gallery.require(OURS, "runs/old/best.pth", masks=False)
        with pytest.raises(InputError, match="own.gallery were taken whole and the others cut out along masks"):
            gallery.require(OURS, "runs/old/best.pth", masks=True)


def test_the_same_checkpoint_trained_further_is_named_once(tmp_path):
    path = tmp_path / "own.gallery"
    info = {"reid": os.path.abspath("runs/old/best.pth")}
    build_gallery(path, entries(3), fingerprint=OURS, info=info)
    with open_gallery(path) as gallery:
        for who in ("runs/old/best.pth", info["reid"]):
            message = "when that was network aaaaaaaaaaaa; by now it is bbbbbbbbbbbb, trained further"
            with pytest.raises(InputError, match=message) as caught:
                gallery.require(OTHER, who)
            assert str(caught.value).count("best.pth") == 1


def test_an_identity_without_entries_is_damage(path, monkeypatch):
    """Searching trusts that there are as many identities as names."""
    with open_gallery(path) as gallery:
        offset = gallery._sections["numbers"][0]
        assert sorted(set(gallery.numbers.tolist())) == [0, 1, 2, 3, 4]
        numbers = np.where(gallery.numbers == 3, 0, gallery.numbers).astype("<i4").tobytes()
    monkeypatch.setattr("recognition.gallery_reader.Gallery._verify", lambda *_: None)  # as if a writer had done it
    data = bytearray(path.read_bytes())
    data[offset : offset + len(numbers)] = numbers
    path.write_bytes(data)
    with pytest.raises(InputError, match="bags.gallery is damaged"):
        open_gallery(path)


def test_bad_files_get_one_line(path):
    whole, bad = path.read_bytes(), path.with_name("bad.gallery")
    cases = [(b"", "is empty"), (b"\x89PNG and so on" * 100, "not a gallery"), (whole[:30], "truncated")]
    cases += [(whole[:length], "truncated|damaged") for length in range(40, len(whole), 97)]
    cases += [(whole[:16] + (9).to_bytes(4, "little") + whole[20:], "has format 9 .* update Carousel")]
    cases += [(whole.replace(b'"metric": "cosine"', b'"metric": "cosinx"'), "damaged")]
    cases += [(whole.replace(b'"fingerprint": "a', b'"fingerprint": "b'), "damaged")]
    for data, message in cases:
        bad.write_bytes(data)
        with pytest.raises(InputError, match=message) as caught:
            open_gallery(bad)
        assert "bad.gallery" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such gallery; check the path, or build one"):
        open_gallery(path.with_name("none"))
    with pytest.raises(InputError, match="can't read the gallery"):
        open_gallery(path.parent)


def sections_of(path):
    with open_gallery(path) as gallery:
        return {name: range(offset, offset + length) for name, (offset, length, *_) in gallery._sections.items()}


def test_a_damaged_byte_is_one_line(path):
    whole, bad, chance = path.read_bytes(), path.with_name("bad.gallery"), random.Random(0)
    places = [place for section in sections_of(path).values() for place in section]
    for _ in range(300):
        data = bytearray(whole)
        data[chance.choice(places)] ^= 1 << chance.randrange(8)
        bad.write_bytes(data)
        with pytest.raises(InputError, match="bad.gallery is damaged"), open_gallery(bad) as gallery:
            list(gallery.rows())


@pytest.mark.parametrize("section", ["sources", "thumbnails"])
def test_a_damaged_byte_is_noticed_by_who_reads_one_entry(path, section):
    """And by nobody else: the other entries are whole."""
    whole, places, damaged_rows = path.read_bytes(), sections_of(path)[section], set()
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with open_gallery(path) as gallery:
            (row,) = [row for row in range(12) if place - places.start < gallery._ends[section][row]][:1]
            for number in range(12):
                read = gallery.source if section == "sources" else gallery.thumbnail
                if number != row:
                    read(number)
                    continue
                with pytest.raises(InputError, match=f"bags.gallery is damaged in its {section}; take a copy"):
                    read(number)
                damaged_rows.add(row)
    assert damaged_rows == set(range(section == "thumbnails", 12))  # the first thumbnail is empty


@pytest.mark.parametrize("what", ["zero", "swapped", "last bit", "not finite"])
def test_damaged_vectors_give_no_answer(path, chunks_of, what):
    chunks_of(5, 16)
    data, vectors = bytearray(path.read_bytes()), sections_of(path)["vectors"]
    first, second = (slice(vectors[row * 32], vectors[row * 32] + 32) for row in (3, 9))
    if what == "zero":
        data[first] = bytes(32)
    elif what == "swapped":
        data[first], data[second] = data[second], data[first]
    elif what == "last bit":
        data[vectors[-2]] ^= 1
    else:
        data[first] = b"\xff" * 32
    path.write_bytes(data)
    for use in (
        lambda: open_gallery(path).search(torch.ones(1, 16), 1),
        lambda: open_gallery(path).identify(torch.ones(1, 16), 1),
        lambda: add_to_gallery(path, entries(2, "new"), fingerprint=OURS),
        lambda: remove_from_gallery(path, ["bag-0", "bag-1", "bag-2", "bag-3", "bag-4"]),
        lambda: merge_galleries(path.with_name("merged"), [path]),
    ):
        with pytest.raises(InputError, match="damaged") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1


def test_rows_have_entries(path, monkeypatch):
    monkeypatch.setattr(gallery_reader, "COPIED_ROWS", 4)
    with open_gallery(path) as gallery:
        keep = np.isin(np.arange(12), [1, 2, 9])
        assert [rows.sources for rows in gallery.rows(keep)] == [["bag/1.jpg", "bag/2.jpg"], ["bag/9.jpg"]]


def test_a_whole_gallery_is_searched_again_and_again(path, chunks_of):
    chunks_of(5, 16)
    with open_gallery(path) as gallery:
        answers = [gallery.search(features(3), 4)[1].tolist() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_one_writer_at_a_time(path):
    """Whoever comes second is told; what killed writers left goes, what belongs to others stays."""
    dead, other = path.with_name(".bags.gallery.123456.tmp"), path.with_name(".other.gallery.123456.tmp")
    lock = path.with_name(".bags.gallery.lock")
    for file in (dead, other, lock):  # the lock of a killed process is a file that nobody holds
        file.write_bytes(b"")

    def new():
        yield entries(2, "x")
        for change in (
            lambda: add_to_gallery(path, entries(2, "y"), fingerprint=OURS),
            lambda: remove_from_gallery(path, ["bag-0"]),
            lambda: build_gallery(path, entries(2, "y"), fingerprint=OURS),
        ):
            with pytest.raises(InputError, match="another process is writing .*bags.gallery; wait"):
                change()
        assert build_gallery(path.with_name("second"), entries(2), fingerprint=OURS) == 2  # another gallery may
        yield entries(1, "z")

    assert add_to_gallery(path, new(), fingerprint=OURS) == (3, 0)
    assert len(content(path)) == 15
    assert sorted(file.name for file in path.parent.iterdir()) == [other.name, "bags.gallery", "second"]


def add_and_die(path, function, when):
    """Add two entries, and be killed just before or after the first call of os.fsync or os.replace."""
    original = getattr(os, function)

    def last(*arguments):
        if when == "after":
            original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, function, last)
    add_to_gallery(path, entries(2, "new"), fingerprint=OURS)


@pytest.mark.parametrize(
    ("function", "when", "state"),
    [("fsync", "before", "old"), ("replace", "before", "old"), ("replace", "after", "new")],
)
def test_killed_around_the_rename(path, function, when, state):
    before, added = content(path), [entry[:3] for entry in zip(*entries(2, "new")[1:], strict=True)]
    process = multiprocessing.get_context("forkserver").Process(target=add_and_die, args=(path, function, when))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert content(path) == (before if state == "old" else before + added)
    left = {file.name for file in path.parent.iterdir()}
    assert left == {path.name, f".{path.name}.lock"} | (
        {f".{path.name}.{process.pid}.tmp"} if state == "old" else set()
    )
    assert add_to_gallery(path, entries(2, "new"), fingerprint=OURS) == ((2, 0) if state == "old" else (0, 2))
    assert content(path) == before + added and len(list(path.parent.iterdir())) == 1


@pytest.mark.slow
def test_killed_while_adding(tmp_path):
    """At random moments; the benchmark raises where the gallery is not whole after one."""
    path = tmp_path / "bags.gallery"
    build_gallery(path, entries(3000, dim=64), fingerprint="0" * 64)
    whole, results = kill_while_adding(path, 3000, 64, 3)
    assert whole > 0 and len(results) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["bags.gallery"]
