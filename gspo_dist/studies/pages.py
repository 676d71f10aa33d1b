"""What a report is made of, as a Markdown page and as an HTML page with its pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns."""

    head: list[str]
    """Names of the columns."""
    rows: list[list[str]]
    """One cell per column each."""


@dataclass(frozen=True)
class Block:
    """One section of a report."""

    heading: str
    """Of the section."""
    text: str
    """A paragraph before the table; empty for none. Backticks mark code."""
    table: Table
    """What the section shows."""


def markdown_page(title: str, blocks: Sequence[Block], figures: Mapping[str, Path], folder: Path) -> str:
    """The report for `folder`, which holds the figures (title -> path); they are linked, not copied."""
    out = [f"# {title}", ""]
    for block in blocks:
        out += [f"## {block.heading}", "", *([block.text, ""] if block.text else [])]
        out += [_row(block.table.head), "|" + "---|" * len(block.table.head)]
        out += [_row([cell.replace("|", "\\|") for cell in row]) for row in block.table.rows] + [""]
    for name, path in figures.items():
        out += [f"## {name}", "", f"![{name}]({path.relative_to(folder)})", ""]
    return "\n".join(out)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto;margin:.5rem 0}"
    "td,th{border:1px solid #ddd;padding:.3rem .6rem;text-align:left;vertical-align:top}"
    "th{background:#f4f6f8}img{max-width:100%}code{background:#f4f6f8}"
)


def html_page(title: str, blocks: Sequence[Block], figures: Mapping[str, Path]) -> str:
    """One self-contained file: to send to somebody, too large to keep in a repository.

    Reads the figures (title -> path of a PNG) into the page.
    """
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
    out = [f"{head}<style>{STYLE}</style><h1>{escape(title)}</h1>"]
    for block in blocks:
        out.append(
            f"<h2>{escape(block.heading)}</h2>" + (f"<p>{_inline(block.text)}</p>" if block.text else "")
        )
        out.append("<table><tr>" + "".join(f"<th>{escape(name)}" for name in block.table.head))
        out += ["<tr>" + "".join(f"<td>{_cell(cell)}" for cell in row) for row in block.table.rows]
        out.append("</table>")
    for name, path in figures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        out.append(f'<h2>{escape(name)}</h2><img alt="{escape(name)}" src="data:image/png;base64,{data}">')
    return "\n".join(out) + "</html>\n"


def _cell(text: str) -> str:
    """An estimate stays on one line."""
    return escape(text).replace(" ± ", "&nbsp;±&nbsp;")


def _inline(text: str) -> str:
    """Backticks become <code>."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))
