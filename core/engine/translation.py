"""What a run of picture translation works on and leaves behind: two domains, checkpoints, sheets, a translated set."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from core.data.images import list_files, read_image
from core.data.loading import batches, build_loader
from core.data.reid_images import ReIDImages, collate
from core.data.samplers import KeyedBatches, ShuffledBatches
from core.data.samples import ReIDDataset, Sample
from core.data.transforms import build_transform, denormalise
from core.engine import distributed, reid
from core.engine.checkpoint import all_options
from core.engine.log import progress_is_shown
from core.engine.reid_pictures import spread
from core.engine.step import autocast
from core.errors import InputError, as_written
from core.files import make_folder
from core.models.gan import ResNetGenerator
from core.models.weights import best_weights
from core.retrieval.domain_distance import frechet_distance
from core.visualize.retrieval import column_sheet
from core.visualize.sheet import JPEG, to_pictures

NORMALISATION = {"mean": [0.5] * 3, "std": [0.5] * 3}  # [0, 1] -> [-1, 1]
JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
LIST_SUFFIXES = (".txt", ".json", ".csv", ".xml")  # of files that belong to a data set and are no pictures
NUM_ROWS = 8  # pictures of each domain on a sheet


class Domain(NamedTuple):
    """One of the two looks. train: its pictures to learn from; dataset: all of its set, other cameras included."""

    name: str
    root: str
    cameras: list[int] | None  # None: all
    train: list[Sample]
    dataset: ReIDDataset

    @property
    def spec(self):
        return f"{self.name}:{os.path.abspath(self.root)}"


def load_domains(args, say):
    """(source, target); what was settled goes into `args`, which the run folder and the checkpoints keep."""
    if args.source is None and args.target is None:
        args.source = args.target = "synthetic"
        # Before and after security: a camera of `core.data.mvb` is 2 * view + (1 after security).
        args.source_cameras, args.target_cameras = (list(range(side, 20, 2)) for side in (0, 1))
    if args.source is None or args.target is None:
        raise InputError("--source and --target belong together: give both, or neither for bags of our own")
    if args.recipe == "quick":
        say("recipe quick: small pictures and few epochs, for a whole run in minutes; --recipe spgan trains in earnest")
    source = load_domain("source", args.source, args.source_cameras, args, say)
    target = load_domain("target", args.target, args.target_cameras, args, say)
    known = {os.path.realpath(sample.path) for sample in source.train}
    shared = [sample.path for sample in target.train if os.path.realpath(sample.path) in known]
    if shared:
        raise InputError(
            f"{len(shared)} training pictures are both source and target, the first is {shared[0]}: give two sets, or "
            "--source-cameras and --target-cameras that have none in common"
        )
    args.source, args.target = source.spec, target.spec
    args.name = args.name or f"{args.method}-{source.name}-to-{target.name}"
    processes = distributed.world_size()
    say(
        f"batch: {args.batch_size} pictures of each x {processes} processes x {args.accumulate} batches an update = "
        f"{args.batch_size * processes * args.accumulate}; {args.method}, {args.height}x{args.width} pixels"
    )
    return source, target


def load_domain(role, spec, cameras, args, say):
    """The `Domain` that "name:root" means, or a name alone for data/<name>. role: "source" or "target", for messages.

    Raises InputError for whatever is wrong with the folder, and where there is no picture to train on.
    """
    name, _, root = spec.partition(":")
    dataset, root = reid.read_set(name, root or Path("data") / name, say)
    dataset = reid.readable_set(dataset, args.skip_broken, say)
    train = [sample for sample in dataset.train if cameras is None or sample.camera in cameras]
    if not train:
        seen = ", ".join(map(str, sorted({sample.camera for sample in dataset.train})))
        raise InputError(
            f"--{role} {spec}: no training pictures"
            + (f" of the cameras {', '.join(map(str, cameras))}; it has those of {seen}" if seen else "; give another")
        )
    say(f"{role}: {name} in {root}: {len(train)} pictures of cameras {sorted({sample.camera for sample in train})}")
    return Domain(name, root, cameras, train, dataset)


class BothDomains:
    """Batches of the two sets side by side, as `Epoch` takes them: source and target (B, 3, H, W), and the paths."""

    def __init__(self, args, source, target, device):
        passes = [-(-len(domain.train) // args.batch_size) for domain in (source, target)]
        count = args.iterations_per_epoch or -(-max(passes) // distributed.world_size())
        self.loaders = [
            _training_loader(args, domain.train, f"{role} {args.seed}", count, device)
            for role, domain in (("source", source), ("target", target))
        ]
        self.batch_sampler = self

    def set_epoch(self, epoch):
        for loader in self.loaders:
            loader.batch_sampler.set_epoch(epoch)

    def __len__(self):
        return len(self.loaders[0])

    def __iter__(self):
        for source, target in zip(*map(batches, self.loaders), strict=True):
            yield {"source": source["image"], "target": target["image"], "path": source["path"] + target["path"]}


def _training_loader(args, samples, seed, num_batches, device):
    place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    sampler = ShuffledBatches(len(samples), args.batch_size, seed=seed, batches_per_epoch=num_batches, **place)
    transform = build_transform(args.height, args.width, training=True, flip=args.flip, pad=0, **NORMALISATION)
    images = ReIDImages(samples, transform, seed=seed)
    return build_loader(images, collate, device, args.workers, batch_sampler=KeyedBatches(sampler))


def exchange(pool, images, coin):
    """`pool.exchange` for a pool that all ranks hold alike: so its content does not depend on their number.

    images: (B, 3, H, W), of this rank, which gets as many. coin: a generator in the same state on every rank.
    """
    everyone = distributed.all_gather_variable(images)  # (W * B, 3, H, W)
    return pool.exchange(everyone, coin).chunk(distributed.world_size())[distributed.rank()]


def checkpoint_state(networks, network_options, generator_step, judge_step, pools, args):
    """Everything that a run needs to go on, and that `generator_from_checkpoint` needs. pools: by name."""
    return {
        "kind": "gan",
        "model": networks.state_dict(),
        **generator_step.state_dict(),
        "judges": judge_step.state_dict(),
        **{name: pool.state_dict() for name, pool in pools.items()},
        "args": all_options(args),
        "network": network_options,
        "input_size": [args.height, args.width],
        "normalisation": NORMALISATION,
    }


def generator_from_checkpoint(state, path, device):
    """The generator from source to target of a checkpoint's content, its averaged weights where it has them."""
    with as_written(path, "get it again"):
        options = state["network"]
        network = ResNetGenerator(options["channels"], options["blocks"])
        weights = {key.removeprefix("to_target."): value for key, value in best_weights(state).items()}
        network.load_state_dict({key: value for key, value in weights.items() if key.startswith("G.")})
    return network.to(device).eval()


@torch.inference_mode()
def draw(path, generators, domains, args, device):
    """A sheet of pictures spread over both sets, each beside its translation and what comes back of that.

    generators: to the target, to the source. domains: source, target.
    """
    transform, columns = build_transform(args.height, args.width, training=False, **NORMALISATION), {}
    count = min(NUM_ROWS, *(len(domain.train) for domain in domains))
    for name, domain, there, back in zip(("source", "target"), domains, generators, generators[::-1], strict=True):
        images = ReIDImages(domain.train, transform)
        pictures = torch.stack([images[index]["image"] for index in spread(len(images), count)]).to(device)
        with autocast(device, args.amp):
            translated = there(pictures)  # (N, 3, H, W)
            returned = back(translated)
        headings = (name, f"{name} translated", f"{name} and back")
        for heading, column in zip(headings, (pictures, translated, returned), strict=True):
            columns[heading] = to_pictures(denormalise(column.float(), **NORMALISATION))
    column_sheet(columns, title="Pictures, translated and back again").save(path)


def check_new_folder(path):
    """Raise InputError, on every rank, where a data set can't be written to `path`: it is there, or has no place."""

    def check():
        if os.path.lexists(path):
            raise InputError(f"--translate {path} is there already, and nothing is overwritten: name a new folder")
        make_folder(Path(path).absolute().parent)

    distributed.on_main(check)


def translate_set(generator, source, folder, size, note, args, device):
    """Write the source's whole data set into the new `folder`, the pictures of its cameras translated.

    Layout, names and sizes of the pictures stay, so boxes and masks stay true; JPEG stays JPEG, all else becomes PNG
    under its old name. Pictures of other cameras and the set's lists are copied; translation.json says where the set
    comes from. The ranks share the pictures. All is written beside the folder first: it is there whole or not at all.

    Args:
        size: height and width in which the generator sees the pictures.
        note: dict for translation.json.
    """
    folder = Path(folder).absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    samples = {sample.path: sample for part in source.dataset for sample in part}
    chosen = [sample for sample in samples.values() if source.cameras is None or sample.camera in source.cameras]
    lists = [path for path in list_files(source.root, recursive=True) if path.endswith(LIST_SUFFIXES)]
    copied = {*samples, *lists} - {sample.path for sample in chosen}

    def begin():
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        for path in {*samples, *lists}:
            _place(path, source.root, partial).parent.mkdir(parents=True, exist_ok=True)

    def end():
        for path in copied:
            shutil.copyfile(path, _place(path, source.root, partial))
        text = json.dumps({"source": source.spec, "cameras": source.cameras, **note, "pictures": len(chosen)}, indent=2)
        (partial / "translation.json").write_text(text + "\n", encoding="utf-8")
        os.rename(partial, folder)

    try:
        distributed.on_main(begin)
        _write_translations(generator, chosen, source.root, partial, size, args, device)
        distributed.barrier("translated pictures")
        distributed.on_main(end)
    except OSError as error:
        raise InputError(
            f"can't write {folder}: {error.strerror or error}; make room, or give another place"
        ) from error
    finally:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)


def _place(path, root, folder):
    return folder / os.path.relpath(path, root)


@torch.inference_mode()
def _write_translations(generator, samples, root, folder, size, args, device):
    """This rank's share of the pictures."""
    loader = reid.build_eval_loader(_sized(args, size), samples, device, NORMALISATION)
    for batch in tqdm(batches(loader), "translation", len(loader), leave=False, disable=not progress_is_shown()):
        with autocast(device, args.amp):
            images = generator(batch["image"].to(device))  # (B, 3, H, W)
        pictures = to_pictures(denormalise(images.float(), **NORMALISATION))
        for picture, path, index in zip(pictures, batch["path"], batch["index"].tolist(), strict=True):
            full = picture.resize(read_image(path, samples[index].bits).size, Image.Resampling.LANCZOS)
            is_jpeg = path.lower().endswith(JPEG_SUFFIXES)
            full.save(_place(path, root, folder), **({"format": "JPEG", **JPEG} if is_jpeg else {"format": "PNG"}))


def _sized(args, size):
    """What `reid.build_eval_loader` wants to know, for pictures of this height and width."""
    return SimpleNamespace(height=size[0], width=size[1], workers=args.workers, eval_batch_size=args.batch_size)


def translate(generator, domains, size, note, distance_in, args, device, say):
    """`translate_set` of the first domain into `--translate`, with a line that says what to do next.

    distance_in: None, or a ReID network and the content of its checkpoint: then the Frechet distances to the training
    pictures of the second domain are said, in the network's embeddings, before and after.
    """
    source = domains[0]
    translate_set(generator, source, args.translate, size, note, args, device)
    layout = "mvb" if source.name in reid.BACKGROUNDS else source.name
    say(f"translated set: {args.translate}; next: python train_reid.py --dataset {layout} --data {args.translate}")
    if distance_in is None:
        return
    network, state = distance_in
    translated = [
        s._replace(path=str(_place(s.path, source.root, Path(args.translate))), bits=16) for s in source.train
    ]
    before, after, wanted = (
        reid.extract_features(
            network,
            reid.build_eval_loader(_sized(args, state["input_size"]), samples, device, state["normalisation"]),
            device,
            amp=args.amp,
        )
        for samples in (source.train, translated, domains[1].train)
    )
    before, after = frechet_distance(before, wanted), frechet_distance(after, wanted)
    say(
        f"Frechet distance to the target, in features of {args.feature_distance}: source {before:.4f}, translated "
        f"{after:.4f}"
    )
