r"""LaTeX of final answers in one plain form: what only looks different is equal as text afterwards.

r"\left(3,\,\dfrac{\pi}{2}\right)." and "(3, \frac{\pi}{2})" both become "(3,\frac{\pi}{2})".
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "°": r"^\circ ",
        "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
        "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ",
        "％": "%", "，": ",", "；": ";", "：": ":", "（": "(", "）": ")", "＝": "=",
        "…": r"\ldots ", "²": "^2", "³": "^3", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
        "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "∕": "/", "⁄": "/",
        "√": r"\sqrt ", "£": "", "€": "",
    }
)  # fmt: skip
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\l?dots(?:[cbmo])?(?![A-Za-z])|\\cdots(?![A-Za-z])|\.{3}"), r"\\ldots "),
    (re.compile(r"\\(?:leqslant|leq|le)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|ge)(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\(?:neq|ne)(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\(?:lbrace|\{)"), r"\\{"),
    (re.compile(r"\\(?:rbrace|\})"), r"\\}"),
    (re.compile(r"\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\\\\\s{0,4}\[[^\]]{0,12}\]"), r"\\\\"),  # \\[4pt]
    (re.compile(r"\\(?:hspace|vspace|phantom)\*?\{[^{}]{0,20}\}"), " "),
    (re.compile(r"\\mid(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:sqrt)\s{0,3}(\d+|[A-Za-z])(?![A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s{0,3}(\d)\s{0,3}(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s{0,3}(\d)\s{0,3}\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\{[^{}]{1,60}\})\s{0,3}(\d)(?!\d)"), r"\1{\2}"),
    (re.compile(r"\\frac\s{0,3}\{"), r"\\frac{"),
    (re.compile(r"\}\s{1,3}\{"), "}{"),
    (re.compile(r"\^\s{0,3}\{?\s{0,3}\\(?:circ|degree)\s{0,3}\}?|\\degree(?![A-Za-z])"), r"^\\circ "),
)
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|texttt|textup|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|bm"
    r"|boldsymbol|operatorname|boxed|fbox|emph|ensuremath)\*?\s{0,3}\{([^{}]*)\}"
)
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~|\s+")
_GROUPED = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:,\\!|\{,\}|\\,|\\ |\\!)\s?\d{3})+)(?!\d)")
_SPACED_GROUPS = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_COMMAS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")

_BRACKETED_MATRIX = re.compile(
    r"[(\[]\s*(\\begin\{(?:small)?(?:matrix|array)\}.*\\end\{\w+\})\s*[)\]]", re.DOTALL
)
_PERCENT = re.compile(r"(?:\\?%|\s+(?:per\s?cent|percent))\s*")
_DEGREES = re.compile(r"\s*(?:\^\\circ(?:\s*C)?|\s(?:degrees?|deg))\s*")
_UNIT = re.compile(
    r"(?:(?<=[\d})!])|(?:(?<=\\pi)|(?<=(?<![A-Za-z\\])i))(?![A-Za-z]))"
    r"\s*(?P<name>[A-Za-zμ]{2,24}(?:[ ./][A-Za-z]{1,24}){0,4}|(?<=\s)[mgslL])\.?"
    r"\s{0,3}(?:\^\s{0,2}\{?-?\d\}?)?(?:\s?/\s?[A-Za-z]{1,12}(?:\s?\^\s?\{?\d\}?)?)?\s*"
)
_NO_UNIT = {
    "or", "and", "to", "if", "is", "for", "mod", "pi", "sin", "cos", "tan", "log", "ln", "exp", "sqrt",
    "when", "not", "with", "where", "max", "min", "gcd", "lcm", "even", "odd",
}  # fmt: skip
_SAME_UNIT = {
    "cm": "cm", "centimeter": "cm", "centimetre": "cm", "m": "m", "meter": "m", "metre": "m",
    "km": "km", "kilometer": "km", "kilometre": "km", "mm": "mm", "millimeter": "mm", "inch": "in",
    "inche": "in", "in": "in", "foot": "ft", "feet": "ft", "ft": "ft", "yard": "yd", "yd": "yd",
    "mile": "mi", "mi": "mi", "second": "s", "sec": "s", "s": "s", "minute": "min", "min": "min",
    "ms": "ms", "millisecond": "ms",
    "hour": "h", "hr": "h", "day": "d", "week": "w", "year": "y", "cent": "ct", "dollar": "$",
    "gram": "g", "g": "g", "kg": "kg", "kilogram": "kg",
}  # fmt: skip


class Clean(NamedTuple):
    """A final answer in plain form, with what was written around its number."""

    text: str
    percent: bool = False
    degrees: bool = False
    unit: str = ""
    """A common unit under one name. Empty without one, and for units that are not in the table."""


def clean(text: str) -> Clean:
    """An answer in plain form.

    Currency, percent signs, degrees and units at its end are taken off. What was taken off is told.
    """
    text = _without_dollars(text.strip()).translate(_SIGNS)
    for pattern, new in _RENAMED:
        text = pattern.sub(new, text)
    text = _GROUPED.sub(lambda m: m.group(1) + re.sub(r"\D", "", m.group(2)), text)
    text = text.replace("\\!", "")
    for _ in range(4):  # a wrapper may stand in another one
        text, count = _WRAPPED.subn(lambda m: " " + m.group(1) + " ", text)
        if not count:
            break
    text = _SPACES.sub(" ", text).strip()
    text = _end(text)
    text, percent, degrees, unit = _measured(text)
    if _SPACED_GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    return Clean(_end(text), percent, degrees, unit)


def _without_dollars(text: str) -> str:
    r"""Delimiters of mathematics away: "$69$,$84$" becomes "69;84", and \$12 becomes 12."""
    text = re.sub(r"\\\$|\\(?:text)?dollar(?![A-Za-z])", "", text)
    text = re.sub(r"\$\s*(?:,|;|\band\b)\s*\$", ";", text)
    text = re.sub(r"^\s*(?:\\\(|\\\[)|(?:\\\)|\\\])\s*\.?\s*$", "", text)
    return text.replace("$", " ")


def _end(text: str) -> str:
    """Without the full stop or comma that ends a sentence, and without outer braces."""
    text = re.sub(r"(?:\\?[.,;:?]|\\\\)+\s*$", "", text)
    text = text.strip().strip("*").strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    if match := _BRACKETED_MATRIX.fullmatch(text):
        return match.group(1)
    return _single_brackets(text)


def _single_brackets(text: str) -> str:
    """((x)) as (x), in one pass: models also nest them a thousand deep."""
    if not text.startswith("(("):
        return text
    most = min(len(text) - len(text.lstrip("(")), len(text) - len(text.rstrip(")")))
    inner = text[most - 1 : len(text) - most + 1]
    return inner if closing(inner, 0) == len(inner) - 1 else text


def _measured(text: str) -> tuple[str, bool, bool, str]:
    """(the number's text, percent, degrees, unit)."""
    for pattern, at in ((_PERCENT, 1), (_DEGREES, 2)):
        match = None
        for match in pattern.finditer(text):  # the last one, which may end the text  # noqa: B007
            pass
        if match is not None and match.end() == len(text) and match.start() > 0:
            return text[: match.start()].strip(), at == 1, at == 2, ""
    # Only the last 60 characters: a unit is short, and a search that starts anywhere is quadratic. A start
    # below zero is the beginning.
    for match in _UNIT.finditer(text, len(text) - 60):
        words = re.findall(r"[A-Za-z]+", match.group("name").lower())
        if match.end() == len(text) and not _NO_UNIT & set(words):
            name = words[0].rstrip("s") if len(words[0]) > 2 else words[0]  # ms are no metres
            power = "".join(re.findall(r"\^\s*\{?(-?\d)", match.group()))
            known = _SAME_UNIT.get(name, "") if len(words) == 1 else ""
            return text[: match.start()].strip(), False, False, known and known + power
    return text, False, False, ""


def compact(text: str) -> str:
    """Without spaces, and without braces around a single sign: for comparison as text."""
    text = re.sub(r"(\\[A-Za-z]+) (?=[A-Za-z])", "\\1\x00", text)  # "\pi r" must not become "\pir"
    text = re.sub(r"[\s{}]", "", text.replace(r"\{", "\x01").replace(r"\}", "\x02"))
    return text.replace("\x01", r"\{").replace("\x02", r"\}").replace("\x00", " ")


def joined_thousands(text: str) -> str:
    """1,234 as 1234, outside brackets: (1,234) may be a pair."""
    return _COMMAS.sub(lambda m: m.group().replace(",", ""), text) if not re.search(r"[(\[{]", text) else text


def closing(text: str, at: int) -> int | None:
    r"""The place of the bracket that closes the one at `at`. A \{ counts as a bracket of its own."""
    depth = 0
    while at < len(text):
        sign = text[at]
        if sign == "\\":
            sign = text[at : at + 2]
            at += 1
        if sign in ("(", "[", "{", r"\{"):
            depth += 1
        elif sign in (")", "]", "}", r"\}"):
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return None


def split(text: str, separators: re.Pattern[str]) -> list[str]:
    """`text` at every separator that stands outside brackets and environments."""
    parts, start, at, depth = [], 0, 0, 0
    while at < len(text):
        if depth == 0 and (match := separators.match(text, at)):
            parts.append(text[start:at].strip())
            start = at = match.end()
            continue
        if text.startswith((r"\begin", r"\{"), at) or text[at] in "([{":
            depth += 1
        elif text.startswith((r"\end", r"\}"), at) or text[at] in ")]}":
            depth = max(0, depth - 1)
        at += 2 if text[at] == "\\" else 1
    parts.append(text[start:].strip())
    return parts
