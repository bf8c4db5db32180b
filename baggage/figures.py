"""The figures of a baggage set's report: bars, histograms, sizes, sheets of samples and of what is at fault."""

import os
from pathlib import Path

from baggage.charts import Row, bar_figure, contact_sheet, histogram_figure, scatter_figure
from baggage.dataset_numbers import counted
from baggage.faults import FAULTS, in_words
from baggage.picture_checks import Measure
from core.data.mvb import PARTS, SIDES
from core.visualize.sheet import shorten

IN_A_ROW = 12  # pictures of a sheet; a bag of the synthetic set has 11
SIDE_NAMES = {side: f"{words} ({side})" for side, words in SIDES.items()}


def write_figures(folder, survey, measures, numbers, samples=6):
    """Draw what the data have into `folder`; a figure that would be empty is left out.

    Args:
        measures: one for each of `survey.pictures`. numbers: of `dataset_numbers`. samples: identities on a sheet.

    Returns:
        dict name -> file name, of those written.
    """
    folder = Path(folder)
    readable = [(p, m) for p, m in zip(survey.pictures, measures, strict=True) if isinstance(m, Measure)]
    written = {}

    def draw(name, function, title, content, *labels):
        if content:
            written[name] = f"{name}.png"
            function(folder / written[name], title, content, *labels)

    bars, histogram = bar_figure, histogram_figure
    parts = [part for part in PARTS if numbers["pictures"][part]]
    by_source = {part: _by_side(numbers["pictures_by_source"][part]) for part in parts}
    draw("pictures", bars, "Pictures by split and side of security", by_source, "pictures")
    identities = {part: {"identities": numbers["identities"][part]} for part in parts}
    draw("identities", bars, "Identities by split", identities, "identities")
    draw("gallery_and_probe", bars, "Gallery against probe", _gallery_and_probe(numbers), "count")
    draw(
        "pictures_per_identity",
        histogram,
        "Pictures of an identity",
        _spread(numbers["pictures_per_identity"]),
        "pictures",
    )
    views = {SIDE_NAMES[side]: counts for side, counts in _spread(numbers["views_per_source"]).items()}
    draw("views_per_source", histogram, "Views of an identity on each side of security", views, "views")
    materials = {one: _by_side(sides) for one, sides in numbers["materials"]["by_source"].items()}
    draw("materials", bars, "Surface materials by side of security", materials, "pictures")
    sizes = _by_part(readable, lambda measure: measure.size)
    draw("sizes", scatter_figure, "Picture sizes", sizes, "width (pixels)", "height (pixels)")
    aspects = _by_part(readable, lambda measure: measure.size[0] / measure.size[1])
    draw("aspect_ratios", histogram, "Aspect ratios", aspects, "width / height")
    for what, words in (("box", "Boxes"), ("mask", "Masks")):
        shares = _by_part(readable, lambda measure, what=what: getattr(measure, f"{what}_share"))
        draw(
            f"{what}_coverage",
            histogram,
            f"{words}: how much of its picture each covers",
            shares,
            "share of the picture",
        )
    pictures, sheet = [picture for picture, _ in readable], contact_sheet
    bits = readable[0][1].bits if readable else 16
    draw("samples_materials", sheet, "Surface materials", material_rows(pictures), bits)
    draw("samples_identities", sheet, "Identities across views", identity_rows(pictures, samples), bits)
    draw("samples_faults", sheet, "Pictures at fault", fault_rows(survey), bits)
    return written


def _by_side(counts):
    return {words: counts.get(side, 0) for side, words in SIDE_NAMES.items()}


def _gallery_and_probe(numbers):
    parts = ("gallery", "probe")
    if not any(numbers["pictures"][part] for part in parts):
        return {}
    return {what: {part: numbers[what][part] for part in parts} for what in ("pictures", "identities")}


def _spread(described):
    """{key: {"histogram": {value: count}}} -> {key: [value, ...]}"""
    return {
        key: [int(value) for value, count in one["histogram"].items() for _ in range(count)]
        for key, one in described.items()
    }


def _by_part(readable, value):
    """Part -> what `value(measure)` says of its pictures, without None; without parts that have nothing."""
    values = {part: [value(m) for p, m in readable if p.part == part] for part in PARTS}
    values = {part: [one for one in found if one is not None] for part, found in values.items()}
    return {part: found for part, found in values.items() if found}


def evenly(values, count):
    """At most `count` of the values, spread evenly over them, first and last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / max(count - 1, 1))] for place in range(count)]


def _by_identity(pictures):
    found = {}
    for picture in sorted(pictures, key=lambda p: (p.name, p.source, p.view or 0, p.path)):
        found.setdefault(picture.identity, []).append(picture)
    return list(found.values())


def material_rows(pictures):
    """For the sheet: of each material pictures of several identities, the two sides of security in turn."""
    rows = []
    for material in sorted({picture.material for picture in pictures if picture.material}):
        groups = _by_identity([picture for picture in pictures if picture.material == material])
        chosen = []
        for place, group in enumerate(evenly(groups, IN_A_ROW)):
            wanted = [picture for picture in group if picture.source == "gp"[place % 2]]
            chosen.append((wanted or group)[0])
        count = counted(sum(map(len, groups)), "picture", "pictures")
        rest = f": {count} of {counted(len(groups), 'identity', 'identities')}"
        shown = [(picture.path, f"{picture.name} {picture.source}", None) for picture in chosen]
        rows.append(Row(material, rest, shown))
    return rows


def identity_rows(pictures, samples):
    """For the sheet: some identities of train and of test, each with its views before security and then after it."""
    rows = []
    train = [picture for picture in pictures if picture.part == "train"]
    test = [picture for picture in pictures if picture.part != "train"]
    for words, some, count in (("train", train, (samples + 1) // 2), ("test", test, samples // 2)):
        for group in evenly(_by_identity(some), count):
            sides = [[picture for picture in group if picture.source == side] for side in SIDES]
            room = max(IN_A_ROW // 2, IN_A_ROW - min(map(len, sides)))  # what one side leaves, the other may take
            chosen = [picture for side in sides for picture in evenly(side, room)]
            material = f", {shorten(group[0].material, 140, 10.5)}" if group[0].material else ""
            rest = f" ({words}{material}): {len(sides[0])} before security, {len(sides[1])} after"
            if len(chosen) < len(group):
                rest += f"; {len(chosen)} of {len(group):,} shown"
            views = ["" if picture.view is None else f" {picture.view}" for picture in chosen]
            shown = [(p.path, p.source + view, p.box) for p, view in zip(chosen, views, strict=True)]
            rows.append(Row(group[0].name, rest, shown))
    return rows


def fault_rows(survey):
    """For the sheet: of each kind of fault the first pictures, with the split they are in; copies beside each other."""
    rows, known = [], {survey.key(p): p for p in survey.files if p.exists}
    for kind in FAULTS:
        faults = [fault for fault in survey.faults if fault.kind == kind and fault.paths]
        paths = [path for fault in faults for path in fault.paths]
        if paths:
            rest = f": {len(faults):,}"
            if len(paths) > IN_A_ROW:
                rest += f"; the first {IN_A_ROW} of {len(paths):,} pictures"
            shown = []
            for path in paths[:IN_A_ROW]:
                picture = known[path]
                stem = os.path.splitext(os.path.basename(path))[0]  # a suffix more, and most names would be cut
                caption = f"{picture.part}/{stem}" if picture.part else stem
                shown.append((picture.path, caption, picture.box if kind == "box_outside" else None))
            rows.append(Row(in_words(kind), rest, shown))
    return rows
