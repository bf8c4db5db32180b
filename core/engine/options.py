"""Command-line options shared by the scripts: one meaning per option, whichever script has it.

A script composes its parser from these groups and calls `parse`, which settles three layers of values: the default of
each option, then the recipe (a published preset), then what the person typed.
"""

import argparse
import inspect
import os
import shutil
import sys
import textwrap

from core.engine.optim import OPTIMIZERS, SCHEDULES
from core.errors import InputError
from core.retrieval.distance import METRICS
from core.retrieval.ranking import PROTOCOLS


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as it stands, and the default of every option as a person would type it."""

    def _get_default_metavar_for_optional(self, action):
        return action.option_strings[-1].strip("-").replace("-", "_").upper()  # what is typed, whatever it sets

    def _get_help_string(self, action):
        text = (action.help or "").removesuffix(" (default: %(default)s)")  # some Pythons put it there for --no-...
        default = action.default
        if (
            "default" in text
            or default in ([], ())
            or any(default is none for none in (None, False, argparse.SUPPRESS))
        ):
            return text
        return f"{text} (default: {_as_typed(default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are InputErrors: one line and exit code 2, like every other bad input.

    command: how a person starts the script; by default `python <script>`.
    """

    def __init__(self, description, command=None):
        command = command or f"python {os.path.basename(sys.argv[0])}"
        super().__init__(prog=command, description=description, formatter_class=HelpFormatter)

    def error(self, message):
        raise InputError(f"{message} (see `{self.prog} --help`)")

    def parse_args(self, argv=None):
        """The trap: an empty value, of a shell variable that isn't set, would pass for an option that isn't given."""
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"{name.replace('_', '-')}: a value is empty; give one, or leave the option out")
        return args

    def given(self, args):
        """Names (dest) of the arguments that are not at their defaults, in the order of the help."""
        defaults = {action.dest: action.default for action in self._actions}
        return [name for name, default in defaults.items() if getattr(args, name, default) not in (default, [])]

    def as_typed(self, names):
        """The options of these names as a person types them: "--k1, --lambda"."""
        words = {action.dest: (action.option_strings or [action.dest])[0] for action in self._actions}
        return ", ".join(words[name] for name in names)


def parse(parser, recipes=None, default_recipe=None, argv=None):
    """Parse `argv` with a recipe below it: an explicit option wins over the recipe, the recipe over the default.

    Args:
        parser: a `Parser`; with recipes it gets the option `--recipe` here.
        recipes: dict name -> dict of option values.
        default_recipe: function of the parsed arguments that names the recipe where the person names none.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not recipes:
        return parser.parse_args(argv)
    parser.add_argument(
        "--recipe", choices=sorted(recipes), help="published settings (listed below); an explicit option wins"
    )
    parser.epilog = _describe(parser, recipes)
    recipe = parser.parse_args(argv)
    name = recipe.recipe or default_recipe(recipe)
    parser.set_defaults(**recipes[name])
    args = parser.parse_args(argv)
    args.recipe = name
    return args


def arguments_of(function, args):
    """The options whose names (dest) are those of keyword-only parameters of a function or class: dict name -> value.

    So an option and the argument that it sets have one name, and no list of them stands twice.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _describe(parser, recipes):
    """What each recipe sets, as options that could be typed."""
    width = max(60, shutil.get_terminal_size().columns - 2)
    lines = ["recipes set, where no option says otherwise:"]
    for name, values in recipes.items():
        words = " ".join(_as_option(parser.as_typed([key]), value) for key, value in values.items())
        wrap = {"initial_indent": f"  {name:<12}", "subsequent_indent": " " * 14, "break_on_hyphens": False}
        # An option and its value stay on one line: between them is a space that can't be broken, until it is wrapped.
        lines.append(textwrap.fill(words, width, break_long_words=False, **wrap).replace("\0", " "))
    return "\n".join(lines)


def _as_option(name, value):
    if isinstance(value, bool):
        return name if value else f"--no-{name.removeprefix('--')}"
    return f"{name} {_as_typed(value)}".replace(" ", "\0")


def _as_typed(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(kind, text, is_allowed, wanted):
    """The number that `text` is. The trap: argparse answers a ValueError with the name of a Python function."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def positive_int(text):
    return _number(int, text, lambda value: value > 0, "a whole number above 0")


def non_negative_int(text):
    return _number(int, text, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text):
    return _number(float, text, lambda value: 0 < value < float("inf"), "a finite number above 0")


def non_negative_float(text):
    return _number(float, text, lambda value: 0 <= value < float("inf"), "a finite number of at least 0")


def fraction(text):
    return _number(float, text, lambda value: 0 <= value <= 1, "a number between 0 and 1")


def fraction_below_one(text):
    return _number(float, text, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


def margin(text):
    """A distance, or None for "soft"."""
    if text == "soft":
        return None
    return _number(float, text, lambda value: 0 <= value < float("inf"), "soft or a finite number of at least 0")


def add_reid_data_options(parser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        help="market1501, dukemtmc, msmt17, cuhk03_np, veri776, vehicleid, personx, vehiclex, mvb, suitcase, folder, "
        "or synthetic (default without --data: baggage that Carousel renders itself), synthetic_hard (the same bags "
        "among others, on restless floors)",
    )
    group.add_argument("--data", metavar="ROOT", help="the data set's folder (default: data/<dataset>)")
    group.add_argument("--height", type=positive_int, default=256, help="picture height in pixels after resizing")
    group.add_argument("--width", type=positive_int, default=128, help="picture width in pixels after resizing")
    group.add_argument("--workers", type=non_negative_int, default=2, help="processes that read pictures, per rank")
    group.add_argument("--skip-broken", action="store_true", help="leave unreadable pictures out instead of stopping")
    return group


def add_reid_evaluation_options(parser):
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="which gallery pictures count: market1501 drops a query's own camera, no_camera drops nothing, "
        "vehicleid draws one gallery picture per identity ten times (default: the data set's own)",
    )
    group.add_argument("--distance", choices=METRICS, default="cosine", help="between embeddings")
    group.add_argument("--eval-batch-size", type=positive_int, default=64, help="pictures per process")
    group.add_argument(
        "--false-accept-rate",
        type=fraction_below_one,
        default=0.01,
        help="share of the pairs of two objects that may pass as one: it sets the distance up to which two pictures "
        "show the same object",
    )
    return group


def add_optimizer_options(parser, per_update=False):
    """`per_update`: the learning rate changes with every update of the weights, and not only with the epoch."""
    group = parser.add_argument_group("optimiser")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="update rule")
    group.add_argument("--lr", type=non_negative_float, default=3.5e-4, help="base learning rate")
    group.add_argument("--weight-decay", type=non_negative_float, default=5e-4, help="L2 penalty")
    group.add_argument("--momentum", type=fraction, default=0.9, help="of sgd")
    group.add_argument("--epochs", type=non_negative_int, default=120, help="0 evaluates and stops")
    group.add_argument(
        "--schedule", choices=SCHEDULES, default="multistep", help="of lr, which is the highest rate of one_cycle"
    )
    group.add_argument("--milestones", type=non_negative_int, nargs="*", default=[40, 70], help="epochs of multistep")
    group.add_argument("--step-size", type=positive_int, default=40, help="epochs between the drops of step")
    group.add_argument("--gamma", type=fraction, default=0.1, help="factor of each drop")
    group.add_argument("--min-lr", type=non_negative_float, default=0.0, help="learning rate where cosine ends")
    name, unit = ("--warmup-iterations", "updates") if per_update else ("--warmup-epochs", "epochs")
    group.add_argument(name, dest="warmup_steps", type=non_negative_int, default=0, help=f"{unit} of linear warm-up")
    group.add_argument("--warmup-factor", type=fraction, default=0.01, help="of the base lr, where the warm-up starts")
    group.add_argument(
        "--clip-gradient", type=non_negative_float, default=0.0, help="largest gradient norm; 0 does not clip"
    )
    group.add_argument("--accumulate", type=positive_int, default=1, help="batches per update")
    group.add_argument(
        "--ema", type=fraction_below_one, default=0.0, help="decay of averaged weights, e.g. 0.999; 0: none"
    )
    return group


def add_device_options(parser, timeout=True):
    """What every script that runs a network has, whether it trains or not.

    timeout: whether its processes ever wait for each other.
    """
    group = parser.add_argument_group("device")
    group.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    group.add_argument("--amp", choices=["off", "fp16", "bf16"], default="off", help="mixed precision")
    if timeout:
        group.add_argument("--timeout", type=positive_float, default=10.0, help="minutes until a hung run is ended")
    return group


def add_run_options(parser):
    add_device_options(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--name", help="run folder under --output (default: data set and backbone)")
    group.add_argument("--output", default="runs", help="folder of the run folders")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="continue a run: its checkpoint, or without PATH the newest one under the run's name",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="all randomness is a function of it")
    group.add_argument("--deterministic", action="store_true", help="equal bits on a GPU too (slower)")
    group.add_argument("--channels-last", action="store_true", help="memory layout that is often faster")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--eval-every", type=positive_int, default=1, help="epochs between evaluations")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    group.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    return group
