r"""Whether a completion's final answer equals the right one, as mathematics.

By kind, from the outside in: numbers exactly (numerals.py), then lists, sets, tuples, intervals, matrices and
equations by their parts, then words. What is left is one expression, and math-verify compares it.

math-verify 0.9.0 alone is not enough. Its tolerance is absolute, so 2.88e-19 equals 3.88e-19. It drops the
base of 4210_5 and compares lists with dots by too little. It reads "2 2/3" as 4/3, and no percent in a box.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from gspo_dist.rewards.latex import Clean, clean, closing, compact, joined_thousands, split
from gspo_dist.rewards.numerals import Numeral, equal_numerals, numeral
from gspo_dist.rewards.symbolic import same_equation, same_expression

MOST_CHARACTERS = 1000
"""Longer answers are compared as text only."""
MOST_ELEMENTS = 200

_LIST = re.compile(r"[,;]|\\(?:text|mathrm)\{\s*(?:and|or)\s*\}|(?<=[\s\d})])(?:and|or)(?=[\s\\{(])")
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!:\\])=|\\equiv(?![A-Za-z])")
_RELATION = re.compile(r"(\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<=|>=|<|>)")
_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?(?:\^?\{?'+\}?)?(?:\([A-Za-z0-9, ]{1,12}\))?")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?\s*(\d+)\s*\}?")
_MATRIX = re.compile(
    r"\\begin\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\{[lcr|]+\})?(.*)\\end\{\w+\}", re.DOTALL
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' ,.-]*")
_CHOICE = re.compile(r"\(?([A-Ja-j])\)?")
_NO_PROSE = (
    "and",
    "sin",
    "cos",
    "tan",
    "cot",
    "log",
    "exp",
    "pmatrix",
    "bmatrix",
    "matrix",
    "array",
    "cases",
)
_FUNCTION = re.compile(r"\\?(gcd|lcm|max|min)\s*(\(.*\)|\\\{.*\\\})", re.DOTALL)


def equal(gold: str, found: str) -> bool:
    """Whether `found` is the right answer `gold`, both as written."""
    return _equal_clean(clean(gold), clean(found))


def readable(gold: str) -> bool:
    """Whether a right answer says anything: something is left of it, and its braces close."""
    text = clean(gold).text
    braces = re.sub(r"\\[{}]", "", text)
    return bool(re.search(r"[^\s{}$\\]|\\[A-Za-z]", text)) and braces.count("{") == braces.count("}")


def _equal_clean(gold: Clean, found: Clean, depth: int = 0) -> bool:
    if not found.text:
        return False
    if gold.unit and found.unit and gold.unit != found.unit:
        return False
    if compact(gold.text) == compact(found.text) and gold.percent == found.percent:
        return True
    if max(len(gold.text), len(found.text)) > MOST_CHARACTERS or depth > 8:
        return False
    left, right = numeral(joined_thousands(gold.text)), numeral(joined_thousands(found.text))
    if left is not None and right is not None and _equal_measured(gold, found, left, right):
        return True
    if gold.degrees != found.degrees and r"\pi" in gold.text + found.text:
        gold, found = _in_radians(gold), _in_radians(found)
    if _prose(gold.text) or _prose(found.text):
        return bool(_words(gold.text, found.text, depth))
    for same in _KINDS:
        verdict = same(gold.text, found.text, depth)
        if verdict is not None:
            return verdict
    return False if left is not None and right is not None else _expressions(gold, found)


def _expressions(gold: Clean, found: Clean) -> bool:
    return same_expression(joined_thousands(gold.text), joined_thousands(found.text))


def _equal_measured(gold: Clean, found: Clean, left: Numeral, right: Numeral) -> bool:
    """Numbers with their percent signs.

    Where 50% is right, so are 50 and 0.5. Where 0.5 or 50 is right, so is 50%.
    """
    if gold.percent == found.percent:
        return equal_numerals(left, right)
    a, b = (_hundredth(n) if side.percent else n for n, side in ((left, gold), (right, found)))
    sign_left_out = equal_numerals(left, right) and (gold.percent or left.value > 1)
    return sign_left_out or equal_numerals(a, b)


def _hundredth(number: Numeral) -> Numeral:
    places = None if number.decimals is None else number.decimals + 2
    return Numeral(number.value / 100, places, number.significant)


def _in_radians(side: Clean) -> Clean:
    number = numeral(side.text)
    if not side.degrees or number is None:
        return side
    value = number.value / 180
    return Clean(rf"\frac{{{value.numerator}}}{{{value.denominator}}}\pi")


def _parts_equal(gold: str, found: str, depth: int) -> bool:
    return _equal_clean(clean(gold), clean(found), depth + 1)


def _matched(golds: list[str], founds: list[str], depth: int, ordered: bool) -> bool:
    """Whether the elements are equal, each with one of its own."""
    if len(golds) != len(founds) or len(golds) > MOST_ELEMENTS:
        return False
    if ordered:
        return all(_parts_equal(g, f, depth) for g, f in zip(golds, founds, strict=True))
    left = list(founds)
    for gold in golds:
        hit = next((at for at, one in enumerate(left) if _parts_equal(gold, one, depth)), None)
        if hit is None:
            return False
        left.pop(hit)
    return True


# Each kind says True or False when it decides, and None when the answers are of other kinds.


def _based(gold: str, found: str, depth: int) -> bool | None:
    a, b = (_BASED.fullmatch(compact(text)) for text in (gold, found))
    if (a is None or not a.group(1)[0].isdigit()) and (b is None or not b.group(1)[0].isdigit()):
        return None
    if a and b:
        return a.groups() == b.groups()
    # The base may go without saying in an answer, never in what is right.
    return a is not None and compact(found) == a.group(1)


def _matrix(gold: str, found: str, depth: int) -> bool | None:
    a, b = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(found)
    if not a and not b:
        return None
    if not a or not b:
        return False
    rows = [[row.split("&") for row in m.group(1).split(r"\\") if row.strip()] for m in (a, b)]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
        return False
    cells = [list(itertools.chain.from_iterable(side)) for side in rows]
    return _matched(cells[0], cells[1], depth, ordered=True)


def _inequality(gold: str, found: str, depth: int) -> bool | None:
    a, b = _ranges(gold), _ranges(found)
    if a is None or b is None:
        return None
    if len(a) > 1 or len(b) > 1:  # the parts of a union, in any order
        return _matched([_range_text(g) for g in a], [_range_text(f) for f in b], depth, False)
    (g,), (f,) = a, b
    same_ends = (g[0], g[3]) == (f[0], f[3])
    return same_ends and _parts_equal(g[1], f[1], depth) and _parts_equal(g[2], f[2], depth)


def _range_text(ends: tuple[str, str, str, str]) -> str:
    return f"{ends[0]}{ends[1]},{ends[2]}{ends[3]}"


def _ranges(text: str) -> list[tuple[str, str, str, str]] | None:
    r"""(bracket, low, high, bracket) of every part of a union. None: it is no range.

    Example: r"x \ge 5" and r"[5,\infty)" are both [("[", "5", r"\infty", ")")].
    """
    text = re.sub(r"^\s*[A-Za-z]\s*(?:\\in(?![A-Za-z])|=)", "", text).strip()
    found = []
    for part in split(text, re.compile(r"\\cup(?![A-Za-z])|(?<=\s)or(?=\s)")):
        one = _interval(part) or _chain(part)
        if one is None:
            return None
        found.append(one)
    return found


def _interval(text: str) -> tuple[str, str, str, str] | None:
    if text[:1] in ("(", "[") and closing(text, 0) == len(text) - 1:
        ends = split(text[1:-1], re.compile(","))
        if len(ends) == 2:
            return text[0], ends[0], re.sub(r"^\+(?=\\infty)", "", ends[1]), text[-1]
    return None


def _chain(text: str) -> tuple[str, str, str, str] | None:
    pieces = [piece.strip() for piece in _RELATION.split(text)]
    if len(pieces) not in (3, 5):
        return None
    signs = [{r"\le": "<=", r"\ge": ">="}.get(sign, sign) for sign in pieces[1::2]]
    if len({sign[0] for sign in signs}) != 1:
        return None
    if signs[0][0] == ">":
        pieces, signs = pieces[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    low, high = signs[0], signs[-1]
    if len(pieces) == 5 and _NAME.fullmatch(pieces[2]):
        return "[" if low == "<=" else "(", pieces[0], pieces[4], "]" if high == "<=" else ")"
    if len(pieces) == 3 and _NAME.fullmatch(pieces[0]) and r"\infty" not in pieces[2]:
        return "(", r"-\infty", pieces[2], "]" if high == "<=" else ")"
    if len(pieces) == 3 and _NAME.fullmatch(pieces[2]):
        return "[" if low == "<=" else "(", pieces[0], r"\infty", ")"
    return None


def _union(gold: str, found: str, depth: int) -> bool | None:
    a, b = split(gold, _UNION), split(found, _UNION)
    if len(a) == 1 and len(b) == 1:
        return None
    return _matched(a, b, depth, ordered=False)


def _equation(gold: str, found: str, depth: int) -> bool | None:
    if len(split(gold, _LIST)) > 1 or len(split(found, _LIST)) > 1:
        return None
    a, b = split(gold, _EQUALS), split(found, _EQUALS)
    if len(a) == 1 and len(b) == 1:
        return None
    if len(a) == 1:  # x = 1 + 2 = 3 where 3 is right; only names and steps may stand before the value
        return _parts_equal(a[0], b[-1], depth) and (bool(_letters(b[0])) or _parts_equal(b[0], b[-1], depth))
    named = _NAME.fullmatch(a[0]) is not None
    if len(b) == 1:
        return named and _parts_equal(a[-1], b[0], depth)
    if named and _NAME.fullmatch(b[0]) and compact(a[0]) == compact(b[0]):
        return _parts_equal(a[-1], b[-1], depth)
    return len(a) == len(b) == 2 and same_equation((a[0], a[1]), (b[0], b[1]))


def _letters(text: str) -> str:
    return re.sub(r"[^A-Za-z]", "", text)


def _list(gold: str, found: str, depth: int) -> bool | None:
    a, b = _elements(gold), _elements(found)
    if a is None and b is None:
        return None
    (open_a, golds), (open_b, founds) = a or ("", [gold]), b or ("", [found])
    if open_a != open_b and {open_a, open_b} & {"(", "[", "<"} and "" not in (open_a, open_b):
        return False
    dots = any(r"\ldots" in one for one in golds + founds)
    ordered = bool({open_a, open_b} & {"(", "[", "<"}) or dots
    if ordered and "" in (open_a, open_b) and not (len(golds) > 1 and len(founds) > 1):
        return None  # (x) is x
    return _matched(golds, founds, depth, ordered)


def _elements(text: str) -> tuple[str, list[str]] | None:
    r"""(opening bracket or "", elements) of a list, set or tuple. 1 \pm 2 is two elements."""
    opening, inner = "", text
    for mark, length in ((r"\{", 2), (r"\langle", 7), ("(", 1), ("[", 1)):
        if mark == r"\langle" and text.startswith(mark) and text.endswith(r"\rangle"):
            opening, inner = "<", text[length : -len(r"\rangle")]
        elif text.startswith(mark) and closing(text, 0) == len(text) - 1:
            opening, inner = mark[-1], text[length : -length if length == 2 else -1]
    parts = [part for part in split(inner, _LIST) if part]
    parts = [one for part in parts for one in _both_signs(part)]
    if len(parts) > 1 or opening == "{":
        return opening, parts
    return None


def _both_signs(text: str) -> list[str]:
    if r"\pm" not in text:
        return [text]
    return [
        re.sub(r"\\pm(?![A-Za-z])", sign, re.sub(r"\\mp(?![A-Za-z])", other, text))
        for sign, other in ("+-", "-+")
    ]


def _function(gold: str, found: str, depth: int) -> bool | None:
    """gcd(a, b) and the like, by their arguments in any order."""
    a, b = _FUNCTION.fullmatch(gold), _FUNCTION.fullmatch(found)
    if a is None or b is None:
        return None
    arguments = [split(m.group(2).strip("\\(){}"), re.compile(",")) for m in (a, b)]
    return a.group(1) == b.group(1) and _matched(arguments[0], arguments[1], depth, ordered=False)


def _thousands_or_list(gold: str, found: str, depth: int) -> bool | None:
    """1,234 is a number, unless both are lists of as many elements."""
    a, b = joined_thousands(gold), joined_thousands(found)
    if (a, b) == (gold, found):
        return None
    if any(numeral(text) is not None for text in (a, b)):
        return None
    return _parts_equal(a, b, depth)


def _prose(text: str) -> bool:
    """Whether words carry the answer. Their formulas may be equal where the sentences are not."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}(?![A-Za-z(])", text)
    return len([word for word in words if word not in _NO_PROSE]) > 1


def _words(gold: str, found: str, depth: int) -> bool | None:
    a, b = (re.sub(r"\\ ", " ", text).strip() for text in (gold, found))
    choice = _CHOICE.fullmatch(a)
    if choice and (a[0] == "(" or choice.group(1).isupper()):
        given = _CHOICE.match(b)
        if given and (given.end() == len(b) or given.group().endswith(")")):
            return given.group(1).upper() == choice.group(1).upper()
        return None
    if not (_WORDS.fullmatch(a) and len(_letters(a)) > 1):
        return None
    return _plain(a) == _plain(b)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.casefold())


_KINDS: tuple[Callable[[str, str, int], bool | None], ...] = (
    _based, _matrix, _function, _inequality, _thousands_or_list, _equation, _union, _list, _words,
)  # fmt: skip
