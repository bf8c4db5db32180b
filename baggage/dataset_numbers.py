"""The numbers of a baggage set, as plain values for JSON: counts, views, materials, sizes, coverage, faults."""

import statistics
from collections import Counter, defaultdict

from baggage.faults import FAULTS
from baggage.picture_checks import Measure
from core.data.mvb import PARTS, SIDES
from core.files import printable

# Zhang et al. 2019, section 3: what the real set holds.
PUBLISHED = {"identities": 4519, "pictures": 22660, "train": 20176, "gallery": 1432, "probe": 1052}


def dataset_numbers(survey, measures):
    """Every number of the report. `measures`: one for each of `survey.pictures`, see `measure_pictures`.

    Counts are of the pictures that are on the disk; sizes and coverage of those that can be read. A part without
    pictures is left out where only zeros would stand.
    """
    kept = [(p, m) for p, m in zip(survey.pictures, measures, strict=True) if p.exists]
    pictures = [picture for picture, _ in kept]
    readable = [(picture, measure) for picture, measure in kept if isinstance(measure, Measure)]
    # A view may have several pictures; a picture whose name says no view is one of its own.
    views = {(p.source, p.identity, p.path if p.view is None else p.view) for p in pictures}
    parts, identities = _count_parts(pictures), {p.identity for p in pictures}
    return {
        "root": printable(survey.root),
        "layout": survey.layout,
        "pictures": {"all": len(pictures)} | parts,
        "pictures_readable": len(readable),
        "identities": {"all": len(identities)}
        | {part: len({p.identity for p in pictures if p.part == part}) for part in PARTS},
        "published": beside_published(pictures),
        "pictures_by_source": {part: _count(p.source for p in pictures if p.part == part) for part in PARTS},
        "gallery_and_probe": _gallery_and_probe(pictures),
        "pictures_per_identity": _per_identity(((p.part, p.identity) for p in pictures), PARTS),
        "views_per_source": _per_identity((view[:2] for view in views), SIDES),
        "view_numbers": {
            side: _count(p.view for p in pictures if p.source == side and p.view is not None) for side in SIDES
        },
        "materials": _materials(pictures),
        "sizes": _sizes(readable),
        "coverage": _coverage(readable),
        "faults": {
            "all": len(survey.faults),
            "by_kind": {kind: count for kind in FAULTS if (count := sum(f.kind == kind for f in survey.faults))},
            "list": [fault._asdict() for fault in survey.faults],
        },
    }


def beside_published(pictures):
    """Pictures -> for each count of PUBLISHED what it is of them ("here"), and what the real set holds."""
    counts = {"identities": len({p.identity for p in pictures}), "pictures": len(pictures)} | _count_parts(pictures)
    return {name: {"here": counts[name], "published": published} for name, published in PUBLISHED.items()}


def published_differences(published):
    """`beside_published` -> lines that say where these data differ from the real set."""
    return [
        f"{name}: {one['here']:,}, and the published set has {one['published']:,}"
        for name, one in published.items()
        if one["here"] != one["published"]
    ]


def counted(count, one, many):
    """1 picture, 1,234 pictures."""
    return f"{count:,} {one if count == 1 else many}"


def describe(values):
    """count, least, mean, median, largest; None where there are no values."""
    values = list(values)
    if not values:
        return None
    return {
        "count": len(values),
        "min": min(values),
        "mean": round(statistics.fmean(values), 4),
        "median": round(statistics.median(values), 4),
        "max": max(values),
    }


def _count(values):
    """How often each value occurs, in the order of the values. JSON's keys are texts."""
    counts = Counter(values)
    return {str(value): counts[value] for value in sorted(counts)}


def _count_parts(pictures):
    return {part: sum(picture.part == part for picture in pictures) for part in PARTS}


def _gallery_and_probe(pictures):
    gallery, probe = ({p.identity for p in pictures if p.part == part} for part in ("gallery", "probe"))
    return {
        "identities_in_both": len(gallery & probe),
        "identities_in_gallery_only": len(gallery - probe),
        "identities_in_probe_only": len(probe - gallery),
    }


def _per_identity(pairs, keys):
    """Of (key, identity) for each picture or view: how many an identity has under a key, and the histogram of that.

    keys: parts or sides; an identity that has none there counts in the others alone.
    """
    counts = defaultdict(Counter)
    for key, identity in pairs:
        counts[key][identity] += 1
    return {
        key: describe(counts[key].values()) | {"histogram": _count(counts[key].values())} for key in keys if counts[key]
    }


def _materials(pictures):
    """Of pictures and of identities; one with two materials counts in both, and is counted."""
    named = [picture for picture in pictures if picture.material]
    materials, identities = sorted({picture.material for picture in named}), defaultdict(set)
    for picture in named:
        identities[picture.identity].add(picture.material)
    return {
        "pictures": _count(picture.material for picture in named),
        "identities": _count(material for found in identities.values() for material in found),
        "by_source": {
            material: {side: sum(p.source == side for p in named if p.material == material) for side in SIDES}
            for material in materials
        },
        "by_split": {material: _count_parts([p for p in named if p.material == material]) for material in materials},
        "pictures_without": len(pictures) - len(named),
        "identities_with_several": sum(len(found) > 1 for found in identities.values()),
    }


def _sizes(readable):
    sizes = {}
    for part in PARTS:
        found = [measure.size for picture, measure in readable if picture.part == part]
        if found:
            sizes[part] = {
                "width": describe(width for width, _ in found),
                "height": describe(height for _, height in found),
                "aspect_ratio": describe(round(width / height, 4) for width, height in found),
            }
    return sizes


def _coverage(readable):
    """Of each part: how many pictures have a box, a mask; the share of the picture that they cover."""
    covered = {}
    for part in PARTS:
        found = [(picture, measure) for picture, measure in readable if picture.part == part]
        if found:
            covered[part] = {
                what: {
                    "with": sum(getattr(picture, what) is not None for picture, _ in found),
                    "of": len(found),
                    "share": describe(round(s, 4) for _, m in found if (s := getattr(m, f"{what}_share")) is not None),
                }
                for what in ("box", "mask")
            }
    return covered
