"""Hybrid memory and cluster memory: golden numbers, cases by hand, ranks and resuming."""

import pytest
import torch
import torch.nn.functional as F

from core.losses.memory import ClusterMemory, HybridMemory

VALUE, GRADIENT, MEMORY = dict(rtol=1e-5, atol=0), dict(rtol=0, atol=1e-6), dict(rtol=0, atol=1e-6)


def random_batch(size=6, features=9, dimension=5):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(size, dimension, generator=generator).requires_grad_()
    indexes = torch.randint(features, (size,), generator=generator)
    return embeddings, indexes, torch.randn(features, dimension, generator=generator)


@pytest.mark.parametrize("case", ["default", "temp_0.1_momentum_0.5"])
def test_hybrid_golden(golden, case):
    arrays = golden("loss_memory")
    arrays = {key.split("/")[1]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(case)}
    labels, indexes = arrays["memory_labels"].long(), arrays["indexes"].long()
    memory = HybridMemory(arrays["features_given"], labels, float(arrays["temp"]), float(arrays["momentum"]))
    torch.testing.assert_close(memory.features, arrays["memory_before"], **MEMORY)
    embeddings = arrays["inputs"].requires_grad_()
    value = memory(embeddings, indexes)
    (gradient,) = torch.autograd.grad(value, embeddings)
    torch.testing.assert_close(value, arrays["value"], **VALUE)
    torch.testing.assert_close(gradient, arrays["grad_inputs"], **GRADIENT)
    memory.update(embeddings, indexes)
    torch.testing.assert_close(memory.features, arrays["memory_after"], **MEMORY)


def test_update_goes_one_by_one():
    """Several embeddings of a feature, in their order: the loop of the original."""
    embeddings, _, centers = random_batch(12, 4)
    indexes = torch.tensor([1, 0, 1, 1, 3, 0, 1, 1, 3, 3, 1, 0])
    memory = ClusterMemory(centers, momentum=0.1)
    expected = memory.features.clone()
    for embedding, index in zip(F.normalize(embeddings.detach()), indexes, strict=True):
        expected[index] = F.normalize(0.1 * expected[index] + 0.9 * embedding, dim=0)
    memory.update(embeddings, indexes)
    torch.testing.assert_close(memory.features, expected, rtol=0, atol=1e-6)


def test_cluster_memory_by_hand():
    """The embedding (0, 3) has similarities 0 and 1, at the temperature 0.5 logits 0 and 2."""
    memory = ClusterMemory(torch.tensor([[4.0, 0], [0, 9]]), temperature=0.5, momentum=0.5)
    embedding = torch.tensor([[0.0, 3]])
    p = torch.tensor([0.0, 2]).softmax(0)
    assert memory(embedding, torch.tensor([1])).item() == pytest.approx(-p[1].log().item())
    memory.update(embedding, torch.tensor([0]))
    torch.testing.assert_close(memory.features, torch.tensor([[0.5**0.5, 0.5**0.5], [0, 1]]))


def test_cluster_memory_is_a_hybrid_memory_of_clusters_alone():
    embeddings, indexes, centers = random_batch()
    memories = ClusterMemory(centers, temperature=1.0), HybridMemory(centers, torch.arange(9), temperature=1.0)
    values = [memory(embeddings, indexes) for memory in memories]
    torch.testing.assert_close(*values, rtol=1e-4, atol=0)  # but for the 1e-6 in the logarithm


@pytest.mark.parametrize("memory", [ClusterMemory, lambda centers: HybridMemory(centers, torch.arange(9) // 2)])
def test_gradient_empty_batch_and_half_precision(memory):
    embeddings, indexes, centers = random_batch()
    memory = memory(centers).double()
    assert torch.autograd.gradcheck(lambda x: memory(x, indexes), embeddings.double())
    memory = memory.float()
    before = memory.features.clone()
    memory.update(embeddings[:0], indexes[:0])
    assert memory(embeddings[:0], indexes[:0]).item() == 0 and torch.equal(memory.features, before)
    with torch.autocast("cpu", torch.bfloat16):
        value = memory(embeddings.bfloat16(), indexes)
    assert value.dtype == torch.float32
    memory.update(embeddings.bfloat16(), indexes)
    torch.testing.assert_close(memory.features.norm(dim=1), torch.ones(9))


def test_a_checkpoint_holds_what_is_remembered():
    embeddings, indexes, centers = random_batch()
    memory = HybridMemory(centers, torch.arange(9) // 3)
    memory.update(embeddings, indexes)
    memory.relabel(torch.arange(9) // 2)
    other = HybridMemory(torch.zeros(9, 5), torch.zeros(9, dtype=torch.int64))
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other(embeddings, indexes), memory(embeddings, indexes))
