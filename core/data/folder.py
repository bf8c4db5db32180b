"""A person's own photographs, one folder for each identity.

`<root>/{train,query,gallery}/<identity>/...`: as it stands; without `train` the data can be evaluated, not trained on.
`<root>/{train,test}/<identity>/...`: query and gallery are made of `test`: of each identity with two pictures or more
the first, in the order of the paths, asks, and all others are the gallery. The same folder gives the same split.
`<root>/<identity>/...`, or `<root>/train/...` alone: some of the identities are held out as `test`.

An identity is the name of its folder; pictures may lie deeper inside. Nobody said which camera took a picture, so all
have camera 0 and the protocol is no_camera.
"""

import hashlib
import os

from core.data.images import folder_entries, list_images
from core.data.samples import ReIDDataset, Sample
from core.errors import InputError

PARTS = ("train", "query", "gallery", "test")
VAL_FRACTION = 0.2


def load_folder(root, val_fraction=VAL_FRACTION):
    """Read photographs sorted into folders; see above. Raises InputError where the folders are not as described.

    val_fraction: of the identities, to be held out where nobody split them.
    """
    if is_unsplit(root):
        train, test = hold_out(_read_part(root / "train" if (root / "train").exists() else root), val_fraction)
        query, gallery = split_test(test)
    else:
        train = _read_part(root / "train") if (root / "train").exists() else {}
        if (root / "query").exists() or (root / "gallery").exists():
            query, gallery = _read_part(root / "query"), _read_part(root / "gallery")
        else:
            query, gallery = split_test(_read_part(root / "test"))
            if not query:
                raise InputError(f"{root / 'test'}: every identity has a single picture; to search, one needs two")
    numbers = {name: number for number, name in enumerate(sorted({*query, *gallery}))}
    train_numbers = {name: number for number, name in enumerate(sorted(train))}
    return ReIDDataset(_to_samples(train, train_numbers), _to_samples(query, numbers), _to_samples(gallery, numbers))


def is_unsplit(root):
    """Whether a folder of photographs has no part to be tested on."""
    return not any((root / part).exists() for part in PARTS[1:])


def hold_out(pictures, fraction):
    """Identity -> paths, split by identity into (train, test), the same way for the same names on every machine.

    Two identities at least are tested, each with a picture that asks and one to be found, and two at least learned; of
    fewer than four all are learned. With the fraction 1 all are tested.
    """
    order = sorted(pictures, key=lambda name: (len(pictures[name]) < 2, hashlib.sha256(os.fsencode(name)).digest()))
    count = round(fraction * len(order))
    if 0 < fraction < 1:
        count = min(max(count, 2), len(order) - 2)
        count = 0 if sum(len(pictures[name]) > 1 for name in order[: max(count, 0)]) < 2 else count
    test = set(order[:count])
    return ({name: paths for name, paths in pictures.items() if (name in test) == held} for held in (False, True))


def load_pictures(root):
    """Pictures that nobody has named, anywhere below `root`: training alone, each of an identity by itself."""
    paths = list_images(root, recursive=True)
    if not paths:
        raise InputError(f"{root}: holds no pictures; give a folder with photographs in it or below it")
    return ReIDDataset([Sample(path, number, 0) for number, path in enumerate(paths)], [], [])


def split_test(pictures):
    """Identity -> paths, split into query and gallery: the first of two or more asks, the rest are to be found."""
    query = {name: paths[:1] for name, paths in pictures.items() if len(paths) > 1}
    gallery = {name: paths[1:] if name in query else paths for name, paths in pictures.items()}
    return query, gallery


def _read_part(folder):
    """Identity -> sorted paths of its pictures. Raises InputError: no folder, no pictures, pictures of nobody."""
    expected = f"expected {os.path.basename(folder)}/<identity>/<picture>"
    loose = list_images(folder)
    if loose:
        raise InputError(
            f"{folder}: {len(loose)} pictures lie outside the identities' folders, the first is "
            f"{os.path.basename(loose[0])}; {expected}"
        )
    names = [entry.name for entry in folder_entries(folder) if entry.is_dir() and not entry.name.startswith(".")]
    pictures = {name: list_images(os.path.join(folder, name), recursive=True) for name in names}
    pictures = {name: paths for name, paths in pictures.items() if paths}
    if not pictures:
        raise InputError(f"{folder}: holds no pictures; {expected}")
    return pictures


def _to_samples(pictures, numbers):
    return [Sample(path, numbers[name], 0, name=name) for name, paths in pictures.items() for path in paths]
