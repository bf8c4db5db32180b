"""One HTML page that shows many pictures: a plain file beside them, without a server, scripts or anything from afar."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from core.files import atomic_write, printable

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #222; --faint: #6b6b6b; --line: #e2e2de; }
@media (prefers-color-scheme: dark) {
  :root { --page: #171717; --card: #222; --ink: #ececec; --faint: #a0a0a0; --line: #363636; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
header, ul { max-width: 100rem; margin: 0 auto; }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.2; overflow-wrap: anywhere; }
header p { margin: .3rem 0 0; color: var(--faint); overflow-wrap: anywhere; }
ul { padding: 0; list-style: none; }
.cards { display: grid; gap: 1.25rem; margin-top: 1.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.cards li { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; overflow: hidden; }
.frame { display: block; position: relative; aspect-ratio: 4 / 3; background: #8883; }
.frame img { position: absolute; width: 100%; height: 100%; object-fit: contain; }
.words { flex: 1; padding: .75rem 1rem .9rem; }
h2 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.words p { margin: .1rem 0 .45rem; color: var(--faint); font-size: .875rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .1rem .8rem; font-size: .875rem; }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--faint); }
a:hover { text-decoration-thickness: 2px; }
a:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
.skipped { margin-top: 1.75rem; padding: .9rem 1rem; border-left: 4px solid #d55e00; background: var(--card); }
.skipped li { overflow-wrap: anywhere; }
""".strip()


class Card(NamedTuple):
    """One picture on the page; paths are relative to the page."""

    name: str
    caption: str
    thumbnail: str
    target: str  # what opens at a click on the thumbnail
    links: dict[str, str]  # word -> path


def index_page(path: str | Path, title: str, subtitle: str, cards: Sequence[Card], skipped: Sequence[str] = ()) -> None:
    """Write the page. Names and paths may hold any characters; `skipped` are lines about pictures that aren't there."""
    notes = "".join(f"<li>{_text(line)}</li>\n" for line in skipped)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p>{_text(subtitle)}</p>
</header>
<main>
{f'<ul class="skipped">{chr(10)}{notes}</ul>' if notes else ""}
{f'<ul class="cards">{chr(10)}{"".join(map(_card, cards))}</ul>' if cards else ""}
</main>
</body>
</html>
"""
    with atomic_write(path) as file:
        file.write(page.encode())


def _card(card: Card) -> str:
    links = "\n".join(f'<a href="{_link(path)}">{_text(word)}</a>' for word, path in card.links.items())
    return f"""<li>
<a class="frame" href="{_link(card.target)}">
<img src="{_link(card.thumbnail)}" alt="{_text(card.name)}" loading="lazy">
</a>
<div class="words">
<h2>{_text(card.name)}</h2>
<p>{_text(card.caption)}</p>
<nav>
{links}
</nav>
</div>
</li>
"""


def _text(text: str) -> str:
    """For a place between tags or within quotes. A file name needs not be text: its strange bytes become a sign."""
    return html.escape(printable(text))


def _link(path: str) -> str:
    return quote(os.fsencode(path))
