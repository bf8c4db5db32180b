"""Who may import whom, as the README says it, and the names that others rely on."""

import ast
import re
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("core", "baggage", "recognition")
# What a floor of core may use beside itself; the scripts, baggage/ and recognition/ may use all of it.
FLOORS = {
    "errors": set(),
    "files": {"errors"},
    "layers": set(),
    "models": {"layers", "errors"},
    "losses": {"layers", "errors"},
    "data": {"layers", "errors", "files"},
    "retrieval": {"layers", "errors"},
    "visualize": {"data", "errors", "files"},
    "engine": {"layers", "models", "losses", "data", "retrieval", "visualize", "errors", "files"},
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, modules):
    """(modules of ours that a file imports when it is imported, and those that it imports in a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    later = {inner for function in functions for inner in ast.walk(function)}
    found = {True: set(), False: set()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        ours = {name if name in modules else name.rpartition(".")[0] for name in names}
        found[node not in later] |= ours & modules
    return found[True], found[False]


@pytest.fixture(scope="module")
def imports():
    """module -> (modules of ours that it imports at once, and later)."""
    paths = {module_of(path): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    return {module: imports_of(path, set(paths)) for module, path in paths.items()}


def test_nothing_imports_upward(imports):
    wrong = []
    for module, (at_once, _) in imports.items():
        room, _, rest = module.partition(".")
        floor = rest.split(".")[0]
        for other in at_once:
            other_room, _, other_rest = other.partition(".")
            other_floor = other_rest.split(".")[0]
            if room == "core":
                allowed = other_room == "core" and other_floor in {floor, *FLOORS[floor]}
            else:
                allowed = other_room in ("core", room)
            if not allowed:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_two_modules_import_each_other(imports):
    order = TopologicalSorter({module: at_once | later for module, (at_once, later) in imports.items()}).static_order()
    assert len(list(order)) == len(imports) > 80


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")


@pytest.fixture(scope="module")
def options():
    """script -> its options"""
    parsers = {path.stem: import_module(path.stem).get_parser() for path in ROOT.glob("*.py")}
    return {name: {*sum((a.option_strings for a in it._actions), []), "--recipe"} for name, it in parsers.items()}


def options_in_messages(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [node.body[0] for node in ast.walk(tree) if isinstance(node, with_docstring) and node.body]
    docstrings = {id(first.value) for first in docstrings if isinstance(first, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {option for node in texts if id(node) not in docstrings for option in OPTION.findall(node.value)}


def test_lower_floors_name_no_option():
    paths = [path for path in (ROOT / "core").rglob("*.py") if "engine" not in path.parts]
    named = {str(path): options_in_messages(path) for path in paths}
    assert len(named) > 50 and {path: found for path, found in named.items() if found} == {}


def test_messages_name_options_that_there_are(options):
    known = {"--help", "--no", "--shm-size"}.union(*options.values())  # --no-flip and the like; docker's
    named = {path: options_in_messages(path) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    named.pop(ROOT / "recognition" / "page.py")  # variables of CSS
    assert {str(path): found - known for path, found in named.items() if found - known} == {}


def test_commands_of_the_readme_have_options_that_there_are(options):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun|bash) [^`]*)`", text)
    commands = [re.search(r"\b(\w+)\.py (.*)", line.split("#")[0]) for line in lines if "benchmarks" not in line]
    commands = [
        (match[1], OPTION.findall(match[2])) for match in commands if match and "pip install" not in match.string
    ]
    assert len(commands) > 40
    assert [(script, name) for script, names in commands for name in names if name not in options[script]] == []


NAMES = {
    "core.layers.boxes": "box_iou nms batched_nms encode_boxes decode_boxes",
    "core.layers.roi_align": "roi_align MultiScaleRoIAlign",
    "core.layers.anchors": "AnchorGenerator",
    "core.layers.fpn": "FeaturePyramidNetwork",
    "core.layers.pooling": "GeM",
    "core.layers.norm": "FrozenBatchNorm2d IBN DomainSpecificBatchNorm to_domain_specific",
    "core.layers.mask_decoder": "MaskDecoder",
    "core.models.resnet": "resnet18 resnet34 resnet50 resnet101 resnet152 resnet50_ibn_a resnet101_ibn_a",
    "core.models.osnet": "osnet_x1_0 osnet_x0_75 osnet_x0_5 osnet_x0_25 osnet_ibn_x1_0 osnet_ain_x1_0",
    "core.models.reid": "build_reid_model ReIDOutput",
    "core.models.lightmbn": "lmbn_n lmbn_r",
    "core.models.mgn": "mgn",
    "core.models.pcb": "pcb pyramid",
    "core.models.gan": "ResNetGenerator PatchDiscriminator SiameseMetricNet",
    "core.models.mask_rcnn": "mask_rcnn_resnet50_fpn MaskRCNN paste_masks",
    "core.losses": "TripletLoss SoftmaxTripletLoss CenterLoss GaussianMaskRegressionLoss FocalMaskLoss "
    "CombinedMaskLoss gaussian_masks build_loss MultiSimilarityLoss FocalLoss CircleLoss ArcFaceLoss CosFaceLoss "
    "RankedListLoss HybridMemory ClusterMemory",
    "core.losses.distillation": "LogitLoss FeatureLoss AttentionLoss RelationalLoss SimilarityPreservingLoss "
    "RetrievalLoss SelfDistillationLoss build_distillation",
    "core.data.samplers": "PKSampler",
    "core.data.reid_datasets": "load_reid_dataset",
    "baggage.synthetic": "make_synthetic_baggage",
    "core.retrieval.distance": "pairwise_distance",
    "core.retrieval.ranking": "evaluate_ranking evaluate_features RankingResult",
    "core.retrieval.rerank": "re_rank",
    "core.retrieval.clustering": "jaccard_distance cluster",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_that_others_rely_on(module):
    assert [name for name in NAMES[module].split() if not hasattr(import_module(module), name)] == []
