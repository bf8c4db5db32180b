"""Names in any script: with a font that has their letters, and with none."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as rle_codec

from core.visualize import fonts
from core.visualize.instances import draw_instances
from core.visualize.sheet import Sheet, plain, save_figure, shorten


def make_font(path, letters):
    """A font in which each of these letters is a block, each of another height."""
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for number in range(1, len(letters) + 1):
        pen = TTGlyphPen(None)
        pen.moveTo((100, 0))
        for point in ((100, 700 // number), (900, 700 // number), (900, 0)):
            pen.lineTo(point)
        pen.closePath()
        glyphs[f"letter{number}"] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(letter): f"letter{number}" for number, letter in enumerate(letters, start=1)})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def system(monkeypatch):
    """Function: these are the fonts of the system."""

    def give(*paths):
        fonts.letters_of_system.cache_clear()
        monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: list(paths))

    yield give
    fonts.letters_of_system.cache_clear()


def drawn(name, path):
    """The pixels of a name on a picture and on a sheet."""
    rle = rle_codec.encode(np.zeros((90, 640), np.uint8, order="F"))
    picture = Image.new("RGB", (640, 90))
    found = draw_instances(picture, [{"box": (0, 60, 600, 80), "label": name, "score": None, "rle": rle}])
    sheet = Sheet(600, 60)
    sheet.text(10, 10, name, 20, align="left", weight="bold")
    sheet.save(path)
    return np.asarray(found).tobytes(), np.asarray(Image.open(path)).tobytes()


PAIRS = [("行李", "背包"), ("かばん", "バッグ"), ("가방", "상자"), ("सूटकेस", "झोला"), ("🧳", "🎒"), ("حقيبة", "صندوق")]


@pytest.mark.parametrize("names", PAIRS)
def test_names_without_a_font_are_told_apart(system, tmp_path, names):
    system()
    (one, on_sheet), (other, other_on_sheet) = (drawn(name, tmp_path / "sheet.png") for name in names)
    assert one != other and on_sheet != other_on_sheet
    assert all(fonts.font_of(letter) == fonts.OWN for name in names for letter in fonts.legible(name))


def test_what_no_font_has_is_a_code_point(system):
    system()
    assert fonts.legible("bag 行李 a") == "bag U+884C U+674E a"
    assert fonts.legible("Koffer groß №5 ✓…") == "Koffer groß №5 ✓…"
    assert shorten("行", 500, 9) == "U+884C" and plain("行").endswith("U+884C")
    assert fonts.legible("") == "" and fonts.width_of("", 12) == 0


def test_a_font_of_the_system_is_found(system, tmp_path, capfd):
    """For pictures, sheets, legends and the ticks of an axis; one that can't be read is passed over."""
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    placeholder = make_font(tmp_path / "LastResort.ttf", "行李箱")
    system(placeholder, str(tmp_path / "broken.ttf"))
    boxes = drawn("行箱", tmp_path / "sheet.png")
    path = make_font(tmp_path / "Made.ttf", "行李")
    system(placeholder, str(tmp_path / "broken.ttf"), path)
    assert fonts.legible("a行李箱") == "a行李U+7BB1"
    assert fonts.runs("a行李b") == [(fonts.OWN, "a"), (path, "行李"), (fonts.OWN, "b")]
    assert fonts.width_of("行李", 20) == 40
    one, other = (drawn(name, tmp_path / "sheet.png") for name in "行李")
    assert all(len({*drawings}) == 3 for drawings in zip(one, other, boxes, strict=True))

    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], label=plain("李"))
    axes.set_xticks([0, 1], [plain("行"), "b"])
    legend = axes.legend()
    save_figure(figure, tmp_path / "figure.png")
    for text, family in ((legend.get_texts()[0], ["Made"]), (axes.get_xticklabels()[0], ["Made"]), (axes.title, [])):
        assert text.get_fontfamily() == ["sans-serif", *family]
    assert capfd.readouterr().err == ""
