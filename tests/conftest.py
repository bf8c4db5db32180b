"""What every test may ask for: the golden numbers of the reference implementations and the small real data sets."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not on this machine")
    return path


@pytest.fixture(autouse=True, scope="session")
def loopback():
    """Without it gloo looks this machine's name up, and where that can't be resolved, says so before our own lines."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture
def golden():
    """Function: name -> dict of the arrays in ../shared/golden/<name>.npz."""

    def load(name):
        with np.load(_shared("golden", f"{name}.npz")) as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture
def golden_keys():
    """Function: name -> the parsed ../shared/golden/<name>_keys.json."""
    return lambda name: json.loads(_shared("golden", f"{name}_keys.json").read_text())


@pytest.fixture
def fill_weights():
    """The module ../shared/golden/fill_weights.py: weights and inputs as a function of their names."""
    spec = importlib.util.spec_from_file_location("fill_weights", _shared("golden", "fill_weights.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shared_data():
    """Folder ../shared/data with the small real data sets."""
    return _shared("data")


@pytest.fixture(scope="session")
def baggage(tmp_path_factory):
    """Folder with a tiny synthetic baggage set in the MVB layout: 6 + 3 identities of 4 pictures."""
    from baggage.synthetic import make_synthetic_baggage

    root = tmp_path_factory.mktemp("data") / "baggage"
    sizes = {"train_identities": 6, "test_identities": 3, "gallery_views": 2, "probe_views": 2}
    return make_synthetic_baggage(root, train_scenes=1, val_scenes=1, progress=False, **sizes)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folder in the layout of COCO 2017: red squares and blue discs on grey noise; 8 and 4 pictures of 96 x 64 pixels,
    every third upright, the last of each without objects. The category ids are 3 and 7."""
    return make_shapes(tmp_path_factory.mktemp("shapes"))


def make_shapes(root):
    random = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split, count in (("train", 8), ("val", 4)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            height, width = (96, 64) if number % 3 == 0 else (64, 96)
            picture = random.integers(90, 150, (height, width, 3), dtype=np.uint8)
            for place in range(0 if number == count else 2):
                annotation = paint_shape(picture, place, random)
                annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation})
            images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
            Image.fromarray(picture).save(root / f"{split}2017" / f"{number}.png")
        categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def paint_shape(picture, place, random):
    """One shape in half `place` (0, 1) of the longer side; its annotation."""
    height, width = picture.shape[:2]
    side = int(random.integers(20, 30))
    x, y = int(random.integers(0, 48 - side)), int(random.integers(0, 64 - side))
    x, y = (x + 48 * place, y) if width > height else (y, x + 48 * place)
    disc = bool(random.integers(2))
    rows, columns = np.mgrid[:height, :width] + 0.5
    inside = (columns >= x) & (columns < x + side) & (rows >= y) & (rows < y + side)
    if disc:
        inside &= np.hypot(columns - x - side / 2, rows - y - side / 2) < side / 2
    picture[inside] = (40, 60, 220) if disc else (220, 50, 40)
    rle = mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {
        "category_id": 7 if disc else 3,
        "iscrowd": 0,
        "area": int(inside.sum()),
        "bbox": mask.toBbox(rle).tolist(),
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
    }


@pytest.fixture
def one_camera(shared_data, tmp_path):
    """Folder with the pictures of COIL-20 that its first camera took: the market1501 protocol leaves no valid query."""
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for path in (shared_data / "coil20_reid" / part).glob("*_c1s1_*"):
            shutil.copy(path, tmp_path / "data" / part)
    return tmp_path / "data"


@pytest.fixture
def no_right_to(monkeypatch):
    """Function: from now on this folder can't be listed. The tests may run as root, who may read everything."""

    def forbid(folder):
        scandir = os.scandir

        def refuse(path="."):
            if os.path.realpath(path) == os.path.realpath(folder):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return forbid


@pytest.fixture
def one_thread():
    """Sums in the order of a process with one thread, as the processes of torchrun have: equal to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start_script(script, arguments):
    """`python script.py arguments` in this process; script: its module."""
    from core.engine import distributed, options

    recipes, default = getattr(script, "RECIPES", None), getattr(script, "default_recipe", None)
    distributed.run_script(
        lambda argv: script.main(options.parse(script.get_parser(), recipes, default, argv)),
        [str(argument) for argument in arguments],
    )


@pytest.fixture
def run(capsys):
    """Function: (script module, *arguments) -> (exit code, stdout, stderr) of that command, in this process."""

    def command(script, *arguments):
        hook = sys.excepthook
        try:
            start_script(script, arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.excepthook = hook
        out, err = capsys.readouterr()
        return code, out, err

    return command


# Two real gloo processes on this machine's CPU. They are forked from a server that has torch imported, to be quick.


def enter(function, rank, world_size, port, folder, connection, arguments):
    """Body of a forked process: the environment that torchrun would give it, then `function(rank, *arguments)`."""
    from core.engine import distributed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    distributed.SECONDS_OTHER_RANKS_WAIT = 0.3
    connection.send(function(rank, *arguments))


@pytest.fixture
def launch(tmp_path):
    """Function: (function, *arguments) -> what it returns on two ranks (None: nothing), exit codes, standard errors."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.collectives", "core.engine.reid"])
    processes = []

    def start(function, *arguments, world_size=2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        for rank, (_, sender) in enumerate(pipes):
            job = (function, rank, world_size, port, tmp_path, sender, arguments)
            processes.append(context.Process(target=enter, args=job))
            processes[-1].start()
            sender.close()
        results = []
        for process, (receiver, _) in zip(processes, pipes, strict=True):
            try:
                results.append(receiver.recv() if receiver.poll(300) else None)
            except EOFError:  # it ended without a result
                results.append(None)
            process.join(30)
        errors = [(tmp_path / f"stderr{rank}").read_text() for rank in range(world_size)]
        return results, [process.exitcode for process in processes], errors

    yield start
    for process in processes:
        process.kill()


def start_on_rank(rank, script, arguments):
    start_script(importlib.import_module(script), arguments)


@pytest.fixture
def run_on_two(launch, tmp_path):
    """Function: (script module, *arguments) -> what both ranks print, of a command that ends well on two."""

    def command(script, *arguments):
        _, codes, errors = launch(start_on_rank, script.__name__, arguments)
        assert codes == [0, 0], errors
        return "".join((tmp_path / f"stdout{rank}").read_text() for rank in range(2))

    return command


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs in this process draw no sheets: they take longer than two steps. `monkeypatch.undo()` gives them back."""
    from core.engine import detection_pictures, log, reid_pictures

    monkeypatch.setattr(log, "curves", lambda *_: None)
    monkeypatch.setattr(detection_pictures, "draw_predictions", lambda *_, **__: None)
    for name in ("draw_augmentations", "draw_rank_list", "draw_masks", "draw_clusters"):
        monkeypatch.setattr(reid_pictures, name, lambda *_: None)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [unquote(value, errors="surrogateescape") for name, value in attrs if name in ("href", "src")]


@pytest.fixture
def links_of():
    """Function: path of an HTML page -> the paths that it links to or shows."""

    def find(page):
        parser = Links()
        parser.feed(page.read_text(encoding="utf-8"))
        return parser.found

    return find
