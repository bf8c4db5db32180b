"""Small tables as text, CSV and LaTeX, and JSON without nan."""

import csv
import json
import math

from core.engine.tables import Table, as_json, write_texts

TABLE = Table(["", "mAP", "n", "note"], [["bot", 61.799, 3, "a, b"], ["50%_more & {x}~^\\\n", None, math.nan, "-"]])


def test_text_by_hand():
    assert Table(["", "mAP", "n"], [["bot", 61.799, 3], ["osnet", None, 10]]).text().splitlines() == [
        "         mAP   n",
        "bot    61.80   3",
        "osnet      -  10",
    ]


def test_csv_is_read_back():
    rows = list(csv.reader(TABLE.csv().splitlines()))
    assert rows == [["", "mAP", "n", "note"], ["bot", "61.80", "3", "a, b"], ["50%_more & {x}~^\\\\n", "", "", "-"]]


def test_latex_takes_nothing_of_the_data_for_a_command():
    lines = TABLE.latex().splitlines()
    assert lines[0] == r"\begin{tabular}{lrrl}" and lines[-1] == r"\end{tabular}"
    assert lines[2] == r" & mAP & n & note \\" and lines[4] == r"bot & 61.80 & 3 & a, b \\"
    slash = r"\textbackslash{}"
    text = r"50\%\_more \& \{x\}\textasciitilde{}\textasciicircum{}" + slash + slash + "n"  # the line break is escaped
    assert lines[5] == text + r" & -- & -- & - \\"


def test_files(tmp_path):
    write_texts(tmp_path, {**TABLE.files("table"), "metrics.json": as_json({"a": [math.nan, (1.5, None)]})})
    assert {path.name for path in tmp_path.iterdir()} == {"table.txt", "table.csv", "table.tex", "metrics.json"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": [None, [1.5, None]]}
