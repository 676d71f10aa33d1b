"""What a logged key means: looks keys up in the table, and renders the table as this folder's README.

python -m gspo_dist.metrics.names > gspo_dist/metrics/README.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from gspo_dist.metrics.table import PLACEHOLDERS, SECTIONS, Metric

HEAD = """\
# Metrics

Every key that a run logs, to `metrics.jsonl` and to W&B. Keys have the form `namespace/name`, with the unit
last where there is one. A share lies between 0 and 1. A value that is not a finite number is `null` in
`metrics.jsonl` and left out of W&B.

This page is made of `table.py` by `python -m gspo_dist.metrics.names > gspo_dist/metrics/README.md`. One test
holds the page to the table, another the table to what runs log.

| part of a key | stands for |
|---|---|
"""


def metrics() -> Iterator[Metric]:
    """Every entry of the table, in the README's order."""
    for section in SECTIONS:
        yield from section.metrics


def metric_of(key: str) -> Metric | None:
    """The entry of a logged key, or None for a key that no run logs.

    Example: `routing/update/flip_fraction/layer_03` belongs to `routing/update/flip_fraction/layer_{layer}`.
    An entry without placeholders comes before one that matches by them: `reward/timeout_fraction` has its own
    entry and is no `reward/{part}`.
    """
    literal, patterns = _lookup()
    if key in literal:
        return literal[key]
    return next((metric for pattern, metric in patterns if pattern.fullmatch(key)), None)


@cache
def _lookup() -> tuple[dict[str, Metric], list[tuple[re.Pattern[str], Metric]]]:
    """Entries by their key, and those with placeholders by a regular expression."""
    literal = {metric.key: metric for metric in metrics() if "{" not in metric.key}
    return literal, [(_pattern(metric.key), metric) for metric in metrics() if "{" in metric.key]


def _pattern(key: str) -> re.Pattern[str]:
    """`layer_{layer}` -> the expression that finds layer_0, layer_07, ..."""
    parts = re.split(r"\{(\w+)\}", key)  # text, placeholder, text, placeholder, ..., text
    return re.compile(
        "".join(PLACEHOLDERS[part][0] if at % 2 else re.escape(part) for at, part in enumerate(parts))
    )


def page() -> str:
    """The table as Markdown: what README.md of this folder holds."""
    lines = [HEAD + "\n".join(f"| `{{{name}}}` | {meaning} |" for name, (_, meaning) in PLACEHOLDERS.items())]
    for section in SECTIONS:
        lines += ["", f"## {section.title}", "", f"Measured in `{section.source}`.", ""]
        lines += ["| key | unit | meaning | logged |", "|---|---|---|---|"]
        lines += [
            f"| `{metric.key}` | {metric.unit} | {metric.meaning} | {metric.when or 'every step'} |"
            for metric in section.metrics
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
