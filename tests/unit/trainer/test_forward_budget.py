"""A whole run: no pass without gradients holds more than its own budget, and training is as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gspo_dist.trainer.run import Run
from tests.unit.trainer.small import config, go

RUNS = {
    "grpo_r2": ["objective=grpo_r2", "objective.kl_coef=0.1"],
    "gspo": [
        *("objective=gspo", "objective.guard.action=recentre", "objective.guard.estimator=subset"),
        "objective.guard.subset_fraction=1.0",
    ],
    "m2po": ["objective=m2po", "objective.routing_replay=r3"],
}
LONGEST = 24


def watched(seen: dict[str, list[list[int]]]) -> Callable[[Run], None]:
    """Notes the tokens of each pass, call by call."""

    def watch(run: Run) -> None:
        forward, update = run.learner.logprobs, run.learner.forward_backward

        def logprobs(micro_batches, **options):
            seen["forward"].append([b.num_tokens for batches in micro_batches for b in batches])
            return forward(micro_batches, **options)

        def forward_backward(mini, spec):
            seen["update"].append([b.num_tokens for b in mini.batches()])
            return update(mini, spec)

        run.learner.logprobs, run.learner.forward_backward = logprobs, forward_backward

    return watch


@pytest.mark.parametrize("name", RUNS)
def test_every_pass_without_gradients_follows_its_own_budget(name, model, reward_file, tmp_path):
    logged, calls = {}, {}
    for budget in ("null", "1000", str(LONGEST)):
        calls[budget] = {"forward": [], "update": []}
        settings = config(
            *(model, reward_file, tmp_path / budget, *RUNS[name]),
            *("steps=1", "learner.token_budget=64", f"learner.forward_token_budget={budget}"),
            *("flips.every=1", "flips.sequences=8", "checkpoint.save_last=true", "evaluation.prompts=1"),
            # Steps too small for AdamW to make much of a gradient that is nothing but rounding.
            *(f"reward.function='{reward_file}:spread'", "learner.optimizer.lr=1e-7"),
        )
        _, rows = go(settings, watched(calls[budget]))
        logged[budget] = rows[-1]
    packed, wide, narrow = (calls[b]["forward"] for b in ("null", "1000", str(LONGEST)))
    assert len(packed) == len(wide) == len(narrow) > 5
    assert all(len(call) == 1 for call in wide)  # one pass each, of whatever there is to compute
    assert max(call[0] for call in wide) > 64
    assert max(max(call) for call in narrow) <= LONGEST < max(max(call) for call in packed) <= 64
    updates = [c["update"] for c in calls.values()]
    assert updates[0] == updates[1] == updates[2]
    assert all(len(call) > 1 for call in updates[0])
    same = ["objective/loss", "learner/grad_norm", "routing/update/flip_fraction"]
    for key in same:
        for budget in ("1000", str(LONGEST)):
            assert logged[budget][key] == pytest.approx(logged["null"][key], rel=1e-3, abs=1e-6), key
    assert logged["null"]["learner/grad_norm"] > 0.01
    if name == "grpo_r2":
        assert logged["1000"]["old_logprobs/micro_batches"] == 4.0  # two mini-batches, policy and reference
        assert logged["null"]["old_logprobs/micro_batches"] == 2 * sum(map(len, updates[0])) > 4
    else:
        assert "old_logprobs/micro_batches" not in logged["1000"]
