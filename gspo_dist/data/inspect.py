"""What a run would see of a source: rendered prompts, lengths, duplicates, answers that cannot be read.

`compare_sources` finds answers that contradict other copies of the same questions.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gspo_dist.config import DataConfig, RewardConfig
from gspo_dist.data.prompts import rendered
from gspo_dist.data.records import Record
from gspo_dist.rewards.equal import equal
from gspo_dist.rewards.reward import prompt_check
from gspo_dist.types import Prompt

SIMILAR = 0.7
"""Share of common pairs of words from which two questions are the same one in two spellings."""
BARS = 40
"""Longest bar of the histogram."""


@dataclass
class Findings:
    """What was seen of a source."""

    records: int = 0
    shown: list[tuple[str, str, tuple[int, ...], Any]] = field(default_factory=list)
    """The first ones: place, text as it is rendered, tokens, answer."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens (characters without a tokenizer) -> prompts."""
    too_long: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """(place, place of the first): the same question with the same answer."""
    contradictions: list[tuple[str, str, Any, Any]] = field(default_factory=list)
    """(place, place of the first, answer, its answer)."""
    unreadable: list[str] = field(default_factory=list)
    """Answers that the reward refuses, with the reason."""
    unrenderable: list[str] = field(default_factory=list)
    bad: Sequence[str] = ()
    """Rows that are no records."""
    sources: Counter[str] = field(default_factory=Counter)
    """data_source -> records."""


def inspect(
    records: Iterable[Record],
    config: DataConfig,
    *,
    tokenizer: Any = None,
    reward: RewardConfig | None = None,
    max_prompt_tokens: int | None = None,
    show: int = 3,
) -> Findings:
    """One pass over the records; what is kept of each is its length and a hash.

    Without a tokenizer lengths are characters. Nothing raises for a record: what is wrong with it is counted.
    """
    found = Findings()
    check = prompt_check(reward) if reward else None
    seen: dict[bytes, tuple[str, Any]] = {}
    for record in records:
        found.records += 1
        if source := record.metadata.get("data_source"):
            found.sources[str(source)] += 1
        text, tokens = plain_text(record), tuple[int, ...]()
        try:
            if tokenizer:
                text, tokens = rendered(record, config, tokenizer, {})
        except ValueError as error:
            found.unrenderable.append(str(error))
            continue
        length = len(tokens) if tokenizer else len(text)
        found.lengths[length] += 1
        if max_prompt_tokens is not None and tokenizer and length > max_prompt_tokens:
            found.too_long.append(f"{record.where}: {length} tokens")
        if len(found.shown) < show:
            found.shown.append((record.where, text, tokens, record.answer))
        _note_repeat(found, seen, record, text)
        if check is not None:
            try:
                check(Prompt(record.where, tokens or (0,), text, record.answer, record.metadata))
            except ValueError as error:
                found.unreadable.append(f"{record.where}: {error}")
    return found


def _note_repeat(found: Findings, seen: dict[bytes, tuple[str, Any]], record: Record, text: str) -> None:
    key = hashlib.blake2b(text.encode(), digest_size=12).digest()
    first, answer = seen.setdefault(key, (record.where, record.answer))
    if first == record.where:
        return
    if answer == record.answer:
        found.duplicates.append((record.where, first))
    else:
        found.contradictions.append((record.where, first, record.answer, answer))


def plain_text(record: Record) -> str:
    """The question as text: the contents of its messages."""
    if isinstance(record.question, str):
        return record.question
    return "\n\n".join(str(message.get("content", "")) for message in record.question)


class Difference(NamedTuple):
    """A question whose answers differ between copies."""

    where: str
    answer: str
    others: tuple[tuple[str, str], ...]
    """(place, answer) of each other copy of the question."""
    question: str

    @property
    def is_outvoted(self) -> bool:
        """Whether most other copies agree on another answer."""
        against = sum(not _same(answer, self.answer) for _, answer in self.others)
        return against > len(self.others) / 2


def compare_sources(
    records: Sequence[Record], others: Mapping[str, Sequence[Record]]
) -> tuple[list[Difference], int]:
    """(questions with another answer somewhere, questions that some other copy has).

    Questions are matched by their pairs of neighbouring words, because copies differ in LaTeX and
    instructions. Answers are compared as mathematics: 025 is 25.
    """
    indexes = [_Index(copies) for copies in others.values()]
    differences, matched = [], 0
    for record in records:
        found = [own for index in indexes if (own := index.find(record)) is not None]
        matched += bool(found)
        ours = str(record.answer)
        if any(not _same(str(own.answer), ours) for own in found):
            pairs = tuple((own.where, str(own.answer)) for own in found)
            differences.append(Difference(record.where, ours, pairs, plain_text(record)))
    return differences, matched


class _Index:
    """Records by their pairs of words."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.words = [_words(record) for record in records]
        self.exact = {frozenset(words): at for at, words in reversed(list(enumerate(self.words)))}
        self.by_word: dict[str, list[int]] = {}
        for at, words in enumerate(self.words):
            for word in words:
                self.by_word.setdefault(word, []).append(at)

    def find(self, record: Record) -> Record | None:
        """The same question, or None."""
        words = _words(record)
        if (at := self.exact.get(frozenset(words))) is not None:
            return self.records[at]
        # The rarest words choose the candidates, so that thousands of questions take no time.
        rare = sorted(words & self.by_word.keys(), key=lambda word: len(self.by_word[word]))[:8]
        votes = Counter(at for word in rare for at in self.by_word[word])
        best = max(votes, key=lambda at: _overlap(words, self.words[at]), default=None)
        if best is None or _overlap(words, self.words[best]) < SIMILAR:
            return None
        return self.records[best]


def _words(record: Record) -> set[str]:
    """Pairs of neighbouring words and numbers, without signs and LaTeX."""
    words = re.findall(r"[a-z]+|\d+", re.sub(r"\\[a-z]+", " ", plain_text(record).lower()))
    return {f"{a} {b}" for a, b in itertools.pairwise(words)} or set(words)


def _overlap(a: set[str], b: set[str]) -> float:
    """Common pairs over those of the shorter one: a copy may have an instruction behind the question."""
    return len(a & b) / max(1, min(len(a), len(b))) if a and b else 0.0


def _same(a: str, b: str) -> bool:
    return a == b or equal(a, b)


def histogram(lengths: Mapping[int, int], unit: str) -> list[str]:
    """Lengths in at most ten bins, with their counts as bars.

    Example: lengths 1 to 100 give bins of 10, each with a full bar.
    """
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // 10))
    bins = Counter[int]()
    for length, count in lengths.items():
        bins[(length - low) // width] += count
    most = max(bins.values())
    return [
        f"{low + at * width:7d} to {low + (at + 1) * width - 1:7d} {unit} {bins[at]:9d} "
        + "#" * round(BARS * bins[at] / most)
        for at in range(max(bins) + 1)
    ]
