"""Data of one's own: writes train.jsonl and heldout.jsonl, as plain questions or as chat messages.

    python -m gspo_dist.examples.make_sums --to sums
    gspo train experiment=quickstart data.train=sums/train.jsonl data.heldout=sums/heldout.jsonl

A record is one JSON object per line: {"prompt": "12+34=", "answer": "46"}. With --chat the prompt is a list
of messages, which go through the chat template of the model. The model must have one:

    python -m gspo_dist.examples.make_sums --to sums --chat
    gspo train experiment=quickstart model=local model.path=INSTRUCT_MODEL \
      data.train=sums/train.jsonl data.heldout=sums/heldout.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path


def record(left: int, right: int, *, chat: bool) -> dict[str, object]:
    """One line of the file."""
    question = f"{left}+{right}="
    if not chat:
        return {"prompt": question, "answer": str(left + right)}
    messages = [
        {"role": "system", "content": "Add the numbers. End with # and the sum."},
        {"role": "user", "content": question},
    ]
    return {"prompt": messages, "answer": str(left + right)}


def write(folder: Path, *, train: int, heldout: int, digits: int, chat: bool, seed: int) -> None:
    """Both files, from distinct questions: a run refuses a held-out prompt that is trained on."""
    low, high = 10 ** (digits - 1), 10**digits
    pairs = [(left, right) for left in range(low, high) for right in range(low, high)]
    if train + heldout > len(pairs):
        raise ValueError(f"{digits}-digit sums give {len(pairs)} questions: got {train} + {heldout}")
    chosen = random.Random(seed).sample(pairs, train + heldout)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", chosen[:train]), ("heldout", chosen[train:])):
        lines = [json.dumps(record(left, right, chat=chat)) for left, right in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Sums as a training and a held-out file.")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=4000, help="training questions")
    parser.add_argument("--heldout", type=int, default=256, help="held-out questions")
    parser.add_argument("--digits", type=int, default=2, help="digits of each number")
    parser.add_argument("--seed", type=int, default=0, help="which questions are drawn")
    parser.add_argument("--chat", action="store_true", help="chat messages instead of plain questions")
    given = parser.parse_args(arguments)
    write(
        given.to,
        train=given.train,
        heldout=given.heldout,
        digits=given.digits,
        chat=given.chat,
        seed=given.seed,
    )


if __name__ == "__main__":
    main()
