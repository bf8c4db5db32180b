import os
import random
import sys

import pytest

from core.files import distinct_names, printable


@pytest.mark.parametrize(
    "name, shown",
    [
        ("Koffer groß 手.jpg", "Koffer groß 手.jpg"),
        ("two\nlines\r.jpg", "two\\nlines\\r.jpg"),
        ("red\x1b[31m\x00", "red\\x1b[31m\\x00"),
        ("a\u2028b", "a\\u2028b"),
        (os.fsdecode(b"caf\xe9"), "caf\N{REPLACEMENT CHARACTER}"),
        ("\ud800", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_any_name_is_one_line_that_can_be_printed(name, shown):
    assert printable(name) == shown
    assert printable(name).encode() and len(printable(name).splitlines()) == 1


@pytest.mark.parametrize("case", ["one name", "cases", "numbered", "mixed"])
def test_names_are_distinct_and_each_is_looked_up_a_few_times(case):
    """20,000 of one name took 98 s. The work is counted, not timed: lines of Python that run."""
    count = 3000
    names = {
        "one name": ["frame"] * count,
        "cases": ["frame", "FRAME", "Frame"] * (count // 3),
        "numbered": [f"frame-{number}" for number in range(count // 2)] + ["frame"] * (count // 2),
        "mixed": random.Random(0).choices(["a", "a-2", "a-2-2", "A-3", "b"], k=count),
    }[case]
    lines = 0

    def count_lines(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return count_lines

    before = sys.gettrace()
    sys.settrace(count_lines)
    try:
        found = distinct_names(f"{number}/{name}.jpg" for number, name in enumerate(names))
    finally:
        sys.settrace(before)
    assert lines < 200 * count
    assert len({name.casefold() for name in found}) == count
    assert all(new == old or new.startswith(f"{old}-") for new, old in zip(found, names, strict=True))


def test_the_numbers_behind_equal_names():
    paths = ["a/x.png", "b/x.png", "x-2.png", "X.jpg", "x.png", "..png", "y.png"]
    assert distinct_names(paths, taken={"Y"}) == ["x", "x-2", "x-2-2", "X-3", "x-4", "picture", "y-2"]
