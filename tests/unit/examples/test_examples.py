"""Every example runs, end to end in this process, and the commands in its docstring compose."""

from __future__ import annotations

import importlib
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from gspo_dist.cli.compose import run_config
from gspo_dist.config import RewardConfig
from gspo_dist.examples import batched_reward, digit_reward, make_sums, squared, word_game
from gspo_dist.objectives import Denominators, Segments
from gspo_dist.rewards.pool import LocalRewardPool
from gspo_dist.types import Completion, Prompt
from tests.unit.trainer.conftest import model, reward_file  # noqa: F401 - fixtures are found by name
from tests.unit.trainer.small import config, go

EXAMPLES = sorted(path.stem for path in Path(squared.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_documented_commands_compose(name):
    documentation = importlib.import_module(f"gspo_dist.examples.{name}").__doc__
    lines = documentation.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    gspo train ")]
    assert commands
    for _, _, *overrides in commands:
        run_config(overrides)


# --- objective ---


def test_squared_by_hand():
    """Log ratios .2 and .4, so log s = .3. A = 2: the loss is -2 (.2 + .4) / 2 + strength / 2 .09."""
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    logprobs = (old + torch.tensor([0.2, 0.4])).requires_grad_()
    segments, counts = Segments(torch.tensor([0, 0]), 1), Denominators(1, 2, 2)
    result = squared.SQUARED.loss(logprobs, old, torch.full_like(old, 2.0), segments, counts)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-0.6 + 0.045, rel=1e-6)
    assert logprobs.grad.tolist() == pytest.approx([-1.0 + 0.15] * 2, rel=1e-6)


@pytest.mark.slow
def test_a_run_trains_with_the_objective_and_its_parameter(model, reward_file, tmp_path):  # noqa: F811
    """The first mini-batch is at ratio 1, where the trust region has neither value nor gradient.

    So both runs are at the same policy in the second, and their losses differ by strength / 2 (log s)^2.
    """
    (tmp_path / "first.py").write_text(
        "def token(prompt, completion):\n    return float(completion.token_ids[0])\n"
    )

    def last_row(strength):
        _, rows = go(
            config(
                model,
                reward_file,
                tmp_path / str(strength),
                "objective=custom",
                "objective.name=gspo_dist.examples.squared:SQUARED",
                f"+objective.params.strength={strength}",
                f"reward.function='{tmp_path}/first.py:token'",
                "data.heldout=null",
                "steps=1",
            )
        )
        return rows[-1]

    without, with_it = last_row(0.0), last_row(8.0)
    assert (
        without["objective/mini_batch_1/approx_kl_k3"] == with_it["objective/mini_batch_1/approx_kl_k3"] > 0
    )
    square = without["objective/log_ratio_mean"] ** 2 + without["objective/log_ratio_std"] ** 2
    assert with_it["objective/loss"] - without["objective/loss"] == pytest.approx(8.0 / 2 * square, rel=1e-4)


# --- reward ---


def completion(text):
    n = len(text)
    return Completion(
        token_ids=np.arange(n),
        loss_mask=np.ones(n, bool),
        logprobs=np.full(n, -1.0, np.float32),
        policy_versions=np.zeros(n, np.int32),
        finish_reason="stop",
        text=text,
    )


@pytest.mark.parametrize(
    ("text", "reward", "parts"),
    [
        ("12,09#92", 1.0, (1.0, 1.0, 1.0)),
        ("12,08#82", 0.25, (1.0, 0.0, 1.0)),
        ("12,08#81", 0.0, (1.0, 0.0, 0.0)),
        ("#92 ", 0.0, (0.0, 0.0, 0.0)),
        ("", 0.0, (0.0, 0.0, 0.0)),
    ],
)
def test_the_reward_and_its_parts_by_hand(text, reward, parts):
    prompt = Prompt("p", (1,), "57+35=", answer="92")
    got, named = digit_reward.score(prompt, completion(text), last_digit=0.25)
    assert got == reward
    assert tuple(named[name] for name in ("answered", "right", "last_digit_right")) == parts


@pytest.mark.slow
def test_a_run_logs_the_parts_of_the_reward(model, reward_file, tmp_path):  # noqa: F811
    _, rows = go(
        config(
            model,
            reward_file,
            tmp_path / "run",
            "reward.function=gspo_dist.examples.digit_reward:score",
            "+reward.options.last_digit=0.5",
            "data.heldout=null",
            "steps=1",
        )
    )
    row = rows[-1]
    assert row["rollout/reward_mean"] == pytest.approx(
        row["reward/right"] + 0.5 * (row["reward/last_digit_right"] - row["reward/right"]), abs=1e-9
    )
    assert 0.0 <= row["reward/right"] <= row["reward/last_digit_right"] <= row["reward/answered"] <= 1.0


# --- data ---


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_files_hold_distinct_questions_with_their_answers(tmp_path):
    make_sums.main(["--to", str(tmp_path), "--train", "30", "--heldout", "10", "--digits", "1"])
    train, heldout = lines(tmp_path / "train.jsonl"), lines(tmp_path / "heldout.jsonl")
    assert (len(train), len(heldout)) == (30, 10)
    assert len({r["prompt"] for r in train + heldout}) == 40
    for r in train + heldout:
        left, right = r["prompt"].rstrip("=").split("+")
        assert r["answer"] == str(int(left) + int(right))
    with pytest.raises(ValueError, match=r"1-digit sums give 81 questions: got 80 \+ 2"):
        make_sums.main(["--to", str(tmp_path), "--train", "80", "--heldout", "2", "--digits", "1"])


@pytest.mark.slow
def test_a_run_reads_the_plain_questions(model, reward_file, tmp_path):  # noqa: F811
    make_sums.main(["--to", str(tmp_path), "--train", "12", "--heldout", "4"])
    files = [f"data.train={tmp_path}/train.jsonl", f"data.heldout={tmp_path}/heldout.jsonl"]
    _, rows = go(config(model, reward_file, tmp_path / "run", *files, "evaluation.prompts=4", "steps=1"))
    assert rows[-1]["learner/policy_version"] == 2.0
    assert math.isfinite(rows[-1]["objective/loss"])


def test_a_run_puts_chat_messages_through_the_template(model, reward_file, tmp_path):  # noqa: F811
    """The last sample's prompt is the user's message as the template of this model writes it."""
    instruct = tmp_path / "instruct"
    instruct.mkdir()
    for file in model.iterdir():
        (instruct / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(instruct)
    make_sums.main(["--to", str(tmp_path), "--train", "12", "--heldout", "4", "--chat"])
    assert [m["role"] for m in lines(tmp_path / "train.jsonl")[0]["prompt"]] == ["system", "user"]
    files = [f"data.train={tmp_path}/train.jsonl", f"data.heldout={tmp_path}/heldout.jsonl"]
    go(config(instruct, reward_file, tmp_path / "run", *files, "evaluation.prompts=4", "steps=1"))
    sample = lines(tmp_path / "run" / "samples.jsonl")[-1]
    questions = {f"<{r['prompt'][1]['content']}>" for r in lines(tmp_path / "train.jsonl")}
    assert sample["prompt"] in questions


def test_the_readmes_objective_is_the_examples() -> None:
    """Its code block runs as it stands, and gives the loss of squared.py."""
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (block,) = [b for b in text.split("```python\n")[1:] if "my_objectives.py" in b]
    names: dict[str, object] = {}
    exec(block.split("```")[0], names)
    theirs, ours = names["SQUARED"], squared.SQUARED
    assert theirs.spec == ours.spec
    lengths = [2, 3]
    segments = Segments(torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)), 2)
    logprobs, old = -torch.arange(1.0, 6.0), -torch.arange(2.0, 7.0) / 2
    args = (logprobs, old, torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]), segments)
    assert torch.equal(theirs.surrogate(*args, strength=0.5).loss, squared.squared(*args, strength=0.5).loss)


# --- rewards of every kind ---


@pytest.mark.parametrize("name", ["near", "near_async"])
def test_rewards_a_list_at_a_time_and_async(name):
    """Off by 5 of width 10: exp(-0.5)."""
    function = f"{batched_reward.__name__}:{name}"
    pool = LocalRewardPool(RewardConfig(function=function))
    ones = np.ones(1)
    texts = ["5+7=12#12", "#17", "12", "#1x"]
    items = [
        (i, Prompt("p", (1,), "q", "12"), Completion(ones, ones, ones, ones, "stop", text))
        for i, text in enumerate(texts)
    ]
    try:
        verdicts = pool.judge(items)
    finally:
        pool.close()
    assert [verdict.reward for verdict in verdicts] == pytest.approx([1.0, math.exp(-0.5), 0.0, 0.0])
    assert [verdict.parts["answered"] for verdict in verdicts] == [1.0, 1.0, 0.0, 0.0]


# --- environment ---


def test_letters_by_hand():
    game = word_game.Letters("abcd")
    game.reset(Prompt("p", (3, 4), "q"), 0)  # 7 % 4: d
    told = [game.step(turn) for turn in ("no", "a", "b c", "d")]
    assert [(o.text, o.reward, o.done) for o in told] == [
        ("?", 0.0, False),
        (".", 0.0, False),
        ("!", 0.1, False),
        ("", 1.0, True),
    ]
    again = word_game.Letters("abcd")
    again.load_state_dict(game.state_dict())
    assert again.step("d").done
