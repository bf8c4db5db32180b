import numpy as np
import pytest
import torch

from benchmarks.reference_retrieval import rank_metrics
from core.errors import InputError
from core.retrieval.distance import pairwise_distance
from core.retrieval.ranking import (
    Labels,
    QueryRanks,
    evaluate_features,
    evaluate_ranking,
    junk_mask,
    rank_features,
    rank_queries,
    summarise,
    vehicleid_galleries,
)


def random_labels(generator, num_query, num_gallery, identities, cameras):
    return [
        torch.randint(high, (length,), generator=generator)
        for high in (identities, cameras)
        for length in (num_query, num_gallery)
    ]


def paired(query_ids, gallery_ids, query_cameras, gallery_cameras):
    """`Labels` of query and gallery."""
    return Labels(query_ids, query_cameras), Labels(gallery_ids, gallery_cameras)


def check_against_numpy(ranks, distance, labels, drop_same_camera):
    cmc, average_precision, inverse_negative_penalty, valid = rank_metrics(
        distance.numpy(), *(label.numpy() for label in labels), drop_same_camera
    )
    assert ranks.valid.nonzero()[:, 0].tolist() == valid.tolist()
    np.testing.assert_allclose(ranks.average_precision[ranks.valid], average_precision, atol=1e-6)
    np.testing.assert_allclose(ranks.inverse_negative_penalty[ranks.valid], inverse_negative_penalty, atol=1e-6)
    assert (ranks.average_precision[~ranks.valid] == 0).all() and (ranks.first_match_rank[~ranks.valid] == 0).all()
    if len(valid):
        result = summarise(ranks)
        np.testing.assert_allclose(result.cmc, cmc, atol=1e-12)
        assert result.num_valid_queries == len(valid)


@pytest.mark.parametrize("case", ["market", "veri", "no_camera", "small_gallery"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_golden(golden, case, chunk_size):
    arrays = {key.split("/")[1]: value for key, value in golden("rank_metrics").items() if key.startswith(case + "/")}
    arguments = [arrays[key] for key in ("dist", "q_pid", "g_pid", "q_cam", "g_cam")]
    ranks = rank_queries(arguments[0], *paired(*arguments[1:]), chunk_size=chunk_size)
    np.testing.assert_allclose(ranks.average_precision[ranks.valid], arrays["AP"], atol=1e-6)
    np.testing.assert_allclose(ranks.inverse_negative_penalty[ranks.valid], arrays["INP"], atol=1e-6)
    for protocol in ("market1501", "no_camera") if case in ("no_camera", "small_gallery") else ("market1501",):
        result = evaluate_ranking(*arguments, protocol, chunk_size=chunk_size)
        np.testing.assert_allclose(result.cmc, arrays["cmc"], atol=1e-6)
        np.testing.assert_allclose(result.cmc, arrays["cython_cmc"], atol=1e-6)
        assert result.mean_ap == pytest.approx(arrays["mAP"], abs=1e-6)
        assert result.mean_inp == pytest.approx(arrays["mINP"], abs=1e-6)
        assert result.num_valid_queries == arrays["num_valid_query"]


def test_golden_vehicleid(golden):
    arrays = golden("rank_metrics")
    distance, ids, draws = (arrays[f"vehicleid/{key}"] for key in ("dist", "pid", "gallery_index"))
    cameras = np.zeros_like(ids)  # not used by this protocol
    result = evaluate_ranking(distance, ids, ids, cameras, cameras, "vehicleid", gallery_index=draws)
    np.testing.assert_allclose(result.cmc, arrays["vehicleid/cmc_mean"], atol=1e-6)
    assert result.mean_ap == pytest.approx(arrays["vehicleid/mAP_mean"], abs=1e-6)
    for repeat, draw in enumerate(draws):
        result = evaluate_ranking(distance, ids, ids, cameras, cameras, "vehicleid", gallery_index=draw[None])
        np.testing.assert_allclose(result.cmc, arrays["vehicleid/cmc_each"][repeat], atol=1e-6)
        assert result.mean_ap == pytest.approx(arrays["vehicleid/mAP_each"][repeat], abs=1e-6)


def test_by_hand():
    # Query of identity 1, camera 0. In order of distance: 2 (other), junk (same camera), match, other, match.
    distance = torch.tensor([[0.5, 0.1, 0.2, 0.3, 0.4]])
    gallery_ids, gallery_cameras = torch.tensor([1, 2, 1, 1, 3]), torch.tensor([1, 1, 0, 2, 1])
    result = evaluate_ranking(distance, [1], gallery_ids, [0], gallery_cameras)
    # Junk gone: other, match, other, match. Matches at ranks 2 and 4.
    assert result.cmc.tolist() == [0, 1, 1, 1, 1]
    assert result.mean_ap == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert result.mean_inp == pytest.approx(2 / 4)
    assert [result.rank(1), result.rank(5), result.rank(10)] == [0, 1, 1]
    # Nothing dropped: other, match, match, other, match.
    result = evaluate_ranking(distance, [1], gallery_ids, [0], gallery_cameras, "no_camera")
    assert result.mean_ap == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)
    assert result.mean_inp == pytest.approx(3 / 5)


@pytest.mark.parametrize("seed", range(25))
def test_ties_and_junk_as_a_stable_sort(seed):
    """Few different distances, negative ones and both zeros included, so that nearly every rank is settled by a tie."""
    generator = torch.Generator().manual_seed(seed)
    num_query, num_gallery = 1 + seed, 3 + 5 * seed
    distance = torch.randint(-2, 3, (num_query, num_gallery), generator=generator) * 0.1
    distance = torch.where(torch.rand(distance.shape, generator=generator) < 0.2, -distance, distance)
    if seed % 3 == 0:
        distance = distance.double()
    labels = random_labels(generator, num_query, num_gallery, identities=1 + seed // 3, cameras=1 + seed % 4)
    for protocol, drop in (("market1501", True), ("no_camera", False)):
        for chunk_size in (None, 1, 4):
            ranks = rank_queries(distance, *paired(*labels), protocol, chunk_size=chunk_size)
            check_against_numpy(ranks, distance, labels, drop)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("protocol", ["market1501", "no_camera", "vehicleid"])
def test_features_give_what_their_distances_give(metric, protocol):
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(60, 16, generator=generator), torch.randn(150, 16, generator=generator)
    labels = random_labels(generator, 60, 150, identities=12, cameras=3)
    if protocol == "vehicleid":
        query, labels = gallery, [labels[1], labels[1], labels[3], labels[3]]
    expected = evaluate_ranking(pairwise_distance(query, gallery, metric), *labels, protocol)
    for chunk_size in (None, 1, 7, 1000):
        result = evaluate_features(query, gallery, *labels, protocol, metric=metric, chunk_size=chunk_size)
        torch.testing.assert_close(result.cmc, expected.cmc)
        assert result[1:] == pytest.approx(expected[1:], abs=1e-7)


@pytest.mark.parametrize("protocol", ["market1501", "vehicleid"])
def test_processes_share_the_queries(protocol):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 8, generator=generator)
    ids, _, cameras, _ = random_labels(generator, 40, 0, identities=6, cameras=2)
    whole = evaluate_features(features, features, ids, ids, cameras, cameras, protocol)
    shares = []
    for rank in range(50):  # more processes than queries: some have no share
        mine = torch.arange(40)[rank::50]
        labels = Labels(ids, cameras).at(mine), Labels(ids, cameras)
        shares.append(rank_features(features[mine], features, *labels, protocol, query_index=mine))
    gathered = [torch.cat(tensors) for tensors in list(zip(*shares, strict=True))[:4]]
    result = summarise(QueryRanks(*gathered, shares[0].gallery_size), protocol)
    assert torch.equal(result.cmc, whole.cmc)
    assert result[1:] == pytest.approx(whole[1:], abs=1e-7)


def test_vehicleid_draws_one_image_of_each_identity():
    ids = torch.tensor([5, 9, 5, 7, 9, 5, 5])
    draws = vehicleid_galleries(ids, repeats=200, seed=3)
    assert (ids[draws] == torch.tensor([5, 7, 9])).all()
    assert torch.equal(draws, vehicleid_galleries(ids, repeats=200, seed=3))
    assert set(draws[:, 0].tolist()) == {0, 2, 5, 6} and set(draws[:, 2].tolist()) == {1, 4}
    result = evaluate_features(torch.eye(7), torch.eye(7), ids, ids, ids, ids, "vehicleid")
    assert result.num_valid_queries == 10 * 4  # of 7 images, 3 are the gallery; identity 7 has no other image
    assert len(result.cmc) == 3


def test_junk_mask():
    query = Labels(torch.tensor([1, 1]), torch.tensor([0, 1]))
    gallery = Labels(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0]))
    mask = junk_mask(query, gallery, "market1501")
    assert mask.tolist() == [[True, False, False], [False, True, False]]
    assert not junk_mask(query, gallery, "no_camera").any()


def test_bad_input_is_named():
    features, ids, cameras = torch.eye(3), torch.tensor([1, 1, 2]), torch.zeros(3)
    with pytest.raises(InputError, match="cameras leave no valid query.*protocol no_camera"):
        evaluate_features(features, features, ids, ids, cameras, cameras)
    with pytest.raises(InputError, match="no valid query"):
        evaluate_features(features, features, ids, ids + 5, cameras, cameras, "no_camera")
    with pytest.raises(InputError, match="unknown protocol 'market'"):
        evaluate_features(features, features, ids, ids, cameras, cameras, "market")
    with pytest.raises(InputError, match="there is no query"):
        evaluate_features(features[:0], features, ids[:0], ids, cameras[:0], cameras)
    with pytest.raises(InputError, match="gallery is empty"):
        evaluate_features(features, features[:0], ids, ids[:0], cameras, cameras[:0])
    with pytest.raises(InputError, match="gallery is empty"):
        evaluate_ranking(torch.zeros(3, 0), ids, ids[:0], cameras, cameras[:0])
    with pytest.raises(InputError, match="NaN"):
        evaluate_ranking(torch.full((3, 3), torch.nan), ids, ids, cameras, cameras)
    with pytest.raises(InputError, match="not finite"):
        evaluate_features(features * torch.nan, features, ids, ids, cameras, cameras, "no_camera")
    with pytest.raises(InputError, match="the same images"):
        evaluate_features(features, features, ids, ids.flip(0), cameras, cameras, "vehicleid")
    with pytest.raises(ValueError, match="3 query images"):
        evaluate_features(features, features, ids[:2], ids, cameras, cameras)
