"""`gspo data SOURCE`: what a run would see of a data source, and where it contradicts other copies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspo_dist.cli.exits import guarded

if TYPE_CHECKING:  # the command answers --help without them
    from gspo_dist.data.inspect import Difference, Findings

LISTED = 10
"""Places that are listed of each kind; the rest is counted."""


def main(args: Sequence[str]) -> None:
    """Prints prompts as they are rendered, lengths, duplicates, answers that the reward cannot read."""
    parser = argparse.ArgumentParser(
        "gspo data",
        description="Shows what a run would see of a source: a few rendered prompts with their tokens, "
        "lengths as a histogram, duplicates, bad rows, answers that the reward cannot read. With --against, "
        "questions whose answer differs from other copies.",
    )
    parser.add_argument("source", help="a file, a folder of save_to_disk, hub:NAME, reasoning_gym:TASK, ...")
    parser.add_argument("--model", help="model folder; without it lengths are characters")
    parser.add_argument("--reward", default="math", help="what reads the answers (math); none: nothing")
    parser.add_argument("--against", nargs="+", default=[], metavar="SOURCE", help="other copies")
    parser.add_argument("--prompt-key", default="prompt")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument("--split", default="train", help="split of a folder or a data set of the hub")
    parser.add_argument("--max-prompt-tokens", type=int, help="count prompts that are longer")
    parser.add_argument("--show", type=int, default=3, help="prompts to show (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of a procedural source")
    options = parser.parse_args(args)
    guarded(lambda: _show(options))


def _show(options: argparse.Namespace) -> None:
    from gspo_dist.config import DataConfig, RewardConfig
    from gspo_dist.data.inspect import compare_sources, inspect
    from gspo_dist.data.prompts import source_records
    from gspo_dist.data.records import BadRows
    from gspo_dist.trainer.setup.checks import load_tokenizer

    config = DataConfig(train=options.source, prompt_key=options.prompt_key, answer_key=options.answer_key)
    bad = BadRows(skip=True)
    records = source_records(config, options.source, options.split, options.seed, bad)
    copies = {}
    if options.against:
        records = list(records)
        copies = {
            other: list(source_records(config, other, options.split, options.seed, BadRows(skip=True)))
            for other in options.against
        }
    found = inspect(
        records,
        config,
        tokenizer=load_tokenizer(options.model) if options.model else None,
        reward=None if options.reward == "none" else RewardConfig(options.reward),
        max_prompt_tokens=options.max_prompt_tokens,
        show=options.show,
    )
    found.bad = bad.skipped
    print("\n".join(_lines(found, options)))
    if options.against:
        print("\n".join(_differences(*compare_sources(list(records), copies), len(copies))))


def _lines(found: Findings, options: argparse.Namespace) -> list[str]:
    from gspo_dist.data.inspect import histogram

    lines = []
    for where, text, tokens, answer in found.shown:
        lines += [f"--- {where}", text, f"--- answer {answer!r}"[:500]]
        if tokens:
            more = " ..." * (len(tokens) > 32)
            lines.append(f"--- {len(tokens)} tokens: {' '.join(map(str, tokens[:32]))}{more}")
    lines += ["", f"{found.records} records in {options.source}"]
    lines += [f"  {count:9d} of {name}" for name, count in found.sources.most_common(LISTED)]
    lines += histogram(found.lengths, "tokens" if options.model else "characters")
    lines += _listed("rows are no records", found.bad)
    lines += _listed("prompts cannot be rendered", found.unrenderable)
    if options.max_prompt_tokens is not None:
        lines += _listed(f"prompts have more than {options.max_prompt_tokens} tokens", found.too_long)
    lines += _listed("repeat an earlier prompt", [f"{place} = {first}" for place, first in found.duplicates])
    lines += _listed(
        "repeat an earlier prompt with another answer",
        [f"{place} = {first}: {a!r} and {b!r}" for place, first, a, b in found.contradictions],
    )
    return lines + _listed(f"answers cannot be read by the reward {options.reward}", found.unreadable)


def _listed(what: str, places: Sequence[str]) -> list[str]:
    more = [f"  ... and {len(places) - LISTED} more"] if len(places) > LISTED else []
    return [f"{len(places)} {what}", *(f"  {place}" for place in places[:LISTED]), *more]


def _differences(differences: Sequence[Difference], matched: int, copies: int) -> list[str]:
    lines = [f"{matched} questions are in the {copies} other copies, {len(differences)} with another answer"]
    for one in differences:
        verdict = "outvoted: look at this answer" if one.is_outvoted else "most agree with it"
        others = ", ".join(f"{answer} ({place})" for place, answer in one.others)
        lines += [f"  {one.where}: {one.answer}; {verdict}; others: {others}", f"    {one.question[:120]!r}"]
    return lines
