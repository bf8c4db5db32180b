"""Which pictures make a batch, the same for all ranks together as for one process.

P identities with K pictures each (Hermans et al. 2017) to re-identify; pictures of one orientation to detect; any in
random order.
"""

import numpy as np
from torch.utils.data import Sampler

from core.data.randomness import derive_seed
from core.errors import InputError


class PassSampler(Sampler):
    """Batches from passes over the data, a function of (seed, epoch, pass); each rank has its share of every batch.

    An epoch is one pass, or `batches_per_epoch` batches out of as many passes as that takes. A subclass says how many
    batches a pass has, and has `draw_pass`.
    """

    def __init__(self, batches_per_pass, batches_per_epoch, *, seed, rank, world_size):
        self.batches_per_pass = batches_per_pass
        self.num_batches = batches_per_pass if batches_per_epoch is None else batches_per_epoch
        self.seed, self.epoch = seed, 0
        self.rank, self.world_size = rank, world_size

    def __len__(self):
        return self.num_batches

    def set_epoch(self, epoch):
        """The next iteration draws the batches of this epoch."""
        self.epoch = epoch

    def __iter__(self):
        for start in range(0, self.num_batches, self.batches_per_pass):
            number = start // self.batches_per_pass
            generator = np.random.default_rng(derive_seed("sampler", self.seed, self.epoch, number))
            shares = np.split(self.draw_pass(generator), self.world_size, axis=1)
            yield from shares[self.rank][: self.num_batches - start].tolist()

    def draw_pass(self, generator):
        """A pass: (batches_per_pass, global batch) indices of pictures, the ranks' shares side by side."""
        raise NotImplementedError


class PKSampler(PassSampler):
    """Batches of P identities x K images. A global batch has P * world_size identities, of which each rank takes P.

    In a pass over the data (`PassSampler`)

    - the n images of an identity are shuffled and cut into round(n / K) chunks of K, at least one. What is left over
      sits out this time; where images lack, the identity's own first ones fill up, so that a chunk holds an image
      twice only if n < K;
    - the chunks are dealt to B = ceil(chunks / global P) batches, at most one of an identity to a batch, least filled
      batch first, ties at random;
    - batches that still lack an identity get further ones at random, which show the images that come next in their
      shuffled order: those that sat out go first.

    So every batch is exactly P different identities x K images (grouped by identity), every identity is seen, and
    every image about once. One exception: an identity with more than B chunks (more than 1 / P of all images) is in
    every batch, but not seen whole. Its other images have their turn in other epochs. More batches would have to
    repeat the other identities, once for each batch.

    Rank only chooses the share, so two processes with P identities each see together the very batches that one process
    with 2P sees.

    Args:
        ids: N integers, the identity of each image of the data set; any values.
        ids_per_batch: P, per process.
        images_per_id: K.
        batches_per_epoch: how many batches an epoch has; None: one pass.

    Raises:
        InputError: there are fewer identities than a global batch needs.
    """

    def __init__(self, ids, ids_per_batch, images_per_id, *, seed=0, rank=0, world_size=1, batches_per_epoch=None):
        self.images_per_id = images_per_id
        _, self.identity, self.counts = np.unique(
            np.asarray(ids, dtype=np.int64), return_inverse=True, return_counts=True
        )
        self.first = np.cumsum(self.counts) - self.counts  # where an identity starts when images are grouped by it
        self.global_ids = ids_per_batch * world_size
        if len(self.counts) < self.global_ids:
            largest = len(self.counts) // world_size
            raise InputError(
                f"a batch needs {self.global_ids} identities ({ids_per_batch} for each of {world_size} processes), and "
                f"the training data have {len(self.counts)}: "
                + (f"set ids_per_batch to {largest} or less" if largest else "use fewer processes")
            )
        chunks = np.maximum((2 * self.counts + images_per_id) // (2 * images_per_id), 1)  # round(n / K), halves up
        batches_per_pass = int(-(-chunks.sum() // self.global_ids))  # rounded up
        self.chunks = np.minimum(chunks, batches_per_pass)
        super().__init__(batches_per_pass, batches_per_epoch, seed=seed, rank=rank, world_size=world_size)

    def draw_pass(self, generator):
        identities, chunks = self._deal(generator)
        return self._images(identities, chunks, generator)

    def _deal(self, generator):
        """Which identities meet in which batch, with which of their chunks: two arrays (B, global P).

        Dealing takes rounds: each gives every batch one chunk. The chunks lie in one row, grouped by identity, the
        identities in random order, and a round takes the next B of them. As no identity has more than B chunks, only
        one that continues from the round before could come to a batch twice: it chooses its batches first.
        """
        num_batches, order = self.batches_per_pass, generator.permutation(len(self.counts))
        row = np.repeat(order, self.chunks[order])  # (chunks,) identity of each chunk
        number = np.arange(len(row)) - np.repeat(np.cumsum(self.chunks[order]) - self.chunks[order], self.chunks[order])
        identities = np.full((num_batches, self.global_ids), -1)
        chunks = np.zeros_like(identities)
        for turn, start in enumerate(range(0, len(row), num_batches)):
            part = row[start : start + num_batches]
            batches = generator.permutation(num_batches)
            if turn > 0 and row[start - 1] == part[0]:
                taken = (identities[:, turn - 1] == part[0])[batches]
                batches = np.concatenate([batches[~taken], batches[taken]])
                head = int((part == part[0]).sum())
                batches[head:] = generator.permutation(batches[head:])
            identities[batches[: len(part)], turn] = part
            chunks[batches[: len(part)], turn] = number[start : start + num_batches]
        self._fill(identities, chunks, generator)
        columns = generator.permuted(np.tile(np.arange(self.global_ids), (num_batches, 1)), axis=1)
        return np.take_along_axis(identities, columns, 1), np.take_along_axis(chunks, columns, 1)

    def _fill(self, identities, chunks, generator):
        """Complete, in place, the batches that lack identities (-1) with random others that are not in them yet."""
        following = self.chunks.copy()
        for batch in np.flatnonzero((identities < 0).any(1)):
            empty = np.flatnonzero(identities[batch] < 0)
            others = np.setdiff1d(np.arange(len(self.counts)), identities[batch])
            chosen = generator.choice(others, len(empty), replace=False)
            identities[batch, empty], chunks[batch, empty] = chosen, following[chosen]
            following[chosen] += 1

    def _images(self, identities, chunks, generator):
        """(B, P) identities and chunk numbers -> (B, P * K) indices of images."""
        shuffled = np.lexsort((generator.random(len(self.identity)), self.identity))  # grouped, each group shuffled
        places = chunks[..., None] * self.images_per_id + np.arange(self.images_per_id)  # (B, P, K)
        places = self.first[identities][..., None] + places % self.counts[identities][..., None]
        return shuffled[places].reshape(len(identities), -1)  # (B, P * K)


class ShuffledBatches(PassSampler):
    """Batches of pictures in random order; what the last one of a pass lacks is taken from the pass's start.

    Args:
        count: pictures of the data set, at least 1.
        batch_size: pictures in a batch, per process.
        batches_per_epoch: how many batches an epoch has; None: one pass.
    """

    def __init__(self, count, batch_size, *, seed=0, rank=0, world_size=1, batches_per_epoch=None):
        self.count, self.global_size = count, batch_size * world_size
        passes = -(-count // self.global_size)  # rounded up
        super().__init__(passes, batches_per_epoch, seed=seed, rank=rank, world_size=world_size)

    def draw_pass(self, generator):
        return np.resize(generator.permutation(self.count), (self.batches_per_pass, self.global_size))


class LabelSampler(PassSampler):
    """Batches for labels that change, as trainings with pseudo labels draw them (Ge et al. 2020).

    In a pass (`PassSampler`) every label, in random order, gives K of its pictures, however many it has; where there
    are too few labels for a batch each gives more, so that a batch shows nothing twice if it can. What the last batch
    lacks is taken from the start of the pass. Pictures with the label -1 sit out.

    Args:
        labels: N integers; `set_labels` gives others.
        batch_size: pictures in a batch, per process.
        images_per_label: K.
        fill: a label with fewer pictures shows them again; otherwise it gives what it has.
    """

    def __init__(self, labels, batch_size, images_per_label, *, fill, seed, rank, world_size):
        self.images_per_label, self.fill = images_per_label, fill
        self.global_size = batch_size * world_size
        super().__init__(1, None, seed=seed, rank=rank, world_size=world_size)
        self.set_labels(labels)

    def set_labels(self, labels):
        """Raises ValueError where no picture has a label."""
        labels = np.asarray(labels, dtype=np.int64)
        self.images = np.flatnonzero(labels >= 0)
        if not len(self.images):
            raise ValueError("no picture has a label")
        _, self.label, self.counts = np.unique(labels[self.images], return_inverse=True, return_counts=True)
        self.first = np.cumsum(self.counts) - self.counts  # where a label starts when images are grouped by it
        wanted = max(self.images_per_label, -(-self.global_size // len(self.counts)))
        self.taken = np.full_like(self.counts, wanted) if self.fill else np.minimum(self.counts, wanted)
        self.batches_per_pass = self.num_batches = int(-(-self.taken.sum() // self.global_size))

    def draw_pass(self, generator):
        order = generator.permutation(len(self.counts))
        shuffled = self.images[np.lexsort((generator.random(len(self.label)), self.label))]  # grouped by label
        taken = self.taken[order]
        owner = np.repeat(order, taken)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(taken) - taken, taken)
        drawn = shuffled[self.first[owner] + place % self.counts[owner]]
        return np.resize(drawn, (self.batches_per_pass, self.global_size))


class AspectRatioBatches(PassSampler):
    """Batches of pictures that are all upright (narrower than high) or all not, so that little of a batch is padding.

    In a pass over the data (`PassSampler`) each of the two groups is shuffled and cut into global batches of batch_size
    * world_size, of which each rank takes its share; the last one is filled with the group's first pictures of the
    pass. The batches of both groups come in random order. So every picture is seen, and less than one global batch of
    each group twice. A group smaller than one global batch joins the other one: alone it would show the same few
    pictures again and again.

    Args:
        sizes: N pairs (width, height), in any unit.
        batch_size: pictures in a batch, per process.
        batches_per_epoch: how many batches an epoch has; None: one pass.
    """

    def __init__(self, sizes, batch_size, *, seed=0, rank=0, world_size=1, batches_per_epoch=None):
        self.global_size = batch_size * world_size
        width, height = np.asarray(sizes).reshape(-1, 2).T
        self.groups = [np.flatnonzero(width < height), np.flatnonzero(width >= height)]
        if min(map(len, self.groups)) < self.global_size:
            self.groups = [np.arange(len(width))]
        batches_per_pass = sum(-(-len(group) // self.global_size) for group in self.groups)  # rounded up
        super().__init__(batches_per_pass, batches_per_epoch, seed=seed, rank=rank, world_size=world_size)

    def draw_pass(self, generator):
        batches = np.concatenate([self._cut(generator.permutation(group)) for group in self.groups])
        return generator.permutation(batches)

    def _cut(self, shuffled):
        """Indices in random order -> (batches, global batch); what the last one lacks is taken from the start."""
        count = -(-len(shuffled) // self.global_size)
        return np.resize(shuffled, (count, self.global_size))


class KeyedBatches(Sampler):
    """The batches of another batch sampler as lists of keys (epoch, slot, index) instead of indices.

    slot is the position in the epoch of all ranks together, so it is different for each picture drawn in an epoch,
    the same one drawn twice included. A key tells a worker everything an augmentation depends on; that matters
    because persistent workers hold a copy of the data set that no `set_epoch` reaches.

    Args:
        batch_sampler: yields lists of indices; each rank's n-th batch has the same length. Its `rank` and
            `world_size` are used where it has them.
    """

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler
        self.rank = getattr(batch_sampler, "rank", 0)
        self.world_size = getattr(batch_sampler, "world_size", 1)
        self.epoch = 0

    def __len__(self):
        return len(self.batch_sampler)

    def set_epoch(self, epoch):
        self.epoch = epoch
        if hasattr(self.batch_sampler, "set_epoch"):
            self.batch_sampler.set_epoch(epoch)

    def __iter__(self):
        epoch, start = self.epoch, 0
        for batch in self.batch_sampler:
            first = start + self.rank * len(batch)
            yield [(epoch, first + position, index) for position, index in enumerate(batch)]
            start += self.world_size * len(batch)


class JointBatches(Sampler):
    """Batches of keys (see `KeyedBatches`) made of a batch of every part, one after the other: the sets of two domains,
    or a part twice for two views of the same pictures, which are augmented each in its way.

    Args:
        parts: list of (`PassSampler`, how many pictures stand before those of its set in the data set of all).
        batches_per_epoch: None: as many as the longest pass of a part has.
    """

    def __init__(self, parts, batches_per_epoch=None):
        self.parts, self.batches_per_epoch, self.epoch = parts, batches_per_epoch, 0

    def __len__(self):
        return self.batches_per_epoch or max(sampler.batches_per_pass for sampler, _ in self.parts)

    def set_epoch(self, epoch):
        self.epoch = epoch
        for sampler, _ in self.parts:
            sampler.set_epoch(epoch)
            sampler.num_batches = len(self)

    def __iter__(self):
        slot = 0
        for batches in zip(*(sampler for sampler, _ in self.parts), strict=True):
            keys = []
            for batch, (sampler, before) in zip(batches, self.parts, strict=True):
                start = slot + sampler.rank * len(batch)
                keys += [(self.epoch, start + place, before + image) for place, image in enumerate(batch)]
                slot += sampler.world_size * len(batch)
            yield keys
