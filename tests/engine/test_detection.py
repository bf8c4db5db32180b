"""The shared home of Mask R-CNN: data, one epoch and evaluation, on one process and on two."""

import hashlib
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from baggage import synthetic
from core.data.coco_images import CocoImages
from core.engine import detection, distributed
from core.engine.coco_evaluation import encode_detections
from core.errors import InputError
from core.models.mask_rcnn import MaskRCNN
from train_mask_rcnn import build_step, train_one_epoch

NETWORK = {
    "backbone_name": "resnet18", "num_classes": 3, "norm": "batch", "min_size": 64, "max_size": 96,
    "anchor_sizes": [8, 16, 24, 32, 48], "box_batch_size_per_image": 16, "rpn_batch_size_per_image": 32,
    "rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 30, "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_test": 20,
}  # fmt: skip
OPTIONS = {
    "data": None, "train_images": None, "train_annotations": None, "val_images": None, "val_annotations": None,
    "val_fraction": 0.0, "skip_broken": False, "seed": 0, "batch_size": 2, "iterations_per_epoch": 2,
    "augmentation": 1, "flip": 0.5,
    "vertical_flip": 0.0, "crop_size": [64, 64], "min_size": 64, "max_size": 96,
    "workers": 0, "accumulate": 1, "clip_gradient": 5.0,
    "channels_last": False, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-4, "momentum": 0.9,
    "schedule": "one_cycle", "epochs": 1, "warmup_steps": 0, "warmup_factor": 0.1, "milestones": [],
    "step_size": 1, "gamma": 0.1, "min_lr": 0.0, "amp": "off", "ema": 0.9,
}  # fmt: skip
CPU = torch.device("cpu")


def options(root, **changes):
    return SimpleNamespace(**{**OPTIONS, "data": str(root), **changes})


def digest(network):
    """A text that tells states apart by any bit: tensors don't travel well from a process that ends."""
    content = io.BytesIO()
    for key, value in network.state_dict().items():
        content.write(key.encode() + value.numpy().tobytes())
    return hashlib.sha256(content.getvalue()).hexdigest()


def train_and_evaluate(rank, root, evaluated):
    """An epoch of two steps; then on this rank: losses, the weights, the averaged ones, metrics of those in a file."""
    device = distributed.setup("cpu", 1.0)
    args = options(root)
    data = detection.load_data(args, lambda _: None)
    torch.manual_seed(distributed.rank())  # each rank starts elsewhere: DDP gives all the weights of rank 0
    network = MaskRCNN(**NETWORK)
    loader = detection.build_train_loader(args, data.train, device)
    step = build_step(network, args, device, len(loader))
    model = distributed.wrap(network, device)
    row, _ = train_one_epoch(model, loader, step, args, device)
    row.pop("images_per_second")
    digests = digest(network), digest(step.evaluated[0])
    if not evaluated.exists():
        torch.save(network.state_dict(), evaluated)
    network.load_state_dict(torch.load(evaluated, weights_only=True))
    result = detection.evaluate(network, detection.build_eval_loader(data.val, device), data.val, device)
    return row, digests, result.metrics


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_the_ap_of_one(shapes, tmp_path, launch, one_thread):
    """The evaluated weights are those that one process ends with."""
    _, _, expected = train_and_evaluate(0, shapes, tmp_path / "weights.pth")
    results, codes, errors = launch(train_and_evaluate, shapes, tmp_path / "weights.pth")
    assert codes == [0, 0], errors
    (row, digests, metrics), (other_row, other_digests, other_metrics) = results
    assert row == other_row and digests == other_digests and digests[0] != digests[1]
    assert repr(metrics) == repr(other_metrics) == repr(expected)  # as text, since nan is not nan


@pytest.fixture
def shapes_of_12_bits(shapes, tmp_path):
    """`shapes` in grey, in files of 16 bits: those of train use 12 of them, those of val 10."""
    root = shutil.copytree(shapes, tmp_path / "shapes")
    for path in root.glob("*2017/*.png"):
        grey = np.array(Image.open(path).convert("L")).astype(np.uint16)
        grey[0, 0] = 255
        Image.fromarray(grey * (16 if "train" in path.parent.name else 4)).save(path)
    return root


def assert_shown_by_12_bits(data):
    assert data.bits == 12
    images = CocoImages(data)
    for index in range(len(images)):
        item = images[index]
        stored = torch.from_numpy(np.array(Image.open(item["path"])).astype(np.int64))
        assert torch.equal((item["image"] * 255).round().long(), (stored >> 4).expand(3, -1, -1))


def test_train_and_val_are_read_by_the_bits_that_both_use(shapes_of_12_bits):
    said = []
    data = detection.load_data(options(shapes_of_12_bits), said.append)
    assert said == ["pictures of 16 bits use 12 of them: 0 .. 4,095 is taken as black .. white"]
    for part in (data.train, data.val):
        assert_shown_by_12_bits(part)
    (shapes_of_12_bits / "annotations/instances_val2017.json").unlink()
    data = detection.load_data(options(shapes_of_12_bits, val_fraction=0.3, skip_broken=True), said.append)
    assert_shown_by_12_bits(data.train)
    assert_shown_by_12_bits(data.val)
    assert said[1:] == said[:1]


def test_what_the_training_evaluated_on_is_read_by_its_bits_again(shapes_of_12_bits, tmp_path):
    """Alone it uses fewer bits, and would be four times as bright."""
    args = options(shapes_of_12_bits)
    data = detection.load_data(args, lambda _: None)
    network = MaskRCNN(**NETWORK)
    step = build_step(network, args, CPU, 1)
    state = detection.checkpoint_state(network, step, 0.5, args, data)
    asked = SimpleNamespace(data=None, images=None, annotations=None, skip_broken=False)
    same = {"data": str(shapes_of_12_bits)}
    named = {"images": data.paths["val_images"], "annotations": data.paths["val_annotations"]}
    for given in ({}, same, named):
        said = []
        again = detection.load_evaluation_data(
            SimpleNamespace(**{**vars(asked), **given}), state["args"], said.append, state["view"]
        )
        assert_shown_by_12_bits(again)
        assert said == []
    other = shutil.copytree(shapes_of_12_bits, tmp_path / "other")
    for trained_with, view in ((state["args"], state["view"]), ({}, {})):
        given = SimpleNamespace(**{**vars(asked), "data": str(other)})
        assert detection.load_evaluation_data(given, trained_with, said.append, view).bits == 10


def test_val_follows_the_view_of_train_where_its_own_pictures_do_not_tell(shapes, tmp_path):
    """Train has one turned by a quarter, outlined as it is stored; val has one turned by half."""
    for split, turns in (("train", {3: 6}), ("val", {1: 3})):
        path = tmp_path / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        content = json.loads((shapes / "annotations" / path.name).read_text())
        (tmp_path / f"{split}2017").mkdir()
        for entry in content["images"]:
            picture = Image.open(shapes / f"{split}2017" / entry["file_name"])
            entry["file_name"] = f"{entry['id']}.jpg"
            exif = Image.Exif()
            exif[0x0112] = turns.get(entry["id"], 1)
            picture.save(tmp_path / f"{split}2017" / entry["file_name"], exif=exif)
        path.write_text(json.dumps(content))
    said = []
    data = detection.load_data(options(tmp_path), said.append)
    assert not data.train.upright and not data.val.upright
    assert len(said) == 1 and "1 of 4 looked at" in said[0] and "stored picture, as no other picture tells" in said[0]
    network = MaskRCNN(**NETWORK)
    state = detection.checkpoint_state(
        network, build_step(network, options(tmp_path), CPU, 1), 0.5, options(tmp_path), data
    )
    asked = SimpleNamespace(data=None, images=None, annotations=None, skip_broken=False)
    assert not detection.load_evaluation_data(asked, state["args"], said.append, state["view"]).upright


def test_an_epoch_of_pictures_without_any_object(shapes):
    """Every loss is there and finite, and every weight has a gradient, which DDP insists on."""
    args = options(shapes, ema=0.0)
    data = detection.load_data(args, lambda _: None).train
    data = data._replace(pictures=[picture._replace(annotations=[]) for picture in data.pictures[:2]])
    network = MaskRCNN(**NETWORK)
    loader = detection.build_train_loader(args, data, CPU)
    step = build_step(network, args, CPU, len(loader))
    gradients = {}
    for name, parameter in network.named_parameters():
        parameter.register_hook(lambda gradient, name=name: gradients.setdefault(name, gradient))
    row, _ = train_one_epoch(network, loader, step, args, CPU)
    assert row["loss_mask"] == 0 and row["loss_box_reg"] == 0 and row["loss_classifier"] > 0
    assert set(gradients) == {name for name, _ in network.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA: half precision takes minutes on a CPU"
)


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=needs_cuda)])
def test_mixed_precision_stays_finite(shapes, amp):
    device = torch.device("cuda" if amp == "fp16" else "cpu")
    args = options(shapes, amp=amp)
    data = detection.load_data(args, lambda _: None)
    torch.manual_seed(0)
    network = MaskRCNN(**NETWORK).to(device)
    loader = detection.build_train_loader(args, data.train, device)
    step = build_step(network, args, device, len(loader))
    row, _ = train_one_epoch(network, loader, step, args, device)
    assert all(torch.isfinite(torch.tensor(value)) for value in row.values())
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    detection.evaluate(network, detection.build_eval_loader(data.val, device), data.val, device, amp=amp)


def test_without_paths_the_belt_scenes_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "SYNTHETIC", tmp_path / "synthetic")
    made = []

    def make(root, background):
        made.append(root)
        (root / "scenes").mkdir(parents=True)

    monkeypatch.setattr(synthetic, "make_synthetic_baggage", make)
    args = options(None, data=None)
    said = []
    with pytest.raises(InputError, match="instances_train2017.json"):  # the stand-in made none
        detection.load_data(args, said.append)
    assert made == [tmp_path / "synthetic"] and args == options(None, data=None)  # the options stay as they were
    assert "rendering" in said[0]


def changed(shapes, tmp_path, split, change):
    """Root of a copy of `shapes` whose annotation file of a split is changed."""
    root = shutil.copytree(shapes, tmp_path / "changed")
    path = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


def test_what_is_at_fault_is_left_out_by_an_option_that_the_message_names(shapes, tmp_path):
    def damage(content):
        content["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
        content["annotations"][1]["segmentation"] = None
        content["images"].append({"id": 99, "file_name": "gone.png", "width": 96, "height": 64})
        del content["images"][1]["width"], content["images"][1]["height"]

    root = changed(shapes, tmp_path, "train", damage)
    says = "gone.png; .*; .*2 of 14 annotations at fault: .*--skip-broken leaves out"
    with pytest.raises(InputError, match=says):
        detection.load_data(options(root), lambda _: None)
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    (root / "train2017" / content["images"][1]["file_name"]).write_bytes(b"no picture")
    said = []
    data = detection.load_data(options(root, skip_broken=True), said.append)
    assert len(data.train.pictures) == 7 and not any("\n" in line for line in said)
    assert sum("left out" in line for line in said) == 3  # the missing, the broken picture and the annotations


def test_validation_without_an_object_is_said_before_the_run(shapes, tmp_path):
    says = "val2017.json: no object to evaluate on in its 4 pictures .*--val-images and --val-annotations"
    with pytest.raises(InputError, match=says):
        root = changed(shapes, tmp_path, "val", lambda content: content["annotations"].clear())
        detection.load_data(options(root), lambda _: None)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_held_out_has_an_object_where_one_can_be_spared(shapes, tmp_path, seed):
    def keep_two(content):  # of two pictures
        by_image = {one["image_id"]: one | {"category_id": 3} for one in content["annotations"]}
        content["annotations"] = list(by_image.values())[:2]

    root = changed(shapes, tmp_path, "train", keep_two)
    given = options(None, data=None, **paths_of(root, "train"), val_fraction=0.2, seed=seed)
    data = detection.load_data(given, lambda _: None)
    assert [sum(len(one.annotations) for one in part.pictures) for part in (data.train, data.val)] == [1, 1]
    assert len(data.val.pictures) <= 3


def test_a_folder_of_another_layout_is_told_the_options_for_it(shapes, tmp_path):
    (tmp_path / "train").mkdir()
    shutil.copy(shapes / "annotations/instances_train2017.json", tmp_path / "train/_annotations.coco.json")
    with pytest.raises(InputError) as caught:
        detection.load_data(options(tmp_path), lambda _: None)
    names = ("--train-images", "--train-annotations", "--val-images", "--val-annotations", "instances_train2017.json")
    assert all(name in str(caught.value) for name in (*names, "train/_annotations.coco.json"))
    asked = SimpleNamespace(data=str(tmp_path), images=None, annotations=None, skip_broken=False)
    with pytest.raises(InputError, match="instances_val2017.json; .* by --images and --annotations"):
        detection.load_evaluation_data(asked, {}, print, {})


def test_classes_without_an_object_are_left_out_with_a_word(shapes, tmp_path):
    def add(content):
        content["categories"] = [{"id": 1, "name": "objects"}, *content["categories"], {"id": 90, "name": "moon"}]

    expected, said = detection.load_data(options(shapes), lambda _: None), []
    data = detection.load_data(options(changed(shapes, tmp_path, "train", add)), said.append)
    assert said == ["classes without an object, left out: objects, moon"]
    for ours, theirs in zip(data[:2], expected[:2], strict=True):
        assert ours.categories == theirs.categories
        labels, others = (
            [[one.label for one in picture.annotations] for picture in part.pictures] for part in (ours, theirs)
        )
        assert labels == others


def test_a_class_that_only_one_part_has_is_kept(shapes, tmp_path):
    def without_discs(content):
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 3]

    data = detection.load_data(options(changed(shapes, tmp_path, "train", without_discs)), lambda _: None)
    assert [category.name for category in data.train.categories] == ["square", "disc"]


def test_pictures_that_are_trained_and_evaluated_on_are_said(shapes, tmp_path):
    said = []
    detection.load_data(options(shapes), said.append)
    detection.load_data(options(shapes, data=None, **paths_of(shapes, "train"), val_fraction=0.3), said.append)
    assert said == []
    root = shutil.copytree(shapes, tmp_path / "shapes")
    shutil.copy(root / "train2017/2.png", root / "val2017/1.png")  # of one size
    detection.load_data(options(root), said.append)
    assert len(said) == 1 and said[0].startswith("warning: 1 of 4 pictures of val are in train too, byte for byte; ")
    said.clear()
    same = paths_of(root, "train") | {key.replace("train", "val"): p for key, p in paths_of(root, "train").items()}
    detection.load_data(options(None, data=None, **same), said.append)
    assert len(said) == 1 and said[0].startswith("warning: 8 of 8 pictures of val")


def paths_of(root, split):
    annotations = root / f"annotations/instances_{split}2017.json"
    return {f"{split}_images": str(root / f"{split}2017"), f"{split}_annotations": str(annotations)}


def test_the_checkpoint_gives_the_averaged_network_back(shapes, tmp_path):
    args = options(shapes)
    data = detection.load_data(args, lambda _: None)
    network = MaskRCNN(**NETWORK)
    loader = detection.build_train_loader(args, data.train, CPU)
    step = build_step(network, args, CPU, len(loader))
    train_one_epoch(network, loader, step, args, CPU)
    torch.save(detection.checkpoint_state(network, step, 0.5, args, data), tmp_path / "best.pth")
    loaded, state = detection.network_from_checkpoint(tmp_path / "best.pth", CPU)
    expected = step.evaluated[0].state_dict()
    assert state["epoch"] == 1 and state["best"] == 0.5
    assert not [key for key, value in loaded.state_dict().items() if not torch.equal(value, expected[key])]
    assert not loaded.training and state["categories"] == [[3, "square"], [7, "disc"]]


def test_instances_are_what_the_network_says_and_what_coco_results_hold():
    boxes = torch.tensor([[10.3, 5.7, 40.1, 30.9], [0, 0, 20, 20], [50.5, 40, 79.99999, 59.99999]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "scores": torch.tensor([0.9, 0.8, 0.7])}
    found["masks"] = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    categories = [(90, "suitcase"), None, (17, "cart")]
    instances = detection.instances_of(found, (60, 80), categories)
    assert [one["box"] for one in instances] == boxes[[0, 2]].tolist()  # to the last bit
    assert [(one["category_id"], one["label"]) for one in instances] == [(90, "suitcase"), (17, "cart")]
    _, masks = encode_detections(found, (60, 80), 1, categories)
    assert [(one["score"], one["rle"]) for one in instances] == [(one["score"], one["segmentation"]) for one in masks]
    nothing = {name: value[:0] for name, value in found.items()}
    assert detection.instances_of(nothing, (60, 80), categories) == []
    half = {name: value if name == "labels" else value.bfloat16() for name, value in found.items()}
    assert len(detection.instances_of(half, (60, 80), categories)) == 2
