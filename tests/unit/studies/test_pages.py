"""A report's pages say the same in Markdown and in HTML, and neither takes a cell for markup."""

from __future__ import annotations

import base64

from gspo_dist.studies.pages import Block, Table, html_page, markdown_page

BLOCKS = [
    Block(
        "Setting", "Made by `gspo compare` <here>.", Table(["arm", "differs by"], [["a|b", "0.5 ± 0.1 <x>"]])
    ),
    Block("Bare", "", Table(["one"], [["1"], ["2"]])),
]


def test_markdown_links_its_figures_and_escapes_bars(tmp_path):
    text = markdown_page("T", BLOCKS, {"Curves": tmp_path / "figures" / "c.png"}, tmp_path)
    assert text == (
        "# T\n\n## Setting\n\nMade by `gspo compare` <here>.\n\n| arm | differs by |\n|---|---|\n"
        "| a\\|b | 0.5 ± 0.1 <x> |\n\n## Bare\n\n| one |\n|---|\n| 1 |\n| 2 |\n\n"
        "## Curves\n\n![Curves](figures/c.png)\n"
    )


def test_html_holds_its_figures_and_escapes_markup(tmp_path):
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    text = html_page("<T>", BLOCKS, {"A & B": tmp_path / "c.png"})
    assert "<title>&lt;T&gt;</title>" in text
    assert "<p>Made by <code>gspo compare</code> &lt;here&gt;.</p>" in text
    assert "<td>0.5&nbsp;±&nbsp;0.1 &lt;x&gt;" in text
    assert (
        f'alt="A &amp; B" src="data:image/png;base64,{base64.b64encode(bytes([137]) + b"PNG").decode()}"'
        in text
    )
