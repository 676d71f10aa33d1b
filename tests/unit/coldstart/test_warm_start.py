"""Laws of the cold-start corpus and of the supervised training."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from gspo_dist.coldstart.model import build_model
from gspo_dist.coldstart.recipes import RECIPES, Shape, WarmStart
from gspo_dist.coldstart.tokenizer import EOS_ID, PAD_ID, VOCABULARY
from gspo_dist.coldstart.warm_start import IGNORE, batches, lr_at, train
from gspo_dist.data.arithmetic import ANSWER_PATTERN, Addition, Habits, is_heldout

TINY = Shape(layers=1, hidden=32, heads=2, kv_heads=1, head_dim=32, experts=4, top_k=2, expert_hidden=32)
PLAN = WarmStart(steps=40, batch=16, lr=1e-2, warmup=5, digits=2, habits=Habits())


def texts(plan: WarmStart, count: int, seed: int = 0):
    """(question, what the labels teach) of every row of `count` batches."""
    for inputs, labels in islice(batches(plan, seed), count):
        for row, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
            prompt = "".join(VOCABULARY[i] for i in row[: row.index(VOCABULARY.index("=")) + 1])
            yield prompt, [i for i in targets if i != IGNORE]


def test_labels_are_the_next_inputs_and_end_the_sequence():
    for inputs, labels in islice(batches(PLAN, 0), 5):
        for row, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
            taught = [t for t, label in enumerate(targets) if label != IGNORE]
            assert VOCABULARY[row[taught[0]]] == "=", "the first token learnt follows the question"
            assert taught == list(range(taught[0], taught[-1] + 1))
            assert [row[t + 1] for t in taught[:-1]] == [targets[t] for t in taught[:-1]]
            assert targets[taught[-1]] == EOS_ID
            assert set(row[taught[-1] + 1 :]) <= {PAD_ID}


def test_a_clean_corpus_teaches_right_answers_only():
    for prompt, targets in texts(PLAN, 20):
        solution = "".join(VOCABULARY[i] for i in targets[:-1])
        left, right = prompt[:-1].split("+")
        assert int(re.search(ANSWER_PATTERN, solution).group(1)) == int(left) + int(right)


def test_the_corpus_holds_no_heldout_question():
    seen = {prompt for prompt, _ in texts(replace(PLAN, digits=2), 150)}
    assert len(seen) > 1000
    for prompt in seen:
        left, right = prompt[:-1].split("+")
        assert not is_heldout(Addition(int(left), int(right)), PLAN.heldout_share)


def test_the_quickstart_corpus_is_right_about_one_time_in_three():
    plan = WarmStart()
    right = []
    for prompt, targets in texts(plan, 40):
        left, right_ = prompt[:-1].split("+")
        solution = "".join(VOCABULARY[i] for i in targets[:-1])
        right.append(int(solution.rsplit("#")[1]) == int(left) + int(right_))
    # No slip in three columns, and every carry kept: carries into the two inner columns come with
    # probability 0.45 each, nearly independently.
    expected = (1 - plan.habits.slip) ** 3 * (1 - 0.47 * plan.habits.forget_carry) ** 2
    assert abs(sum(right) / len(right) - expected) < 0.04


def test_learning_rate_rises_to_the_peak_and_falls_to_a_tenth():
    plan = WarmStart(steps=100, warmup=10, lr=1.0)
    assert lr_at(0, plan) == pytest.approx(0.1)
    assert lr_at(10, plan) == pytest.approx(1.0)
    assert lr_at(55, plan) == pytest.approx(0.55)
    assert lr_at(100, plan) == pytest.approx(0.1)


def losses(seed: int) -> tuple[float, float, torch.Tensor]:
    model = build_model(TINY, seed)
    inputs, labels = next(batches(replace(PLAN, batch=128), seed + 100))

    def loss() -> float:
        with torch.no_grad():
            logits = model(input_ids=inputs).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE
        ).item()

    before = loss()
    train(model, PLAN, seed, lambda _: None)
    return before, loss(), torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_is_repeatable_and_teaches_the_format():
    before, after, weights = losses(0)
    # Uniform over 64 tokens is log 64 = 4.16; knowing only which ones are digits would be log 10 = 2.30.
    assert before > 4.0
    assert after < 2.3
    assert torch.equal(weights, losses(0)[2])
    assert not torch.equal(weights, losses(1)[2])


def test_making_a_model_leaves_the_callers_random_state_alone():
    state = torch.random.get_rng_state()
    train(build_model(TINY, 3), replace(PLAN, steps=1), 3, lambda _: None)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("recipe", "call"), [("calculator", r"^(\d+\+\d+=)$"), ("python", r"^print\((\d+\+\d+)\);$")]
)
def test_calls_are_taught_and_their_results_are_not(recipe, call):
    plan = replace(RECIPES[recipe].warm_start, digits=2, batch=64)
    calls = 0
    for inputs, labels in islice(batches(plan, 0), 5):
        for row, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
            question = "".join(VOCABULARY[i] for i in row[: row.index(VOCABULARY.index("=")) + 1])
            taught = "".join(VOCABULARY[i] for i in targets if i != IGNORE).removesuffix("<eos>")
            first, _, answer = taught.partition("#")
            found = re.match(call, first)
            calls += found is not None
            if found:
                left, right = question[:-1].split("+")
                assert found.group(1).removesuffix("=") == question[:-1]
                assert int(answer) == int(left) + int(right)
            else:
                assert "=" not in first
                assert ";" not in first
    assert 0.08 < calls / 320 < 0.22


def test_games_are_of_a_pupil_who_counts_with_the_answers_untaught():
    """Mostly it goes on by one, never against what it was told, and wins what such a pupil wins."""
    plan = RECIPES["guess"].warm_start
    moves, games, won = [], 0, 0
    for inputs, labels in islice(batches(plan, 0), 5):
        for row, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
            taught = "".join(VOCABULARY[i] for i in targets if i != IGNORE)
            assert re.fullmatch(r"([1-9];){1,4}", taught)
            said = "".join(VOCABULARY[i] for i in row[row.index(VOCABULARY.index("=")) + 1 :] if i)
            assert re.fullmatch(r"[1-9](;[<>][1-9])*(;[<>]?)?", said)  # the last token is only a target
            guesses, answers = [int(g) for g in re.findall(r"\d", said)], re.findall("[<>]", said)
            for before, after, answer in zip(guesses, guesses[1:], answers, strict=False):
                assert (after > before) == (answer == ">")
                moves.append(abs(after - before))
            games, won = games + 1, won + said[-1].isdigit()
    assert 0.6 < moves.count(1) / len(moves) < 0.75  # 0.6 of them count, and some leaps are of one
    assert won / games == pytest.approx(0.593, abs=0.08)  # 4/9 by counting alone, 1 by halving what is left


def test_solutions_that_work_a_sum_out_again_answer_with_the_last_working():
    """Four to twelve workings, each of three columns, as often one number as another: 8 on average, with a
    spread of sqrt((9^2 - 1) / 12) = 2.58. Each forgets carries by itself, and only the last is answered."""
    plan = RECIPES["rethink"].warm_start
    counts, right, told_apart = [], 0, 0
    for _, labels in islice(batches(plan, 0), 40):
        for targets in labels.tolist():
            *text, last = [VOCABULARY[i] for i in targets if i != IGNORE]
            assert last == "<eos>"
            workings, _, answer = "".join(text).partition("#")
            columns = [w.split(",") for w in workings.split(";")]
            assert {len(c) for c in columns} == {3}
            assert all(re.fullmatch(r"\d\+\d(\+1)?=\d\d", c) for working in columns for c in working)
            sums = [[c.split("=")[1] for c in working] for working in columns]
            answers = [int(s[2] + s[1][1] + s[0][1]) for s in sums]
            assert int(answer) == answers[-1]
            counts.append(len(columns))
            terms = [c.split("=")[0].split("+") for c in columns[0]]
            truth = sum((int(t[0]) + int(t[1])) * 10**i for i, t in enumerate(terms))
            right += int(answer) == truth
            told_apart += len(set(answers)) > 1
    assert (min(counts), max(counts)) == (4, 12)
    assert np.mean(counts) == pytest.approx(8.0, abs=0.3)
    assert np.std(counts) == pytest.approx(2.58, abs=0.2)
    assert 0.4 < right / len(counts) < 0.7
    assert told_apart / len(counts) > 0.7
