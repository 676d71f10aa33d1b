"""The whole loop in one process: a real HF policy, the eager learner, the reference engine; no Ray."""

from __future__ import annotations

import contextlib
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gspo_dist.metrics.jsonl import read_jsonl
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.trainer import loop
from gspo_dist.trainer.clock import StepClock
from gspo_dist.trainer.episode_page import EPISODES
from gspo_dist.trainer.heldout import EVALUATION_IDS
from gspo_dist.trainer.loop import run_step, start, train
from gspo_dist.trainer.publisher import PROBE_SEQUENCES
from gspo_dist.trainer.setup.build import build
from gspo_dist.trainer.sharing import SharedGpus
from gspo_dist.trainer.step_metrics import StepMetrics
from gspo_dist.types import SamplingSpec
from gspo_dist.weights.verify import WeightSyncError
from tests.unit.trainer.small import config, go, rollout, values


def test_a_start_samples_one_completion_per_probe_prompt_without_routes_and_publishes():
    """Routes of a 30B completion are megabytes that no probe looks at. A resumed run is not evaluated."""
    first, second = rollout(0), rollout(1)
    asked, published = [], []

    def generate(prompts, spec, ids):
        asked.append((prompts, spec, list(ids)))
        return [[first.completion], [second.completion]]

    start(
        SimpleNamespace(
            sampling=SamplingSpec(n=4, max_tokens=8, seed=7, record_routing=True),
            probe_prompts=[first.prompt, second.prompt],
            pool=SimpleNamespace(generate=generate),
            shared=SharedGpus(None, None, colocated=False),
            collector=SimpleNamespace(pause=lambda: None),
            publisher=SimpleNamespace(publish=published.append),
            clock=StepClock(),
            completed_steps=2,
            suites=SimpleNamespace(start=lambda completed: {}),
            heldout=[first.prompt],
        )
    )
    assert asked == [([first.prompt, second.prompt], SamplingSpec(n=1, max_tokens=8, seed=7), [0, 1])]
    ((one, two),) = published
    assert [tokens.tolist() for tokens, _ in (one, two)] == [[1, 2, 5, 6, 7]] * 2


class Parts:
    """A run whose parts write down what they are asked, in order."""

    def __init__(self, monkeypatch, tmp_path, *, due=True, colocated=False, **told) -> None:
        self.said = said = []

        def note(name, answer=None):
            def ask(*given):
                said.append((name, *given))
                return dict(answer) if isinstance(answer, dict) else answer

            return ask

        @contextlib.contextmanager
        def block(name, *given):
            said.append((f"{name} begins", *given))
            yield
            said.append((f"{name} ends",))

        self.run = SimpleNamespace(
            config=SimpleNamespace(steps=9, cluster=SimpleNamespace(colocated=colocated)),
            clock=SimpleNamespace(restart=note("restart"), metrics=lambda: {"time/step_s": 2.0}),
            shared=SimpleNamespace(
                to_engines=note("to engines"),
                to_learner=note("to learner"),
                to_publication=note("to publication"),
                take_metrics=note("take hand-overs", {"time/switch_s": 0.5}),
            ),
            profile=lambda step: block("profile", step),
            suites=SimpleNamespace(
                finish=note("finish suites", {"eval/late/accuracy": 0.25}),
                after_step=note("begin suites", {"eval/suites_begun": 1.0}),
                beside_learner=lambda: block("suites"),
            ),
            collector=SimpleNamespace(
                pause=note("pause"),
                take_speed=lambda: (40, 0.5),
                metrics=lambda: {"pipeline/ticks": 3.0},
                take_events=lambda: ["c"],
                beside_learner=lambda: block("engines"),
            ),
            pool=SimpleNamespace(take_events=lambda: ["a"]),
            rewards=SimpleNamespace(take_events=lambda: ["b"]),
            health=SimpleNamespace(note=note("health"), metrics=lambda: {"health/deaths": 3.0}),
            sinks=SimpleNamespace(samples=note("samples"), log=note("log")),
            run_dir=tmp_path,
            tokens_seen=100,
            completed_steps=3,
            started=100.0,
            learner=SimpleNamespace(policy_version=7),
            last_checkpoint=None,
            unfinished_save=None,
        )
        self.rollouts = [rollout(i, tokens=range(3 + i)) for i in range(PROBE_SEQUENCES + 2)]
        self.metrics = StepMetrics(
            {"reward/mean": 0.5}, {}, {}, {}, {}, samples=[{"text": "x"}], episodes=[{"tokens": ["y"]}]
        )
        for name, answer in {
            "collect": self.rollouts,
            "learn": self.metrics,
            "publish": {"sync/bytes": 8.0},
            "evaluation_due": due,
            "evaluate": {"eval/heldout/accuracy": 0.75},
            "commit": None,
            "checkpoint_due": due,
            "save": None,
            "save_hf": None,
        }.items():
            if name not in told:
                monkeypatch.setattr(loop, name, note(name, answer))


@pytest.mark.parametrize("due", [True, False])
def test_a_step_in_its_order(monkeypatch, tmp_path, due):
    """Six rollouts of 3 to 8 tokens, 33 in all. Three steps were done before; 30 s for two are 15 each."""
    parts = Parts(monkeypatch, tmp_path, due=due)
    run, rollouts = parts.run, parts.rollouts
    speeds = []

    def speed_metrics(*given):
        speeds.append(given)
        return {"perf/tokens": 1.0}

    monkeypatch.setattr(loop.step_metrics, "speed_metrics", speed_metrics)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: 130.0))
    run_step(run, 5)
    tokens = sum(len(r.completion) for r in rollouts)
    assert speeds == [({"time/step_s": 2.0}, rollouts, 100 + tokens, (40, 0.5))]
    row = {
        "reward/mean": 0.5,
        "sync/bytes": 8.0,
        "pipeline/ticks": 3.0,
        "perf/tokens": 1.0,
        "time/switch_s": 0.5,
        "eval/late/accuracy": 0.25,
        "eval/suites_begun": 1.0,
        "health/deaths": 3.0,
        "time/left_s": 15.0 * 4,
    }
    assert parts.said == [
        ("restart",),
        ("to engines",),
        ("collect", run, 5),
        ("profile begins", 5),
        ("learn", run, rollouts, 5),
        ("finish suites",),
        ("publish", run, [(r.prompt, r.completion) for r in rollouts[:PROBE_SEQUENCES]]),
        ("profile ends",),
        ("take hand-overs",),
        ("evaluation_due", run, 5),
        *([("evaluate", run)] if due else []),
        ("begin suites", 5),
        ("health", 5, ["a", "b", "c"]),
        ("samples", 5, [{"text": "x"}]),
        ("log", 5, row | ({"eval/heldout/accuracy": 0.75} if due else {})),
        ("commit", run),
        ("checkpoint_due", run, 5),
        *([("save", run, 5)] if due else []),
        ("save_hf", run, 5),
    ]
    assert run.tokens_seen == 100 + tokens
    assert read_jsonl(tmp_path / EPISODES) == [{"step": 5, "tokens": ["y"]}]


def test_while_the_learner_works_engines_sample_on_or_lend_it_their_gpus(monkeypatch, tmp_path):
    own, shared = Parts(monkeypatch, tmp_path), Parts(monkeypatch, tmp_path, colocated=True)
    for parts in (own, shared):
        with loop.learning(parts.run):
            parts.said.append(("learns",))
    beside = ["engines begins", "suites begins", "learns", "suites ends", "engines ends"]
    assert [name for (name,) in own.said] == beside
    assert [name for (name,) in shared.said] == ["pause", "to learner", "learns", "to publication"]


def test_a_publication_finds_the_engines_empty(monkeypatch, tmp_path):
    parts = Parts(monkeypatch, tmp_path, publish="as it is")
    run = parts.run
    run.clock = StepClock()
    run.publisher = SimpleNamespace(
        publish=lambda probe: parts.said.append(("publish", len(probe))) or {"sync/bytes": 8.0}
    )
    assert loop.publish(run, [(r.prompt, r.completion) for r in parts.rollouts[:2]]) == {"sync/bytes": 8.0}
    assert parts.said == [("pause",), ("publish", 2)]
    assert set(run.clock.spans) == {"sync"}


@pytest.mark.parametrize(("done", "row"), [(0, {"eval/heldout/accuracy": 0.75}), (3, {})])
def test_what_a_start_measures_is_logged_under_step_0(monkeypatch, tmp_path, done, row):
    """A run that begins is evaluated. One that goes on was, and its suites log nothing of their own there."""
    parts = Parts(monkeypatch, tmp_path)
    run = parts.run
    run.completed_steps, run.heldout, run.probe_prompts = done, [parts.rollouts[0].prompt], []
    run.sampling = SamplingSpec(n=4, max_tokens=8, seed=7, record_routing=True, candidates=2)
    run.pool.generate = lambda prompts, spec, ids: parts.said.append(("generate", spec, list(ids))) or []
    run.suites.start = lambda completed: parts.said.append(("suites", completed)) or {"eval/a": 0.5}
    start(run)
    assert parts.said == [
        ("to engines",),
        ("generate", SamplingSpec(n=1, max_tokens=8, seed=7), []),
        ("publish", run, []),
        ("take hand-overs",),  # the start's, which are no step's
        ("suites", done),
        *([("evaluate", run), ("log", 0, {"eval/a": 0.5} | row)] if not done else []),
    ]


def test_a_failure_says_where_the_run_was_and_what_is_safe(monkeypatch, tmp_path):
    parts = Parts(monkeypatch, tmp_path)
    monkeypatch.setattr(loop, "what_is_saved", lambda run: "nothing is saved")
    monkeypatch.setattr(loop, "collect", lambda run, step: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        run_step(parts.run, 5)
    assert error.value.__notes__ == ["at step 5, policy version 7; nothing is saved"]


def test_a_run_goes_from_the_step_after_the_last_one_to_its_last(monkeypatch, tmp_path):
    parts = Parts(monkeypatch, tmp_path)
    for name, answer in {"start": None, "run_step": None, "finish": {"steps": 9}}.items():
        monkeypatch.setattr(loop, name, lambda *given, n=name, a=answer: parts.said.append((n, *given)) or a)
    assert train(parts.run) == {"steps": 9}
    steps = [("run_step", parts.run, step) for step in range(4, 10)]
    assert parts.said == [("start", parts.run), *steps, ("finish", parts.run)]


class Told(dict):
    """Metrics that name who gave them, and of what."""

    def __or__(self, other):
        return Told({**self, **other})


@pytest.mark.parametrize("recomputed", [False, True])
def test_learning_in_its_order(monkeypatch, recomputed):
    """Two mini-batches. Only the first one's policy is the one that old log-probs were recomputed with."""
    said = []

    def note(name, answer=None):
        def ask(*given, **named):
            said.append((name, *given, *named.items()))
            return answer(*given) if callable(answer) else answer

        return ask

    def metrics(name):
        return lambda *given, **named: Told({name: (*given, *named.items())})

    run = SimpleNamespace(
        config=SimpleNamespace(
            mini_batches=2,
            objective=SimpleNamespace(routing_replay="r2"),
            rollout="rollout",
            learner=SimpleNamespace(forward_token_budget=64, token_budget=128),
            logger=SimpleNamespace(samples_per_step=3),
        ),
        clock=StepClock(),
        learner=SimpleNamespace(
            policy_version=7,
            forward_backward=note("forward_backward", lambda batch, spec: f"stats of {batch}"),
            optim_step=note("optim_step", lambda: f"update {len(said)}"),
        ),
        old_logprobs=SimpleNamespace(
            recomputed=recomputed,
            prepare=note("old log-probs", ["m0+", "m1+"]),
            with_routes=note("routes", lambda mini, trained: f"{mini} routed"),
            metrics=metrics("old_logprobs"),
        ),
        guard=SimpleNamespace(
            loss_spec=note("loss", lambda mini, index: f"loss {index}"),
            observe=note("observe"),
            metrics=metrics("guard"),
        ),
        flips=SimpleNamespace(
            begin=note("flips begin"),
            after_mini_batch=note("flips"),
            finish_step=note("flips end"),
            metrics=metrics("flips"),
        ),
        publisher=SimpleNamespace(probed_offset="probe"),
        collector=SimpleNamespace(episode_rows=lambda *given: ["episodes", *given]),
    )
    selected = SimpleNamespace(trained="trained", advantages="A", given="given", metrics={"selection": 1})
    monkeypatch.setattr(loop, "prepare", note("prepare", (selected, ["m0", "m1"])))
    monkeypatch.setattr(loop, "learning", lambda run: contextlib.nullcontext())
    monkeypatch.setattr(loop, "with_second_moment_cut", note("cut", lambda spec, *rest: f"{spec} cut"))
    monkeypatch.setattr(loop, "count_skips", note("skips"))
    for name in ("rollout", "length", "packing", "update", "replay"):
        monkeypatch.setattr(loop.step_metrics, f"{name}_metrics", metrics(name))
    monkeypatch.setattr(loop.step_metrics, "sample_rows", lambda *given: ["samples", *given])

    found = loop.learn(run, "rollouts", 5)
    updates = [f"update {n}" for n, (name, *_) in enumerate(said, start=1) if name == "optim_step"]
    each = [
        [
            ("loss", f"m{i}+", i, ("recomputed", recomputed)),
            ("routes", f"m{i}+", "trained"),
            ("cut", f"loss {i}", f"m{i}+ routed", run.learner, 64, ("unmoved", recomputed and i == 0)),
            ("forward_backward", f"m{i}+ routed", f"loss {i} cut"),
            ("optim_step",),
            ("skips", run, updates[i]),
            ("observe", f"stats of m{i}+ routed", i, "probe"),
            ("flips", i),
        ]
        for i in (0, 1)
    ]
    assert said == [
        ("prepare", run, "rollouts", 5),
        ("old log-probs", ["m0", "m1"], "trained", 5),
        ("flips begin", 5, ["m0+", "m1+"], "trained"),
        *each[0],
        *each[1],
        ("flips end",),
    ]
    assert set(run.clock.spans) == {"pack", "old_logprobs", "flips", "attach_routes", "update"}
    stats = ["stats of m0+ routed", "stats of m1+ routed"]
    assert found == StepMetrics(
        rollouts={
            "rollout": ("rollouts", "A", 7, 2),
            "selection": 1,
            "length": ("rollout", 5),
        },
        packing={"packing": (["m0+", "m1+"], 128)},
        update={"update": (stats, updates)},
        old_logprobs={"old_logprobs": (), "guard": ()},
        routing={"flips": (), "replay": ("r2", ["m0+", "m1+"], "trained", ("recomputed", recomputed))},
        samples=["samples", "rollouts", "A", 3],
        episodes=["episodes", "trained", "given", 3],
    )


def test_what_trains_is_chosen_and_packed_as_the_run_says(monkeypatch, tmp_path):
    """The draws of a step take its index: step 5 of seed 11 shuffles by (11, 4)."""
    said = []
    selected = SimpleNamespace(trained="trained", given="given")
    monkeypatch.setattr(loop, "select", lambda *given, **named: said.append((given, named)) or selected)
    monkeypatch.setattr(loop, "pack", lambda *given, **named: said.append((given, named)) or ["m0"])
    rollout_config = SimpleNamespace(completion_tokens=lambda step: 10 * step, max_completion_tokens=99)
    run = SimpleNamespace(
        config=SimpleNamespace(
            objective="objective",
            rollout=rollout_config,
            mini_batches=2,
            learner=SimpleNamespace(data_parallel=3, token_budget=128),
            seed=11,
        ),
        objective=SimpleNamespace(spec=SimpleNamespace(advantage="group_std")),
    )
    assert loop.prepare(run, ["r0"], 5) == (selected, ["m0"])
    assert said == [
        (
            (["r0"], "objective", "group_std"),
            {"max_tokens": 50, "mini_batches": 2, "replicas": 3},
        ),
        (
            ("trained", "given"),
            {
                "replicas": 3,
                "token_budget": 128,
                "mini_batches": 2,
                "max_completion_length": 99,
                "seed": (11, 4),
            },
        ),
    ]


@pytest.mark.slow
def test_reward_rises_and_the_run_folder_is_whole(model, reward_file, tmp_path):
    summary, rows = go(config(model, reward_file, tmp_path / "run", "steps=12"), pictures=True)
    rewards = [r["rollout/reward_mean"] for r in rows if "rollout/reward_mean" in r]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:2])
    assert summary["policy_version"] == 24
    folder = tmp_path / "run"
    for name in (
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "curves.png",
        "flips_update.png",
    ):
        assert (folder / name).stat().st_size > 0
    assert (
        json.loads((folder / "summary.json").read_text())["heldout_after"]
        == rows[-1]["eval/heldout/accuracy"]
    )
    assert (folder / "checkpoints" / "step-000012" / "manifest.json").is_file()


@pytest.mark.slow
def test_on_policy_first_mini_batch_has_ratio_one_and_no_clipping(model, reward_file, tmp_path):
    """In fp32 the engine's log-probs are the learner's: the first mini-batch's ratio is 1 to rounding."""
    _, rows = go(config(model, reward_file, tmp_path / "run", "steps=5"))
    for row in rows[1:]:
        assert row["objective/mini_batch_0/clip_fraction"] == 0.0
        assert row["mismatch/abs_log_ratio_max"] < 1e-5
        assert abs(row["guard/offset_clip_widths"]) < 0.05
    assert any(
        row["objective/mini_batch_1/clip_fraction"] > 0.0 for row in rows[1:]
    )  # the policy has moved by then


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        "grpo_r2",
        "grpo_r3",
        "gspo_r3",
        "gspo_recompute",
        "dapo_loss",
        "sapo",
        "minirl",
        "m2po",
        "rspo",
        "score_centering",
    ],
)
def test_every_path_of_old_logprobs_and_replay_runs(model, reward_file, tmp_path, objective):
    _, rows = go(config(model, reward_file, tmp_path / "run", f"objective={objective}", "steps=2"))
    last = rows[-1]
    assert last["learner/policy_version"] == 4.0
    if objective == "rspo":
        assert 0.7 < last["objective/router_shift"] < 1.0  # the policy has moved before the second mini-batch
    if objective == "score_centering":
        # The head of 32 of the vocabulary's tokens has most of the mass and not all.
        assert 0.0 < last["objective/candidates_rest"] < 0.5
        assert last["old_logprobs/recomputed"] == 0.0
    if objective == "m2po":
        assert last["old_logprobs/recomputed"] == 0.0
    if objective in ("grpo_r2", "grpo_r3", "gspo_recompute"):
        assert last["old_logprobs/recomputed"] == 1.0
        assert last["objective/mini_batch_0/approx_kl_k3"] == 0.0  # the same pass twice, bit for bit
    if objective.endswith(("r2", "r3")):
        assert last["routing/replay_bytes_per_token"] == pytest.approx(2 * 2 + 1)  # 2 layers, top-2, one mark
    if objective.endswith("r3"):
        assert 0.0 < last["routing/native_row_fraction"] < 0.2  # the last token of each sequence
    if objective.endswith("r2"):
        assert last["routing/native_row_fraction"] == 0.0


@pytest.mark.slow
def test_two_runs_with_one_seed_agree(model, reward_file, tmp_path):
    _, a = go(config(model, reward_file, tmp_path / "a"))
    _, b = go(config(model, reward_file, tmp_path / "b"))
    assert values(a) == values(b)
    _, c = go(config(model, reward_file, tmp_path / "c", "seed=1"))
    assert values(a) != values(c)


RENEWED = (
    "objective=dapo",
    "objective.selection.over_asked=1",
    "++data.options.size=40",
    "data.renewal={active: 12, arrivals: 1.5, retire_at: 0.5, solved_at: 0.1}",
    "rollout.length_schedule=[[1, 5], [3, 8]]",
)
"""Dynamic sampling, a query set that is renewed, and completions that grow."""


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), RENEWED])
def test_a_resumed_run_equals_one_that_was_not_stopped(model, reward_file, tmp_path, more):
    _, whole = go(config(model, reward_file, tmp_path / "whole", "steps=4", *more))
    if more:
        assert [row["rollout/max_completion_tokens"] for row in whole[1:]] == [5, 5, 8, 8]
        assert whole[-1]["data/retired"] > 0
        assert whole[-1]["data/waiting"] < 28
        assert whole[-1]["selection/asked_groups"] >= 5
    stopped = config(model, reward_file, tmp_path / "parts", "steps=4", "checkpoint.every=2", *more)
    run = build(stopped)
    try:
        start(run)
        for step in (1, 2, 3):  # one step beyond the checkpoint, then "killed"
            run_step(run, step)
    finally:
        run.release()
    _, resumed = go(stopped)
    assert values(resumed) == values(whole)


class Shifted:
    """A learner whose engine is off by 0.01 nats per token: what the guard must find and take out."""

    def __init__(self, run) -> None:
        self.specs = []
        advance, forward = run.pool.advance, run.learner.forward_backward

        def shifted(ticks, seconds):
            return {
                name: replace(
                    told,
                    finished={
                        key: replace(c, logprobs=c.logprobs + np.float32(0.01))
                        for key, c in told.finished.items()
                    },
                )
                for name, told in advance(ticks, seconds).items()
            }

        def watched(mini, spec):
            self.specs.append(spec)
            return forward(mini, spec)

        run.pool.advance, run.learner.forward_backward = shifted, watched


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["batch", "ema", "subset"])
def test_the_guard_takes_out_of_later_steps_what_it_measured(model, reward_file, tmp_path, estimator):
    """The engine says 0.01 nats more for every token, so every log ratio is off by -0.01: 33 clip widths."""
    seen = []
    _, rows = go(
        config(
            model,
            reward_file,
            tmp_path / "run",
            "objective.guard.action=recentre",
            f"objective.guard.estimator={estimator}",
            "objective.guard.subset_fraction=1.0",
            "rollout.weight_sync.probe_every=0",
            f"reward.function='{reward_file}:spread'",
        ),
        lambda run: seen.append(Shifted(run)),
    )
    measured = [r["guard/offset"] for r in rows[1:]]
    applied = [r["guard/applied_offset"] for r in rows[1:]]
    assert measured == pytest.approx([-0.01] * 3, abs=1e-5)
    assert applied == pytest.approx([-0.01] * 3, abs=1e-5)
    assert [r["guard/active"] for r in rows[1:]] == [1.0] * 3
    offsets = [spec.offset for spec in seen[0].specs]  # 3 steps of 2 mini-batches
    late = (
        offsets if estimator == "subset" else offsets[1:]
    )  # the others first measure in the first mini-batch
    assert late == pytest.approx([-0.01] * len(late), abs=1e-5)
    # Without the guard every sequence of the first mini-batch with a negative advantage is clipped.
    assert rows[-1]["objective/mini_batch_0/clip_fraction_negative"] == 0.0


@pytest.mark.slow
def test_without_the_guard_the_same_offset_clips(model, reward_file, tmp_path):
    _, rows = go(
        config(
            model,
            reward_file,
            tmp_path / "run",
            "objective.guard.action=warn",
            "rollout.weight_sync.probe_every=0",
            f"reward.function='{reward_file}:spread'",
        ),
        Shifted,
    )
    for row in rows[1:]:
        assert row["objective/mini_batch_0/clip_fraction_negative"] == 1.0
        assert row["objective/mini_batch_0/clip_fraction_positive"] == 0.0
    assert rows[-1]["guard/applied_offset"] == 0.0


@pytest.mark.slow
def test_the_guard_switches_to_recomputation_and_the_offset_is_gone(model, reward_file, tmp_path):
    _, rows = go(
        config(
            model,
            reward_file,
            tmp_path / "run",
            "objective.guard.action=recompute",
            "rollout.weight_sync.probe_every=0",
            f"reward.function='{reward_file}:spread'",
        ),
        Shifted,
    )
    assert [r["old_logprobs/recomputed"] for r in rows[1:]] == [0.0, 1.0, 1.0]
    assert rows[1]["objective/mini_batch_0/clip_fraction_negative"] == 1.0
    assert rows[2]["objective/mini_batch_0/clip_fraction"] == 0.0


@pytest.mark.slow
def test_a_resumed_guard_goes_on_as_one_that_did_not_stop(model, reward_file, tmp_path):
    knobs = [
        "objective.guard.action=recentre",
        "objective.guard.estimator=ema",
        "rollout.weight_sync.probe_every=0",
    ]
    _, whole = go(config(model, reward_file, tmp_path / "whole", "steps=4", *knobs), Shifted)
    go(config(model, reward_file, tmp_path / "parts", "steps=2", *knobs), Shifted)
    _, parts = go(config(model, reward_file, tmp_path / "parts", "steps=4", *knobs), Shifted)
    assert [r["guard/applied_offset"] for r in parts[1:]] == [r["guard/applied_offset"] for r in whole[1:]]
    assert parts[3]["guard/applied_offset"] == pytest.approx(-0.01, abs=1e-5)


@pytest.mark.slow
def test_a_run_reports_what_its_learner_did(model, reward_file, tmp_path):
    """Loss averaged over the mini-batches, counts added, fresh rollouts, one version per optimiser step."""
    losses: list[float] = []

    def watch(run):
        forward = run.learner.forward_backward

        def watched(mini, spec):
            stats = forward(mini, spec)
            losses.append(stats["objective/loss"].result())
            return stats

        run.learner.forward_backward = watched

    _, rows = go(config(model, reward_file, tmp_path / "run"), watch)
    for step, row in enumerate(rows[1:]):
        assert row["objective/loss"] == pytest.approx(sum(losses[2 * step : 2 * step + 2]) / 2, rel=1e-12)
        assert row["objective/sequences"] == pytest.approx(16.0, rel=1e-6)
        assert row["rollout/staleness"] == 0.0
        assert row["learner/policy_version"] == 2.0 * (step + 1)
        assert row["rollout/completion_tokens_total"] == pytest.approx(
            16 * sum(r["rollout/completion_tokens_mean"] for r in rows[1 : step + 2]), rel=1e-9
        )
        assert (
            0.0 <= row["routing/engine/flip_fraction"] < 0.01
            if "routing/engine/flip_fraction" in row
            else True
        )
    assert "routing/engine/flip_fraction" in rows[1]


@pytest.mark.parametrize(
    ("receipt", "message"),
    [
        ({"policy_version": 99}, "engine-0 reports policy version 99 after a sync of version 0"),
        ({"checksums": {}}, "engine-0 did not receive"),
    ],
)
def test_a_weight_sync_that_went_wrong_stops_the_run(model, reward_file, tmp_path, receipt, message):
    run = build(config(model, reward_file, tmp_path / "run"))
    finish = run.pool.engine.finish_weight_update
    run.pool.engine.finish_weight_update = lambda version: replace(finish(version), **receipt)
    with pytest.raises(WeightSyncError, match=message):
        train(run)
    run.release()


def test_an_engine_that_computes_another_policy_stops_the_run(model, reward_file, tmp_path):
    run = build(config(model, reward_file, tmp_path / "run"))
    ask = run.pool.engine.logprobs_of
    run.pool.engine.logprobs_of = lambda sequences: [values - 0.5 for values in ask(sequences)]
    with pytest.raises(WeightSyncError, match=r"engine-0 and learner disagree after the sync of version 0"):
        train(run)
    run.release()


@pytest.mark.slow
def test_a_run_begins_with_one_evaluation_and_a_resumed_one_with_none(model, reward_file, tmp_path):
    asked: list[int] = []

    def watch(run):
        generate = run.pool.generate

        def counted(prompts, spec, ids):
            asked.extend([min(ids)] if min(ids) >= EVALUATION_IDS else [])
            return generate(prompts, spec, ids)

        run.pool.generate = counted

    summary, rows = go(config(model, reward_file, tmp_path / "run", "steps=1"), watch)
    assert len(asked) == 2  # before and after
    before, after = rows[0]["eval/heldout/accuracy"], rows[1]["eval/heldout/accuracy"]
    assert (summary["heldout_before"], summary["heldout_after"]) == (before, after)
    asked.clear()
    go(config(model, reward_file, tmp_path / "run", "steps=2"), watch)
    assert len(asked) == 1
    asked.clear()
    summary, _ = go(config(model, reward_file, tmp_path / "run", "steps=2"), watch)  # nothing is left to do
    assert asked == []
    assert summary["heldout_before"] == before


def test_a_failing_reward_names_the_rollout(model, reward_file, tmp_path):
    run = build(
        config(
            model,
            reward_file,
            tmp_path / "run",
            f"reward.function='{reward_file}:broken'",
            "data.heldout=null",
        )
    )
    with pytest.raises(Exception, match=r"reward of rollout 0 .*raised KeyError"):
        train(run)
    run.release()


def test_a_gradient_that_is_not_finite_costs_one_step(model, reward_file, tmp_path):
    """The second mini-batch of four is skipped: three versions are made. Where none may be, the run stops."""
    overrides = ("flips.every=0", "data.heldout=null", "steps=2", "mini_batches=2")

    def poison(at):
        def watch(run):
            step, calls = run.learner.optim_step, iter(range(4))

            def poisoned():
                if next(calls) == at:
                    run.learner.learner.gradients[0][0] = float("nan")
                return step()

            run.learner.optim_step = poisoned

        return watch

    _, rows = go(config(model, reward_file, tmp_path / "a", *overrides), poison(1))
    assert [row["learner/skipped_steps"] for row in rows if "learner/lr" in row] == [1.0, 0.0]
    assert [row["learner/policy_version"] for row in rows if "learner/lr" in row] == [1.0, 3.0]
    with pytest.raises(FloatingPointError, match="max_skipped_steps allows 0"):
        go(config(model, reward_file, tmp_path / "b", *overrides, "learner.max_skipped_steps=0"), poison(0))


@pytest.mark.slow
def test_a_diverging_run_says_where_it_was_and_what_is_saved(model, reward_file, tmp_path):
    run = build(config(model, reward_file, tmp_path / "run", "checkpoint.every=1", "flips.every=0"))
    forward = run.learner.forward_backward

    def diverges(mini, spec):
        if run.learner.policy_version == 3:
            raise FloatingPointError("logprobs of rollout 20 are not finite")
        return forward(mini, spec)

    run.learner.forward_backward = diverges
    with pytest.raises(FloatingPointError) as error:
        train(run)
    run.release()
    saved = tmp_path / "run" / "checkpoints" / "step-000001"
    assert error.value.__notes__ == [f"at step 2, policy version 3; saved: {saved}"]


def test_a_real_divergence_is_stopped_with_the_rollout_named(model, reward_file, tmp_path):
    run = build(
        config(
            model,
            reward_file,
            tmp_path / "run",
            "learner.optimizer.lr=1e30",
            "learner.optimizer.grad_clip=0",
            "rollout.weight_sync.probe_every=0",
            "flips.every=0",
        )
    )
    with pytest.raises(FloatingPointError, match=r"of rollout \d+ are not finite|loss is .* rollouts"):
        train(run)
    run.release()


@pytest.mark.slow
def test_a_reference_policy_adds_its_kl(model, reward_file, tmp_path):
    _, rows = go(config(model, reward_file, tmp_path / "run", "objective.kl_coef=0.1", "steps=2"))
    first, second = rows[1]["objective/kl_reference"], rows[2]["objective/kl_reference"]
    assert 0.0 <= first < second  # the policy leaves the reference


@pytest.mark.slow
def test_a_run_folder_is_resumed_with_its_own_settings_or_not_at_all(model, reward_file, tmp_path):
    go(config(model, reward_file, tmp_path / "run", "steps=2"))
    with pytest.raises(ValueError, match=r"made with other settings: .*objective\.name .*seed"):
        build(config(model, reward_file, tmp_path / "run", "steps=4", "seed=5", "objective=grpo"))
    with pytest.raises(
        ValueError, match=r"holds checkpoints of an earlier run and checkpoint\.resume is false"
    ):
        build(config(model, reward_file, tmp_path / "run", "steps=4", "checkpoint.resume=false"))
    summary, rows = go(config(model, reward_file, tmp_path / "run", "steps=3"))  # more steps is no other run
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert summary["policy_version"] == 6


@pytest.mark.slow
def test_a_run_folder_has_one_run_at_a_time(model, reward_file, tmp_path):
    mine = config(model, reward_file, tmp_path / "run", "steps=1")
    first = build(mine)
    try:
        with pytest.raises(
            ValueError, match=r"run_dir .* is in use by process \d+ on .*: wait for it, or choose another"
        ):
            build(mine)
    finally:
        first.release()
    go(mine)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo_r2", "grpo_r3", "gspo_r3"])
def test_the_host_holds_the_traces_of_one_batch_once_beside_the_mini_batch_in_use(
    model, reward_file, tmp_path, objective, monkeypatch, traces
):
    run = build(
        config(
            model,
            reward_file,
            tmp_path / "run",
            f"objective={objective}",
            "steps=2",
            "mini_batches=4",
            "flips.every=0",
        )
    )
    seen = []

    def watched(name):
        verb = getattr(run.learner, name)

        def call(mini, *args, **kwargs):
            batches = getattr(mini, "micro_batches", mini)
            if kwargs or args:  # not the probe of the weight sync
                seen.append(
                    (
                        bytes_behind(traces),
                        sum(b.routing.nbytes for r in batches for b in r if b.routing),
                    )
                )
            return verb(mini, *args, **kwargs)

        monkeypatch.setattr(run.learner, name, call)

    watched("forward_backward")
    watched("logprobs")
    try:
        train(run)
    finally:
        run.release()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    batch = [row["routing/replay_bytes"] for row in rows if "routing/replay_bytes" in row]
    in_use = max(used for _, used in seen)
    assert 0 < in_use < 0.5 * max(batch)
    assert max(alive for alive, _ in seen) <= max(batch) + in_use
    assert max(alive for alive, _ in seen) >= min(batch)  # the count sees them


@pytest.fixture
def traces(monkeypatch):
    """All routing traces that are made from here on and still alive."""
    alive = []
    check = RoutingTrace.__post_init__

    def registered(trace):
        check(trace)
        alive.append(weakref.ref(trace))

    monkeypatch.setattr(RoutingTrace, "__post_init__", registered)
    return alive


def bytes_behind(traces) -> int:
    """Bytes of memory behind the traces that are alive; views of one array count once."""
    traces[:] = [ref for ref in traces if ref() is not None]
    arrays = {}
    for trace in (ref() for ref in traces):
        for array in (trace.expert_ids, trace.known):
            while isinstance(array.base, np.ndarray):
                array = array.base
            arrays[id(array)] = array.nbytes
    return sum(arrays.values())


@pytest.mark.slow
def test_no_forward_pass_of_a_run_holds_more_tokens_than_the_budget(model, reward_file, tmp_path):
    """Update, old log-probs, reference, the guard's subset, the flip sample, the probe: 24 tokens at most."""
    passes: dict[str, list[int]] = {"logprobs": [], "forward_backward": []}

    def watch(run):
        for verb, tokens in passes.items():
            call = getattr(run.learner.learner, verb)

            def counted(batches, *args, call=call, tokens=tokens, **options):
                tokens.extend(batch.num_tokens for batch in batches)
                return call(batches, *args, **options)

            setattr(run.learner.learner, verb, counted)

    knobs = [
        "steps=1",
        "learner.token_budget=24",
        "objective.kl_coef=0.1",
        "objective.guard.action=recompute",
        "objective.guard.estimator=subset",
        "objective.guard.subset_fraction=1.0",
        "objective.guard.threshold=1e-9",
        "flips.every=1",
        "flips.sequences=16",
        "evaluation.prompts=1",
    ]
    _, rows = go(config(model, reward_file, tmp_path / "run", *knobs), watch)
    assert rows[-1]["old_logprobs/recomputed"] == 1.0
    assert "routing/update/flip_fraction" in rows[-1]
    longest = max(passes["forward_backward"])
    assert 12 < longest <= 24
    assert max(passes["logprobs"]) <= 24
    # reference, guard's subset, recomputation, flips before and after two updates, two probes
    assert sum(passes["logprobs"]) > 6 * sum(passes["forward_backward"])


@pytest.mark.parametrize("fault", ["layers", "expert"])
def test_a_learner_that_exports_weights_in_the_wrong_place_stops_before_the_first_step(
    fault, model, reward_file, tmp_path
):
    """Checksums agree, because both sides sum what was sent. The engine's own log-probs have moved."""

    def wrong(weights, bucket_bytes):
        tensors = {name: tensor for bucket in weights(bucket_bytes) for name, tensor in bucket}
        pairs = {"layers": ("layers.0.", "layers.1."), "expert": ("experts.3.", "experts.4.")}[fault]
        yield [(name, tensors[name.replace(*pairs)]) for name in tensors]

    def watch(run):
        weights = run.learner.learner.weights
        run.learner.learner.weights = lambda bucket_bytes, **_: wrong(weights, bucket_bytes)

    c = config(model, reward_file, tmp_path / "run", "rollout.weight_sync.probe_tolerance=null")
    with pytest.raises(WeightSyncError, match="after a sync of the very weights that it had loaded"):
        go(c, watch)


@pytest.mark.slow
def test_the_last_hf_folder_of_a_run_is_the_policy_that_it_ends_with(model, reward_file, tmp_path):
    """Read by HF alone. The folder of the step before holds other weights."""
    import torch
    from transformers import AutoModelForCausalLM

    ends = {}

    def keep(run):
        release = run.release

        def last():
            ends.update({n: p.detach().clone() for n, p in run.learner.learner.policy.hf.named_parameters()})
            release()

        run.release = last

    c = config(model, reward_file, tmp_path / "run", "steps=2", "checkpoint.hf_every=1")
    go(c, keep)
    one, two = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / f"run/hf/step-00000{n}").named_parameters())
        for n in (1, 2)
    )
    assert ends
    assert all(torch.equal(two[name], value) for name, value in ends.items())
    assert not all(torch.equal(one[name], value) for name, value in ends.items())
