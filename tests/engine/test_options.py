import argparse
import inspect
from types import SimpleNamespace

import pytest

import analyze_mvb
import demo
import evaluate
import train_mask_rcnn
from baggage import perceptual_hash, picture_checks
from core.data import folder, images
from core.data.transforms import build_transform
from core.engine import export, optim, options
from core.errors import InputError
from core.layers import attention, mask_decoder, pooling
from core.losses import distillation, mask, spec
from core.models import mask_rcnn, reid
from core.retrieval import distance, ranking
from recognition import matching

RECIPES = {"small": {"epochs": 3, "lr": 0.1}, "large": {"epochs": 300}}


def parse(*argv):
    parser = options.Parser("a script")
    options.add_optimizer_options(parser)
    options.add_run_options(parser)
    return options.parse(parser, RECIPES, lambda args: "small" if args.accumulate == 1 else "large", argv)


def test_recipe_wins_over_the_default_and_an_explicit_option_over_the_recipe():
    args = parse("--recipe", "small", "--lr", "0.7")
    assert (args.recipe, args.epochs, args.lr, args.optimizer) == ("small", 3, 0.7, "adam")


def test_an_explicit_option_wins_even_when_it_equals_the_default():
    default = options.Parser("a script")
    options.add_optimizer_options(default)
    epochs = default.parse_args([]).epochs
    assert parse("--recipe", "small", "--epochs", str(epochs)).epochs == epochs


def test_default_recipe_depends_on_the_arguments():
    assert parse().recipe == "small"
    assert parse("--accumulate", "2").recipe == "large"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--no-such-option",), "--no-such-option"),
        (("--epochs", "-1"), "'-1' is not a whole number of at least 0"),
        (("--epochs", "abc"), "argument --epochs: 'abc' is not a whole number of at least 0"),
        (("--lr", "nan"), "'nan' is not a finite number"),
        (("--lr", "fast"), "'fast' is not a finite number"),
        (("--accumulate", "0"), "'0' is not a whole number above 0"),
        (("--accumulate", "abc"), "'abc' is not a whole number above 0"),
        (("--gamma", "1.5"), "'1.5' is not a number between 0 and 1"),
        (("--ema", "1"), "'1' is not a number of at least 0 and below 1"),
        (("--milestones", "40", "-70"), "'-70' is not a whole number of at least 0"),
        (("--timeout", "0"), "'0' is not a finite number above 0"),
        (("--optimizer", "rmsprop"), "adam"),
        (("--recipe", "huge"), "huge"),
    ],
)
def test_bad_values_are_named_in_one_line(argv, said):
    with pytest.raises(InputError, match=said) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_one_folder_is_a_text_and_several_are_a_list():
    parser = options.Parser("a script")
    options.add_reid_data_options(parser, several=True)
    assert parser.parse_args([]).data is None and parser.parse_args(["--data", "a"]).data == "a"
    assert parser.parse_args(["--data", "a", "b"]).data == ["a", "b"]
    parser = options.Parser("a script")
    parser.add_argument("checkpoint")
    options.add_reid_data_options(parser)
    assert vars(parser.parse_args(["--data", "a", "b"])).items() >= {"data": "a", "checkpoint": "b"}.items()


def test_margin_can_be_soft():
    assert options.margin("soft") is None
    assert options.margin("0.3") == 0.3
    with pytest.raises(argparse.ArgumentTypeError, match="'hard' is not soft or a finite number"):
        options.margin("hard")


def test_help_shows_defaults_as_they_are_typed_and_only_where_there_are_some(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    for text in ("epochs of multistep (default: 40 70)", "0: none (default: 0.0)", "(default: the best there is)"):
        assert text in said
    for text in ("None", "False", "SUPPRESS", "[40", "==", "is) (default", "backbone) (default"):
        assert text not in said


def test_help_shows_what_each_recipe_sets(capsys):
    """By the names that a person types, whatever the arguments are called that they set."""
    parser = options.Parser("a script")
    for name in ("--ids-per-batch", "--milestones", "--autoaugment", "--flip", "--pad"):
        parser.add_argument(name)
    parser.add_argument("--warmup-epochs", dest="warmup_steps")
    recipes = {
        "large": {"ids_per_batch": 16, "milestones": [40, 70], "autoaugment": True, "flip": False},
        "none": {"pad": 0, "warmup_steps": 3},
    }
    with pytest.raises(SystemExit):
        options.parse(parser, recipes, argv=["--help"], notes={"large": "published: 91.5 / 96.3"})
    said = " ".join(capsys.readouterr().out.split())
    assert "large --ids-per-batch 16 --milestones 40 70 --autoaugment --no-flip published: 91.5 / 96.3 none" in said
    assert said.endswith("none --pad 0 --warmup-epochs 3")


def test_options_become_the_arguments_of_their_name():
    """Keyword-only ones alone, so that `name`, of the run, is never taken for the name of something else."""

    def build(name, flip, *, pad=3, blur=0.5):
        return name, flip, pad, blur

    args = SimpleNamespace(name="run", flip=0.5, pad=7, other=1)
    assert options.arguments_of(build, args) == {"pad": 7}


def test_a_default_with_a_per_cent_sign_is_shown_as_it_is(capsys):
    parser = options.Parser("a script")
    parser.add_argument("--format", default="%d", help="of numbers, 100%%")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "of numbers, 100% (default: %d)" in capsys.readouterr().out


def test_the_device_group_is_part_of_the_run_options():
    parsers = [options.Parser("a script") for _ in range(2)]
    options.add_device_options(parsers[0])
    options.add_run_options(parsers[1])
    device, run = (vars(parser.parse_args([])) for parser in parsers)
    assert device == {"device": None, "amp": "off", "timeout": 10.0}
    assert device.items() <= run.items() and len(run) > 10


@pytest.mark.parametrize("argv", [["--name", ""], ["--many", "a", ""]])
def test_an_empty_value_is_none(argv):
    parser = options.Parser("A script.")
    parser.add_argument("--name")
    parser.add_argument("--many", nargs="+")
    assert parser.parse_args(["--name", " "]).name == " "
    with pytest.raises(InputError, match=f"{argv[0][2:]}: a value is empty"):
        parser.parse_args(argv)


def test_what_a_person_gave_and_how_it_is_typed():
    parser = options.Parser("A script.")
    parser.add_argument("pictures", nargs="*")
    group = parser.add_argument_group("numbers")
    group.add_argument("--lambda", dest="lambda_value", type=float, default=0.3)
    group.add_argument("--num-bags", "--bags", type=int)
    assert parser.given(parser.parse_args([])) == parser.given(parser.parse_args(["--lambda", "0.3"])) == []
    given = parser.given(parser.parse_args(["--bags", "0", "a.jpg", "--lambda", "0"]))
    assert parser.as_typed(given) == "pictures, --lambda, --num-bags"


def test_an_error_says_how_to_get_help():
    with pytest.raises(InputError, match=r"\(see `bash run_ddp.sh --check --help`\)$"):
        options.Parser("a check", command="bash run_ddp.sh --check").parse_args(["--no"])


def test_choices_are_what_the_builders_know():
    """They are written out in `options`, so that --help needs nothing of torch."""
    known = {
        "ATTENTIONS": attention.ATTENTIONS,
        "BACKBONES": reid.BACKBONES,
        "DISTILLATION_LOSSES": distillation.DISTILLATION_LOSSES,
        "FEATURE_ERASINGS": attention.FEATURE_ERASINGS,
        "LOSSES": spec.KNOWN_LOSSES,
        "MASK_DECODERS": mask_decoder.MASK_DECODERS,
        "MASK_POOLINGS": reid.MASK_POOLINGS,
        "METRICS": distance.METRICS,
        "MODELS": reid.MODELS,
        "NECKS": reid.NECKS,
        "OPTIMIZERS": optim.OPTIMIZERS,
        "POOLINGS": pooling.POOLINGS,
        "PROTOCOLS": ranking.PROTOCOLS,
        "REGRESSIONS": mask.REGRESSIONS,
        "SCHEDULES": optim.SCHEDULES,
        "WARMUPS": optim.WARMUPS,
    }
    for name, builders in known.items():
        assert sorted(getattr(options, name)) == sorted(builders), name
    assert options.VAL_FRACTION == folder.VAL_FRACTION and options.MAX_MEGAPIXELS == images.MAX_MEGAPIXELS
    for value in options.ERASING_VALUES:
        build_transform(8, 8, training=True, erasing_value=value)
    defaults = inspect.signature(mask_rcnn.MaskRCNN).parameters
    for _, argument, _, default, _ in sum(train_mask_rcnn.MASK_RCNN_OPTIONS.values(), ()):
        assert default == defaults[argument].default, argument
    choices = {action.dest: action.choices for action in train_mask_rcnn.get_parser()._actions}
    assert set(choices["backbone_name"]) == set(mask_rcnn.BACKBONES) and set(choices["norm"]) == set(mask_rcnn.NORMS)
    choices = {action.dest: action.choices for action in evaluate.get_parser()._actions}
    assert set(choices["export"]) == set(export.SUFFIXES)
    assert demo.LEAST_OF_GALLERY == matching.LEAST_SCORE
    analysis = vars(analyze_mvb.get_parser().parse_args([]))
    assert (analysis["min_side"], analysis["copy_bits"]) == (picture_checks.MIN_SIDE, perceptual_hash.MOST_BITS)
