"""Published re-identification data sets, each read as published, and the checks that come before a run.

Identities are relabelled 0 .. C-1 for training and keep their own number in query and gallery. Cameras count from 0.
"""

import os
import re
from collections import Counter, defaultdict
from functools import partial
from typing import NamedTuple

from core.data.folder import PARTS, VAL_FRACTION, load_folder, load_pictures
from core.data.mot17 import cut_persons
from core.data.mvb import INSIDE, load_mvb
from core.data.samples import (
    ReIDDataset,
    Sample,
    check_on_disk,
    find_root,
    listed_path,
    read_pictures,
    read_text,
    relabel,
)
from core.errors import InputError


class MarketLayout(NamedTuple):
    """How a data set differs from Market-1501, whose naming the others took over.

    folders: published names of its own folder and of the one around it, as torchreid, fast-reid, LightMBN and
    OpenUnReID have them. example: a file name of it. train, query, gallery: sub-folders (None: it has no such part).
    first_camera: the number that becomes camera 0.
    """

    folders: tuple[str, ...]
    example: str
    train: str = "bounding_box_train"
    query: str | None = "query"
    gallery: str | None = "bounding_box_test"
    first_camera: int = 1

    @property
    def parts(self):
        return [part for part in (self.train, self.query, self.gallery) if part]


# In all of them a name begins <identity>_c<camera>; what follows (sequence, frame, box) plays no part here.
MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")
OWN_NUMBERS = ("msmt17",)  # train and test number their identities each from 0: the same number is not the same person
JUNK = -1  # a detection that is neither a person of the set nor a distractor; ignored in every part

# identities (train + test), pictures (train, query, gallery), cameras
MARKET_LAYOUTS = {
    # 751 + 750; 12,936, 3,368, 15,913: 19,732 in the folder less 3,819 junk; identity 0: 2,798 distractors; 6
    "market1501": MarketLayout(("Market-1501-v15.09.15", "Market-1501", "market1501"), "0002_c1s1_000451_03.jpg"),
    # 702 + 702 (and 408 distractors with numbers of their own); 16,522, 2,228, 17,661; 8
    "dukemtmc": MarketLayout(("DukeMTMC-reID", "dukemtmc-reid", "dukemtmcreid", "dukemtmc"), "0001_c2_f0046182.jpg"),
    # 767 + 700; detected 7,365, 1,400, 5,332; labeled 7,368, 1,400, 5,328; 2. From the parent, `detected` is read,
    # the harder and the usual one; for the other give its folder, .../labeled
    "cuhk03_np": MarketLayout(("detected", "CUHK03_detected", "cuhk03-np", "CUHK03-NP", "cuhk03"), "0001_c1_1.png"),
    # 576 + 200; 37,778, 1,678, 11,579; 20
    "veri776": MarketLayout(
        ("VeRi", "VeRi_with_plate", "VeRi-776", "veri", "veri776"),
        "0001_c001_00016450_0.jpg",
        "image_train",
        "image_query",
        "image_test",
    ),
    # 410 + 856; 9,840, 5,136, 30,816; 6, numbered 3, 4, 8, 10, 11, 12 in subset1 as OpenUnReID distributes it
    "personx": MarketLayout(("subset1", "personx", "PersonX"), "0001_c3_12.jpg"),
    # 1,362 for training alone, 192,150; numbered from 6: rendered to go with CityFlow, whose test is another set
    "vehiclex": MarketLayout(("AIC20_ReID_Simulation", "vehiclex"), "0001_c006_1.jpg", "image_train", None, None, 6),
}


# Each reader takes the data set's own folder, a Path -----------------------------------------------------------------


def load_market_like(layout, root):
    """Read a data set of MARKET_LAYOUTS. Junk (identity -1) is dropped; distractors (0) stay in the gallery.

    Here and in the other sets `train` may lack; the set can then be evaluated on."""

    def parse(file_name):
        match = MARKET_NAME.match(file_name)
        return match and (match[1], int(match[1]), int(match[2]) - layout.first_camera)

    def read(part):
        folder, may_lack = os.path.join(root, part or ""), part == layout.train
        samples = read_pictures(folder, parse, layout.example, may_lack) if part else []
        return [sample for sample in samples if sample.id != JUNK]

    train, query, gallery = (read(part) for part in (layout.train, layout.query, layout.gallery))
    return ReIDDataset(relabel(train), query, gallery)


def read_list(path, folder, suffix="", camera_of=lambda picture: 0, may_lack=False):
    """Samples of a text file with lines `<picture> <identity>`.

    Args:
        path: the text file.
        folder: where the pictures are.
        suffix: what the listed names lack, e.g. ".jpg".
        camera_of: listed name -> camera; ValueError or IndexError where the name does not say.
        may_lack: where the file, or every picture, is not there, there are no samples.

    Raises:
        InputError: the file is missing or empty, a line is of another form, a picture is not on disk.
    """
    samples = []
    if may_lack and not os.path.exists(path):
        return samples
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            picture, identity = line.split()
            sample = Sample(picture + suffix, int(identity), camera_of(picture), name=identity)
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}, line {number}: {line.strip()!r} is not '<picture> <identity>'") from error
        samples.append(sample._replace(path=listed_path(folder, sample.path, f"{path}, line {number}: {picture}")))
    if not samples:
        raise InputError(f"{path}: lists no pictures")
    return check_on_disk(samples, path, may_lack)


MSMT17_FOLDERS = ("train", "test", "mask_train_v2", "mask_test_v2")


def load_msmt17(root):
    """MSMT17 (Wei et al. 2018): 1,041 + 3,060 identities; 32,621, 11,659, 82,161 pictures; 15 cameras.

    V1 (`train`, `test`) and V2 (`mask_train_v2`, `mask_test_v2`, faces blurred) share their lists; where both lie side
    by side, V1 is read. A name such as 0000/0000_000_01_0303morning_0008_0.jpg has the camera in its third field.
    Training takes list_train (30,248) and list_val (2,373) together: the 32,621 of the paper, on which most published
    results stand. torchreid and fast-reid leave list_val out unless told to.
    """
    is_first = any((root / folder).is_dir() for folder in MSMT17_FOLDERS[:2])
    train_folder, test_folder = MSMT17_FOLDERS[:2] if is_first else MSMT17_FOLDERS[2:]

    def read(part, folder, may_lack=False):
        path, camera_of = root / f"list_{part}.txt", lambda name: int(name.split("_")[2]) - 1
        return read_list(path, str(root / folder), camera_of=camera_of, may_lack=may_lack)

    train = read("train", train_folder, may_lack=True)
    train += read("val", train_folder) if train else []
    return ReIDDataset(relabel(train), read("query", test_folder), read("gallery", test_folder))


def load_vehicleid(root, test_size=800):
    """PKU VehicleID (Liu et al. 2016): 13,164 training identities, 113,346 pictures; the data names no cameras.

    Test lists: 800 identities with 6,493 pictures (small; `vehicleid`), 1,600 with 13,377 (`vehicleid_medium`), 2,400
    with 19,777 (`vehicleid_large`). Query and gallery are both the whole list: the protocol `vehicleid` draws one
    gallery picture of each identity, asks with the others, and repeats.
    """
    lists, folder = root / "train_test_split", str(root / "image")
    train = read_list(lists / "train_list.txt", folder, ".jpg", may_lack=True)
    test = read_list(lists / f"test_list_{test_size}.txt", folder, ".jpg")
    return ReIDDataset(relabel(train), test, list(test))


def load_mot17(root):
    """The persons of MOT17's training sequences, which `cut_persons` cuts out; no person is seen by two cameras."""
    return load_market_like(MarketLayout((), "020001_c2_000001.jpg"), cut_persons(root))


VEHICLEID = (("VehicleID_V1.0", "PKU-VehicleID", "VehicleID", "vehicleid"), ("train_test_split", "image"))
# Its reader, and what `find_root` knows it by: published names of its folder, and what lies in that.
DATASETS = {
    **{name: (partial(load_market_like, it), it.folders, it.parts) for name, it in MARKET_LAYOUTS.items()},
    "msmt17": (load_msmt17, ("MSMT17_V1", "MSMT17_V2", "msmt17"), MSMT17_FOLDERS),
    "mot17": (load_mot17, ("MOT17", "mot17"), ("train", "reid")),
    "vehicleid": (load_vehicleid, *VEHICLEID),
    "vehicleid_medium": (partial(load_vehicleid, test_size=1600), *VEHICLEID),
    "vehicleid_large": (partial(load_vehicleid, test_size=2400), *VEHICLEID),
    "mvb": (load_mvb, ("MVB", "mvb"), INSIDE),
    # Of the XJTU-SuitcaseReID project, whose numbers are those of the protocol market1501 (a camera is a view). Here
    # the default drops no camera, as for every baggage set.
    "suitcase": (load_mvb, ("SuitcaseReID_Processed",), INSIDE),
    "folder": (load_folder, (), (".",)),
    "pictures": (load_pictures, (), (".",)),
    "synthetic": (load_mvb, ("MVB",), INSIDE),
    "synthetic_hard": (load_mvb, ("MVB",), INSIDE),
}


def find_dataset(name, root):
    """A data set's own folder, a Path: `root`, or where its published name is below that; raises as `find_root`."""
    _check_name(name)
    return find_root(root, *DATASETS[name][1:], name)


def load_reid_dataset(name, root, val_fraction=VAL_FRACTION):
    """Read a data set.

    Args:
        name: one of DATASETS.
        root: its folder, or one around it (`find_dataset`).
        val_fraction: of the identities of a `folder` that nobody split, to be tested on.

    Returns:
        ReIDDataset. vehiclex has no query and gallery; a `folder` may be without train.

    Raises:
        InputError: an unknown name, or data that is missing, incomplete or not as published; one line says what.
    """
    root = find_dataset(name, root)
    if name != "folder":
        return _in_int64(DATASETS[name][0](root))
    if not any((root / part).exists() for part in PARTS):  # the trap: its folders would pass for identities
        for other, (_, _, inside) in DATASETS.items():
            if inside != (".",) and any((root / part).exists() for part in inside):
                raise InputError(f"{root}: is laid out as the data set {other}, not as folders of identities")
    return load_folder(root, val_fraction)


def _in_int64(dataset):
    """The data set as it is, or with identities and cameras numbered anew where a number is too long for a tensor."""
    ids = {sample.id for sample in (*dataset.query, *dataset.gallery)}
    cameras = {sample.camera for part in dataset for sample in part}
    if all(abs(number) < 2**63 for number in ids | cameras):
        return dataset
    ids, cameras = _numbers(ids), _numbers(cameras)
    train, *tested = ([sample._replace(camera=cameras[sample.camera]) for sample in part] for part in dataset)
    return ReIDDataset(train, *([sample._replace(id=ids[sample.id]) for sample in part] for part in tested))


def join_datasets(names, datasets):
    """Several data sets as one, to be trained and searched together.

    Nothing is merged: identities and cameras are numbered anew, and an identity is named `<name>/<its own name>`.
    The queries of each set are asked of the galleries of all.

    Args:
        names: one for each data set, all different.
        datasets: list of ReIDDataset.
    """
    parts = [[(place, s) for place, dataset in enumerate(datasets) for s in dataset[part]] for part in range(3)]
    cameras = _numbers((place, s.camera) for part in parts for place, s in part)
    learned, tested = (_numbers((place, s.id) for place, s in part) for part in (parts[0], parts[1] + parts[2]))

    def apart(place, sample, ids):
        camera = cameras[place, sample.camera]
        return sample._replace(id=ids[place, sample.id], camera=camera, name=f"{names[place]}/{sample.name}")

    every = zip(parts, (learned, tested, tested), strict=True)
    return ReIDDataset(*([apart(place, sample, ids) for place, sample in part] for part, ids in every))


def _numbers(keys):
    return {key: number for number, key in enumerate(sorted(set(keys)))}


def default_protocol(name):
    """How a data set is evaluated unless the person says otherwise: "market1501", "no_camera" or "vehicleid"."""
    _check_name(name)
    if name.startswith("vehicleid"):
        return "vehicleid"
    without = ("mot17", "mvb", "suitcase", "folder", "pictures", "synthetic", "synthetic_hard")
    return "no_camera" if name in without else "market1501"


def _check_name(name):
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}; known are {', '.join(sorted(DATASETS))}")


def check_training(dataset):
    """Raise InputError where nothing can be learnt: fewer than two identities. One picture of an identity is enough."""
    if not dataset.train:
        raise InputError("the data set has no training pictures; it can only be evaluated")
    if len({sample.id for sample in dataset.train}) < 2:
        first = dataset.train[0]
        raise InputError(
            f"all {len(dataset.train)} training pictures are of one identity, {first.name} ({first.path}, ...); "
            "telling apart needs two or more"
        )


def check_evaluation(dataset, protocol):
    """Look whether queries can find anything before a run spends hours on it.

    Args:
        dataset: ReIDDataset.
        protocol: "market1501" (a match of the query's own camera does not count), "no_camera", or "vehicleid" (one
            picture of each identity is drawn as gallery, the others ask).

    Returns:
        One line about the queries that can find nothing, or None where all can.

    Raises:
        InputError: query or gallery is empty, or no query at all can find a match, or they are two sets under
            "vehicleid".
    """
    query, gallery = dataset.query, dataset.gallery
    if not query or not gallery:
        raise InputError(f"nothing to evaluate: {len(query)} query and {len(gallery)} gallery pictures")
    if protocol == "vehicleid" and query != gallery:
        raise InputError(
            "the protocol vehicleid draws queries and gallery out of one set of pictures, and this data set has two; "
            "use the protocol no_camera"
        )
    cameras, pictures = defaultdict(set), Counter(sample.id for sample in gallery)
    for sample in gallery:
        cameras[sample.id].add(sample.camera)
    has_match = {
        "market1501": lambda sample: bool(cameras.get(sample.id, set()) - {sample.camera}),
        "no_camera": lambda sample: sample.id in pictures,
        "vehicleid": lambda sample: pictures[sample.id] > 1,
    }[protocol]
    invalid = [sample for sample in query if not has_match(sample)]
    absent = sum(sample.id not in pictures for sample in invalid)
    if absent == len(query):
        raise InputError(
            f"none of the {len(query)} query pictures shows an identity of the gallery (the first is "
            f"{query[0].name or query[0].id}, {query[0].path}); do query and gallery belong together?"
        )
    if len(invalid) == len(query):
        raise InputError(_no_valid_query(query, gallery, protocol))
    if not invalid:
        return None
    return (
        f"{len(invalid)} of {len(query)} query pictures have no match in the gallery under the protocol {protocol} "
        f"({absent} of them: identity absent), the first is {invalid[0].path}; they count in no metric"
    )


def _no_valid_query(query, gallery, protocol):
    if protocol == "vehicleid":
        return "no identity has two pictures, which the protocol vehicleid needs; use the protocol no_camera"
    seen = len({sample.camera for sample in (*query, *gallery)})
    why = "all pictures are from one camera" if seen == 1 else "no identity of the query was seen by another camera"
    return f"{why}, so the protocol {protocol} leaves no valid query; use the protocol no_camera"
