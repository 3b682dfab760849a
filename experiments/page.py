"""report.html: the whole comparison in one file that needs no network, no script and no other file."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from xattn.experiments.tables import Table

# Of a picture's dots: the widest one then fills the page.
_SCALE = 0.77
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c0392b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; } .left { text-align: left; }
tbody tr:first-child { background: var(--soft); }
.bad { color: var(--bad); white-space: normal; min-width: 16rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; background: white; border-radius: 4px; }
li { margin: .3rem 0; color: GrayText; }
"""


def page(
    *,
    title: str,
    description: str | None,
    tables: Sequence[Table],
    notes: Sequence[str],
    folder: Path,
    pictures: Sequence[tuple[str, str]],
) -> str:
    """The HTML text. Args: `pictures` are (file name within `folder`, caption), and are put into the page itself."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if description:
        parts.append(f"<p>{html.escape(description)}</p>")
    parts += [_table(table) for table in tables]
    if pictures:
        figures = "".join(_figure(folder / name, caption) for name, caption in pictures)
        parts.append(f"<h2>Pictures</h2>{figures}")
    parts.append("<h2>How to read this</h2><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(parts)}</body></html>\n'


def _table(table: Table) -> str:
    def row(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(_cell(tag, table, place, text) for place, text in enumerate(cells)) + "</tr>"

    body = "".join(row("td", cells) for cells in table.cells)
    head = row("th", table.header)
    return f'<h2>{html.escape(table.title)}</h2><div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, table: Table, place: int, text: str) -> str:
    classes = ["left"] if place == 0 or table.header[place] in table.left else []
    if text.startswith(("not comparable", "no result")):
        classes.append("bad")
    return f'<{tag} class="{" ".join(classes)}">{html.escape(text)}</{tag}>'


def _figure(path: Path, caption: str) -> str:
    data = path.read_bytes()
    # A PNG says its width there. One scale for all, so that text has one size in all.
    width = round(int.from_bytes(data[16:20], "big") * _SCALE)
    image = f'src="data:image/png;base64,{base64.b64encode(data).decode()}" width="{width}"'
    return f'<figure><img alt="{html.escape(caption)}" {image}></figure>'
