"""A person's own photographs, one folder for each identity.

`<root>/{train,query,gallery}/<identity>/...`: as it stands; without `train` the data can be evaluated, not trained on.
`<root>/{train,test}/<identity>/...`: query and gallery are made of `test`: of each identity with two pictures or more
the first, in the order of the paths, asks, and all others are the gallery. The same folder gives the same split.

An identity is the name of its folder; pictures may lie deeper inside. Nobody said which camera took a picture, so all
have camera 0 and the protocol is no_camera.
"""

import os

from core.data.images import folder_entries, list_images
from core.data.samples import ReIDDataset, Sample
from core.errors import InputError


def load_folder(root):
    """Read photographs sorted into folders; see above. Raises InputError where the folders are not as described."""
    train = _read_part(root / "train") if (root / "train").exists() else {}
    if (root / "query").exists() or (root / "gallery").exists():
        query, gallery = _read_part(root / "query"), _read_part(root / "gallery")
    else:
        query, gallery = split_test(_read_part(root / "test"))
        if not query:
            raise InputError(f"{root / 'test'}: every identity has a single picture; to search, one needs two or more")
    numbers = {name: number for number, name in enumerate(sorted({*query, *gallery}))}
    train_numbers = {name: number for number, name in enumerate(sorted(train))}
    return ReIDDataset(_to_samples(train, train_numbers), _to_samples(query, numbers), _to_samples(gallery, numbers))


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
    loose = list_images(folder)
    if loose:
        raise InputError(
            f"{folder}: {len(loose)} pictures lie outside the identities' folders, the first is "
            f"{os.path.basename(loose[0])}; expected {os.path.basename(folder)}/<identity>/<picture>"
        )
    names = [entry.name for entry in folder_entries(folder) if entry.is_dir() and not entry.name.startswith(".")]
    pictures = {name: list_images(os.path.join(folder, name), recursive=True) for name in names}
    pictures = {name: paths for name, paths in pictures.items() if paths}
    if not pictures:
        raise InputError(f"{folder}: holds no pictures; expected {os.path.basename(folder)}/<identity>/<picture>")
    return pictures


def _to_samples(pictures, numbers):
    return [Sample(path, numbers[name], 0, name=name) for name, paths in pictures.items() for path in paths]
