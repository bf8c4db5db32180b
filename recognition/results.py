"""What demo.py leaves behind: of a picture its sheets, panels, JSON, and card on the page; of two their comparison."""

import json
import os
from collections import Counter

from core.files import atomic_write, make_folder, printable
from core.visualize.instances import describe_instances, draw_instances, instance_panels, instance_sheet
from core.visualize.sheet import JPEG
from recognition import matching
from recognition.gallery_pictures import from_jpeg
from recognition.matching import rates_of
from recognition.page import Card
from recognition.sheets import comparison_sheet, identification_sheet

THUMBNAIL = (640, 480)  # pixels at most
JPEG_LIMIT = 65500  # pixels; a picture with a longer side is written as PNG


def titles_of(paths):
    """What pictures are called on sheets and pages: by their file's name, or where two have the same, their paths."""
    names = [os.path.basename(path) for path in paths]
    counts = Counter(names)
    return [name if counts[name] == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def write_instances(folder, title, picture, found, class_names, about, note=""):
    """Everything about the instances of one picture into its folder; returns its card for the page.

    Args:
        title: of the picture, as `titles_of` gives it.
        found: instances, as `recognition.networks.find_instances` gives them.
        class_names: of the network, which keep their colours from picture to picture.
        about: what instances.json says of the picture: a dict of plain values. note: behind the caption.
    """
    make_folder(folder)
    panels = instance_panels(picture, found, class_names)
    files = {panel: save(folder / panel, drawn) for panel, drawn in panels.items()}
    caption = describe_instances(found) + note
    size = f"{picture.width} x {picture.height} pixels"
    instance_sheet(folder / "sheet.jpg", panels, title, f"{size}, {caption}")
    write_json(folder, rows_of(found), about)
    return make_card(folder, title, caption, panels["all"], files)


def write_identities(folder, title, picture, found, cuts, matches, identifier, about, note=""):
    """One picture and who is in it into its folder; returns its card for the page.

    Args:
        found, cuts, matches: of `matching.identify_instances`.
        identifier: `matching.Identifier`, its gallery open; the other arguments as in `write_instances`.
    """
    gallery = identifier.gallery
    rows = [
        {**row, "identity": matching.answer(known), "matches": [_in_words(match, gallery) for match in known]}
        for row, known in zip(rows_of(found), matches, strict=True)
    ]
    pictured = [[_in_pictures(match, gallery) for match in known] for known in matches]
    make_folder(folder)  # not before all was read: where the gallery is damaged, nothing stays behind
    answers = {"gallery": str(gallery.path), **answers_by(identifier.encoder, identifier.threshold)}
    write_json(folder, rows, {**about, **answers})
    caption = matching.describe(matches) + note
    known = found, cuts, pictured, identifier.threshold
    identification_sheet(folder / "sheet.jpg", picture, *known, title, caption)
    labels = [printable(row["identity"] or "unknown") for row in rows]
    named = [{**one, "label": label, "also": ()} for one, label in zip(found, labels, strict=True)]
    drawn = draw_instances(picture, named, scores=False)
    return make_card(folder, title, caption, drawn, {"identities": save(folder / "identities", drawn)})


def _in_words(match, gallery):
    return {"identity": match["identity"], "distance": match["distance"], "source": gallery.source(match["row"])}


def _in_pictures(match, gallery):
    thumbnail = from_jpeg(gallery.thumbnail(match["row"]))
    return {**match, "identity": printable(match["identity"]), "thumbnail": thumbnail}


def rows_of(found):
    """What instances.json says of each instance; number: the one beside it on the sheet."""
    keys = {"class": "label", "category_id": "category_id", "score": "score", "box": "box", "mask": "rle"}
    return [
        {
            "number": number,
            **{word: one[key] for word, key in keys.items()},
            "also": [{"class": name, "score": score} for name, score in one["also"]],
        }
        for number, one in enumerate(found, start=1)
    ]


def answers_by(encoder, threshold):
    """By which network and up to which distance two are the same, as the JSON files say it."""
    known = {name: rate for name, rate in rates_of(encoder, threshold).items() if rate == rate}  # nan is unknown
    rates = {name: known.get(name) for name in ("false_accept_rate", "true_accept_rate", "identities")}
    rates["false_accept_interval"] = [known.get("lower"), known.get("upper")]
    return {"reid": encoder.path, "metric": encoder.metric, "threshold": threshold, **rates}


def write_json(folder, rows, about):
    """instances.json, with an instance on each line."""
    lines = ",\n  ".join(map(json.dumps, rows))
    head = json.dumps(about)
    with atomic_write(folder / "instances.json") as file:
        file.write(f'{head[:-1]}, "instances": [\n  {lines}\n]}}\n'.encode())


def make_card(folder, title, caption, drawn, files):
    """The card of a picture on the page, and its thumbnail, which `drawn` becomes."""
    drawn.thumbnail(THUMBNAIL)
    save(folder / "thumbnail", drawn)
    links = {"sheet": "sheet.jpg", **files, "JSON": "instances.json"}
    links = {word: f"{folder.name}/{file}" for word, file in links.items()}
    return Card(title, caption, f"{folder.name}/thumbnail.jpg", links["sheet"], links)


def save(stem, picture):
    """Write a PIL picture, whole or not at all, as JPEG, or as PNG where it is too long; returns the file's name."""
    suffix = ".jpg" if max(picture.size) <= JPEG_LIMIT else ".png"
    path = stem.with_name(stem.name + suffix)
    with atomic_write(path) as file:
        if suffix == ".jpg":
            picture.save(file, "JPEG", **JPEG)
        else:
            picture.save(file, "PNG")
    return path.name


def write_comparison(folder, paths, pictures, cuts, verdict, encoder, detector):
    """comparison.jpg and comparison.json of two pictures.

    Args:
        cuts: what was compared of them, small copies; None for whole pictures.
        verdict: `matching.Verdict`. encoder, detector: what it was compared with; detector may be None.
    """
    comparison_sheet(
        folder / "comparison.jpg",
        pictures,
        titles_of(paths),
        cuts,
        verdict.distance,
        verdict.threshold,
        verdict.answer,
        verdict.reason,
    )
    content = {"pictures": list(map(str, paths)), "same": verdict.is_same, "answer": verdict.answer}
    content |= {"distance": verdict.distance, "similarity": verdict.similarity, "cut_out": None not in cuts}
    content |= {"segment": detector and detector.path, **answers_by(encoder, verdict.threshold)}
    with atomic_write(folder / "comparison.json") as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
