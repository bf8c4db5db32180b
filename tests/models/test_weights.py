import argparse
import hashlib
import http.server
import os
import pickle
import socket
import threading
import types
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch

from core.errors import InputError
from core.models import weights
from core.models.mask_rcnn import MaskRCNN
from core.models.reid import build_reid_model
from core.models.resnet import resnet18, resnet34
from core.models.weights import DownloadError, Unfilled, fetch, load_file, load_weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's folder for downloads, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine: `files` is what it has, path -> bytes; `requests` what it was asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files, requests, over = {}, [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path not in files:
                return self.send_error(404)
            content = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if "stalls" not in self.path:
                return self.wfile.write(content)
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return over.wait()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        web.files, web.requests, web.address = files, requests, f"http://127.0.0.1:{web.server_port}"
        yield web
        over.set()
        web.shutdown()


def publish(server, content, name="weights"):
    path = f"/{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[path] = content
    return server.address + path


def saved(content, path):
    torch.save(content, path)
    return path


def same(model, state, prefix=""):
    own = model.state_dict()
    return all(torch.equal(own[prefix + key], value) for key, value in state.items())


# ---- download


def test_fetch_downloads_once_into_the_cache_of_torch_hub(server, cache):
    url = publish(server, b"0123456789" * 300_000)
    path = fetch(url)
    assert path == cache / url.rsplit("/", 1)[-1] and path.read_bytes() == b"0123456789" * 300_000
    assert fetch(url) == path and len(server.requests) == 1
    assert os.listdir(cache) == [path.name]


def test_fetch_replaces_a_damaged_copy(server, cache):
    url = publish(server, b"whole")
    cache.mkdir(parents=True)
    (cache / url.rsplit("/", 1)[-1]).write_bytes(b"who")
    assert fetch(url).read_bytes() == b"whole"


def test_fetch_refuses_another_checksum_and_leaves_nothing_behind(server, cache):
    server.files["/weights-01234567.pth"] = b"not these"
    with pytest.raises(DownloadError, match=r"has the sha256 [0-9a-f]{8}\.\.\., not 01234567\.\.\."):
        fetch(f"{server.address}/weights-01234567.pth")
    assert os.listdir(cache) == []


def test_fetch_names_what_is_not_there(server, cache):
    with pytest.raises(DownloadError, match="404"):
        fetch(f"{server.address}/weights-01234567.pth")


def test_fetch_where_nobody_listens(cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(DownloadError, match="refused"):
        fetch(f"http://127.0.0.1:{port}/weights-01234567.pth")


def test_fetch_gives_up_on_silence(cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    silent = socket.create_server(("127.0.0.1", 0))  # accepts connections and never says a word
    with silent, pytest.raises(DownloadError, match="no answer in time"):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/weights-01234567.pth", timeout=0.2)
    assert os.listdir(cache) == []


def test_fetch_gives_up_on_data_that_stops_coming(server, cache):
    url = publish(server, bytes(1000), name="stalls")
    with pytest.raises(DownloadError, match="no answer in time"):
        fetch(url, timeout=0.2)
    assert os.listdir(cache) == []


def test_fetch_gives_up_on_a_name_that_is_looked_up_for_ever(cache, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(10) and [])
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DownloadError, match="no answer in time"):
        fetch("http://nowhere.invalid/weights-01234567.pth", timeout=0.1)
    over.set()


def test_fetch_where_nothing_can_be_written(server, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="checkpoints"):
        fetch(publish(server, b"whole"))


def test_published_names_carry_their_checksum():
    for name, url in weights.PUBLISHED.items():
        assert url.startswith("https://") and f"/{name}-" in url
        assert len(url.rsplit("-", 1)[-1].removesuffix(".pth")) == 8


# ---- load_weights


def test_imagenet(server, cache, tmp_path, monkeypatch):
    published = resnet18()
    content = saved(published.state_dict(), tmp_path / "file").read_bytes()
    monkeypatch.setitem(weights.PUBLISHED, "resnet18", publish(server, content, name="resnet18"))
    model = build_reid_model("resnet18_with_mask", 7)
    report = load_weights(model, "imagenet", "resnet18_with_mask")
    state = {key: value for key, value in published.state_dict().items() if not key.startswith("fc.")}
    assert same(model, state, "backbone.") and report.loaded == len(state) and not report.warning
    assert "resnet18-" in report.message and "in the file alone: fc.weight, fc.bias" in report.message
    assert "\n" not in report.message


def test_imagenet_that_cannot_be_had_leaves_the_model_and_says_so_in_one_line(cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setitem(weights.PUBLISHED, "resnet18", f"http://127.0.0.1:{port}/resnet18-01234567.pth")
    model = build_reid_model("resnet18", 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_weights(model, "imagenet", "resnet18")
    assert report.warning and report.loaded == 0 and same(model, before)
    assert "refused" in report.message and "training from scratch" in report.message and "\n" not in report.message


def test_none():
    report = load_weights(resnet18(num_classes=0), "none", "resnet18")
    assert (report.message, report.warning) == ("weights: none, training from scratch", False)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "ours", "ddp"])
def test_a_file_into_a_plain_network(wrap, tmp_path):
    source = resnet18(num_classes=10)
    state = source.state_dict()
    content = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "ours": {"kind": "reid", "model": {f"backbone.{key}": value for key, value in state.items()}},
        "ddp": {f"module.{key}": value for key, value in state.items()},
    }[wrap]
    model = resnet18(num_classes=10)
    report = load_weights(model, str(saved(content, tmp_path / "w.pth")), "resnet18")
    assert same(model, state) and report.loaded == len(state)
    assert report.message == f"weights: 122 of 122 tensors from {tmp_path / 'w.pth'}"


def test_our_checkpoint_with_a_head_of_another_size(tmp_path):
    source = build_reid_model("resnet18", 20, pooling="gem")
    path = saved({"kind": "reid", "model": source.state_dict(), "epoch": 1}, tmp_path / "last.pth")
    model = build_reid_model("resnet18_with_mask", 7)
    classifier = model.classifier.weight.clone()
    message = load_weights(model, str(path), "resnet18_with_mask").message
    assert same(model, source.backbone.state_dict(), "backbone.") and torch.equal(model.classifier.weight, classifier)
    assert "a classifier of 20 other identities left out, as expected" in message and "not loaded" not in message
    assert "not in the file: mask_decoder.conv1.weight" in message and "more" in message
    assert "in the file alone: pooling.p" in message and "\n" not in message


def test_the_averaged_weights_of_our_checkpoint_are_taken(tmp_path):
    """They are what a run is judged by; the file has its last weights beside them."""
    torch.manual_seed(0)
    last, mean = (build_reid_model("resnet18", 5) for _ in range(2))
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in mean.state_dict().items()}
    content = {"kind": "reid", "model": last.state_dict(), "ema": averaged}
    assert weights.best_weights(content).keys() == mean.state_dict().keys()
    assert weights.best_weights(content | {"ema": None}) is content["model"]
    model = build_reid_model("resnet18", 5)
    path = saved(content, tmp_path / "best.pth")
    report = load_weights(model, str(path), "resnet18")
    assert same(model, mean.state_dict()) and "n_averaged" not in report.message
    assert report.message.endswith(f"tensors from {path} (its averaged weights)")
    saved(content | {"ema": 0.9}, path)  # nothing that this could be
    assert "its averaged" not in load_weights(model, str(path), "resnet18").message and same(model, last.state_dict())


@pytest.mark.parametrize("kind", ["state_dict", "old and named"])
def test_damaged_weights_are_refused(tmp_path, kind):
    """By the sums that torch writes, or by the digits in the name of a published file."""
    path = tmp_path / "w.pth"
    torch.save(resnet18().state_dict(), path, _use_new_zipfile_serialization=kind != "old and named")
    if "named" in kind:
        path = path.rename(tmp_path / f"resnet18-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    assert load_weights(resnet18(), str(path), "resnet18").message.endswith(f"tensors from {path}")
    good = path.read_bytes()
    for place in range(100_000, len(good), len(good) // 8):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(InputError, match="damaged"):
            load_weights(resnet18(), str(path), "resnet18")


def test_a_date_in_a_name_is_no_checksum(tmp_path):
    path = tmp_path / "resnet18-20191104.pth"
    torch.save(resnet18().state_dict(), path, _use_new_zipfile_serialization=False)
    assert "without checksums" in load_weights(resnet18(), str(path), "resnet18").message


def test_what_has_no_checksums_is_read_and_the_line_says_so(tmp_path):
    """Files of before torch 1.6, whose sha256 a person can compare; and archives that were written without sums."""
    old, bare = tmp_path / "old.pth", tmp_path / "bare.pth"
    torch.save(resnet18().state_dict(), old, _use_new_zipfile_serialization=False)
    digest = hashlib.sha256(old.read_bytes()).hexdigest()
    assert f"without checksums; sha256 {digest[:16]}" in load_weights(resnet18(), str(old), "resnet18").message
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(resnet18().state_dict(), bare)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_weights(resnet18(), str(bare), "resnet18").loaded == 122


def test_old_files_without_batch_counters_are_complete(tmp_path):
    state = {key: value for key, value in resnet18().state_dict().items() if "num_batches" not in key}
    message = load_weights(resnet18(), str(saved(state, tmp_path / "w.pth")), "resnet18").message
    assert message == f"weights: 102 of 122 tensors from {tmp_path / 'w.pth'}"


def test_ours_loads_half_precision(tmp_path):
    source = resnet18(num_classes=0)
    path = saved(source.half().state_dict(), tmp_path / "w.pth")
    model = resnet18(num_classes=0)
    load_weights(model, str(path), "resnet18")
    assert model.conv1.weight.dtype == torch.float32 and torch.equal(model.conv1.weight.half(), source.conv1.weight)


@pytest.mark.parametrize(
    "network, other, message",
    [
        (
            lambda: build_reid_model("resnet18", 5),
            resnet34,
            r"also has backbone\.layer1\.2\.conv1\.weight, .* and .* more",
        ),
        (lambda: build_reid_model("resnet34", 5), resnet18, r"lacks backbone\.layer1\.2\.conv1\.weight"),
        (
            resnet18,
            lambda: build_reid_model("resnet50", 5).backbone,
            r"has other sizes of layer1\.0\.conv1\.weight",
        ),
    ],
)
def test_another_backbone_is_refused_and_nothing_changes(network, other, message, tmp_path):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"w.pth is of another backbone: it {message}") as caught:
        load_weights(model, str(saved(other().state_dict(), tmp_path / "w.pth")), "resnet18")
    assert "\n" not in str(caught.value) and same(model, before)


PLAIN_VALUES = {
    "namespace": argparse.Namespace(lr=0.1, output=Path("runs")),
    "paths": [PurePosixPath("a/b"), Path("c")],
    "numpy": [np.float64(1), np.float32(1), np.int64(7), np.int32(7), np.bool_(True)],
    "simple": types.SimpleNamespace(epochs=3),
}


def tiny():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize("beside", PLAIN_VALUES)
def test_plain_values_beside_the_weights_are_read(beside, tmp_path):
    source, model = tiny(), tiny()
    path = saved({"weights": source.state_dict(), "args": PLAIN_VALUES[beside]}, tmp_path / "w.pth")
    load_weights(model, str(path), "resnet18")
    assert same(model, source.state_dict())
    read = load_file(path)["args"]
    if beside != "paths":
        assert str(read) == str(PLAIN_VALUES[beside]).replace("PosixPath", "PurePosixPath")


def test_a_path_of_another_system_is_read(tmp_path):
    """pathlib.WindowsPath can't be made here, nor pathlib.PosixPath on Windows."""
    path = saved({"weights": {"a": torch.zeros(1)}, "args": Path("data")}, tmp_path / "w.pth")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(b"PosixPath", b"WindowsPath"))
    assert load_file(path)["args"] == PureWindowsPath("data")


NOT_WEIGHTS = {
    "epoch": torch.tensor(3),
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}, "param_groups": [{}]},
    "criterion": {"centers": torch.zeros(3)},
}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"weights": state},
        lambda state: {"params": state},
        lambda state: {"encoder": state, **NOT_WEIGHTS},
        lambda state: {"model": {"weights": state}, "mean": torch.zeros(3)},
        lambda state: {"model_ema": {"state_dict": state}, "model": state},
        lambda state: {**state, "extra": {"a": torch.zeros(1)}},
    ],
)
def test_weights_are_found_under_whatever_name_a_file_has_for_them(wrap, tmp_path):
    source, model = tiny(), tiny()
    load_weights(model, str(saved(wrap(source.state_dict()), tmp_path / "w.pth")), "resnet18")
    assert same(model, source.state_dict())


def test_weights_of_two_networks_are_not_chosen_from():
    state, itself = tiny().state_dict(), {}
    with pytest.raises(InputError, match="w.pth holds weights as 'student' and as 'teacher'; save one of them alone"):
        weights.find_state_dict({"student": state, "teacher": state}, "w.pth")
    itself["model"] = itself
    with pytest.raises(InputError, match="holds no weights"):
        weights.find_state_dict(itself, "w.pth")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weight": torch.zeros(3)}, "has no tensor that this model could take"),
        ({"0.num_batches_tracked": torch.tensor(1)}, "has no tensor that this model could take"),
        ({"epoch": 3}, "holds no weights"),
        ([torch.zeros(3)], "holds no weights"),
        ({"conv1.weight": Evil()}, r"holds code or objects \(posix\.mkdir\)"),
        (b"", "is damaged or no file that torch.save wrote"),
        (b"<html>not found</html>", "is damaged or no file that torch.save wrote"),
        (b"not a checkpoint", "is damaged or no file that torch.save wrote"),
        (b"can this be code?\nNo\n", "is damaged or no file that torch.save wrote"),
        (b"PK\x03\x04 not a zip", "is damaged or no file that torch.save wrote"),
    ],
)
def test_files_that_cannot_be_used(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"w.pth.*{message}") as caught:
        load_weights(torch.nn.Sequential(torch.nn.BatchNorm2d(2)), str(path), "resnet18")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["w.pth"]


def test_an_unknown_pickle_is_one_line_without_warnings(tmp_path, recwarn):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(InputError, match="damaged"):
        load_file(tmp_path / "w.pth")
    assert not recwarn.list


def test_truncated_and_missing_files_and_folders(tmp_path):
    path = saved({"a": torch.zeros(1000)}, tmp_path / "w.pth")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="damaged"):
        load_file(path)
    with pytest.raises(InputError, match="no such file"):
        load_file(tmp_path / "other.pth")
    with pytest.raises(InputError, match="can't read"):
        load_file(tmp_path)


def test_of_a_domain_specific_network_the_last_domain_is_taken(tmp_path):
    network = build_reid_model("resnet18", 0, num_domains=2)
    network.backbone.bn1.dsbn[1].running_mean.fill_(7)
    torch.save(network.state_dict(), tmp_path / "domains.pth")
    plain = build_reid_model("resnet18", 0)
    report = load_weights(plain, str(tmp_path / "domains.pth"), "resnet18")
    assert report.loaded == len(plain.state_dict()) and "not in the file" not in report.message
    assert (plain.backbone.bn1.running_mean == 7).all()


@pytest.mark.parametrize(
    "build",
    [
        lambda: MaskRCNN("resnet18", 3, box_roi_output_size=2),
        lambda: build_reid_model("resnet18_with_mask", 5),
        lambda: build_reid_model("osnet_x0_25", 5, model="lmbn_n"),
    ],
)
def test_an_unfilled_network_draws_nothing_and_is_the_one_of_its_file(build):
    """What a file does not hold (the mean of pictures, rates, anchors) is as in a network that was filled."""
    filled = build()
    before = torch.get_rng_state()
    with Unfilled():
        network = build()
    assert torch.equal(torch.get_rng_state(), before)
    network.load_state_dict(filled.state_dict())
    for (name, one), (other, two) in zip(filled.named_buffers(), network.named_buffers(), strict=True):
        assert name == other and torch.equal(one, two)
    assert str(network) == str(filled)
    torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), before)  # outside everything is drawn as ever
