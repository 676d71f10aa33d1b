"""`gspo evaluate suite=...` without the command line: an endpoint, a model's engines, what it leaves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gspo_dist.config import DataConfig, EvaluationConfig, LoggerConfig, RunConfig, WandbConfig
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.trainer import evaluate
from gspo_dist.trainer.evaluate import evaluate_suites, weights_of
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
    assert told[1][2]["eval/own/avg@2"] == 0.0
    assert told[2] == ("close",)


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
