"""The report on a baggage set as Markdown: its faults first, then its numbers, each table beside its figure."""

import json
import re

from baggage.dataset_numbers import counted
from baggage.faults import FAULTS, in_words
from baggage.perceptual_hash import BITS, MOST_COLOR
from baggage.picture_checks import FILLED, FLAT, MARGIN
from core.data.mvb import PARTS, SIDES
from core.files import atomic_write, printable

LISTED = 20  # faults of a kind that the report lists; the JSON has all
REFERENCES = {"<": "&lt;", "(": "&#40;"}


def write_report(folder, numbers, figures, limits, is_synthetic):
    """Write `report.md` and `numbers.json` into `folder`.

    Args:
        numbers: of `dataset_numbers`. figures: of `write_figures`, name -> file name.
        limits: {"min_side": pixels, "most_bits": of the hash}. is_synthetic: made by ourselves, so not the real set.
    """
    sections = [
        heading(numbers),
        faults_section(numbers, figures),
        counts_section(numbers, figures),
        views_section(numbers, figures),
        materials_section(numbers, figures),
        sizes_section(numbers, figures),
        coverage_section(numbers, figures),
        samples_section(figures),
        published_section(numbers, is_synthetic),
        method_section(limits),
    ]
    with atomic_write(folder / "report.md") as file:
        file.write(("\n\n".join(filter(None, sections)) + "\n").encode())
    with atomic_write(folder / "numbers.json") as file:
        file.write((json.dumps(numbers | {"limits": limits}, indent=1, allow_nan=False) + "\n").encode())


def table(head, rows, left=(0,)):
    """A Markdown table; columns of text (`left`) to the left, numbers to the right, with separators of thousands."""
    rows = [[_cell(value) for value in row] for row in rows]
    line = ["---" if index in left else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, line, *rows])


def _cell(value):
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else value.replace("|", "\\|")


def code(text):
    """Text of the data as it stands, on one line, at any place of the report: nothing in it is markup.

    It is in code spans, whose fences are longer than any backticks in it. What would begin a tag or the target of a
    link stands between two spans as a character reference: not every reader of Markdown looks for code first.
    """
    parts = re.split(r"(<|(?<=\])\()", printable(text))
    return "".join(REFERENCES.get(part) or _code_span(part) for part in parts if part)


def _code_span(text):
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text or text[0] == text[-1] == " " else ""  # one on each side belongs to the fences
    return f"{fence}{space}{text}{space}{fence}"


def figure(figures, name, words):
    return f"![{words}]({figures[name]})" if name in figures else None


def join(*blocks):
    return "\n\n".join(block for block in blocks if block)


def heading(numbers):
    pictures, identities, count = numbers["pictures"], numbers["identities"], numbers["faults"]["all"]
    found = f"**{counted(count, 'fault', 'faults')} found.**" if count else "**No faults found.**"
    pictures = counted(pictures["all"], "picture", "pictures")
    identities = counted(identities["all"], "identity", "identities")
    return join(
        f"# Baggage data: {code(numbers['root'])}",
        f"{pictures} of {identities}, in the {numbers['layout']} layout of MVB (Multi View Baggage). {found} Every "
        "number and every fault is in [numbers.json](numbers.json).",
    )


def faults_section(numbers, figures):
    faults = numbers["faults"]
    if not faults["all"]:
        looked = ", ".join(map(in_words, FAULTS))
        return join("## Faults", f"None. Looked for: {looked}.")
    blocks = ["## Faults"]
    kinds = [[in_words(kind), count, FAULTS[kind]] for kind, count in faults["by_kind"].items()]
    blocks.append(table(["kind", "found", "what it is"], kinds, left=(0, 2)))
    blocks.append(figure(figures, "samples_faults", "Pictures at fault"))
    for kind, count in faults["by_kind"].items():
        found = [fault for fault in faults["list"] if fault["kind"] == kind]
        lines = [f"- {code(fault['where'])}: {code(fault['message'])}" for fault in found[:LISTED]]
        if count > LISTED:
            lines.append(f"- and {count - LISTED:,} more, in numbers.json")
        blocks += [f"### {in_words(kind).capitalize()} ({count:,})", "\n".join(lines)]
    return join(*blocks)


def counts_section(numbers, figures):
    rows = []
    for part in PARTS:
        sides = numbers["pictures_by_source"][part]
        spread = numbers["pictures_per_identity"].get(part) or dict.fromkeys(("min", "mean", "median", "max"))
        spread = [spread[name] for name in ("min", "mean", "median", "max")]
        counts = [numbers["identities"][part], numbers["pictures"][part], *(sides.get(side, 0) for side in SIDES)]
        rows.append([part, *counts, *spread])
    head = ["split", "identities", "pictures", "before security (g)", "after security (p)"]
    head += [f"{name} per identity" for name in ("fewest", "mean", "median", "most")]
    both = numbers["gallery_and_probe"]
    return join(
        "## Pictures and identities",
        table(head, rows),
        figure(figures, "pictures", "Pictures by split and side of security"),
        figure(figures, "identities", "Identities by split"),
        figure(figures, "pictures_per_identity", "Histogram: pictures of an identity"),
        "## Gallery against probe",
        f"{counted(both['identities_in_both'], 'identity is', 'identities are')} in both, "
        f"{both['identities_in_gallery_only']:,} in the gallery alone, "
        f"{both['identities_in_probe_only']:,} in the probe alone.",
        figure(figures, "gallery_and_probe", "Gallery against probe"),
    )


def views_section(numbers, figures):
    rows = []
    for side, words in SIDES.items():
        spread = numbers["views_per_source"].get(side)
        if spread:
            named = ", ".join(f"{view}: {count:,}" for view, count in numbers["view_numbers"][side].items())
            rows.append([f"{words} ({side})", *(spread[n] for n in ("count", "min", "mean", "median", "max")), named])
    if not rows:
        return None
    return join(
        "## Views on each side of security",
        table(["side", "identities", "fewest", "mean", "median", "most", "pictures of each view"], rows, left=(0, 6)),
        figure(figures, "views_per_source", "Histogram: views of an identity on each side of security"),
    )


def materials_section(numbers, figures):
    materials = numbers["materials"]
    if not materials["pictures"]:
        return join("## Surface materials", f"These data name none{_lost(numbers)}.")
    total = sum(materials["pictures"].values())
    rows = []
    for name, count in materials["pictures"].items():
        sides, parts = materials["by_source"][name], materials["by_split"][name]
        share = f"{100 * count / total:.1f}%"
        counts = [*(sides[side] for side in SIDES), *(parts[part] for part in PARTS)]
        rows.append([code(name), materials["identities"][name], count, share, *counts])
    notes = []
    if materials["pictures_without"]:
        notes.append(f"{counted(materials['pictures_without'], 'picture has', 'pictures have')} none.")
    if materials["identities_with_several"]:
        several = counted(materials["identities_with_several"], "identity has", "identities have")
        notes.append(f"{several} more than one.")
    head = ["material", "identities", "pictures", "share", "before security", "after security", *PARTS]
    return join(
        "## Surface materials", table(head, rows), " ".join(notes), figure(figures, "materials", "Materials by side")
    )


def _lost(numbers):
    return (
        ": file names, which are all that the converted layout has, can't" if numbers["layout"] == "converted" else ""
    )


def sizes_section(numbers, figures):
    if not numbers["sizes"]:
        return None
    rows = []
    for part, sizes in numbers["sizes"].items():
        for name, words in (("width", "width (px)"), ("height", "height (px)"), ("aspect_ratio", "width / height")):
            rows.append([f"{part}, {words}", *(sizes[name][key] for key in ("min", "mean", "median", "max"))])
    return join(
        "## Sizes and aspect ratios",
        "Of the pictures as they are shown, turned as their EXIF orientation says.",
        table(["", "least", "mean", "median", "most"], rows),
        figure(figures, "sizes", "Widths and heights"),
        figure(figures, "aspect_ratios", "Histogram: width divided by height"),
    )


def coverage_section(numbers, figures):
    if not any(one["with"] for part in numbers["coverage"].values() for one in part.values()):
        return join("## Boxes and masks", f"These data have none{_lost(numbers)}.")
    rows = []
    for part, coverage in numbers["coverage"].items():
        for what, one in coverage.items():
            share = one["share"] or dict.fromkeys(("min", "mean", "median", "max"))
            share = [
                None if value is None else f"{100 * value:.1f}%"
                for value in map(share.get, ("min", "mean", "median", "max"))
            ]
            rows.append([f"{part}, {what}", one["with"], one["of"], *share])
    return join(
        "## Boxes and masks",
        "How many pictures have one, and how much of the picture it covers.",
        table(["", "have one", "of", "least", "mean", "median", "most"], rows),
        figure(figures, "box_coverage", "Histogram: share of the picture that the box covers"),
        figure(figures, "mask_coverage", "Histogram: share of the picture that the mask covers"),
    )


def samples_section(figures):
    sheets = [
        figure(figures, "samples_materials", "Pictures of each surface material"),
        figure(figures, "samples_identities", "Identities across views, before and after security"),
    ]
    return join("## Samples", *sheets) if any(sheets) else None


def published_section(numbers, is_synthetic):
    if is_synthetic:
        return None
    rows = [[name, one["here"], one["published"]] for name, one in numbers["published"].items()]
    return join(
        "## Beside the published set",
        "What Zhang et al. 2019 (arXiv:1907.11366) published. Other data than theirs differ, and need not agree.",
        table(["", "here", "published"], rows),
    )


def method_section(limits):
    return join(
        "## How faults were looked for",
        "\n".join(
            [
                f"- Tiny: a side below {limits['min_side']} pixels. One colour: a standard deviation below {FLAT:g} "
                "grey levels in every channel. Wrong bit depth: grey with 16 bits whose values are all "
                f"shown below {FILLED} of 255, where the highest of the set is shown above 127.",
                f"- Boxes may reach out of the picture by {MARGIN:g} pixel: some count the last pixel as inside.",
                f"- Copies: perceptual hashes (DCT, {BITS} bits) that differ in {limits['most_bits']} bits at most, "
                f"and colours that differ by {MOST_COLOR:g} grey levels on average at most, at equal brightness. "
                "Copies that were mirrored, turned or cropped by more than about 1% are not found.",
                "- Pictures that no entry (converted: no name) describes are looked at, and count in no number.",
                "- Identities are judged by what the data say, whether or not their pictures are there.",
            ]
        ),
    )
