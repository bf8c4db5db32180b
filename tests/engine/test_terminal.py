"""What is printed, where it can't be printed: escapes, encodings, readers that are gone, full disks."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from core.engine.terminal import Terminal, guard_streams

ROOT = Path(__file__).resolve().parents[2]
NAMES = {  # as a file system, a JSON file or a command line may hold them -> as they are shown
    "bag": "bag", "caf\u00e9": "caf\u00e9", "\u65e5\u672c": "\u65e5\u672c", "\U0001f9f3": "\U0001f9f3",
    "caf\udce9": "caf\N{REPLACEMENT CHARACTER}", "half \ud83e": "half \N{REPLACEMENT CHARACTER}",
    "\x1b[31mred": r"\x1b[31mred", "\x1b]0;title\x07": r"\x1b]0;title\x07", "\x9b2J": r"\x9b2J",
    "back\b\b": r"back\x08\x08", "over\rwritten": r"over\rwritten", "\u202egpj.exe": r"\u202egpj.exe",
    "\u2066a\u2069": r"\u2066a\u2069", "\u200fa": r"\u200fa", "a\u2028b": r"a\u2028b", "a\0b": r"a\x00b",
}  # fmt: skip


def terminal(monkeypatch, stream, name="stdout"):
    monkeypatch.setattr(sys, name, stream)
    guard_streams()
    guard_streams()
    assert isinstance(getattr(sys, name), Terminal) and not isinstance(getattr(sys, name).stream, Terminal)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "latin-1", "utf-16", "cp932"])
def test_names_of_all_kinds_are_printed_in_every_encoding(monkeypatch, encoding):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        terminal(monkeypatch, stream, name)
        for text, shown in NAMES.items():
            if name == "stderr" and "\r" in text:  # which bars need
                continue
            print(f"{text}\n  it is", file=getattr(sys, name), flush=True)
            expected = shown.encode(encoding, "backslashreplace").decode(encoding)
            assert stream.buffer.getvalue().decode(encoding) == f"{expected}\n  it is\n"
            stream.seek(0)
            stream.truncate()


def test_bars_move_as_they_did(monkeypatch):
    shown = []
    for wrapped in (False, True):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        stream = sys.stderr
        if wrapped:
            guard_streams()
        with tqdm(total=2, desc="outer", bar_format="{desc} {n}", mininterval=0) as outer:
            for _ in tqdm(range(2), "inner", bar_format="{desc} {n}", leave=False, mininterval=0):
                outer.update()
            tqdm.write("a line", file=sys.stderr)  # beside one bar: of two, tqdm clears either first
        shown.append(stream.getvalue())
    assert shown[0] == shown[1] and "\x1b[A" in shown[0] and "\r" in shown[0]


def test_where_nobody_reads_the_run_goes_on(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        terminal(monkeypatch, stream)
        for number in range(3):
            print(number, flush=True)
        sys.stdout.write("x" * 10**6)
        sys.stdout.flush()
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full is of Linux")
def test_on_a_full_disk_the_run_goes_on_and_says_so_once(monkeypatch, capsys):
    with open("/dev/full", "w") as stream, open("/dev/full", "w") as errors:
        terminal(monkeypatch, stream)
        for number in range(3):
            print(number, flush=True)
        line = "warning: what is printed is lost (No space left on device); the run goes on\n"
        assert capsys.readouterr().err == line
        monkeypatch.undo()
        terminal(monkeypatch, errors, "stderr")
        print("nobody can be told", file=sys.stderr, flush=True)


def test_a_closed_descriptor(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        for name in ("stdout", "stderr"):
            terminal(monkeypatch, stream, name)
            print("a line", file=getattr(sys, name), flush=True)
            assert stream is closed or not getattr(sys, name).isatty()


def test_at_the_end_of_a_script_nothing_is_added_either(tmp_path):
    """Python's own report of what it could not write, and its exit code 120."""
    code = "from core.engine.distributed import run_script; run_script(lambda _: print('a line'), None)"
    reader, writer = os.pipe()
    os.close(reader)
    with open(os.devnull if not os.path.exists("/dev/full") else "/dev/full", "w") as full:
        runs = [
            subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
            for stdout in (writer, full)
        ]
    os.close(writer)
    said = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and said[0] == ""
    assert said[1] in ("", "warning: what is printed is lost (No space left on device); the run goes on\n")


def test_every_script_is_run_by_run_script():
    scripts = [path for path in ROOT.glob("*.py") if "__main__" in path.read_text("utf-8")]
    assert len(scripts) == 8 and all("distributed.run_script(" in path.read_text("utf-8") for path in scripts)
