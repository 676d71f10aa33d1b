"""Graders over a table of cases: which verdicts are right, what is refused, what is paid wrongly.

    python -m benchmarks.graders CASES.jsonl --golds FILE:FIELD ... --out benchmarks/reports/graders.md

A case is {"gold", "response", "expected", "firm", "group"}. The graders: `math` (the reward), math-verify
as it comes, and the text of the last box. --golds gives every answer of a data file back in a box, then with
one digit changed, and counts what `math` says.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gspo_dist.rewards.math import math

Grader = Callable[[str, str], bool]


def ours(gold: str, response: str) -> bool:
    return math(SimpleNamespace(answer=gold), SimpleNamespace(text=response))[0] == 1.0  # type: ignore[arg-type]


def math_verify_alone(gold: str, response: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(response)))


def last_box(gold: str, response: str) -> bool:
    found = re.findall(r"\\boxed\{([^{}]*)\}", response)
    return bool(found) and found[-1].strip() == gold.strip()


GRADERS: dict[str, Grader] = {
    "math": ours,
    "math-verify alone": math_verify_alone,
    "text of the last box": last_box,
}


def verdicts(grader: Grader, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the firm cases, and the seconds of every case."""
    count: dict[str, int] = defaultdict(int)
    by_group: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    seconds = []
    for case in cases:
        begun = time.perf_counter()
        try:
            got: bool | None = grader(case["gold"], case["response"])
        except Exception:
            got = None
        seconds.append(time.perf_counter() - begun)
        kind = (
            "right" if got == case["expected"] else "raised" if got is None else "paid" if got else "refused"
        )
        count[kind] += 1
        by_group[case["group"]][0] += kind == "right"
        by_group[case["group"]][1] += 1
    return {"count": count, "groups": by_group, "seconds": seconds}


def golds_table(files: list[str]) -> list[str]:
    rows = [
        "| file | answers | given back: right | one digit changed | of them paid |",
        "|---|---|---|---|---|",
    ]
    rng = random.Random(0)
    for name in files:
        path, _, field = name.partition(":")
        golds = [str(one) for one in read_golds(Path(path), field)]
        right = sum(ours(gold, f"\\boxed{{{gold}}}") for gold in golds if "####" not in gold)
        right += sum(ours(gold, gold.rpartition("####")[2]) for gold in golds if "####" in gold)
        changed = paid = 0
        for gold in golds:
            said = gold.rpartition("####")[2].strip()
            places = [at for at, sign in enumerate(said) if sign.isdigit()]
            if places:
                at = rng.choice(places)
                digit = rng.choice([d for d in "123456789" if d != said[at]])
                changed += 1
                paid += ours(gold, f"\\boxed{{{said[:at]}{digit}{said[at + 1 :]}}}")
        rows.append(f"| {Path(path).name} | {len(golds)} | {right} | {changed} | {paid} |")
    return rows


def read_golds(path: Path, field: str) -> list[Any]:
    text = path.read_text()
    records = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    return [one[0] if isinstance(one := record[field], list) else one for record in records]


def report(path: Path, golds: list[str]) -> str:
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    firm = [case for case in cases if case["firm"]]
    ours("x+1", r"\boxed{1+x}")  # imports sympy
    found = {name: verdicts(grader, firm) for name, grader in GRADERS.items()}
    lines = [
        "# Graders over given cases",
        "",
        f"`python -m benchmarks.graders {path.name}{' --golds ...' if golds else ''}`: {len(firm)} firm "
        f"cases of {len(cases)} (firm: no careful grader would decide otherwise).",
        "",
        "| grader | right | right refused | wrong paid | raised | median ms | slowest s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        c = one["count"]
        lines.append(
            f"| {name} | {c['right']} of {len(firm)} ({c['right'] / len(firm):.1%}) | {c['refused']} "
            f"| {c['paid']} | {c['raised']} | {1e3 * statistics.median(one['seconds']):.2f} "
            f"| {max(one['seconds']):.2f} |"
        )
    lines += ["", "| kind | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for group in sorted({case["group"] for case in firm}):
        cells = ["{} of {}".format(*one["groups"][group]) for one in found.values()]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    if golds:
        lines += [
            "",
            "Answers of published files, given back in a box, and with one digit changed (seed 0):",
            "",
        ]
        lines += golds_table(golds)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", type=Path)
    parser.add_argument("--golds", nargs="*", default=[], metavar="FILE:FIELD")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = report(arguments.cases, arguments.golds)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
