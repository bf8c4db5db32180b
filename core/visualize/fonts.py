"""Letters of any script: which font of this machine has them, and what stands for those that none has.

DejaVu Sans comes with matplotlib and is always there. Where it lacks a letter, the fonts of the system are looked
through, once, and only then. A letter that no font has is written as its code point, U+884C: as the empty box of a
missing letter, all names would look the same.
"""

import logging
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageDraw, ImageFont

OWN = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf")
PLACEHOLDERS = ("lastresort", "adobeblank", "adobenotdef", "unifont_upper")  # fonts that draw a box for any letter


@lru_cache
def letters_of_own_font():
    """Code points of the letters of DejaVu Sans."""
    return frozenset(FT2Font(OWN).get_charmap())


@lru_cache
def letters_of_system():
    """Code point -> path of a font of the system that has it: one without serifs and of plain weight before others."""

    def rank(path):
        name = Path(path).name.lower()
        return "serif" in name, not any(word in name for word in ("regular", "bold")), "italic" in name, path

    logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)  # else it tells of each that has no bold letters
    found = {}
    for path in sorted(font_manager.findSystemFonts(), key=rank):
        if any(word in Path(path).name.lower() for word in PLACEHOLDERS):
            continue
        try:
            font_manager.fontManager.addfont(path)  # so that matplotlib finds it by its family, new ones too
            found |= dict.fromkeys(FT2Font(path).get_charmap().keys() - found.keys(), path)
        except (RuntimeError, NotImplementedError, OSError):  # no font, or one of fixed pixels, as of coloured emoji
            continue
    return found


def font_of(letter):
    """Path of a font that has this letter, or None."""
    code = ord(letter)
    return OWN if code in letters_of_own_font() else letters_of_system().get(code)


def legible(text):
    """The text with the code point, U+884C, in place of each letter that no font has."""
    parts = groupby(text, key=lambda letter: font_of(letter) is not None)
    shown = ("".join(part) if there else " ".join(f"U+{ord(letter):04X}" for letter in part) for there, part in parts)
    return "".join(shown)


@lru_cache
def font(path, size):
    """PIL font in letters of `size` pixels."""
    return ImageFont.truetype(path, size)


def runs(text):
    """[(path of a font, the letters it draws)] of a `legible` text: as few as there are changes of font."""
    return [(path, "".join(part)) for path, part in groupby(text, key=font_of)]


def width_of(text, size):
    """Pixels of a `legible` text in bold letters of `size` pixels."""
    return sum(font(path, size).getlength(part) for path, part in runs(text))


def draw_text(draw: ImageDraw.ImageDraw, x, y, text, size, fill):
    """A line of a `legible` text with its left end at x, its middle at y."""
    for path, part in runs(text):
        draw.text((x, y), part, font=font(path, size), fill=fill, anchor="lm")
        x += font(path, size).getlength(part)


def choose_fonts(figure):
    """Each text of a matplotlib figure gets the fonts that have its letters."""
    for axes in figure.axes:
        axes.get_xticklabels(), axes.get_yticklabels()  # the trap: they have no text until somebody asks for them
    for text in figure.findobj(Text):
        others = {path: FT2Font(path).family_name for path, _ in runs(text.get_text()) if path not in (OWN, None)}
        if others:
            text.set_fontfamily([*text.get_fontfamily(), *others.values()])
