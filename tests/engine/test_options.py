import pytest

from core.engine import options
from core.errors import InputError

RECIPES = {"small": {"epochs": 3, "lr": 0.1}, "large": {"epochs": 300}}


def parse(*argv):
    parser = options.Parser("a script")
    options.add_optimizer_options(parser)
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
        (("--epochs", "-1"), "-1 is negative"),
        (("--lr", "nan"), "nan is not a finite number"),
        (("--lr", "fast"), "--lr"),
        (("--accumulate", "0"), "0 is not a whole number above 0"),
        (("--ema", "1.5"), "1.5 is not between 0 and 1"),
        (("--recipe", "huge"), "huge"),
    ],
)
def test_bad_values_are_named_in_one_line(argv, said):
    with pytest.raises(InputError, match=said) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_margin_can_be_soft():
    assert options.margin("soft") is None
    assert options.margin("0.3") == 0.3
