"""A page of pictures, frames and text, and what every sheet shares: its colours, its measures, its way to the disk."""

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from core.files import atomic_write, printable
from core.visualize.fonts import choose_fonts, legible, width_of

DPI = 100
GAP, MARGIN = 18, 28  # pixels between pictures, and around the sheet
TITLE, HEAD = 13, 32  # points of a title, pixels above the sheet
INK, FAINT = "#222222", "#767676"
RIGHT, WRONG = "#1a9641", "#d7191c"
JPEG = {"quality": 92, "subsampling": 0}  # letters keep their colour
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = ("o", "^", "s", "D", "v", "P")  # six, and seven colours: 42 pairs


class Sheet:
    """A page of pictures, frames and text, placed in pixels from the top left corner; a title stands above that."""

    def __init__(self, width: int, height: int, title: str = ""):
        self.head = HEAD if title else 0
        if title:
            width = max(width, 2 * MARGIN + math.ceil(width_of(title, round(TITLE * DPI / 72))))
        self.size = (width, height)
        self.pixels = np.full((self.head + height, width, 3), 255, np.uint8)
        self.figure = Figure(figsize=(width / DPI, (self.head + height) / DPI), dpi=DPI)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, -self.head))
        self.axes.set_axis_off()
        self.text(MARGIN, MARGIN - 10 - self.head, title, TITLE, align="left", weight="bold")

    def picture(self, picture: Image.Image, left: int, top: int) -> None:
        top += self.head
        self.pixels[top : top + picture.height, left : left + picture.width] = np.asarray(picture)

    def frame(self, left: float, top: float, width: float, height: float, color: str, line=1.0, style="solid") -> None:
        """A frame whose line, `line` pixels wide, lies outside the rectangle."""
        half = line / 2
        self.axes.add_patch(
            Rectangle(
                (left - half, top - half),
                width + line,
                height + line,
                fill=False,
                edgecolor=color,
                linewidth=line * 72 / DPI,
                linestyle=style,
                joinstyle="miter",
                snap=False,
            )
        )

    def text(
        self, left: float, top: float, text: str, size=8.5, color=INK, align="center", weight="normal", room=math.inf
    ) -> None:
        """A line of letters of `size` points, shortened to `room` pixels."""
        # Names come from folders and files: a dollar sign in one is no formula, and some of its bytes may be no text.
        text = shorten(text, room, size)
        self.axes.text(left, top, text, fontsize=size, color=color, ha=align, va="top", weight=weight, parse_math=False)

    def save(self, path: str | Path) -> None:
        self.figure.add_artist(_Pixels(self.pixels))
        save_figure(self.figure, path)


class _Pixels(Artist):
    """Pixels (H, W, 3) drawn as they are, in bands: figimage and imshow resample, with a hundred bytes for each."""

    zorder = -1

    def __init__(self, pixels: np.ndarray):
        super().__init__()
        self.pixels = pixels

    def draw(self, renderer) -> None:
        context, height = renderer.new_gc(), len(self.pixels)
        for top in range(0, height, 256):
            band = self.pixels[top : top + 256]
            rgba = np.full((*band.shape[:2], 4), 255, np.uint8)  # (h, W, 4)
            rgba[..., :3] = band
            renderer.draw_image(context, 0, height - top - len(band), rgba[::-1])  # from the lowest row up
        context.restore()


def save_figure(figure: Figure, path: str | Path) -> None:
    """PNG, or JPEG where the suffix says so."""
    FigureCanvasAgg(figure)
    choose_fonts(figure)
    jpeg = Path(path).suffix.lower() in (".jpg", ".jpeg")
    form = {"format": "jpeg", "pil_kwargs": JPEG} if jpeg else {"format": "png"}
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a font, which others stand in for
        figure.savefig(file, dpi=DPI, **form)


def empty_sheet(path: str | Path, text: str) -> None:
    sheet = Sheet(360, 90)
    sheet.text(180, 38, text, size=11, color=FAINT)
    sheet.save(path)


def box_for(pictures: list[Image.Image], area: int) -> tuple[int, int]:
    """Width and height of one box for all pictures: the middle one of their shapes, but no ribbon."""
    aspect = float(np.clip(np.median([picture.width / picture.height for picture in pictures]), 0.45, 2.0))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture, in its own shape, centred in a light grey box."""
    return ImageOps.pad(picture, (width, height), Image.Resampling.LANCZOS, color=(240, 240, 240))


def shorten(text: str, width: float, size: float, rest: str = "") -> str:
    """The text on one line, cut in its middle to `width` pixels in letters of `size` points: both ends tell names.

    rest: what stands behind it, whole, and needs room too.
    """
    text = legible(printable(" ".join(str(text).split())))
    short, kept, pixels = text, min(len(text), 300), round(size * DPI / 72)
    while kept > 1 and width_of(short + rest, pixels) > width:
        kept -= 1
        short = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
    return short + rest


def plain(name: str) -> str:
    """A name that matplotlib takes as it stands: no formula, and not hidden from the legend for an underscore."""
    return ("\N{ZERO WIDTH SPACE}" + legible(printable(name))).replace("$", r"\$")


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> PIL pictures."""
    pixels = (images.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # (B, H, W, 3)
    return [Image.fromarray(picture) for picture in pixels.numpy()]
