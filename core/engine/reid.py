"""What every ReID script shares: the data and its loaders, features, evaluation, checkpoints.

A script adds only what is its own. Everything here runs on one process or many; each rank ends with the same numbers.
"""

import inspect
import os
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from core.data.folder import is_unsplit
from core.data.images import bits_in_use, list_files, say_unread
from core.data.leaks import reid_leaks
from core.data.loading import batches, build_loader
from core.data.reid_datasets import (
    OWN_NUMBERS,
    check_evaluation,
    check_training,
    default_protocol,
    find_dataset,
    join_datasets,
    load_reid_dataset,
)
from core.data.reid_images import ReIDImages, collate, split_broken
from core.data.samplers import KeyedBatches, PKSampler
from core.data.samples import ReIDDataset, Sample, relabel
from core.data.transforms import IMAGENET_MEAN, IMAGENET_STD, build_transform
from core.engine import distributed
from core.engine.checkpoint import all_options, check_same_network, load_checkpoint, restore
from core.engine.log import progress_is_shown
from core.engine.options import arguments_of
from core.engine.step import autocast
from core.errors import InputError, as_written
from core.losses import box_masks, gaussian_masks, needs_mask
from core.models.reid import build_reid_model
from core.models.weights import Unfilled, best_weights
from core.retrieval.ranking import Labels, rank_features, summarise
from core.retrieval.threshold import choose_threshold

BACKGROUNDS = {"synthetic": "plain", "synthetic_hard": "hard"}  # of the sets that are rendered


class ReIDData(NamedTuple):
    """A data set as a run uses it, or several as one.

    train, query, gallery: as in `ReIDDataset`. name: as in `--dataset`. root: its own folder; of several, the list of
    theirs. protocol: of its evaluation.
    """

    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]
    name: str
    root: str | list[str]
    protocol: str


def load_data(args, say=print, training=False):
    """`ReIDData` that `--dataset` and `--data` name, with the protocol of `--protocol` or the set's own.

    With `training` it must have training pictures, and may lack query and gallery. Without either option it is the
    synthetic baggage set, which is made first where it is missing (by rank 0). Several sets are one (`join_datasets`).
    What leaks (`core.data.leaks`) is said. Raises InputError for whatever is wrong with the folders, and where no query
    could find a match.
    """
    if args.dataset is None and args.data is not None:
        raise InputError(f"--data {args.data} needs --dataset to say how the folder is laid out, e.g. folder")
    name = args.dataset or "synthetic"
    names = name.split("+")
    dataset, root = _read_sets(names, args, say, training)
    protocols = {default_protocol(one) for one in names}
    if len(protocols) > 1 and not args.protocol:
        raise InputError(f"--dataset {name}: its sets differ in protocol; give one --protocol for all")
    dataset = readable_set(dataset, args.skip_broken, say, with_masks=training and may_read_masks(args))
    data = ReIDData(*dataset, name, root, args.protocol or protocols.pop())
    if training:
        check_training(data)
    if training and not data.query and not data.gallery:
        say(f"{name} has no query and gallery: the run trains without evaluation")
    else:
        note = check_evaluation(data, data.protocol)
        if note:
            say(note)
    looked_at = data if training else data._replace(train=[])  # what the network learned from, only its run knows
    shared_names = not set(OWN_NUMBERS).intersection(names)
    for line in distributed.on_main(lambda: reid_leaks(looked_at, data.protocol, shared_names)):
        say(line)
    return data


def _read_sets(names, args, say, training):
    """(ReIDDataset, root as in `ReIDData`) of the sets of these names, in `--data`: a folder, a list or None."""
    roots = args.data or [Path("data") / name for name in names]
    roots = roots if isinstance(roots, list) else [roots]
    if len(roots) != len(names):
        raise InputError(f"--dataset names {len(names)} sets and --data {len(roots)} folders: give one for each set")
    read = [read_set(name, root, say, args.val_fraction) for name, root in zip(names, roots, strict=True)]
    for name, (dataset, root) in zip(names, read, strict=True):
        if training and not dataset.train:
            raise InputError(f"{name} in {root} has no training pictures; it can only be evaluated")
    if len(names) == 1:
        return read[0]
    datasets, roots = zip(*read, strict=True)
    if len(set(map(os.path.realpath, roots))) < len(roots):
        raise InputError(f"--data {' '.join(roots)}: a set is given twice; give each once")
    if len(set(names)) < len(names):  # of one layout
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return join_datasets(names, datasets), list(roots)


def read_set(name, root, say, val_fraction=0.0):
    """(ReIDDataset, its own folder); by rank 0 first, where the pictures have to be made.

    val_fraction: as in `load_reid_dataset`.
    """
    root = os.path.expanduser(root)
    with distributed.main_first():
        if name in BACKGROUNDS:
            from baggage.synthetic import settle_synthetic_baggage  # core stands without it

            settle_synthetic_baggage(root, BACKGROUNDS[name], say)
        root = str(find_dataset(name, root))
        dataset = load_reid_dataset(name, root, val_fraction)
    if name == "folder" and val_fraction and is_unsplit(Path(root)):
        learned, tested = (len({sample.id for sample in part}) for part in (dataset.train, dataset.gallery))
        say(
            f"{root} has no folder test: {tested} of its {learned + tested} identities are held out as such "
            f"(--val-fraction {val_fraction:g})"
        )
    distributed.on_main(lambda: _say_unread(dataset, root, say))
    return dataset, root


def readable_set(dataset, skip_broken, say, with_masks=False):
    """The data set with the bits that it uses; with `skip_broken` without pictures that can't be read, which are said.

    with_masks: a mask that can't be read is a broken picture, too.
    """
    if skip_broken:
        dataset = _without_broken(dataset, say, with_masks)
    paths = [sample.path for part in dataset for sample in part]
    bits = distributed.on_main(lambda: bits_in_use(paths, say))
    return ReIDDataset(*([sample._replace(bits=bits) for sample in part] for part in dataset))


def _say_unread(dataset, root, say):
    """Count the pictures of kinds that are not read in the folders of `root` in which the data set's pictures lie."""
    folders = {os.path.dirname(sample.path) for part in dataset for sample in part}
    tops = sorted({os.path.relpath(folder, root).split(os.sep)[0] for folder in folders} - {os.pardir})
    files = [path for top in tops for path in list_files(os.path.join(root, top), recursive=True)]
    say_unread(files, root, say)


def _without_broken(data, say, with_masks):
    """Rank 0 reads every picture once; what it can't read is named, counted and left out on all ranks."""
    train = _readable("train", data.train, say, with_masks)
    query = _readable("query", data.query, say)
    gallery = query if data.gallery == data.query else _readable("gallery", data.gallery, say)
    return ReIDDataset(relabel(train), query, gallery)  # an identity of train may be gone


def _readable(name, samples, say, with_masks=False):
    readable, errors = distributed.on_main(lambda: split_broken(samples, with_masks))
    for error in errors:
        say(f"left out: {error}")
    if errors:
        say(f"--skip-broken: {len(errors)} of {len(samples)} {name} pictures left out")
    return readable


def describe(data):
    """One line: pictures and identities of each part."""
    parts = {"train": data.train, "query": data.query, "gallery": data.gallery}
    return ", ".join(
        f"{name} {len(part)} pictures of {len({s.id for s in part})} identities" for name, part in parts.items()
    )


def may_read_masks(args):
    """Whether a training may read the data's own masks: `--mask-target` is settled only when the data is known."""
    regressed = args.mask_target in (None, "instance") and needs_mask(args.loss)
    return (regressed or args.hide_background > 0) and not args.mask_checkpoint


def reads_masks(args):
    """Whether a training reads the masks of its samples, the data's own or predicted ones."""
    return args.mask_target in ("instance", "predicted") or args.hide_background > 0


def build_train_loader(args, data, device):
    """PK batches of augmented pictures; `loader.batch_sampler.set_epoch` starts an epoch."""
    sampler = PKSampler(
        [sample.id for sample in data.train],
        args.ids_per_batch,
        args.images_per_id,
        seed=args.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        batches_per_epoch=args.iterations_per_epoch or None,
    )
    transform = build_transform(args.height, args.width, training=True, **arguments_of(build_transform, args))
    images = ReIDImages(data.train, transform, seed=args.seed, with_masks=reads_masks(args))
    return build_loader(images, collate, device, args.workers, batch_sampler=KeyedBatches(sampler))


def build_eval_loader(args, samples, device, normalisation=None):
    """This rank's share of `samples`, every world_size-th picture, without augmentation.

    normalisation: a checkpoint's `mean` and `std`; None for those of training.
    """
    images = ReIDImages(samples, build_transform(args.height, args.width, training=False, **(normalisation or {})))
    share = range(distributed.rank(), len(samples), distributed.world_size())
    return build_loader(images, collate, device, args.workers, batch_size=args.eval_batch_size, sampler=share)


def target_masks(batch, kind, size, sigma_ratio, device):
    """The masks that a decoder learns to predict, (B, 1, h, w) in [0, 1]; None where `kind` is None.

    Args:
        batch: collated samples with `box` (B, 4) in [0, 1] and, for "instance", `mask` (B, 1, H, W).
        kind: "gaussian" and "box" are made from the box, "instance" and "predicted" are the sample's own mask.
        size: (h, w) of the decoder's output.
    """
    if kind is None:
        return None
    if kind in ("instance", "predicted"):
        masks = batch["mask"].to(device).float()
        return torch.nn.functional.interpolate(masks, size, mode="bilinear")
    boxes = batch["box"].to(device)
    return gaussian_masks(boxes, size, sigma_ratio) if kind == "gaussian" else box_masks(boxes, size)


@torch.inference_mode()
def extract_features(model, loader, device, *, amp="off", flip=False, description="features"):
    """Embeddings of all pictures of `loader.dataset` in their order, on every rank: (N, D) float32.

    Each rank embeds its share (see `build_eval_loader`), then all exchange. `flip` averages with the mirrored picture.
    """
    model.eval()
    features = [torch.zeros(0, model.embedding_dim, device=device)]
    bar = tqdm(batches(loader), description, len(loader), leave=False, disable=not progress_is_shown())
    for batch in bar:
        pictures = batch["image"].to(device, non_blocking=True)
        with autocast(device, amp):
            embedding = model(pictures).embedding.float()  # (B, D)
            if flip:
                embedding = (embedding + model(pictures.flip(-1)).embedding.float()) / 2
        features.append(embedding)
    return distributed.interleave(torch.cat(features))


def query_gallery_loaders(args, data, device, normalisation=None):
    """A `build_eval_loader` each; the same one where a set is both (VehicleID), so that it is embedded once."""
    query = build_eval_loader(args, data.query, device, normalisation)
    return query, query if data.gallery == data.query else build_eval_loader(args, data.gallery, device, normalisation)


def extract_query_gallery(model, loaders, device, **how):
    """(Q, D) and (G, D) embeddings of the pictures of `query_gallery_loaders`; `how` as in `extract_features`."""
    query = extract_features(model, loaders[0], device, description="query", **how)
    if loaders[1] is loaders[0]:
        return query, query
    return query, extract_features(model, loaders[1], device, description="gallery", **how)


def labels_of(samples):
    """`Labels` of N samples: their identities and cameras, (N,) each."""
    return Labels(torch.tensor([s.id for s in samples]), torch.tensor([s.camera for s in samples]))


def rank_embeddings(query, gallery, data, metric):
    """RankingResult of the embeddings (Q, D), (G, D) of `data`; each rank answers its share of the queries.

    A query's answer is a few numbers, so that is what travels; VehicleID, whose queries are also its gallery, is
    answered by every rank for itself.
    """
    shares, own = _share_of_queries(data.protocol)
    query_labels, gallery_labels = labels_of(data.query).at(own), labels_of(data.gallery)
    answers = rank_features(query[own], gallery, query_labels, gallery_labels, data.protocol, metric=metric)
    if shares > 1:
        tensors = {name: value for name, value in answers._asdict().items() if name != "gallery_size"}
        answers = answers._replace(**{name: distributed.interleave(value) for name, value in tensors.items()})
    return summarise(answers, data.protocol)


def _share_of_queries(protocol):
    """(how many processes share the queries, slice of those that are this rank's)."""
    shares = 1 if protocol == "vehicleid" else distributed.world_size()
    return shares, slice(distributed.rank() % shares, None, shares)


class Evaluation(NamedTuple):
    """metrics: as `RankingResult.metrics` gives them. query (Q, D), gallery (G, D): the embeddings behind them."""

    metrics: dict
    query: torch.Tensor
    gallery: torch.Tensor


def evaluate(network, loaders, data, args, device):
    """Evaluation under `data.protocol` and `args.distance`, the same on every rank; None where there are no queries."""
    if not data.query:
        return None
    query, gallery = extract_query_gallery(network, loaders, device, amp=args.amp)
    return Evaluation(rank_embeddings(query, gallery, data, args.distance).metrics(), query, gallery)


def threshold(query, gallery, data, args):
    """`Threshold` between one object and two at `--false-accept-rate`, of the embeddings (Q, D), (G, D) of `data`.

    None where all pictures are of one object. The ranks share the queries, and each gets the answer.
    """
    if len({sample.id for sample in data.query + data.gallery}) < 2:
        return None
    shares, own = _share_of_queries(data.protocol)
    return choose_threshold(
        query[own], gallery, labels_of(data.query).at(own), labels_of(data.gallery), data.protocol,
        false_accept_rate=args.false_accept_rate, of_others=args.false_accept_of_others, metric=args.distance,
        add_up=distributed.all_reduce_sum if shares > 1 else None,
    )  # fmt: skip


def freeze(network, part, frozen, batch_norm=False):
    """Let `part` of `network` learn or not.

    Args:
        part: submodule whose parameters stop learning while `frozen`.
        batch_norm: every BatchNorm keeps its statistics (its weight and bias still learn).

    Returns:
        the modules that training must keep in evaluation mode.
    """
    for parameter in part.parameters():
        parameter.requires_grad_(not frozen)
    kept = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)] if batch_norm else []
    return [*kept, part] if frozen else kept


def checkpoint_state(network, network_options, criterion, step, best, args, data, threshold):
    """Everything that a run needs to go on, and that `evaluate.py` and `demo.py` need to use the network alone.

    best: the highest mAP so far. threshold: `Threshold` of the last evaluation, or None.
    """
    return {
        "kind": "reid",
        "best": best,
        "model": network.state_dict(),
        "loss": criterion.state_dict(),
        **step.state_dict(),
        "args": {**all_options(args), "data": _absolute(data.root)},
        "network": network_options,
        "input_size": [args.height, args.width],
        "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
        "identities": identities_of(data.train),
        "bits": data.train[0].bits,
        "distance": args.distance,
        "threshold": threshold and threshold._asdict(),
    }


def _absolute(root):
    return list(map(_absolute, root)) if isinstance(root, list) else str(Path(root).absolute())


def identities_of(samples):
    """The name of each training identity 0 .. C-1."""
    names = {sample.id: sample.name for sample in samples}
    return [names[number] for number in range(len(names))]


def resume(state, path, network, network_options, criterion, step, data):
    """Continue from a checkpoint.

    Raises InputError if it was trained with another network or on other identities, naming what differs: a class of
    its classifier is the place of an identity among all, so one that is new, gone or renamed shifts those behind it.
    """
    saved, own = state["identities"], identities_of(data.train)
    if saved != own:
        other = sorted(set(saved) ^ set(own))[:4] or "another order"
        raise InputError(
            f"{path} was trained on {len(saved)} identities, the data have {len(own)}, and they differ ({other}); give "
            "the data it was started with, or begin a new run from its weights"
        )
    parameters = inspect.signature(build_reid_model).parameters.values()  # a checkpoint from before one has its default
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
    state = {**state, "network": defaults | state["network"]}
    check_same_network(state, path, network_options)
    restore(state, path, ("model", network), ("loss", criterion), (None, step))


def network_from_checkpoint(path, device, state=None):
    """The trained network of a ReID checkpoint, averaged weights where it has them, ready to embed; and its state.

    state: what `load_checkpoint` made of the path, where that is known already.
    """
    state = state or load_checkpoint(path, "reid")
    with as_written(path, "get it again"):
        with Unfilled():
            network = build_reid_model(**state["network"])
        network.load_state_dict(best_weights(state))
    return network.to(device).eval(), state
