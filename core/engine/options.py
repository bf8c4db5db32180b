"""Command-line options shared by the scripts: one meaning per option, whichever script has it.

A script composes its parser from these groups and calls `parse`, which settles three layers of values: the default of
each option, then the recipe (a published preset), then what the person typed.
"""

import argparse
import inspect
import os
import sys
import textwrap

from core.engine.terminal import guard_streams
from core.errors import InputError

# What the builders know, written out here: --help imports nothing of theirs. A test holds the two together.
ATTENTIONS = ("se", "cbam", "channel", "spatial", "position_self", "channel_self")
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet50_ibn_a", "resnet101_ibn_a")
BACKBONES += ("osnet_x1_0", "osnet_x0_75", "osnet_x0_5", "osnet_x0_25", "osnet_ibn_x1_0", "osnet_ain_x1_0")
DISTILLATION_LOSSES = ("logits", "features", "attention", "relational", "similarity", "retrieval", "self")
ERASING_VALUES = ("mean", "zero", "noise")
FEATURE_ERASINGS = ("off", "batch", "top")
LOSSES = ("cross_entropy", "focal", "arcface", "cosface", "circle_softmax", "triplet", "softmax_triplet")
LOSSES += ("semihard_triplet", "multi_similarity", "circle", "ranked_list", "center")
LOSSES += ("gaussian_mask", "focal_mask", "combined_mask")
MASK_DECODERS = ("full", "light")
MASK_POOLINGS = ("off", "soft", "branch")
MAX_MEGAPIXELS = 200.0  # as core.data.images has it, whose import takes time
METRICS = ("euclidean", "cosine")
MODELS = ("bot", "lmbn_n", "lmbn_r", "pcb", "mgn", "pyramid")
NECKS = ("bnneck", "none")
OPTIMIZERS = ("adam", "adamw", "amsgrad", "nadam", "sgd")
POOLINGS = ("avg", "max", "gem")
PROTOCOLS = ("market1501", "no_camera", "vehicleid")
REGRESSIONS = ("mse", "l1", "smooth_l1")
SCHEDULES = ("step", "multistep", "linear", "cosine", "cosine_to_min", "one_cycle")
VAL_FRACTION = 0.2
WARMUPS = ("linear", "constant", "exponential", "count")


WIDTH = 80  # columns


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as it stands, and the default of every option as a person would type it."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=WIDTH)

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

    def format_help(self):
        """What the script does, in its first sentence; how it is called, on one line; and all the rest."""
        positional = [action.dest for action in self._actions if not action.option_strings]
        first, _, rest = self.description.partition("\n\n")
        usage = " ".join([f"usage: {self.prog} [options]", *(f"[{name} ...]" for name in positional)])
        formatter = self._get_formatter()
        formatter.add_text(f"{first}\n\n{usage}\n\n{rest}")
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message):
        raise InputError(f"{message} (see `{self.prog} --help`)")

    def parse_args(self, argv=None):
        """The trap: an empty value, of a shell variable that isn't set, would pass for an option that isn't given."""
        args = super().parse_args(argv)
        if "max_megapixels" in args:
            from core.data.images import limit_megapixels  # here, so that --help needs nothing of it

            limit_megapixels(args.max_megapixels)
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


def parse(parser, recipes=None, default_recipe=None, argv=None, notes=None):
    """Parse `argv` with a recipe below it: an explicit option wins over the recipe, the recipe over the default.

    Args:
        parser: a `Parser`; with recipes it gets the option `--recipe` here.
        recipes: dict name -> dict of option values.
        default_recipe: function of the parsed arguments that names the recipe where the person names none.
        notes: dict name -> what the help says about a recipe beside its options.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not recipes:
        return parser.parse_args(argv)
    _add_recipes(parser, recipes, notes)
    recipe = parser.parse_args(argv)
    name = recipe.recipe or default_recipe(recipe)
    parser.set_defaults(**recipes[name])
    args = parser.parse_args(argv)
    args.recipe = name
    return args


def answer_help(parser, recipes=None, notes=None):
    """Print the help and end the process, where it is asked for: a script calls it before it imports torch, which takes
    seconds. Arguments as those of `parse`."""
    if not {"-h", "--help"}.intersection(sys.argv[1:]):
        return
    if recipes:
        _add_recipes(parser, recipes, notes)
    guard_streams()
    parser.print_help()
    sys.stdout.flush()
    sys.exit(0)


def _add_recipes(parser, recipes, notes):
    parser.add_argument(
        "--recipe", choices=sorted(recipes), help="published settings (listed below); an explicit option wins"
    )
    parser.epilog = _describe(parser, recipes, notes or {})


def arguments_of(function, args):
    """The options whose names (dest) are those of keyword-only parameters of a function or class: dict name -> value.

    So an option and the argument that it sets have one name, and no list of them stands twice.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _describe(parser, recipes, notes):
    """What each recipe sets, as options that could be typed, and the notes."""
    lines = ["recipes set, where no option says otherwise:"]
    for name, values in recipes.items():
        words = " ".join(_as_option(parser.as_typed([key]), value) for key, value in values.items())
        wrap = {"initial_indent": f"  {name + ' ':<12}", "subsequent_indent": " " * 14, "break_on_hyphens": False}
        # An option and its value stay on one line: between them is a space that can't be broken, until it is wrapped.
        lines.append(textwrap.fill(words, WIDTH, break_long_words=False, **wrap).replace("\0", " "))
        if name in notes:
            lines.append(textwrap.fill(notes[name], WIDTH, **{**wrap, "initial_indent": " " * 14}))
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


def names(text):
    """Names with commas between them."""
    return [name.strip() for name in text.split(",")]


def stages(text):
    return [_number(int, stage, lambda value: 1 <= value <= 4, "a stage from 1 to 4") for stage in text.split(",")]


class OneOrList(argparse.Action):
    """For `nargs="+"`: a single value stays itself, of several there is a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def add_reid_data_options(parser, several=False):
    """`several`: sets may be joined, `--dataset a+b --data A B`. Not beside a positional, which --data would take."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        help="market1501, dukemtmc, msmt17, cuhk03_np, mot17, veri776, vehicleid, personx, vehiclex, mvb, suitcase, "
        "folder, or synthetic (default without --data: baggage that Carousel renders itself), synthetic_hard (the same "
        "bags among others, on restless floors)" + "; several as one: market1501+dukemtmc" * several,
    )
    group.add_argument(
        "--data",
        nargs="+" if several else 1,
        action=OneOrList,
        metavar="ROOT",
        help="the data set's folder or one around it (default: data/<dataset>)" + "; of several, one each" * several,
    )
    add_picture_options(group)
    return group


def add_domain_options(parser):
    """The two sets of a translation."""
    group = parser.add_argument_group("data")
    for role in ("source", "target"):
        group.add_argument(f"--{role}", metavar="NAME:ROOT", help=f"{role} set, e.g. market1501:PATH or folder:PATH")
        group.add_argument(f"--{role}-cameras", type=int, nargs="+", metavar="N", help="only pictures of these, from 0")
    group.add_argument("--height", type=positive_int, default=256, help="picture height in the networks, pixels")
    group.add_argument("--width", type=positive_int, default=128, help="picture width in the networks, pixels")
    group.add_argument("--workers", type=non_negative_int, default=2, help="readers of each set, per rank")
    add_broken_options(group)
    group.add_argument("--batch-size", type=positive_int, default=8, help="pictures of each set, per process")
    group.add_argument("--iterations-per-epoch", type=non_negative_int, default=0, help="batches; 0: all of both sets")
    group.add_argument("--flip", type=fraction, default=0.5, help="probability of mirroring")


def add_picture_options(group):
    """How the pictures of ReID are read, whatever sets they are of."""
    group.add_argument("--height", type=positive_int, default=256, help="picture height in pixels after resizing")
    group.add_argument("--width", type=positive_int, default=128, help="picture width in pixels after resizing")
    group.add_argument("--workers", type=non_negative_int, default=2, help="processes that read pictures, per rank")
    add_broken_options(group)
    group.add_argument(
        "--val-fraction", type=fraction, default=VAL_FRACTION, help="identities held out of a folder without test"
    )


def add_broken_options(group):
    """What is done about pictures that can't be read, or are too large."""
    group.add_argument(
        "--skip-broken", action="store_true", help="leave out what can't be read, and faulty annotations"
    )
    add_size_limit(group)


def add_size_limit(group):
    text = "millions of pixels; a picture with more is refused: each takes 4 to 20 bytes of memory, by its format"
    group.add_argument("--max-megapixels", type=positive_float, default=MAX_MEGAPIXELS, help=text)


def add_published_options(parser):
    group = parser.add_argument_group("another project's weights", "in place of a checkpoint of ReID")
    group.add_argument("--backbone", choices=BACKBONES, metavar="NAME", help=f"of the file: {', '.join(BACKBONES)}")
    group.add_argument("--model", choices=MODELS, default="bot", help="of the file, see train_reid.py")
    return group


def add_reid_batch_options(parser, masks=True):
    """`masks`: the script reads masks of the training pictures."""
    group = parser.add_argument_group("batches and augmentation")
    group.add_argument("--ids-per-batch", type=positive_int, default=16, help="P: identities, per process")
    group.add_argument("--images-per-id", type=positive_int, default=4, help="K: pictures of each identity")
    group.add_argument("--iterations-per-epoch", type=non_negative_int, default=0, help="batches; 0: one pass")
    group.add_argument("--flip", type=fraction, default=0.5, help="probability of mirroring")
    group.add_argument("--pad", type=non_negative_int, default=10, help="pixels, before a random crop")
    group.add_argument("--autoaugment", action=argparse.BooleanOptionalAction, default=False, help="ImageNet policy")
    group.add_argument("--blur", type=fraction, default=0.0, help="probability of Gaussian blur")
    group.add_argument("--translation", type=fraction, default=0.0, help="probability of an eighth larger, then a crop")
    group.add_argument("--color-jitter", type=fraction, default=0.0, help="probability of other light and colours")
    group.add_argument("--random-patch", type=fraction, default=0.0, help="probability that a part covers another one")
    group.add_argument("--erasing", type=fraction, default=0.5, help="probability of random erasing")
    group.add_argument("--cutout", type=fraction, default=0.0, help="probability of erasing a square, 1/12 of the area")
    group.add_argument("--erasing-value", choices=ERASING_VALUES, default="mean", help="of erasing and cutout")
    if masks:
        group.add_argument(
            "--hide-background",
            type=fraction,
            default=0.0,
            help="probability that only the object is shown; needs masks (of the data, or --mask-target predicted)",
        )
    return group


def add_reid_network_options(parser):
    group = parser.add_argument_group("network")
    group.add_argument(
        "--model",
        choices=MODELS,
        default="bot",
        help="bot: the strong baseline; of several branches: lmbn_n and lmbn_r (LightMBN), mgn, pcb, pyramid",
    )
    group.add_argument(
        "--backbone",
        help=f"{', '.join(BACKBONES)}, for bot each also with _with_mask (default: resnet50, for lmbn_n osnet_x1_0)",
    )
    group.add_argument("--parts", type=non_negative_int, default=0, help="stripes of pcb and pyramid; 0: 6")
    group.add_argument(
        "--branches", type=names, default=[], help="of lmbn_n and lmbn_r, e.g. global,part (default: with channel, too)"
    )
    group.add_argument("--attention", choices=ATTENTIONS, help="a block behind stages of a ResNet (default: none)")
    group.add_argument("--attention-stages", type=stages, default=[3, 4], metavar="N,N", help="of --attention, 1 to 4")
    group.add_argument(
        "--feature-erasing", choices=FEATURE_ERASINGS, default="off", help="rows of stage 4 that bot loses in training"
    )
    add_branch_options(group)
    group.add_argument("--mask-size", type=positive_int, nargs=2, default=[256, 256], help="height, width (px)")
    group.add_argument("--mask-decoder", choices=MASK_DECODERS, default="full", help="light: a fortieth of the work")
    group.add_argument(
        "--mask-pooling",
        choices=MASK_POOLINGS,
        default="off",
        help="the predicted mask weights the features of stage 4 before pooling: soft, or in a second branch",
    )
    group.add_argument(
        "--head-lr", type=non_negative_float, default=0.0, help="learning rate of all but the backbone; 0: as --lr"
    )
    group.add_argument("--freeze-epochs", type=non_negative_int, default=0, help="with a frozen backbone")
    group.add_argument("--sync-batch-norm", action="store_true", help="BatchNorm over all GPUs' batches")
    group.add_argument("--freeze-batch-norm", action="store_true", help="BatchNorm keeps its statistics")
    return group


def add_branch_options(group):
    """Of every network of ReID, whatever its branches are."""
    group.add_argument("--last-stride", type=int, choices=[1, 2], default=1, help="stride of stage 4")
    group.add_argument("--pooling", choices=POOLINGS, default="avg", help="of stage 4")
    group.add_argument(
        "--neck", choices=NECKS, help="between embedding and classifier (default: bnneck, for mgn and pyramid none)"
    )
    group.add_argument("--dropout", type=fraction, help="before the classifier (default: 0, for pyramid 0.2)")
    group.add_argument("--embedding-dim", type=non_negative_int, default=0, help="of a branch; 0: the network's own")
    group.add_argument("--weights", default="imagenet", help="imagenet (the published file), none, or a file's path")


def add_reid_loss_options(parser):
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--loss",
        help=f'weighted sum, e.g. "0.5*cross_entropy+0.5*multi_similarity"; names: {", ".join(LOSSES)}, or as '
        "LightMBN spells them, such as CrossEntropy and MSLoss (default: the recipe's)",
    )
    group.add_argument("--label-smoothing", type=fraction, default=0.1, help="of cross_entropy")
    group.add_argument(
        "--margin",
        type=margin,
        default=0.3,
        help="of triplet (a distance; soft: soft margin), semihard_triplet (squared), multi_similarity (a cosine)",
    )
    group.add_argument(
        "--cosine-margin",
        type=non_negative_float,
        help="of circle, circle_softmax, cosface, and in radians arcface (default: 0.25, 0.25, 0.35, 0.5)",
    )
    group.add_argument("--scale", type=positive_float, help="of the same losses (default: 128, 128, 64, 64)")
    group.add_argument("--center-lr", type=non_negative_float, default=0.5, help="of the centers (SGD)")
    group.add_argument(
        "--mask-target",
        choices=["gaussian", "box", "instance", "predicted"],
        help="gaussian and box are made from the object's box, instance is its true mask, predicted is what "
        "--mask-checkpoint finds (default: instance where every training picture has a mask, else gaussian)",
    )
    group.add_argument(
        "--mask-checkpoint",
        metavar="PATH",
        help="a checkpoint of train_mask_rcnn.py, for --mask-target predicted; its masks are kept beside the data",
    )
    group.add_argument(
        "--mask-loss", dest="mask_kind", choices=REGRESSIONS, default="mse", help="regression of gaussian_mask"
    )
    group.add_argument("--sigma-ratio", type=positive_float, default=0.1, help="sigma / side of the box")
    group.add_argument("--mask-threshold", type=fraction, default=0.0, help="gaussian_mask's least target")
    group.add_argument("--gather", action="store_true", help="metric losses compare the batches of all ranks")
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
    group.add_argument(
        "--false-accept-of-others",
        action="store_true",
        help="let that share hold for other objects than these, too: the upper end of its interval is at most it",
    )
    return group


def add_optimizer_options(parser, per_update=False):
    """`per_update`: the learning rate changes with every update of the weights, and not only with the epoch."""
    group = parser.add_argument_group("optimiser")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="update rule")
    group.add_argument("--lr", type=non_negative_float, default=3.5e-4, help="base learning rate")
    group.add_argument("--weight-decay", type=non_negative_float, default=5e-4, help="L2 penalty")
    group.add_argument("--momentum", type=fraction, default=0.9, help="of sgd")
    group.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=False, help="momentum of sgd")
    group.add_argument("--epochs", type=non_negative_int, default=120, help="0 evaluates and stops")
    group.add_argument(
        "--schedule", choices=SCHEDULES, default="multistep", help="of lr, which is the highest rate of one_cycle"
    )
    group.add_argument("--decay-from", type=non_negative_int, default=0, help="epoch from which linear falls to 0")
    group.add_argument("--milestones", type=non_negative_int, nargs="*", default=[40, 70], help="epochs of multistep")
    group.add_argument("--step-size", type=positive_int, default=40, help="epochs between the drops of step")
    group.add_argument("--gamma", type=fraction, default=0.1, help="factor of each drop")
    group.add_argument(
        "--min-lr",
        type=non_negative_float,
        default=0.0,
        help="learning rate where cosine ends, which cosine_to_min reaches in the last epoch",
    )
    name, unit = ("--warmup-iterations", "updates") if per_update else ("--warmup-epochs", "epochs")
    group.add_argument(name, dest="warmup_steps", type=non_negative_int, default=0, help=f"{unit} of warm-up")
    group.add_argument(
        "--warmup",
        choices=WARMUPS,
        default="linear",
        help="count: 1/E, 2/E, ... 1 of the base lr in E epochs, whatever --warmup-factor",
    )
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
        help="continue a run: its last.pth, or without PATH the latest run of this name",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="all randomness is a function of it")
    group.add_argument("--deterministic", action="store_true", help="equal bits on a GPU too (slower)")
    group.add_argument("--channels-last", action="store_true", help="memory layout that is often faster")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--eval-every", type=positive_int, default=1, help="epochs between evaluations")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    group.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    return group
