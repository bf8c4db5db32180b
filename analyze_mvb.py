"""Look through a baggage set: a report with its numbers, figures and faults.

MVB (Multi View Baggage, Zhang et al. 2019) in either layout, the synthetic set
without --data; and its conversion:
    python analyze_mvb.py
    python analyze_mvb.py --data MVB
    python analyze_mvb.py --data MVB --convert MVB_converted

<--output> gets report.md with its figures, and numbers.json with every number
and every fault. A folder that exists is never overwritten, the next free number
is added. Faults end nothing: what training would refuse is listed here, with
the file or the entry, and the exit code stays 0.

--convert writes bounding_box_train, query and bounding_box_test with names like
0010_g_1.jpg into a new folder, which `train_reid.py --dataset mvb` reads as it
reads the original. Materials, boxes and masks have no place there: they are
lost.
"""

import os
import sys
from pathlib import Path

from core.engine import options


def get_parser():
    parser = options.Parser(__doc__)
    parser.add_argument("--data", metavar="ROOT", help="folder of the set (default: data/synthetic, made if it lacks)")
    parser.add_argument("--output", default="analysis", metavar="FOLDER", help="folder for the report")
    parser.add_argument("--convert", metavar="OUT", help="also write the set in the converted layout into a new folder")
    parser.add_argument("--copy", action="store_true", help="with --convert: copies, where it would be hard links")
    parser.add_argument(
        "--min-side", type=options.positive_int, default=32, help="pixels; a picture with a shorter side is tiny"
    )
    parser.add_argument(
        "--copy-bits",
        type=options.non_negative_int,
        default=28,
        help="of the 255 bits of their hashes, how many may differ between copies of a picture",
    )
    parser.add_argument("--samples", type=options.positive_int, default=6, help="identities on the sheet of views")
    parser.add_argument("--workers", type=options.positive_int, default=8, help="threads that read pictures")
    options.add_size_limit(parser)
    return parser


if __name__ == "__main__":
    options.answer_help(get_parser())  # before torch is imported, which takes seconds

from baggage import conversion
from baggage.dataset_numbers import beside_published, counted, dataset_numbers, published_differences
from baggage.faults import in_words
from baggage.figures import write_figures
from baggage.identity_checks import identity_faults
from baggage.inspection import inspect
from baggage.picture_checks import Measure, copy_faults, measure_pictures, picture_faults
from baggage.report import write_report
from baggage.synthetic import MARKER, settle_synthetic_baggage
from core.data.mvb import CONVERTED, PARTS
from core.engine import distributed
from core.engine.checkpoint import open_output
from core.errors import InputError
from core.files import printable

SYNTHETIC = Path("data") / "synthetic"


def survey_data(args):
    """Read all there is: (survey with its faults, measures of `survey.pictures`)."""
    if args.data is None:
        settle_synthetic_baggage(SYNTHETIC, "plain", print)
        args.data = SYNTHETIC
    survey = inspect(args.data)
    if args.convert and survey.layout == "converted":  # before all pictures are read
        raise InputError(f"--convert: {survey.root} is in the converted layout already")
    measures = measure_pictures(survey.files, args.workers)
    survey.faults.extend(identity_faults(survey.pictures))
    survey.faults.extend(picture_faults(survey, measures, args.min_side))
    survey.faults.extend(copy_faults(survey, measures, most_bits=args.copy_bits))
    return survey, measures[: len(survey.pictures)]


def describe(survey, numbers):
    """The summary that is printed: what there is, and of each kind of fault how many and the first."""
    parts = ", ".join(f"{part} {numbers['pictures'][part]:,} of {numbers['identities'][part]:,}" for part in PARTS)
    lines = [
        f"{numbers['root']}, {survey.layout} layout: "
        f"{counted(numbers['pictures']['all'], 'picture', 'pictures')} of "
        f"{counted(numbers['identities']['all'], 'identity', 'identities')} ({parts})"
    ]
    if survey.both:
        lines.append(f"both layouts lie there; this is the {survey.layout} one, which training reads too")
    lines.append(f"faults: {numbers['faults']['all'] or 'none'}")
    for kind, count in numbers["faults"]["by_kind"].items():
        first = next(fault for fault in survey.faults if fault.kind == kind)
        lines.append(f"  {count:>6,}  {in_words(kind)}: {first.where}: {first.message}"[:400])
    return lines


def convert(args, survey, measures, is_synthetic):
    """Write the converted layout and say what became of it."""
    usable = [p for p, measure in zip(survey.pictures, measures, strict=True) if isinstance(measure, Measure)]
    done = conversion.convert(usable, args.convert, args.copy)
    how = " and ".join(f"{count:,} {words}" for words, count in sorted(done.items()))
    print(
        f"converted: {len(usable):,} pictures into {printable(args.convert)} ({how}); materials, boxes and masks have "
        "no place there and are lost"
    )
    left_out = {
        "not there or not readable": len(survey.pictures) - len(usable),
        "without an entry that says whose they are": len(survey.unlisted),
    }
    for why, count in left_out.items():
        if count:
            print(f"left out: {counted(count, 'picture', 'pictures')} {why}")
    filled = {picture.part for picture in usable}
    empty = [folder for part, folder in CONVERTED.items() if part not in filled]
    if empty:
        print(f"empty: {', '.join(empty)}; training and evaluation will refuse {printable(args.convert)}")
    if (Path(os.path.expanduser(args.convert)) / conversion.NAMES).exists():
        print(f"identities that are no numbers were numbered; {conversion.NAMES} has their names")
    differences = published_differences(beside_published(usable))  # what was left out is missing there
    if differences and not is_synthetic:
        print("this is not the published MVB, or not all of it: " + "; ".join(differences))
    elif not differences:
        print("identities and pictures are as many as published")


def main(args):
    if args.copy and not args.convert:
        raise InputError("--copy says how to --convert: give that too")
    if args.convert:
        conversion.check_target(args.convert)  # before all pictures are read
    with open_output(args.output) as output:  # so is this
        survey, measures = survey_data(args)
        is_synthetic = (survey.root / MARKER).is_file()
        numbers = dataset_numbers(survey, measures)
        figures = write_figures(output, survey, measures, numbers, args.samples)
        limits = {"min_side": args.min_side, "most_bits": args.copy_bits}
        write_report(output, numbers, figures, limits, is_synthetic)
        print("\n".join(describe(survey, numbers)))
        print(f"report: {printable(output / 'report.md')}")
    if args.convert:  # last: the report stands, whatever becomes of this
        convert(args, survey, measures, is_synthetic)


if __name__ == "__main__":
    distributed.run_script(lambda argv: main(options.parse(get_parser(), argv=argv)), sys.argv[1:])
