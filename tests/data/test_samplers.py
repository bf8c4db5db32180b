"""Samplers: what every batch is, what an epoch covers, ranks, seeds, and the cases that break other samplers."""

import numpy as np
import pytest

from core.data.randomness import derive_seed
from core.data.samplers import (
    AspectRatioBatches,
    JointBatches,
    KeyedBatches,
    LabelSampler,
    PKSampler,
    ShuffledBatches,
)
from core.errors import InputError


def uneven_ids(num_ids=40, most=13, seed=0):
    """Identities 0, 1, 2, ... with 1 to `most` images each, in mixed order."""
    generator = np.random.default_rng(seed)
    return generator.permutation(np.repeat(np.arange(num_ids), generator.integers(1, most + 1, num_ids)))


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return np.array(list(sampler))  # (batches, P * K)


@pytest.mark.parametrize(("ids_per_batch", "images_per_id"), [(8, 4), (5, 3), (40, 2), (3, 1)])
def test_every_batch_is_p_different_identities_times_k(ids_per_batch, images_per_id):
    ids = uneven_ids()
    sampler = PKSampler(ids, ids_per_batch, images_per_id)
    for epoch in range(5):
        batches = epoch_of(sampler, epoch)
        assert batches.shape == (len(sampler), ids_per_batch * images_per_id)
        groups = ids[batches].reshape(len(batches), ids_per_batch, images_per_id)
        assert (groups == groups[..., :1]).all()
        assert all(len(set(row)) == ids_per_batch for row in groups[..., 0])


def test_an_image_comes_twice_in_a_batch_only_if_its_identity_has_fewer_than_k():
    ids = uneven_ids()
    counts = np.bincount(ids)
    for epoch in range(5):
        for batch in epoch_of(PKSampler(ids, 8, 4), epoch):
            for group in batch.reshape(8, 4):
                assert len(set(group)) == min(4, counts[ids[group[0]]])


def test_an_epoch_sees_every_identity_and_every_image_about_once():
    ids = uneven_ids()
    sampler = PKSampler(ids, 8, 4)
    total = np.zeros(len(ids))
    for epoch in range(200):
        batches = epoch_of(sampler, epoch)
        assert set(ids[batches].flat) == set(ids)
        seen = np.bincount(batches.ravel(), minlength=len(ids))
        large = np.bincount(ids)[ids] >= 4
        assert seen[large].max() <= 3  # once, again as filling, and again in a batch that lacked an identity
        total += seen
    assert abs(len(sampler) * 8 * 4 / len(ids) - 1) < 0.25  # an epoch is about as long as the data
    large = np.bincount(ids)[ids] >= 4
    assert total[large].min() / 200 > 0.75 and total[large].max() / 200 < 1.5  # and no image is favoured for long


def test_a_case_worked_out_by_hand():
    # 4 identities with 4 images each, K = 2, P = 2: 8 chunks, 4 batches, nothing left over and nothing repeated.
    batches = epoch_of(PKSampler(np.repeat([7, 3, 5, 9], 4), 2, 2))
    assert batches.shape == (4, 4)
    assert sorted(batches.flat) == list(range(16))
    # 5 images and K = 4: round(5 / 4) = 1 chunk. 6 images: 2 chunks, 8 places, so two of its images come twice.
    batches = epoch_of(PKSampler([0] * 5 + [1] * 6 + [2] * 2, 1, 4))
    assert len(batches) == 1 + 2 + 1
    seen = np.bincount(batches.ravel(), minlength=13)
    assert sorted(seen[:5]) == [0, 1, 1, 1, 1]
    assert sorted(seen[5:11]) == [1, 1, 1, 1, 2, 2]
    assert seen[11:].tolist() == [2, 2]


def test_identity_with_a_single_image_repeats_it_k_times():
    batches = epoch_of(PKSampler([0, 1, 1, 1, 1], 2, 4))
    assert len(batches) == 1
    assert sorted(batches[0].tolist()) == [0, 0, 0, 0, 1, 2, 3, 4]


def test_a_giant_identity_is_in_every_batch_and_the_epoch_keeps_its_length():
    # 1000 images of one identity, 2 of each of 10 others: (250 + 10) / 8 chunks make 33 batches.
    ids = np.array([0] * 1000 + list(np.repeat(np.arange(1, 11), 2)))
    batches = epoch_of(PKSampler(ids, 8, 4))
    assert len(batches) == 33
    seen = np.bincount(batches.ravel(), minlength=len(ids))
    assert seen[:1000].sum() == 33 * 4 and seen[:1000].max() == 1
    assert (seen[1000:] > 0).all()
    columns = (ids[batches].reshape(33, 8, 4)[..., 0] == 0).argmax(1)
    assert len(set(columns)) > 4  # its place in the batch varies, so every rank gets its share of it


def test_batches_that_lack_an_identity_show_the_images_that_sat_out():
    # 3 identities of 5 images, K = 4, P = 2: 3 chunks for 4 places. The fourth begins with the one image left out.
    for epoch in range(10):
        seen = np.bincount(epoch_of(PKSampler(np.repeat([0, 1, 2], 5), 2, 4), epoch).ravel(), minlength=15)
        assert sorted(seen.reshape(3, 5).min(1)) == [0, 0, 1]
        assert seen.sum() == 16 and seen.max() == 2


def test_identities_meet_in_ever_new_combinations():
    # 30 identities of 40 chunks, 300 batches of 4: each pair should meet about 300 * (4 * 3) / (30 * 29) = 4 times an
    # epoch. Dealt simply in order, an identity would meet its neighbours of another round nearly 40 times.
    sampler = PKSampler(np.repeat(np.arange(30), 80), 4, 2)
    groups = (epoch_of(sampler).reshape(len(sampler), 4, 2) // 80)[..., 0]
    present = (groups[..., None] == np.arange(30)).any(1).astype(int)  # (batches, identities)
    meetings = (present.T @ present)[np.triu_indices(30, 1)]
    expected = len(sampler) * 4 * 3 / (30 * 29)
    assert abs(meetings.mean() - expected) < 1e-9
    assert meetings.max() < expected + 6 * expected**0.5


def test_same_seed_and_epoch_same_batches_else_others():
    ids = uneven_ids()
    sampler = PKSampler(ids, 8, 4, seed=3)
    first = epoch_of(sampler, 2)
    assert np.array_equal(first, epoch_of(sampler, 2))
    assert np.array_equal(first, epoch_of(PKSampler(ids, 8, 4, seed=3), 2))
    assert not np.array_equal(first, epoch_of(sampler, 3))
    assert not np.array_equal(first, epoch_of(PKSampler(ids, 8, 4, seed=4), 2))


@pytest.mark.parametrize("batches_per_epoch", [None, 50])
def test_two_processes_see_together_what_one_sees(batches_per_epoch):
    ids = uneven_ids()
    whole = epoch_of(PKSampler(ids, 4, 4, seed=1, batches_per_epoch=batches_per_epoch), 5)
    halves = [
        epoch_of(PKSampler(ids, 2, 4, seed=1, rank=rank, world_size=2, batches_per_epoch=batches_per_epoch), 5)
        for rank in range(2)
    ]
    assert np.array_equal(np.concatenate(halves, axis=1), whole)


def test_batches_per_epoch_chains_different_passes():
    ids = uneven_ids()
    one_pass = epoch_of(PKSampler(ids, 8, 4))
    sampler = PKSampler(ids, 8, 4, batches_per_epoch=2 * len(one_pass) + 3)
    batches = epoch_of(sampler)
    assert len(batches) == len(sampler) == 2 * len(one_pass) + 3
    assert np.array_equal(batches[: len(one_pass)], one_pass)
    second = batches[len(one_pass) : 2 * len(one_pass)]
    assert set(ids[second].flat) == set(ids) and not np.array_equal(second, one_pass)
    assert np.array_equal(epoch_of(PKSampler(ids, 8, 4, batches_per_epoch=5)), one_pass[:5])


def test_too_few_identities_is_an_input_error_that_says_what_to_set():
    with pytest.raises(InputError, match="set ids_per_batch to 2 or less"):
        PKSampler([0, 0, 1, 2, 3], 3, 2, world_size=2)
    with pytest.raises(InputError, match="fewer processes"):
        PKSampler([0, 0, 1], 1, 2, world_size=3)


def shapes(upright, lying, seed=0):
    """(width, height) of so many pictures narrower than high and so many others, mixed; some of those are square."""
    pairs = [(3, 4)] * upright + [(4, 3)] * (lying - lying // 3) + [(4, 4)] * (lying // 3)
    return np.random.default_rng(seed).permutation(np.array(pairs))


@pytest.mark.parametrize(("upright", "lying", "batch_size"), [(20, 80, 4), (21, 83, 4), (30, 9, 8), (7, 9, 1)])
def test_batches_of_one_orientation_see_every_picture_about_once(upright, lying, batch_size):
    sizes = shapes(upright, lying)
    is_upright = sizes[:, 0] < sizes[:, 1]
    sampler = AspectRatioBatches(sizes, batch_size, seed=1)
    repeats = -(-upright // batch_size) * batch_size - upright, -(-lying // batch_size) * batch_size - lying
    for epoch in range(5):
        batches = epoch_of(sampler, epoch)
        assert batches.shape == (len(sampler), batch_size)
        assert (is_upright[batches] == is_upright[batches][:, :1]).all()
        assert all(len(set(batch)) == batch_size for batch in batches)
        seen = np.bincount(batches.ravel(), minlength=len(sizes))
        assert seen.min() == 1 and seen.max() <= 2
        assert (seen[is_upright].sum() - upright, seen[~is_upright].sum() - lying) == repeats


def test_orientations_come_mixed_and_which_picture_repeats_changes():
    sizes = shapes(41, 41)
    sampler = AspectRatioBatches(sizes, 4)
    repeated = set()
    for epoch in range(30):
        batches = epoch_of(sampler, epoch)
        upright = (sizes[batches[:, 0], 0] < sizes[batches[:, 0], 1]).tolist()
        changes = sum(first != second for first, second in zip(upright[1:], upright, strict=False))
        assert changes > 1
        repeated |= set(np.flatnonzero(np.bincount(batches.ravel()) == 2))
    assert len(repeated) > 60


def test_an_orientation_with_less_than_a_batch_joins_the_other():
    sampler = AspectRatioBatches(shapes(3, 17), 4)
    batches = epoch_of(sampler)
    assert sorted(batches.flat) == list(range(20))
    assert len(AspectRatioBatches(shapes(3, 17), 2)) == 2 + 9
    # Two ranks need twice as many.
    assert len(AspectRatioBatches(shapes(3, 17), 2, world_size=2)) == 5


def test_fewer_pictures_than_a_batch_repeat():
    batches = epoch_of(AspectRatioBatches(shapes(1, 2), 8))
    assert batches.shape == (1, 8) and sorted(np.bincount(batches[0])) == [2, 3, 3]


@pytest.mark.parametrize("batches_per_epoch", [None, 50])
def test_two_processes_see_together_the_pictures_of_one(batches_per_epoch):
    sizes = shapes(33, 50)
    whole = epoch_of(AspectRatioBatches(sizes, 6, seed=1, batches_per_epoch=batches_per_epoch), 5)
    halves = [
        epoch_of(AspectRatioBatches(sizes, 3, seed=1, rank=rank, world_size=2, batches_per_epoch=batches_per_epoch), 5)
        for rank in range(2)
    ]
    assert np.array_equal(np.concatenate(halves, axis=1), whole)
    keyed = KeyedBatches(AspectRatioBatches(sizes, 3, seed=1, rank=1, world_size=2))
    keyed.set_epoch(5)
    assert [key[1] for key in list(keyed)[1]] == [9, 10, 11]


def test_orientation_batches_are_a_function_of_seed_epoch_and_pass():
    sizes = shapes(33, 50)
    sampler = AspectRatioBatches(sizes, 4, seed=3)
    first = epoch_of(sampler, 2)
    assert np.array_equal(first, epoch_of(sampler, 2))
    assert not np.array_equal(first, epoch_of(sampler, 3))
    assert not np.array_equal(first, epoch_of(AspectRatioBatches(sizes, 4, seed=4), 2))
    long = AspectRatioBatches(sizes, 4, seed=3, batches_per_epoch=2 * len(first) + 3)
    batches = epoch_of(long, 2)
    assert len(batches) == len(long) == 2 * len(first) + 3
    assert np.array_equal(batches[: len(first)], first)
    second = batches[len(first) : 2 * len(first)]
    assert set(second.flat) == set(range(83)) and not np.array_equal(second, first)
    assert np.array_equal(epoch_of(AspectRatioBatches(sizes, 4, seed=3, batches_per_epoch=5), 2), first[:5])


def test_shuffled_batches_see_every_picture_and_fill_the_last_from_the_first():
    sampler = ShuffledBatches(10, 4, seed=1)
    batches = epoch_of(sampler, 2)
    assert batches.shape == (len(sampler), 4) == (3, 4)
    assert sorted(batches.flat[:10]) == list(range(10)) and np.array_equal(batches.flat[10:], batches.flat[:2])
    halves = [epoch_of(ShuffledBatches(10, 2, seed=1, rank=rank, world_size=2), 2) for rank in range(2)]
    assert np.array_equal(np.concatenate(halves, axis=1), batches)
    assert epoch_of(ShuffledBatches(1, 3, batches_per_epoch=2)).tolist() == [[0, 0, 0]] * 2


def test_keys_hold_epoch_slot_and_index():
    ids = uneven_ids()
    sampler = PKSampler(ids, 8, 4, seed=2)
    keyed = KeyedBatches(sampler)
    keyed.set_epoch(6)
    keys = np.array(list(keyed))  # (batches, P * K, 3)
    assert len(keyed) == len(sampler) == len(keys)
    assert (keys[..., 0] == 6).all()
    assert keys[..., 1].ravel().tolist() == list(range(keys[..., 1].size))
    assert np.array_equal(keys[..., 2], epoch_of(sampler, 6))
    assert all(type(number) is int for number in next(iter(keyed))[0])


def test_slots_of_two_ranks_are_those_of_one_process():
    ids = uneven_ids()

    def keys(ids_per_batch, rank, world_size):
        return [
            key
            for batch in KeyedBatches(PKSampler(ids, ids_per_batch, 2, rank=rank, world_size=world_size))
            for key in batch
        ]

    assert sorted(keys(2, 0, 2) + keys(2, 1, 2), key=lambda key: key[1]) == keys(4, 0, 1)


def test_keyed_batches_take_any_batch_sampler():
    assert list(KeyedBatches([[4, 2], [7]])) == [[(0, 0, 4), (0, 1, 2)], [(0, 2, 7)]]


def test_seeds_differ_by_every_part_and_never_change():
    assert derive_seed("sampler", 0, 1) == 7337058811288648361
    assert derive_seed(1, np.int64(2)) == derive_seed(1, 2)
    seeds = {derive_seed(*parts) for parts in [(1,), (1, 0), (0, 1), (10,), ("a", 1), ("b", 1), (2**70,), (-1,)]}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)


def label_sampler(labels, batch_size=8, images_per_label=4, fill=True, rank=0, world_size=1):
    return LabelSampler(labels, batch_size, images_per_label, fill=fill, seed=0, rank=rank, world_size=world_size)


def test_labels_of_a_pass_give_k_pictures_each():
    labels = uneven_ids(num_ids=11)
    labels[labels == 3] = -1
    sampler = label_sampler(labels)
    batches = epoch_of(sampler)
    assert batches.shape == (5, 8) and len(sampler) == 5
    groups = labels[batches].reshape(10, 4)
    assert (groups == groups[:, :1]).all() and sorted(groups[:, 0]) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    for group in batches.reshape(10, 4):
        assert len(set(group)) == min(4, (labels == labels[group[0]]).sum())


def test_labels_give_what_they_have_where_nothing_is_filled():
    labels = np.array([0, 0, 0, 0, 0, 1, 2, 3, 3, -1])
    drawn = epoch_of(label_sampler(labels, batch_size=4, images_per_label=2, fill=False)).ravel()
    counts = np.bincount(labels[drawn[:6]])
    assert len(drawn) == 8 and len(set(drawn[:6])) == 6 and counts.tolist() == [2, 1, 1, 2]


def test_few_labels_fill_a_batch_with_other_pictures():
    labels = np.repeat([0, 1, 2], 20)
    (batch,) = epoch_of(label_sampler(labels, batch_size=24))
    assert len(set(batch)) == 24 and np.bincount(labels[batch]).tolist() == [8, 8, 8]


def test_new_labels_change_the_batches_and_none_are_refused():
    sampler = label_sampler(np.zeros(6))
    sampler.set_labels([-1, -1, 4, 4, 4, 4])
    assert set(epoch_of(sampler).flat) == {2, 3, 4, 5}
    with pytest.raises(ValueError, match="no picture has a label"):
        sampler.set_labels([-1] * 6)


def joint(batch_size, rank=0, world_size=1, views=1, **how):
    parts = []
    for labels, before in ((uneven_ids(6), 0), (uneven_ids(9, seed=1), 100)):
        parts.append((label_sampler(labels, batch_size, 2, rank=rank, world_size=world_size), before))
    batches = JointBatches(parts * views, **how)
    batches.set_epoch(3)
    return batches


def test_joint_batches_have_a_part_of_each_set_and_as_many_as_the_longest_pass():
    batches = joint(4)
    keys = np.array(list(batches))  # (batches, 8, 3)
    assert keys.shape == (5, 8, 3) and len(batches) == 5 and (keys[..., 0] == 3).all()
    assert keys[..., 1].ravel().tolist() == list(range(40))
    assert (keys[:, :4, 2] < 100).all() and (keys[:, 4:, 2] >= 100).all()
    assert len(list(joint(4, batches_per_epoch=12))) == 12


def test_two_views_are_the_same_pictures_in_other_slots():
    keys = np.array(list(joint(4, views=2)))  # (batches, 16, 3)
    first, second = np.split(keys, 2, axis=1)
    assert np.array_equal(first[..., 2], second[..., 2]) and not set(first[..., 1].flat) & set(second[..., 1].flat)


def test_joint_slots_of_two_ranks_are_those_of_one_process():
    whole = np.array(list(joint(4, views=2))).reshape(-1, 3)
    halves = np.concatenate([np.array(list(joint(2, rank, 2, views=2))).reshape(-1, 3) for rank in range(2)])
    assert np.array_equal(halves[halves[:, 1].argsort()], whole)
