"""What every test may ask for: the golden numbers of the reference implementations and the small real data sets."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not on this machine")
    return path


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
