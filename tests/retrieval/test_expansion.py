import numpy as np
import pytest
import torch

from core.errors import InputError
from core.retrieval.expansion import expand_queries


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_golden(golden, chunk_size):
    arrays = golden("rank_metrics")
    query, gallery = expand_queries(arrays["aqe/query"], arrays["aqe/gallery"], 5, 3, 2, chunk_size)
    np.testing.assert_allclose(query, arrays["aqe/query_out"], atol=1e-6)
    np.testing.assert_allclose(gallery, arrays["aqe/gallery_out"], atol=1e-6)


def test_by_hand():
    query, gallery = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    # Cosine of the query to the first is 3/5, to the second 0; of the first to the second 4/5.
    for alpha, weight in ((2, 0.36), (1.5, 0.6**1.5), (0, 1)):
        new_query, new_gallery = expand_queries(query, gallery, k=2, alpha=alpha)
        torch.testing.assert_close(new_query, torch.tensor([[2 + 3 * weight, 4 * weight]]) / 2)
        weight = 0.8**alpha
        torch.testing.assert_close(new_gallery[1], torch.tensor([3 * weight, 1 + 4 * weight]) / 2)


def test_negative_similarity_pushes_away_for_any_exponent():
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    for alpha in (1, 2, 2.5):
        torch.testing.assert_close(expand_queries(query, gallery, k=2, alpha=alpha)[0], torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(expand_queries(query, gallery, k=2, alpha=0)[0], torch.tensor([[0.0, 0.0]]))


def test_edges():
    query, gallery = torch.eye(3)[:1], torch.eye(3)[1:]
    assert torch.equal(expand_queries(query, gallery, times=0)[0], query)
    torch.testing.assert_close(expand_queries(query, gallery, k=1)[1], gallery)  # the image alone
    assert expand_queries(query, gallery, k=99)[0].shape == (1, 3)  # more than there are images
    with pytest.raises(InputError, match="k starts at 1"):
        expand_queries(query, gallery, k=0)
    with pytest.raises(InputError, match="neither may be empty"):
        expand_queries(query[:0], gallery)
    with pytest.raises(InputError, match="not finite"):
        expand_queries(query * torch.nan, gallery)
