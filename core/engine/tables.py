"""What an evaluation leaves as text: a small table for people, spreadsheets (CSV) and papers (LaTeX), and JSON."""

import csv
import io
import json
import math
from typing import NamedTuple

from core.files import atomic_write, printable


class Table(NamedTuple):
    """head: names of the columns. rows: their cells: text, whole numbers, numbers (two digits), None for unknown."""

    head: list[str]
    rows: list[list]

    def text(self):
        """Columns below each other, text at the left and numbers at the right."""
        lines = [self.head, *([_cell(value, "-") for value in row] for row in self.rows)]
        columns = []
        for column, is_numeric in zip(zip(*lines, strict=True), self._numeric(), strict=True):
            width = max(map(len, column))
            columns.append([cell.rjust(width) if is_numeric else cell.ljust(width) for cell in column])
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

    def csv(self):
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(
            [self.head, *([_cell(v, "") for v in row] for row in self.rows)]
        )
        return file.getvalue().rstrip("\n")

    def latex(self):
        """A tabular that needs no package."""
        columns = "".join("r" if is_numeric else "l" for is_numeric in self._numeric())
        lines = [[_escaped(_cell(value, "--")) for value in line] for line in (self.head, *self.rows)]
        head, *rows = (" & ".join(line) + r" \\" for line in lines)
        start = rf"\begin{{tabular}}{{{columns}}}"
        return "\n".join([start, r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}"])

    def files(self, name):
        """Name of the file -> its text, for `write_texts`."""
        return {f"{name}.txt": self.text(), f"{name}.csv": self.csv(), f"{name}.tex": self.latex()}

    def _numeric(self):
        return [not any(isinstance(value, str) for value in column) for column in zip(*self.rows, strict=True)]


def _cell(value, unknown):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return unknown
    return f"{value:.2f}" if isinstance(value, float) else printable(value)


def _escaped(text):
    """Text of the data as LaTeX: nothing in it is a command."""
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(names.get(sign, rf"\{sign}" if sign in "&%$#_{}" else sign) for sign in text)


def as_json(value):
    """JSON knows no nan: null is a number that could not be measured."""
    return json.dumps(_without_nan(value), indent=2)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_texts(folder, texts):
    """Files of a folder, each there whole or not at all; texts: name -> content."""
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write((text + "\n").encode())
