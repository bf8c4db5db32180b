"""What demo.py leaves behind: of a picture its sheets, panels, JSON, and card on the page; of two their comparison."""

import json
import os

from core import visualize
from core.engine import identification
from core.engine.gallery_pictures import from_jpeg
from core.files import atomic_write, make_folder, printable

THUMBNAIL = (640, 480)  # pixels at most
JPEG_LIMIT = 65500  # pixels; a picture with a longer side is written as PNG


def write_instances(folder, name, picture, found, class_names):
    """Everything about the instances of one picture into its folder; returns its card for the page.

    Args:
        found: instances, as `core.engine.trained.find_instances` gives them.
        class_names: of the network, which keep their colours from picture to picture.
    """
    make_folder(folder)
    panels = visualize.instance_panels(picture, found, class_names)
    files = {panel: save(folder / panel, drawn) for panel, drawn in panels.items()}
    caption = visualize.describe_instances(found)
    size = f"{picture.width} x {picture.height} pixels"
    visualize.instance_sheet(folder / "sheet.jpg", panels, name, f"{size}, {caption}")
    write_json(folder, name, picture, rows_of(found))
    return make_card(folder, name, caption, panels["all"], files)


def write_identities(folder, name, picture, found, cuts, matches, identifier):
    """One picture and who is in it into its folder; returns its card for the page.

    Args:
        found, cuts, matches: of `identification.identify_instances`.
        identifier: `identification.Identifier`, its gallery open; the other arguments as in `write_instances`.
    """
    make_folder(folder)
    gallery = identifier.gallery
    rows = [
        {**row, "identity": identification.answer(known), "matches": [_in_words(match, gallery) for match in known]}
        for row, known in zip(rows_of(found), matches, strict=True)
    ]
    about = {"gallery": str(gallery.path), "metric": identifier.encoder.metric, "threshold": identifier.threshold}
    write_json(folder, name, picture, rows, about)
    caption = identification.describe(matches)
    pictured = [[_in_pictures(match, gallery) for match in known] for known in matches]
    known = found, cuts, pictured, identifier.threshold
    visualize.identification_sheet(folder / "sheet.jpg", picture, *known, name, caption)
    labels = [printable(row["identity"] or "unknown") for row in rows]
    named = [{**one, "label": label} for one, label in zip(found, labels, strict=True)]
    drawn = visualize.draw_instances(picture, named, scores=False)
    return make_card(folder, name, caption, drawn, {"identities": save(folder / "identities", drawn)})


def _in_words(match, gallery):
    return {"identity": match["identity"], "distance": match["distance"], "source": gallery.source(match["row"])}


def _in_pictures(match, gallery):
    thumbnail = from_jpeg(gallery.thumbnail(match["row"]))
    return {**match, "identity": printable(match["identity"]), "thumbnail": thumbnail}


def rows_of(found):
    """What instances.json says of each instance."""
    keys = {"class": "label", "category_id": "category_id", "score": "score", "box": "box", "mask": "rle"}
    return [{word: one[key] for word, key in keys.items()} for one in found]


def write_json(folder, name, picture, rows, about=None):
    """instances.json, with an instance on each line."""
    lines = ",\n  ".join(map(json.dumps, rows))
    head = json.dumps({"picture": name, "width": picture.width, "height": picture.height, **(about or {})})
    with atomic_write(folder / "instances.json") as file:
        file.write(f'{head[:-1]}, "instances": [\n  {lines}\n]}}\n'.encode())


def make_card(folder, name, caption, drawn, files):
    """The card of a picture on the page, and its thumbnail, which `drawn` becomes."""
    drawn.thumbnail(THUMBNAIL)
    save(folder / "thumbnail", drawn)
    links = {"sheet": "sheet.jpg", **files, "JSON": "instances.json"}
    links = {word: f"{folder.name}/{file}" for word, file in links.items()}
    return visualize.Card(name, caption, f"{folder.name}/thumbnail.jpg", links["sheet"], links)


def save(stem, picture):
    """Write a PIL picture, whole or not at all, as JPEG, or as PNG where it is too long; returns the file's name."""
    suffix = ".jpg" if max(picture.size) <= JPEG_LIMIT else ".png"
    path = stem.with_name(stem.name + suffix)
    with atomic_write(path) as file:
        if suffix == ".jpg":
            picture.save(file, "JPEG", **visualize.JPEG)
        else:
            picture.save(file, "PNG")
    return path.name


def write_comparison(folder, paths, pictures, cuts, verdict, encoder):
    """comparison.jpg and comparison.json of two pictures.

    Args:
        cuts: what was compared of them, small copies; None for whole pictures.
        verdict: `identification.Verdict`.
    """
    names = [os.path.basename(path) for path in paths]
    visualize.comparison_sheet(
        folder / "comparison.jpg",
        pictures,
        names,
        cuts,
        verdict.distance,
        verdict.threshold,
        verdict.answer,
        verdict.reason,
    )
    content = {"pictures": list(map(str, paths)), "metric": encoder.metric, "distance": verdict.distance}
    content |= {"threshold": verdict.threshold, "same": verdict.is_same, "cut_out": None not in cuts}
    with atomic_write(folder / "comparison.json") as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
