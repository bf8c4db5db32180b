"""A folder of runs -> one table: the best epoch of each run, and every evaluation of its checkpoints."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from core.engine.log import read_log
from core.engine.tables import Table
from core.errors import InputError, as_written

HEAD = ["run", "data", "network", "what", "mAP", "Rank-1", "mask AP", "box AP", "images/s"]


class Row(NamedTuple):
    """The columns of `HEAD`: metrics in per cent, images/s of training; None where there is none."""

    run: str
    data: str
    network: str
    what: str
    map: float | None = None
    rank1: float | None = None
    mask_ap: float | None = None
    box_ap: float | None = None
    images_per_second: float | None = None


def summarise_runs(folder):
    """`Table` of what lies below `folder`: each run's best epoch (log.csv, args.json), and under it its evaluations.

    The runs of ReID come first, the best mAP above; then those of Mask R-CNN by mask AP; then those without either. An
    evaluation (metrics.json) that belongs to no run there, as one of raw pixels, stands for itself.
    Raises InputError where there is nothing, or a file is not as a run left it.
    """
    folder = Path(folder)
    runs = {path.parent.resolve(): [_training(path.parent, folder)] for path in sorted(folder.rglob("log.csv"))}
    for path in sorted(folder.rglob("metrics.json")):
        with as_written(path):
            content = _read_json(path, "args", "results")
            checkpoint = content["args"].get("checkpoint")
            if isinstance(checkpoint, list):  # a table of many, each of which has its own file
                continue
            homes = [Path(checkpoint or path).resolve().parent, *path.resolve().parents]
            home = next((home for home in homes if home in runs), path)
            own = runs.setdefault(home, [])
            first = own[0] if own else Row(str(checkpoint or "raw pixels"), "", "", "")
            own.extend(_evaluations(content, first))
    if not runs:
        raise InputError(f"{folder}: no run in it (no log.csv, no metrics.json); give the folder that holds runs")
    return Table(HEAD, [row for rows in sorted(runs.values(), key=_rank) for row in rows])


def _rank(rows):
    first = rows[0]
    return first.map is None, first.mask_ap is None, -(first.map or first.mask_ap or 0), first.run


def _training(run, folder):
    """The `Row` of a run's best epoch."""
    args = _read_json(run / "args.json")
    epochs = [{key: float(value) for key, value in row.items() if value} for row in read_log(run / "log.csv")]
    measured = [epoch for epoch in epochs if not math.isnan(_score(epoch))]
    best = max(measured, key=_score, default={})
    what = f"training, epoch {best.get('epoch', 0):.0f}" if best else "training, not evaluated"
    name = str(run.relative_to(folder)) if run != folder else run.resolve().name
    speed = {"images_per_second": best.get("images_per_second")}
    with as_written(run / "args.json"):
        network = [args.get("model", "bot").replace("bot", ""), args.get("backbone") or args.get("backbone_name") or ""]
        return Row(name, _data_of(args), " ".join(network).strip(), what, **_metrics(best), **speed)


def _score(epoch):
    return epoch.get("mAP", epoch.get("mask_AP", math.nan))


def _evaluations(content, first):
    """A `Row` for each way in which a checkpoint was evaluated; first: the row of its run."""
    args, results = content["args"], content["results"]
    row = first._replace(data=_data_of(args), images_per_second=None)
    stem = Path(args.get("checkpoint") or "evaluation").stem
    if "classes" in content:
        return [row._replace(what=stem, **_metrics(results))]
    return [row._replace(what=f"{stem}: {how}", **_metrics(metrics)) for how, metrics in results.items()]


def _metrics(numbers):
    found = {"map": "mAP", "rank1": "rank1", "mask_ap": "mask_AP", "box_ap": "box_AP"}
    return {name: 100 * float(numbers[key]) if numbers.get(key) is not None else None for name, key in found.items()}


def _data_of(args):
    """How people call the data: its --dataset, or the name of its annotations."""
    path = args.get("annotations") or args.get("val_annotations") or args.get("train_annotations") or ""
    return str(args.get("dataset") or Path(path).stem)


def _read_json(path, *needed):
    with as_written(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in needed):
            raise ValueError(f"it lacks {' or '.join(needed)}" if needed else "it holds no options")
    return content
