"""Questions made by a program: the quickstart's additions and the tasks of reasoning_gym."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from gspo_dist.data import arithmetic
from gspo_dist.data.records import Record

REASONING_GYM = "reasoning_gym:"
DEFAULT_SIZE, DEFAULT_HELDOUT_SIZE = 8192, 512
# reasoning_gym derives question i from seed + i, so the held-out seed is far above any training seed.
HELDOUT_SEED_OFFSET = 1_000_000_007


def is_procedural(source: str) -> bool:
    return source == "arithmetic" or source.startswith(REASONING_GYM)


def make(source: str, split: str, options: Mapping[str, Any], seed: int) -> list[Record]:
    """The questions of one split of a procedural source.

    options: `size` (training questions), `heldout_size`, and arguments of the task itself. The held-out
    questions share none with the training ones, and depend on `seed` as little as the task allows.
    """
    rest = dict(options)
    sizes = {
        "train": rest.pop("size", DEFAULT_SIZE),
        "heldout": rest.pop("heldout_size", DEFAULT_HELDOUT_SIZE),
    }
    if split not in sizes:
        raise ValueError(f"{source} is made in the splits train and heldout: got {split!r}")
    for name, size in zip(("size", "heldout_size"), sizes.values(), strict=True):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"data.options.{name} must be a whole number of at least 1: got {size!r}")
    if source == "arithmetic":
        return _additions(split, sizes[split], rest, seed)
    return _gym(source.removeprefix(REASONING_GYM), split, sizes, rest, seed)


def _additions(split: str, size: int, options: dict[str, Any], seed: int) -> list[Record]:
    known = [
        p for p in inspect.signature(arithmetic.problems).parameters if p not in ("split", "size", "seed")
    ]
    for name in options:
        if name not in known:
            raise ValueError(
                f"arithmetic has no option {name!r}; data.options may hold: size, heldout_size, "
                f"{', '.join(known)}"
            )
    questions = arithmetic.problems(split, size=size, seed=seed, **options)
    return [Record(f"arithmetic:{q.text[:-1]}", q.text, q.answer, {"carries": q.carries}) for q in questions]


def _gym(task: str, split: str, sizes: dict[str, int], options: dict[str, Any], seed: int) -> list[Record]:
    train = _gym_entries(task, sizes["train"], options, seed)
    if split == "train":
        chosen = train
    else:
        # Small tasks repeat themselves under any seed. Spare questions are drawn, of which training
        # sees none.
        pool = _gym_entries(task, 4 * sizes["heldout"], options, seed + HELDOUT_SEED_OFFSET)
        chosen = {q: e for q, e in pool.items() if q not in train}
        if len(chosen) < sizes["heldout"]:
            raise ValueError(
                f"reasoning_gym:{task}: only {len(chosen)} questions differ from the {len(train)} training "
                f"ones, {sizes['heldout']} held-out ones are asked for; lower data.options.size or "
                "heldout_size, or make the task larger"
            )
        chosen = dict(list(chosen.items())[: sizes["heldout"]])
    return [
        Record(f"reasoning_gym:{task}:{split}:{i}", q, e["answer"], {"reasoning_gym": e["metadata"]})
        for i, (q, e) in enumerate(chosen.items())
    ]


def _gym_entries(task: str, size: int, options: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """Distinct questions -> entries, in order of first appearance."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"data source reasoning_gym:{task} needs the package reasoning-gym: pip install 'gspo-dist[math]'"
        ) from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        raise ValueError(
            f"reasoning_gym has no task {task!r}; nearest: {', '.join(near) or 'none'} "
            f"({len(DATASETS)} in all)"
        )
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning_gym:{task}: data.options {options} are refused: {error}") from error
    entries: dict[str, dict[str, Any]] = {}
    for entry in dataset:
        entries.setdefault(entry["question"], entry)
    return entries
