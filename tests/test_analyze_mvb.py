import html
import json
import os
import re
import shutil

import pytest
from PIL import Image

import analyze_mvb
from baggage import synthetic
from baggage.dataset_numbers import PUBLISHED
from baggage.faults import make_fault
from baggage.figures import evenly, fault_rows, identity_rows, material_rows
from baggage.inspection import Picture, inspect
from baggage.report import code, heading, materials_section, table
from core.data.reid_datasets import load_reid_dataset
from core.files import printable

TRAIN = "MVB_train/Info/train.json"


def report_of(folder):
    text = (folder / "report.md").read_text()
    for name in re.findall(r"\]\((.+?)\)", text):
        assert (folder / name).is_file(), name
    return text, json.loads((folder / "numbers.json").read_text())


def test_a_clean_set(run, baggage, tmp_path):
    arguments = ("--data", baggage, "--output", tmp_path / "analysis", "--convert", tmp_path / "out")
    code, out, err = run(analyze_mvb, *arguments)
    assert code == 0, err
    assert "36 pictures of 9 identities (train 24 of 6, gallery 6 of 3, probe 6 of 3)" in out
    assert "faults: none" in out and f"report: {tmp_path / 'analysis/report.md'}" in out
    text, numbers = report_of(tmp_path / "analysis")
    assert "**No faults found.**" in text and "published" not in text + out
    assert numbers["faults"]["all"] == 0 and numbers["pictures"]["all"] == 36
    pictures = {name for name in os.listdir(tmp_path / "analysis") if name.endswith(".png")}
    assert len(pictures) == 12 and pictures == {name for name in pictures if f"({name})" in text}
    for name in pictures:
        Image.open(tmp_path / "analysis" / name).verify()
    assert len(load_reid_dataset("mvb", tmp_path / "out").train) == 24

    code, out, err = run(analyze_mvb, "--data", tmp_path / "out", "--output", tmp_path / "analysis")
    assert code == 0 and "converted layout: 36 pictures of 9 identities" in out and "faults: none" in out, err
    text, _ = report_of(tmp_path / "analysis-2")  # the first is as it was
    assert "These data name none: file names" in text and "4,519" in text


def test_a_set_with_faults(run, baggage, tmp_path):
    root = shutil.copytree(baggage, tmp_path / "set", ignore=shutil.ignore_patterns("scenes", "synthetic.json"))
    (root / "MVB_train/Image/0001_g_1.jpg").write_bytes(b"")
    shutil.copy(root / "MVB_train/Image/0002_g_1.jpg", root / "MVB_train/Image/*stray*|`.jpg")
    content = json.loads((root / TRAIN).read_text())["image"]
    content[9] |= {"bbox": [-30, 0, 40, 40]}
    content[10] |= {"id": None}
    content += [content[5] | {"image_name": f"gone\ud800{number}.jpg"} for number in range(30)]
    (root / TRAIN).write_text(json.dumps(content))
    arguments = ("--data", root, "--output", tmp_path / "analysis", "--convert", tmp_path / "out", "--copy")
    code, out, err = run(analyze_mvb, *arguments)
    assert code == 0, err
    text, numbers = report_of(tmp_path / "analysis")
    assert numbers["faults"]["by_kind"] == {
        "copies": 1,
        "metadata": 1,
        "metadata_without_picture": 30,
        "picture_without_metadata": 1,
        "unreadable": 1,
        "box_outside": 1,
    }
    assert len(numbers["faults"]["list"]) == 35 and "faults: 35" in out
    assert (
        "      30  metadata without picture: MVB_train/Info/train.json, entry 24 (gone\ufffd0.jpg): there is no" in out
    )
    assert "and 10 more, in numbers.json" in text and "`` MVB_train/Image/*stray*|`.jpg ``" in text
    assert text.index("## Faults") < text.index("## Pictures and identities")
    assert "converted: 34 pictures" in out and "(34 copied)" in out
    assert "left out: 31 pictures not there or not readable\n" in out
    assert "left out: 2 pictures without an entry that says whose they are\n" in out
    assert "this is not the published MVB" in out and "pictures: 34, and the published set has 22,660" in out


def test_convert_is_refused_before_pictures_are_read(run, baggage, tmp_path, monkeypatch):
    monkeypatch.delattr(analyze_mvb, "measure_pictures")
    (tmp_path / "set/query").mkdir(parents=True)
    (tmp_path / "file").touch()
    for data, target, said in (
        (tmp_path / "set", "out", "in the converted layout already"),
        (baggage, "file/out", "can't be written"),
    ):
        code, _, err = run(analyze_mvb, "--data", data, "--convert", tmp_path / target)
        assert code == 2 and said in err


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("file", "is a file where a folder is needed"),
        ("file/out", "is a file where a folder is needed"),
        ("new/" + "a" * 300, "can't make the run folder"),
        ("new/..", "name a new folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_pictures_are_read(
    run, baggage, tmp_path, monkeypatch, output, said
):
    monkeypatch.delattr(analyze_mvb, "measure_pictures")
    (tmp_path / "file").touch()
    code, _, err = run(analyze_mvb, "--data", baggage, "--output", tmp_path / output)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_that_fails_leaves_no_output(run, tmp_path):
    (tmp_path / "there").mkdir()
    for output in ("there", "new/deep/out"):
        code, _, err = run(analyze_mvb, "--data", tmp_path / "absent", "--output", tmp_path / output)
        assert code == 2 and "no such folder" in err and os.listdir(tmp_path) == ["there"]


def test_what_was_left_out_is_not_as_published(run, baggage, tmp_path, monkeypatch):
    root = shutil.copytree(baggage, tmp_path / "set", ignore=shutil.ignore_patterns("scenes", "synthetic.json"))
    for name, count in zip(PUBLISHED, (9, 36, 24, 6, 6), strict=True):
        monkeypatch.setitem(PUBLISHED, name, count)
    arguments = ("--data", root, "--output", tmp_path / "analysis", "--convert")
    _, out, _ = run(analyze_mvb, *arguments, tmp_path / "all")
    assert "identities and pictures are as many as published" in out
    (root / "MVB_train/Image/0001_g_1.jpg").write_bytes(b"")
    _, out, _ = run(analyze_mvb, *arguments, tmp_path / "less")
    assert "left out: 1 picture not there" in out and "train: 23, and the published set has 24" in out
    assert "as many as published" not in out


def test_convert_says_what_is_empty_and_the_report_comes_first(run, tmp_path):
    folder = tmp_path / "set/MVB_train"
    (folder / "Info").mkdir(parents=True)
    (folder / "Image").mkdir()
    (folder / "Info/train.json").write_text('[{"image_name": "0001_g_1.png"}]')
    arguments = ("--data", tmp_path / "set", "--output", tmp_path / "analysis", "--convert", tmp_path / "out")
    code, out, err = run(analyze_mvb, *arguments)
    assert code == 2 and "nothing to convert" in err and "report: " in out
    Image.new("RGB", (40, 40)).save(folder / "Image/0001_g_1.png")
    code, out, err = run(analyze_mvb, *arguments)
    assert code == 0 and "empty: query, bounding_box_test; " in out, err


def test_names_that_are_no_text(run, tmp_path):
    (tmp_path / "converted/query").mkdir(parents=True)
    (tmp_path / "original/MVB_val/Info").mkdir(parents=True)
    for name in ("b\udce4g.jpg", "0001_p_\udce4.jpg", "0001_p_1\udce4.jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / "converted/query" / name)
    (tmp_path / "original/MVB_val/Info/\udce4.json").write_text("[{}, 7]")
    for layout, where in (("converted", "query/b\ufffdg.jpg"), ("original", "MVB_val/Info/\ufffd.json, entry 0")):
        code, out, err = run(analyze_mvb, "--data", tmp_path / layout, "--output", tmp_path / "analysis" / layout)
        assert code == 0, err
        text, numbers = report_of(tmp_path / "analysis" / layout)
        assert where in text and where in [fault["where"] for fault in numbers["faults"]["list"]]


def test_control_characters_reach_no_terminal(run, baggage, tmp_path):
    root = shutil.copytree(baggage, tmp_path / "s\x1b[2Jt", ignore=shutil.ignore_patterns("scenes"))
    content = json.loads((root / TRAIN).read_text())["image"]
    for entry in content[:2]:
        entry |= {"id": "\x1b]0;bag\x07", "material": "\x1b[31mred\n leather"}
    content[2] |= {"material": "\x1b[31mred leather"}
    content.append(content[0] | {"image_name": "\x1b[2Jgone\n.jpg", "datatype": "\x1b[8m"})
    content.append(content[0] | {"image_name": "\x1b[2Jgone\n.jpg", "datatype": "g"})
    (root / TRAIN).write_text(json.dumps(content))
    (root / "MVB_train/Image/\x1b[2J.jpg").write_bytes(b"")
    arguments = ("--data", root, "--output", tmp_path / "an\x1b[2J", "--convert", tmp_path / "out\x1b[2J")
    code, out, err = run(analyze_mvb, *arguments)
    assert code == 0, err
    text, numbers = report_of(tmp_path / "an\x1b[2J")
    for said in (out, err, text, *(fault["where"] + fault["message"] for fault in numbers["faults"]["list"])):
        assert "\x1b" not in said and "\x07" not in said
    assert "(\\x1b[2Jgone\\n.jpg)" in text and "\\x1b]0;bag\\x07" in text
    assert numbers["materials"]["pictures"]["\\x1b[31mred leather"] == 3


def test_data_without_anything(run, tmp_path):
    (tmp_path / "set/MVB_val").mkdir(parents=True)
    code, out, err = run(analyze_mvb, "--data", tmp_path / "set", "--output", tmp_path / "analysis")
    assert code == 0 and "0 pictures of 0 identities" in out and "missing part" in out, err
    report_of(tmp_path / "analysis")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{root}/absent"], "no such folder"),
        (["--data", "{root}/" + "a" * 300], "no such folder"),
        (["--data", "{root}"], "not laid out as mvb"),
        (["--data", "{set}", "--copy"], "--copy says how to --convert"),
        (["--data", "{set}", "--convert", "{root}"], "is there already"),
        (["--data", "{set}", "--convert", "{root}/" + "a" * 300], "can't be written"),
        (["--data", "{set}", "--convert", "{root}/out"], "in the converted layout already"),
        (["--data", "{set}", "--min-side", "0"], "--min-side"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, message):
    (tmp_path / "set/query").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "set/query/0001_p_1.jpg")
    arguments = [argument.format(root=tmp_path, set=tmp_path / "set") for argument in arguments]
    code, out, err = run(analyze_mvb, *arguments, "--output", tmp_path / "analysis")
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "analysis").exists()


def test_the_synthetic_set_is_made_where_it_lacks(baggage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "make_synthetic_baggage", lambda root, background: shutil.copytree(baggage, root))
    said = "rendering the synthetic baggage set with a plain background into data/synthetic, about two minutes\n"
    for message in (said, ""):
        survey, _ = analyze_mvb.survey_data(analyze_mvb.get_parser().parse_args([]))
        assert len(survey.pictures) == 36 and survey.faults == [] and capsys.readouterr().out == message


def picture(view, material, name="0001", source="g"):
    return Picture("x.jpg", True, "train", source, int(name), name, "x", view=view, material=material)


def test_headings_of_samples():
    rows = material_rows([picture(1, "cloth"), picture(1, "hard shell", "0002"), picture(2, "hard shell", "0003")])
    assert [row[:2] for row in rows] == [
        ("cloth", ": 1 picture of 1 identity"),
        ("hard shell", ": 2 pictures of 2 identities"),
    ]
    ((name, rest, *_),) = identity_rows([picture(1, "soft " * 50)], 1)
    assert name == "0001" and rest.startswith(" (train, soft") and rest.endswith("): 1 before security, 0 after")
    assert len(rest) < 60


def test_a_row_that_is_too_short_says_so():
    views = [picture(view, "soft", source=side) for side, count in (("g", 6), ("p", 7)) for view in range(count)]
    for pictures, said in ((views, "7 after; 12 of 13 shown"), (views[:12], "6 before security, 6 after")):
        (row,) = identity_rows(pictures, 1)
        assert row.rest.endswith(said) and len(row.pictures) == 12


def test_rows_of_faults_say_the_split(baggage):
    survey = inspect(baggage)
    names = ("MVB_train/Image/0003_g_1.jpg", "MVB_val/Image/gallery/0007_g_1.jpg")
    survey.faults.append(make_fault("copies_across_splits", "x", "y", names))
    survey.faults.extend(make_fault("tiny", "x", "y", names[:1]) for _ in range(14))
    copies, tiny = fault_rows(survey)
    assert copies[:2] == ("copies across splits", ": 1") and tiny.rest == ": 14; the first 12 of 14 pictures"
    assert [caption for _, caption, _ in copies.pictures] == ["train/0003_g_1", "gallery/0007_g_1"]
    assert [path for path, *_ in copies.pictures] == [str(baggage / name) for name in names]


@pytest.mark.parametrize(
    "count, pictures, identities, has",
    [(1, "1 picture", "1 identity", "has"), (1234, "1,234 pictures", "1,234 identities", "have")],
)
def test_one_is_not_many(count, pictures, identities, has):
    spread = {"cloth": {"g": 1, "p": 0}}, {"cloth": {"train": 1, "gallery": 0, "probe": 0}}
    materials = {"pictures": {"cloth": 1}, "identities": {"cloth": 1}, "by_source": spread[0], "by_split": spread[1]}
    materials |= {"pictures_without": count, "identities_with_several": count}
    text = materials_section({"materials": materials}, {})
    assert f"{pictures} {has} none. {identities} {has} more than one." in text
    numbers = {"pictures": {"all": count}, "identities": {"all": count}, "faults": {"all": count}}
    text = heading({**numbers, "root": "x", "layout": "original"})
    assert f"{pictures} of {identities}, in the original" in text


def test_evenly():
    assert evenly(range(10), 4) == [0, 3, 6, 9] and evenly("abc", 5) == ["a", "b", "c"]
    assert evenly([1, 2], 1) == [1] and evenly([], 3) == []


def test_markdown():
    assert table(["a", "b"], [["x|y", 1234], ["z", None]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1,234 |\n| z | – |"
    assert table(["a"], [["p"]]).splitlines()[1] == "| --- |"
    assert code("a_b*") == "`a_b*`" and code("a`b") == "`` a`b ``"


NASTY = [
    "<script>alert(1)</script>",
    "![x](http://example.com/x.png)",
    "[words](http://example.com)",
    "http://example.com/a www.example.com a@example.com",
    "a | b \\| c |",
    "**bold** _so_ ~~gone~~ $x$",
    "`ends the span",
    "``` three ``and`",
    "`",
    "``<b>``",
    "two\nlines\r\x1b[2J\u2028\x00",
    " blanks ",
    "# - 1. > \\",
    "&lt;b&gt; &#60;b&#62; <!-- -->",
    "<](<](",
]


def as_rendered(markdown):
    """One line of Markdown -> (what stands in its code spans, references read; the line without them)."""
    spans = r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)"  # CommonMark, 6.1: of a line of text, from left to right
    rest = re.sub(spans, "\0", markdown)
    contents = [match[2] for match in re.finditer(spans, markdown)]
    contents = [text[1:-1] if text[0] == text[-1] == " " and text.strip() else text for text in contents]
    text = re.sub("\0", lambda _: contents.pop(0), html.unescape(rest))
    return text, rest


@pytest.mark.parametrize("text", NASTY)
def test_text_of_the_data_is_no_markup_wherever_it_stands(text):
    for markdown in (code(text), table(["m"], [[code(text)]], left=()).splitlines()[2][2:-2].replace("\\|", "|")):
        rendered, rest = as_rendered(markdown)
        assert rendered == printable(text)
        assert set(re.sub(r"&lt;|&#40;|\0", "", rest)) == set()
        assert "<" not in markdown and "](" not in markdown and len(markdown.splitlines()) == 1


def test_a_cell_keeps_its_columns():
    for text in NASTY:
        row = table(["a", "b"], [[code(text), 7]]).splitlines()[2]
        assert len(re.split(r"(?<!\\)\|", row)) == 4 and row.endswith(" | 7 |")


def test_markup_in_the_data_lands_nowhere(run, baggage, tmp_path):
    """In names of files and identities, in materials, in the path of the set; the sheets are drawn all the same."""
    root = tmp_path / "set <script>![x](y.png)" / "`s`|*t*"
    shutil.copytree(baggage, root, ignore=shutil.ignore_patterns("scenes", "synthetic.json"))
    content = json.loads((root / TRAIN).read_text())["image"]
    names = [text for text in NASTY if "/" not in text and "\0" not in text]
    for entry, text in zip(content, NASTY, strict=False):
        entry |= {"material": text}
    for entry, text in zip(content[4:], NASTY, strict=False):
        entry |= {"id": text, "datatype": "g"}
    content += [content[0] | {"image_name": f"{text} gone.jpg"} for text in NASTY]
    (root / TRAIN).write_text(json.dumps(content))
    for text in names:
        shutil.copy(root / "MVB_train/Image/0002_g_1.jpg", root / f"MVB_train/Image/{text}.jpg")
    status, _, err = run(analyze_mvb, "--data", root, "--output", tmp_path / "analysis")
    assert status == 0, err
    text, numbers = report_of(tmp_path / "analysis")  # all it links to and shows is in its folder
    assert numbers["faults"]["by_kind"]["picture_without_metadata"] == len(names)
    lines = [as_rendered(line.replace("\\|", "\1")) for line in text.splitlines()]
    assert [rest for _, rest in lines if re.search(r"<|http|www|@|bold|~|words", rest)] == []
    cells = [re.split(r" ?\| ?", rendered)[1].replace("\1", "|") for rendered, _ in lines if rendered[:1] == "|"]
    materials = [" ".join(printable(word) for word in material.split()) for material in NASTY]
    assert [material for material in materials if material not in cells] == []
