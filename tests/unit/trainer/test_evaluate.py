"""`gspo evaluate` without the command line: held-out prompts and suites, an endpoint, a model's engines."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gspo_dist.config import (
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    FlipsConfig,
    LearnerConfig,
    LoggerConfig,
    ObjectiveConfig,
    RunConfig,
    WandbConfig,
)
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.trainer import evaluate
from gspo_dist.trainer.evaluate import evaluate_suites, weights_of
from gspo_dist.types import SamplingSpec
from tests.unit.evaluation.small import write_jsonl
from tests.unit.evaluation.test_samplers import server  # noqa: F401 (a fixture)
from tests.unit.trainer.small import config as small_config
from tests.unit.trainer.test_episodes import episodes_of, source  # noqa: F401 (a fixture)


def config(tmp_path, url=None, **options) -> RunConfig:
    file = write_jsonl(tmp_path / "own.jsonl", [{"problem": w, "answer": w} for w in ("a", "b", "c")])
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(root=str(tmp_path)),
        logger=LoggerConfig(wandb=WandbConfig(mode="off")),
        evaluation=EvaluationConfig(
            suites=("own",),
            endpoint=url,
            options={"own": {"file": str(file), "reward": "exact_match", "samples": 2, **options}},
        ),
    )


def test_an_endpoint_is_graded_and_asked_once(tmp_path, server):  # noqa: F811
    (result,) = evaluate_suites(config(tmp_path, server["url"]))
    assert result.metrics["avg@2"] == 1.0  # the server says what it is asked
    assert result.setting["model"] == f"default at {server['url'].rstrip('/')}"
    asked = len(server["seen"])
    (again,) = evaluate_suites(config(tmp_path, server["url"]))
    assert len(server["seen"]) == asked == 6
    assert again.metrics == result.metrics
    wrong = config(tmp_path, server["url"], instruction="!")
    with pytest.raises(ValueError, match="temperature"):
        evaluate_suites(config(tmp_path, server["url"], temperature=0.7))
    (other,) = evaluate_suites(replace(wrong, run_dir=str(tmp_path / "other")))
    assert other.metrics["avg@2"] == 0.0


def test_wandb_gets_figures_and_failures_in_one_run(tmp_path, server, monkeypatch):  # noqa: F811
    told = []

    class Sink:
        def samples(self, step, rows):
            told.append(("samples", step, rows))

        def log(self, step, row):
            told.append(("log", step, row))

        def close(self, summary):
            told.append(("close",))

    identities = []

    def opened(mode, wandb, folder, run_config, identity):
        assert (mode, wandb) == ("offline", wrong.logger.wandb)
        assert str(folder) == f"{run_config['run_dir']}/evaluation"
        identities.append(identity)
        return Sink()

    monkeypatch.setattr(evaluate, "choose_mode", lambda wandb: "offline")
    monkeypatch.setattr(evaluate, "open_wandb", opened)
    wrong = config(tmp_path, server["url"], instruction="!")
    evaluate_suites(wrong)
    evaluate_suites(wrong)
    assert identities[0] == identities[1]
    kind, step, rows = told[0]
    assert (kind, step, len(rows)) == ("samples", 0, 6)
    assert {row["why"] for row in rows} == {"wrong"}
    assert told[1][:2] == ("log", 0)
    assert told[1][2]["eval/own/avg@2"] == 0.0
    assert told[2] == ("close",)
    # What is right is no failure, and W&B that cannot be opened is done without.
    evaluate_suites(replace(config(tmp_path, server["url"]), run_dir=str(tmp_path / "right")))
    assert told[6] == ("samples", 0, [])
    monkeypatch.setattr(evaluate, "open_wandb", lambda *arguments: None)
    evaluate_suites(wrong)
    monkeypatch.setattr(evaluate, "choose_mode", lambda wandb: None)
    monkeypatch.setattr(evaluate, "open_wandb", opened)
    evaluate_suites(wrong)
    assert (len(told), len(identities)) == (9, 3)


def test_another_model_in_the_same_place_is_not_this_one(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = weights_of(tmp_path)
    assert before[0][:2] == ["model.safetensors", 1]
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert weights_of(tmp_path) != before


@pytest.mark.slow
def test_a_models_engine_answers_the_same_after_an_interruption(model, reward_file, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "own.jsonl", [{"problem": f"{i}+1=", "answer": "1"} for i in range(3)])
    chosen = small_config(
        model,
        reward_file,
        tmp_path / "run",
        "evaluation.suites=[own]",
        f"+evaluation.options.own={{file: {file}, reward: exact_match, samples: 2, temperature: 1.0}}",
    )
    (whole,) = evaluate_suites(chosen)
    texts = [sample["completion"] for sample in whole.samples]
    assert len(set(texts)) > 3
    path = tmp_path / "run/evaluation/own/samples.jsonl"
    kept = path.read_text().splitlines()[:2]
    path.write_text("\n".join(kept) + "\n")
    seen = []
    submit = ReferenceEngine.submit
    monkeypatch.setattr(
        ReferenceEngine, "submit", lambda self, work: (seen.append(len(work)), submit(self, work))[1]
    )
    (again,) = evaluate_suites(chosen)
    assert seen == [4]
    assert [sample["completion"] for sample in again.samples] == texts
    result = json.loads((tmp_path / "run/evaluation/own/result.json").read_text())
    assert result["setting"]["weights"] == weights_of(model)


def test_an_endpoint_that_nobody_would_ask_is_refused(model, reward_file, tmp_path):
    from gspo_dist.trainer.setup.build import check_run

    chosen = small_config(model, reward_file, tmp_path / "run", "evaluation.endpoint=http://h/v1")
    with pytest.raises(ValueError, match="endpoint answers suites alone: got http://h/v1 and no suite"):
        evaluate.evaluate_model(chosen)
    with pytest.raises(ValueError, match="answered by its own engines"):
        check_run(chosen)


def test_a_template_and_a_limit_are_part_of_what_was_sampled(tmp_path):
    plain = config(tmp_path)
    other = replace(plain, data=replace(plain.data, template_args={"enable_thinking": False}))
    longer = replace(plain, rollout=replace(plain.rollout, max_prompt_tokens=2048))
    assert evaluate.model_setting(plain, "m") == evaluate.model_setting(config(tmp_path), "m")
    for changed in (other, longer):
        assert evaluate.model_setting(changed, "m") != evaluate.model_setting(plain, "m")


@pytest.mark.parametrize("with_environment", [False, True])
def test_a_model_is_measured_on_held_out_prompts_without_training(
    model,
    reward_file,
    source,  # noqa: F811
    tmp_path,
    with_environment,
):
    """Greedy samples of the same prompts, so the figures are those of a run before its first step."""
    from gspo_dist.trainer.heldout import evaluate as evaluate_run
    from gspo_dist.trainer.setup.build import build

    chosen = (
        episodes_of(model, reward_file, source, tmp_path / "run")
        if with_environment
        else small_config(model, reward_file, tmp_path / "run")
    )
    found = evaluate.evaluate_model(chosen)
    assert set(found) >= {"eval/heldout/accuracy", "eval/heldout/avg@1", "eval/heldout/reward_mean"}
    run = build(chosen)
    try:
        expected = evaluate_run(run)
    finally:
        run.release()
    del expected["time/evaluation_s"]
    assert found == expected
    assert not (tmp_path / "run/checkpoints").exists()


# --- what is asked of whom, without a model ---


@pytest.fixture
def seen(monkeypatch):
    """Everything that starts something stands still, and notes what it was given."""
    seen = {"order": []}

    def noted(name, answer=None):
        def call(*arguments, **options):
            seen[name] = (arguments, options)
            seen["order"].append(name)
            return answer

        return call

    class Prompts:
        def __init__(self, tokenizer, **options):
            seen["prompts"] = (tokenizer, options)

        def check(self, suites):
            seen["checked"] = suites

    @contextlib.contextmanager
    def engines(config, model, moe_layers):
        seen["engines"] = (config, model, moe_layers)
        rewards = SimpleNamespace(start=noted("rewards.start"))
        yield SimpleNamespace(start=lambda: "limits", generate=noted("generate", [["c"]])), lambda: rewards
        seen["order"].append("engines ended")

    def run_suites(suites, sampler, folder, setting):
        seen["suites"] = (suites, sampler, folder, setting)
        for suite in suites:
            yield suite, 2, None
            yield suite, 6, SimpleNamespace(suite=suite.name)

    load_suites = evaluate.load_suites

    def loaded(*arguments):
        for suite in (suites := load_suites(*arguments)):
            monkeypatch.setattr(suite.grader, "close", noted("grader closed"))
        return suites

    spec = SamplingSpec(n=2, max_tokens=9, seed=0)
    monkeypatch.setattr(evaluate, "load_suites", loaded)
    monkeypatch.setattr(evaluate, "ensure_model", noted("ensure_model", "M"))
    monkeypatch.setattr(evaluate, "check_model", noted("check_model", 3))
    monkeypatch.setattr(evaluate, "load_tokenizer", noted("load_tokenizer", "T"))
    monkeypatch.setattr(evaluate, "sampling_spec", noted("sampling_spec", spec))
    monkeypatch.setattr(evaluate, "weights_of", lambda folder: [str(folder)])
    monkeypatch.setattr(evaluate, "SuitePrompts", Prompts)
    monkeypatch.setattr(evaluate, "engines", engines)
    monkeypatch.setattr(evaluate, "run_suites", run_suites)
    monkeypatch.setattr(evaluate, "EngineSampler", noted("EngineSampler", "engine sampler"))
    monkeypatch.setattr(
        evaluate, "EndpointSampler", noted("EndpointSampler", SimpleNamespace(name="default at U"))
    )
    return seen


def test_suites_of_an_endpoint_start_no_engine(tmp_path, seen):
    chosen = config(tmp_path, "http://h/v1")
    chosen = replace(
        chosen,
        seed=5,
        rollout=replace(chosen.rollout, max_completion_tokens=99),
        evaluation=replace(chosen.evaluation, endpoint_model="m", endpoint_concurrency=7),
    )
    (result,) = evaluate_suites(chosen)
    assert result.suite == "own"
    assert seen["EndpointSampler"] == (
        ("http://h/v1", "m"),
        {"max_tokens": 99, "seed": 5, "concurrency": 7},
    )
    (suite,), _, folder, setting = seen["suites"]
    assert suite.name == "own"
    assert folder == tmp_path / "run" / "evaluation"
    assert setting == {"model": "default at U", "seed": 5, "longest": 99}
    assert seen["order"] == ["EndpointSampler", "grader closed"]


def test_suites_of_a_model_are_sampled_with_a_stream_of_their_own(tmp_path, seen):
    """Another seed than training's, and ids beyond all that training and held-out prompts count to."""
    chosen = config(tmp_path)
    chosen = replace(
        chosen,
        seed=5,
        data=replace(chosen.data, template_args={"x": 1}, too_long="skip"),
        rollout=replace(chosen.rollout, max_prompt_tokens=77, max_completion_tokens=99),
        flips=FlipsConfig(every=3),
    )
    evaluate_suites(chosen)
    alone, model, moe_layers = seen["engines"]
    assert (alone.flips.every, model, moe_layers) == (0, "M", 3)
    assert seen["check_model"] == ((alone, "M"), {})
    assert seen["load_tokenizer"] == (("M",), {})
    assert seen["sampling_spec"] == ((alone, "T", "limits"), {})
    tokenizer, options = seen["prompts"]
    assert tokenizer == "T"
    assert options == {
        "max_prompt_tokens": 77,
        "max_completion_tokens": 99,
        "template_args": {"x": 1},
        "too_long": "skip",
    }
    suites, sampler, _, setting = seen["suites"]
    assert seen["checked"] is suites
    assert sampler == "engine sampler"
    (pool, prompts, spec), told = seen["EngineSampler"]
    assert pool.start() == "limits"
    assert hasattr(prompts, "check")
    assert spec == SamplingSpec(n=2, max_tokens=9, seed=6)
    assert told == {"name": "M", "first_id": 2**41}
    assert setting == {
        "model": "M",
        "seed": 5,
        "longest": 99,
        "longest_prompt": 77,
        "template_args": {"x": 1},
        "weights": ["M"],
    }


def test_how_far_a_suite_is_is_told_now_and_then(tmp_path, seen, monkeypatch):
    lines = []
    evaluate_suites(config(tmp_path, "http://h/v1"), lines.append)
    assert lines == []  # ten seconds have not passed
    monkeypatch.setattr(evaluate, "TELL_EVERY_S", -1.0)
    evaluate_suites(config(tmp_path, "http://h/v1"), lines.append)
    assert lines == ["own: 2 of 6 samples graded"]


def test_engines_alone_record_no_routes_and_share_no_gpu():
    chosen = RunConfig(
        flips=FlipsConfig(every=2),
        objective=ObjectiveConfig(name="grpo", old_logprobs="recompute", routing_replay="r3"),
        cluster=ClusterConfig(colocated=True),
    )
    alone = evaluate.without_learner(chosen)
    assert (alone.flips.every, alone.objective.routing_replay, alone.cluster.colocated) == (0, "none", False)
    assert replace(alone, flips=chosen.flips, objective=chosen.objective, cluster=chosen.cluster) == chosen


def test_held_out_prompts_are_sampled_as_the_evaluation_says(tmp_path, seen, monkeypatch):
    chosen = config(tmp_path)
    chosen = replace(
        chosen,
        seed=5,
        data=replace(chosen.data, heldout="arithmetic"),
        rollout=replace(chosen.rollout, max_prompt_tokens=77),
        evaluation=replace(chosen.evaluation, prompts=2, samples=4, temperature=0.5, top_p=0.9),
    )

    def load_prompts(*arguments, **options):
        seen["load_prompts"] = (arguments, options)
        return ["p0", "p1", "p2"]

    def evaluate_heldout(generate, judges, prompts, spec):
        seen["heldout"] = (judges, prompts, spec)
        assert generate(prompts, spec) == [["c"]]
        return {"eval/heldout/accuracy": 0.5}

    monkeypatch.setattr(evaluate, "load_prompts", load_prompts)
    monkeypatch.setattr(evaluate, "judged_heldout", lambda config, prompts: prompts)
    monkeypatch.setattr(evaluate, "evaluate_heldout", evaluate_heldout)
    assert evaluate.evaluate_model(chosen) == {"eval/heldout/accuracy": 0.5}
    alone = seen["engines"][0]
    assert seen["load_prompts"] == ((alone.data, "heldout", "T"), {"max_prompt_tokens": 77, "seed": 5})
    _, prompts, spec = seen["heldout"]
    assert prompts == ["p0", "p1"]
    assert spec == SamplingSpec(n=4, max_tokens=9, seed=0, temperature=0.5, top_p=0.9)
    assert seen["generate"] == ((["p0", "p1"], spec, range(2)), {})
    assert seen["order"][-3:] == ["sampling_spec", "generate", "engines ended"]
    assert "rewards.start" in seen["order"]


def test_held_out_prompts_of_an_environment_are_played_and_judged_by_episode(tmp_path, seen, monkeypatch):
    chosen = config(tmp_path)
    chosen = replace(chosen, seed=5, data=replace(chosen.data, heldout="arithmetic"))
    closed = []
    environment = SimpleNamespace(rendering={"cue": False})
    episodes = SimpleNamespace(pool=SimpleNamespace(close=lambda: closed.append("pool")))

    def noted(name, answer):
        def call(*arguments, **options):
            seen[name] = (arguments, options)
            return answer

        monkeypatch.setattr(evaluate, name, call)

    noted("check_environment", environment)
    noted("load_prompts", ["p0", "p1"])
    noted("judged_heldout", ["p1"])
    noted("start_episodes", episodes)
    noted("play", [["played"]])
    noted("EpisodeJudge", "judge of episodes")

    def evaluate_heldout(generate, judges, prompts, spec):
        assert (judges, prompts, closed) == ("judge of episodes", ["p1"], [])
        assert generate(prompts, spec) == [["played"]]
        return {"eval/heldout/accuracy": 0.25}

    monkeypatch.setattr(evaluate, "evaluate_heldout", evaluate_heldout)
    assert evaluate.evaluate_model(chosen) == {"eval/heldout/accuracy": 0.25}
    alone = seen["engines"][0]
    assert seen["check_model"] == ((alone, "M"), {})
    assert seen["engines"][1:] == ("M", 3)
    assert seen["sampling_spec"] == ((alone, "T", "limits"), {})
    assert seen["check_environment"] == ((alone, "T"), {})
    assert seen["load_prompts"][1] == {"max_prompt_tokens": 1024, "seed": 5, "cue": False}
    assert seen["judged_heldout"] == ((alone, ["p0", "p1"]), {})
    assert seen["start_episodes"] == ((alone, environment), {})
    (pool, played, prompts, spec, ids), _ = seen["play"]
    assert (pool.start(), played, prompts, spec.n, ids) == ("limits", episodes, ["p1"], 1, range(1))
    (of, rewards), _ = seen["EpisodeJudge"]
    assert of is episodes
    assert callable(rewards.start)
    assert "generate" not in seen
    assert closed == ["pool"]


def test_wandb_gets_as_many_failures_as_a_table_can_show(tmp_path, monkeypatch):
    class Sink:
        def samples(self, step, rows):
            sent.append((step, len(rows), rows[-1]["sample"]))

        def log(self, step, row): ...
        def close(self, summary): ...

    sent = []
    monkeypatch.setattr(evaluate, "open_wandb", lambda *given: Sink())
    wrong = {"problem": "p", "why": "wrong", "answer": "1", "completion": "2", "tokens": 1, "correct": False}
    result = SimpleNamespace(
        suite="own",
        samples=[wrong | {"sample": i} for i in range(501)],
        logged=lambda: {"eval/own/avg@2": 0.0},
    )
    evaluate._to_wandb(config(tmp_path), tmp_path, "offline", [result])
    assert sent == [(0, 500, 499)]


def test_without_held_out_prompts_there_is_nothing_to_measure(tmp_path):
    with pytest.raises(ValueError, match=r"needs held-out prompts: set data\.heldout"):
        evaluate.evaluate_model(
            replace(config(tmp_path), data=DataConfig(heldout=None), evaluation=EvaluationConfig())
        )


def test_engines_are_actors_without_learners_or_live_in_this_process(tmp_path, monkeypatch):
    made, closed = [], []

    class Processes:
        def __init__(self, *arguments, **options):
            made.append((arguments, options))

        def __enter__(self):
            return SimpleNamespace(pool=lambda: "pool", rewards="rewards")

        def __exit__(self, *error):
            closed.append("processes")

    class Closes:
        def __init__(self, *arguments):
            self.arguments = arguments

        def close(self):
            closed.append(self.arguments)

    def factory(*arguments):
        return lambda name: (arguments, name)

    monkeypatch.setattr(evaluate, "Processes", Processes)
    monkeypatch.setattr(evaluate, "resolve_device", lambda cluster: "cpu")
    monkeypatch.setattr(evaluate, "engine_factory", factory)
    monkeypatch.setattr(evaluate, "LocalRolloutPool", Closes)
    monkeypatch.setattr(evaluate, "LocalRewardPool", Closes)
    actors = replace(config(tmp_path), cluster=ClusterConfig(in_process=False))
    with evaluate.engines(actors, "M", 3) as told:
        assert told == ("pool", "rewards")
    assert made == [((actors, "M", "cpu", tmp_path / "run", 3), {"learners": False})]
    assert closed == ["processes"]
    here = replace(
        actors,
        cluster=ClusterConfig(in_process=True, env={"A": "1"}),
        learner=LearnerConfig(backend="eager", world_size=1),
        rollout=replace(actors.rollout, engines=1),
    )
    with evaluate.engines(here, "M", 3) as (pool, make_rewards):
        assert pool.arguments == (((here, "M", "cpu", 3), "engine-0"),)
        assert make_rewards().arguments == (here.reward, {"A": "1"})
        del closed[:]
    assert closed == [(here.reward, {"A": "1"}), (((here, "M", "cpu", 3), "engine-0"),)]
    assert len(made) == 1
