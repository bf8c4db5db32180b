import builtins
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from core.engine.checkpoint import atomic_write, load_checkpoint, open_run, save_checkpoint, save_run
from core.errors import InputError

STATE = {"kind": "reid", "epoch": 3, "model": {"weight": torch.arange(4.0)}}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "last.pth", STATE)
    state = load_checkpoint(tmp_path / "last.pth", "reid")
    assert state["epoch"] == 3 and torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_best_is_written_once_and_survives_the_next_last(tmp_path):
    save_run(tmp_path, STATE, improved=True)
    assert os.path.samefile(tmp_path / "best.pth", tmp_path / "last.pth")
    save_run(tmp_path, {**STATE, "epoch": 4}, improved=False)
    assert load_checkpoint(tmp_path / "best.pth")["epoch"] == 3
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 4


def test_without_hard_links_best_and_last_are_two_files(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save_run(tmp_path, STATE, improved=True)
    assert load_checkpoint(tmp_path / "best.pth")["epoch"] == load_checkpoint(tmp_path / "last.pth")["epoch"] == 3


class FullDisk:
    """A file on a disk with room for 100 bytes."""

    def __init__(self, file):
        self.file, self.room = file, 100

    def write(self, data):
        if len(memoryview(data).cast("B")) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save_checkpoint(path, STATE)
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *args: FullDisk(real(*args)) if args[1] == "wb" else real(*args))
    with pytest.raises(InputError, match="No space left on device") as error:
        save_checkpoint(path, {**STATE, "epoch": 4, "model": {"weight": torch.zeros(10_000)}})
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    monkeypatch.undo()
    assert load_checkpoint(path)["epoch"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_a_fault_of_ours_while_writing_keeps_its_kind_and_the_old_file(tmp_path):
    save_checkpoint(tmp_path / "last.pth", STATE)
    with pytest.raises(KeyError), atomic_write(tmp_path / "last.pth") as file:
        file.write(b"half")
        raise KeyError("a bug")
    assert load_checkpoint(tmp_path / "last.pth")["epoch"] == 3


class Code:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        (pickle.dumps(Code()), "never run|damaged"),
        ({"weights": torch.zeros(2)}, "not a checkpoint of Carousel"),
        ({"kind": "mask_rcnn"}, "kind mask_rcnn, reid is needed"),
        ({"kind": "reid", "model": Code()}, "never run"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, capsys, content, said):
    path = tmp_path / "last.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=said) as error:
        load_checkpoint(path, "reid")
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_truncated_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)


def test_a_run_folder_is_never_taken_twice(tmp_path):
    folders = [open_run(tmp_path / "runs", "bags")[0] for _ in range(3)]
    assert [folder.name for folder in folders] == ["bags", "bags-2", "bags-3"]


def test_resume_takes_the_newest_checkpoint_of_the_name(tmp_path):
    for epoch in range(2):
        folder, _ = open_run(tmp_path, "bags")
        save_checkpoint(folder / "last.pth", {**STATE, "epoch": epoch})
    other, _ = open_run(tmp_path, "bags-and-more")
    save_checkpoint(other / "last.pth", STATE)
    os.utime(tmp_path / "bags-2" / "last.pth", (2e9, 2e9))
    (tmp_path / "bags-2" / ".last.pth.123.tmp").write_bytes(b"half a checkpoint")
    folder, checkpoint = open_run(tmp_path, "bags", "auto")
    assert (folder.name, checkpoint) == ("bags-2", tmp_path / "bags-2" / "last.pth")
    assert not list(folder.glob(".*"))


def test_resume_without_a_checkpoint_starts_afresh(tmp_path):
    folder, checkpoint = open_run(tmp_path, "bags", "auto")
    assert folder.is_dir() and checkpoint is None


def test_resume_from_a_path_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_run(tmp_path, "bags", str(tmp_path / "gone.pth"))


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="runs is a file|can't make"):
        open_run(tmp_path / "runs", "bags")


def test_an_unwritable_run_folder(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # as root every folder can be written to, so it is simulated
    with pytest.raises(InputError, match="Permission denied") as error:
        open_run(tmp_path / "runs", "bags")
    assert "--output" in str(error.value)
