import os

import pytest

from core.files import printable


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
