r"""Where a completion's final answer stands: the last box, a marked answer, or the last line.

Every search is linear in the text, because models also write 64,000 words without a box, or 4,000 boxes
that are never closed.

The order, first hit wins. What stands in <think>...</think> never counts.

1. the content of the last <answer>...</answer>, read by the rules below
2. the last box with something in it: \boxed{42}, \fbox{42}, \boxed 42 (boxes side by side are a list)
3. the text after the last marker: "The answer is 42.", "**Answer:** 42", "### Final answer" and the next line
4. the last formula set off by $$...$$ or \[...\], when the text ends with it
5. the last line: all of it, or the one number, formula or bold text in its sentence
"""

from __future__ import annotations

import itertools
import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}(\{|(?=[\w+-]))")
_BARE_BOX = re.compile(r"[+-]?[\w.,]{1,40}")
_BETWEEN_BOXES = re.compile(r"[\s$]{0,8}(?:(?:,|;|\band\b|\bor\b|&)[\s$]{0,8}){1,2}")
"""What may stand between two boxes that are one list."""
_CUT_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{[^}]")
"""A box that is never closed: the text was cut inside the answer, which may lack its last digits."""
_MARKER = re.compile(
    r"""(?ix)
    (?: \b answers? [ \t*_]{0,4} (?: (?:is|are)\b [ \t]{0,4} :? | [:=：] ) (?! [ \t]{0,2} not\b)
      | ^ [\W_]{0,8} (?:final[ \t])? answer [\W_]{0,8} $
      | 答案 [\s*]{0,4} (?: [是为為] [\s:：]{0,4} | [:：] )
    )""",
    re.MULTILINE,
)
_DISPLAY = re.compile(r"(?s)(?:\$\$(.{1,2000}?)\$\$|\\\[(.{1,2000}?)\\\])[\s.]*\Z")
_FORMULA = re.compile(r"\$([^$\n]{1,500})\$|\\\(([^\n]{1,500}?)\\\)")
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_NUMBER = re.compile(r"(?<![\w.\\])[-−]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[ ]?\\?%|/\d+)?(?!\w)")
_SENTENCE = re.compile(r"(?:\\\$|\$(?:[^$\\]|\\.)*\$|[^.。]|\.(?![ \t*_<]|\Z))*")
"""The first sentence of a line: a full stop inside a formula or a number ends none."""
_DENIED = re.compile(r"\bnot\s{1,4}\W{0,4}\d")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_TAIL = 20_000
"""Characters from the end in which a marker is looked for."""


def final_answer(text: str, *, boxed_only: bool = False) -> str | None:
    r"""The final answer as the completion writes it. None when there is none.

    Examples: r"so \boxed{\frac{1}{2}}." gives r"\frac{1}{2}". "Answer: 42\n\nI hope it helps!" gives "42".
    """
    visible = after_thinking(text)
    visible = _tagged(visible)
    boxed = _last_boxes(visible)
    if boxed or boxed_only:
        return boxed
    visible = _CUT_BOX.split(visible[-_TAIL:])[0]
    return _marked(visible) or _last_line(visible)


def after_thinking(text: str) -> str:
    """What follows the thinking. A thought that is cut off was never followed by an answer."""
    _, closed, after = text.rpartition("</think>")
    before, opened, _ = after.partition("<think>")
    return before if closed or opened else text


def _tagged(text: str) -> str:
    """What stands in the last <answer>...</answer>, or all of the text."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside if closed and opened else text


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every box that is closed, in the order in which they close. One pass."""
    opened: list[tuple[int, int] | None] = []  # for each open brace: the box it opens, if any
    found: list[tuple[int, int, str]] = []
    starts = {}
    for match in _BOX.finditer(text):
        if match.group(1):
            starts[match.end() - 1] = match.start()
        elif bare := _BARE_BOX.match(text, match.end()):
            content = bare.group().rstrip(".,")
            found.append((match.start(), match.end() + len(content), content))
    if not starts:
        return found
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        at, what = brace.start(), brace.group()
        if what == "{":
            opened.append((starts[at], at + 1) if at in starts else None)
        elif what == "}" and opened:
            box = opened.pop()
            if box is not None:
                found.append((box[0], at + 1, text[box[1] : at].strip()))
    return sorted(found, key=lambda box: box[1])


def _last_boxes(text: str) -> str | None:
    """The last box with content, and those right before it that belong to its list."""
    filled = [box for box in _boxes(text) if box[2]]
    if not filled:
        return None
    listed = [filled[-1]]
    for box in reversed(filled[:-1]):
        if _BETWEEN_BOXES.fullmatch(text, box[1], listed[0][0]):
            listed.insert(0, box)
    separators = [text[a[1] : b[0]] for a, b in itertools.pairwise(listed)]
    word = " or " if any("or" in between for between in separators) else ", "
    return word.join(content for _, _, content in listed)


def _marked(text: str) -> str | None:
    """What the last marker announces: the rest of its line, or the next line with text."""
    for match in reversed(list(_MARKER.finditer(text))):
        rest = text[match.end() :].lstrip(" \t*_:：=")
        if display := re.match(r"(?s)\s{0,20}(?:\$\$(.{1,2000}?)\$\$|\\\[(.{1,2000}?)\\\])", rest):
            return (display.group(1) or display.group(2)).strip() or None
        line = rest.lstrip().partition("\n")[0]
        sentence, *_ = _SENTENCE.findall(line.strip())  # there is one always: it may be empty
        if found := _quantity(sentence, last=False):
            return found
    return None


def _last_line(text: str) -> str | None:
    if display := _DISPLAY.search(text[-2200:]):
        return (display.group(1) or display.group(2)).strip() or None
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t*_`#-")]
    return _quantity(lines[-1], last=True) if lines else None


def _quantity(sentence: str, last: bool) -> str | None:
    """A sentence without its decoration, or the only formula, bold text or number among its words."""
    plain = sentence.strip(" \t*_`#").rstrip(" \t.。!,;\\")
    if not plain:
        return None
    outside = _FORMULA.sub(" ", plain)
    if not _WORD.search(re.sub(r"\\[A-Za-z]+\{[^{}]*\}", " ", outside)):
        return plain  # nothing but mathematics
    for pattern in (_FORMULA, _BOLD, _NUMBER):
        found = [match.group().strip() for match in pattern.finditer(sentence)]
        if len(found) == 1 and not _DENIED.search(sentence):
            return found[0].strip("* ")
        if found:
            break  # several: taking one of them would pay for a guess
    if last and "=" in plain:
        return plain.rpartition("=")[2].strip() or None
    return plain
