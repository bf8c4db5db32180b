"""`--help` of every script: at once, what it does first, how it is called on one line, within 80 columns."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
HEAVY = ("torch", "numpy", "PIL", "matplotlib")  # seconds, each

ASK = """
import contextlib, io, json, runpy, sys
told = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--epochs", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    told[script] = out.getvalue()
print(json.dumps([told, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def told():
    """(script -> its help, the modules that were imported for all of them)"""
    done = subprocess.run([sys.executable, "-c", ASK, *SCRIPTS], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_heavy_is_imported(told):
    assert len(SCRIPTS) == 8 and not set(HEAVY).intersection(told[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_said(told, script):
    lines = told[0][script].splitlines()
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8")))
    assert lines[0] == docstring.splitlines()[0] and lines[0].endswith(".") and lines[1] == ""
    assert lines[2].startswith(f"usage: python {script} [options]") and lines[3] == ""
    assert max(map(len, lines)) <= 80
    assert "--output" in told[0][script]


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_sleep_while_they_wait_unless_a_person_wants_something_else(own, expected):
    """What libgomp reads is there before torch is."""
    code = "import sys, os; import core.engine.options; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **own}, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{expected} False\n", done.stderr
