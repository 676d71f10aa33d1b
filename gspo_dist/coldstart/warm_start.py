"""The supervised warm start: next-token loss on a pupil's worked solutions, about a minute on one core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from gspo_dist.coldstart.recipes import RethinkWarmStart, TurnsWarmStart, WarmStart
from gspo_dist.coldstart.tokenizer import EOS_ID, PAD_ID, TOKEN_IDS, encode
from gspo_dist.data import arithmetic

IGNORE = -100
END = "<eos>"
"""The end of a solution, as one of its characters."""


def batches(plan: WarmStart, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of the training split: inputs and labels, both [B, N] int64, padded on the right.

    Only solutions are learnt: labels of the question and of the padding are IGNORE. The question "1+2="
    with the solution "03#3" gives inputs "1 + 2 = 0 3 # 3" and labels "_ _ _ 0 3 # 3 <eos>".
    """
    rng = np.random.default_rng([seed, 2])
    questions = arithmetic.stream(rng, "train", digits=plan.digits, heldout_share=plan.heldout_share)
    while True:
        rows = []
        for question in islice(questions, plan.batch):
            prompt = encode(question.text)
            tokens: list[int] = []
            targets: list[int] = []
            for text, is_taught in solution_of(question, rng, plan):
                part = [EOS_ID if piece == END else TOKEN_IDS[piece] for piece in text]
                tokens += part
                targets += part if is_taught else [IGNORE] * len(part)
            rows.append((prompt + tokens[:-1], [IGNORE] * (len(prompt) - 1) + targets))
        width = max(len(tokens) for tokens, _ in rows)
        inputs = torch.full((plan.batch, width), PAD_ID)
        labels = torch.full((plan.batch, width), IGNORE)
        for i, (tokens, targets) in enumerate(rows):
            inputs[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, : len(targets)] = torch.tensor(targets)
        yield inputs, labels


def solution_of(
    question: arithmetic.Addition, rng: np.random.Generator, plan: WarmStart
) -> list[tuple[list[str], bool]]:
    """The solution in parts of characters (END for the end), each with whether it is taught: what an
    environment says is not.

    Example: with a calculator "347+285=" may be solved by "347+285=" (taught), "632" and "#632" (taught).
    """
    if isinstance(plan, TurnsWarmStart) and plan.environment == "guess":
        return _game(rng, plan.share)
    if isinstance(plan, RethinkWarmStart):
        return [([*_rethought(question, rng, plan), END], True)]
    if not isinstance(plan, TurnsWarmStart) or rng.random() >= plan.share:
        return [([*arithmetic.worked_solution(question, rng, plan.habits), END], True)]
    call = f"print({question.text[:-1]});" if plan.environment == "python" else question.text
    return [([*call], True), ([*question.answer], False), ([*"#", *question.answer, END], True)]


def _rethought(question: arithmetic.Addition, rng: np.random.Generator, plan: RethinkWarmStart) -> str:
    """Several workings of one sum, joined by ";", and the answer that the last one gives."""
    fewest, most = plan.workings
    count = int(rng.integers(fewest, most + 1))
    solutions = [arithmetic.worked_solution(question, rng, plan.habits) for _ in range(count)]
    workings, answers = zip(*(s.split(arithmetic.ANSWER_MARK) for s in solutions), strict=True)
    return ";".join(workings) + arithmetic.ANSWER_MARK + answers[-1]


def _game(rng: np.random.Generator, leap: float) -> list[tuple[list[str], bool]]:
    """A game (environments/guess.py) of a pupil who mostly counts: from 1 on, by one in the told direction.

    A share `leap` of the guesses is any number that is left. Such guesses win more games, so there is
    something to learn: counting finds 4 numbers of 9 in 4 turns, and halving what is left finds all.
    """
    number, low, high, guess = int(rng.integers(1, 10)), 1, 9, 0
    parts: list[tuple[list[str], bool]] = []
    for _ in range(4):
        if rng.random() < leap:
            guess = int(rng.integers(low, high + 1))
        else:
            guess += 1 if low == guess + 1 else -1
        parts.append(([*f"{guess};"], True))
        if guess == number:
            break
        parts.append((["<" if number < guess else ">"], False))
        low, high = (low, guess - 1) if number < guess else (guess + 1, high)
    return parts


def lr_at(step: int, plan: WarmStart) -> float:
    """Linear warm-up, then cosine to a tenth of the peak at the last step."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: Any, plan: WarmStart, seed: int, log: Callable[[str], object]) -> None:
    """Runs the warm start in place.

    Attention needs no mask: padding stands on the right and is never a target.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step, (inputs, labels) in enumerate(islice(batches(plan, seed), plan.steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, plan)
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        wanted = labels != IGNORE
        loss = nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.grad_clip)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == plan.steps:
            log(f"warm start: step {step + 1}/{plan.steps}, loss {loss.item():.3f}")
    model.eval()
