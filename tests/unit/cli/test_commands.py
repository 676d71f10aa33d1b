"""What each small command prints and does with its arguments; the work itself is stood in for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gspo_dist.cli.main import main
from gspo_dist.cli.train import print_summary


def test_a_runs_last_lines_say_where_how_well_and_how_fast(capsys):
    summary = {
        "heldout_before": 0.398,
        "heldout_after": 0.883,
        "completion_tokens": 1234567,
        "seconds": 90.0,
        "tokens_per_s_median": 13717.4,
    }
    print_summary(Path("/runs/a"), summary)
    assert capsys.readouterr().out == (
        "\nrun folder   /runs/a  (metrics.jsonl, curves.png, samples.jsonl, summary.json)\n"
        "held-out accuracy   39.8% -> 88.3%   (+48.5 points)\n"
        "1,234,567 completion tokens in 1.5 min, median 13,717 tokens/s per step\n"
    )
    del summary["heldout_before"], summary["heldout_after"]
    print_summary(Path("/runs/a"), summary)
    assert "held-out" not in capsys.readouterr().out


def test_training_releases_the_run_whether_or_not_it_ends_well(monkeypatch, capsys):
    """Engines and ranks that outlived a failed run would hold its GPUs."""
    from gspo_dist.trainer import restarts

    released = []

    class Built:
        run_dir = Path("/runs/a")
        completed_steps = 0
        health = SimpleNamespace(note=lambda step, events: None)

        def release(self) -> None:
            released.append(self.run_dir)

    def fail(run: Built) -> dict[str, Any]:
        raise RuntimeError("rank 1 died")

    monkeypatch.setattr(restarts, "build", lambda config: Built())
    monkeypatch.setattr(restarts, "train", fail)
    with pytest.raises(SystemExit) as stop:
        main(["train", "steps=1"])
    assert (stop.value.code, released) == (1, [Path("/runs/a")])
    assert "RuntimeError: rank 1 died" in capsys.readouterr().err
    done = {"completion_tokens": 1, "seconds": 1.0, "tokens_per_s_median": 1.0}
    monkeypatch.setattr(restarts, "train", lambda run: done)
    main(["train", "steps=1"])
    assert len(released) == 2
    assert "run folder   /runs/a" in capsys.readouterr().out


def test_a_sweep_trains_once_per_value_and_leaves_its_list(monkeypatch, tmp_path: Path, capsys):
    from gspo_dist.trainer import restarts

    seen = []

    class Built:
        completed_steps = 0
        health = SimpleNamespace(note=lambda step, events: None)
        run_dir = Path("/runs/a")

        def release(self) -> None:
            pass

    def built(config) -> Built:
        seen.append((config.seed, config.run_dir))
        return Built()

    done = {"completion_tokens": 1, "seconds": 1.0, "tokens_per_s_median": 1.0}
    monkeypatch.setattr(restarts, "build", built)
    monkeypatch.setattr(restarts, "train", lambda run: done)
    monkeypatch.chdir(tmp_path)
    main(["train", "-m", "seed=3,5", "run_dir=runs/seed-${seed}"])
    assert seen == [(3, "runs/seed-3"), (5, "runs/seed-5")]
    assert [p.name for p in tmp_path.iterdir()] == ["multirun.yaml"]  # hydra's own


def test_a_job_of_a_sweep_that_no_run_allows_ends_with_status_2(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.chdir(tmp_path)  # hydra leaves its list of jobs in the working directory
    with pytest.raises(SystemExit) as stop:
        main(["train", "-m", "steps=0,1"])
    assert stop.value.code == 2
    assert "steps must be at least 1: got 0" in capsys.readouterr().err


def test_evaluate_prints_a_line_per_metric_in_order(monkeypatch, capsys):
    from gspo_dist.trainer import evaluate

    seen = []

    def measured(config) -> dict[str, float]:
        seen.append(config.evaluation.samples)
        return {"eval/b": 0.25, "eval/a": 1.0}

    monkeypatch.setattr(evaluate, "evaluate_model", measured)
    main(["evaluate", "evaluation.samples=3"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["eval/a", "1.0000"],
        ["eval/b", "0.2500"],
    ]
    assert seen == [3]


def test_suites_are_named_without_a_sweep_and_shown_as_a_table(monkeypatch, tmp_path, capsys):
    from gspo_dist.evaluation.bench import SuiteResult
    from gspo_dist.trainer import evaluate

    seen = []
    numbers = {"problems": 30.0, "avg@32": 0.25, "pass@32": 0.5, "truncated_fraction": 0.125}

    def evaluated(config, tell) -> list[SuiteResult]:
        seen.append((config.evaluation.suites, config.data.root, config.evaluation.options))
        tell("aime24: 5 of 960 samples graded")
        return [SuiteResult("aime24", numbers, {}, ("file x.jsonl",), {"samples": 32}, ())]

    monkeypatch.setattr(evaluate, "evaluate_suites", evaluated)
    main(["evaluate", "suite=aime24,gsm8k", "data.root=/d", "+evaluation.options.all.samples=32"])
    assert seen == [(["aime24", "gsm8k"], "/d", {"all": {"samples": 32}})]
    progress, head, row, note, where = capsys.readouterr().out.splitlines()
    assert progress == "aime24: 5 of 960 samples graded"
    assert head.split()[:2] == ["suite", "problems"]
    assert row.split() == ["aime24", "30", "@32", "0.250", "-", "0.500", "12.5%"]
    assert note == "aime24: file x.jsonl"
    assert where.startswith("results      runs/default/evaluation/SUITE/")


def test_two_results_are_compared(tmp_path, capsys):
    for name, right in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        samples = [{"problem": f"p{i}", "correct": i <= right} for i in range(4)]
        (tmp_path / name / "result.json").write_text(json.dumps({"suite": "gsm8k", "samples": samples}))
    main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert "gsm8k" in out
    assert "+0.2500 [-0.5456, +1.0456]" in out  # 1/4 +- 3.182 x 1/4
    assert "better 1, worse 0" in out
    assert "only in" not in out
    (tmp_path / "b/amc").mkdir()
    (tmp_path / "b/amc/result.json").write_text(json.dumps({"suite": "amc", "samples": []}))
    main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert f"only in {tmp_path / 'b'}: amc\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "none")])
    assert stop.value.code == 2


def test_a_source_is_shown_with_what_is_wrong_with_it(capsys, tmp_path: Path):
    rows = [*({"prompt": f"{i} apples", "answer": i} for i in range(12)), {"prompt": "3 apples", "answer": 7}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, [], rows[0]]))
    copy = tmp_path / "b.jsonl"
    copy.write_text(json.dumps({"prompt": "5 apples", "answer": 6}) + "\n")
    main(["data", str(path), "--show", "1", "--reward", "exact_match", "--against", str(copy)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"--- {path}:1", "0 apples", "--- answer 0"]
    assert f"14 records in {path}" in lines
    for count, what, place in (
        (1, "rows are no records", f"  {path}:14: a record must be a JSON object: got list"),
        (1, "repeat an earlier prompt", f"  {path}:15 = {path}:1"),
        (1, "repeat an earlier prompt with another answer", f"  {path}:13 = {path}:4: 7 and 3"),
    ):
        at = lines.index(f"{count} {what}")
        assert lines[at + 1] == place
    assert f"  {path}:6: 5; outvoted: look at this answer; others: 6 ({copy}:1)" in lines
    with pytest.raises(SystemExit) as stop:
        main(["data", "arithmetic", "--split", "test"])
    assert stop.value.code == 2


def test_export_takes_the_run_and_the_folder(monkeypatch, capsys, tmp_path: Path):
    from gspo_dist.trainer import export

    asked = []

    def written(run_dir: Path, target: Path, *, probe: bool) -> dict[str, Any]:
        asked.append((run_dir, target, probe))
        done: dict[str, Any] = {"folder": str(target), "tensors": 7, "step": 3}
        return done | ({"mean_abs": 2.5e-7} if probe else {"not_compared": "as asked"})

    monkeypatch.setattr(export, "export_run", written)
    monkeypatch.chdir(tmp_path)
    main(["export", "--run", "run", "--to", "out"])
    said = capsys.readouterr().out
    assert said == "out: 7 tensors after step 3, read back; log-probs the learner's to 2.5e-07 nats\n"
    main(["export", "--run", "run", "--to", "out", "--no-probe"])
    said = capsys.readouterr().out
    assert said == "out: 7 tensors after step 3, read back; log-probs not compared: as asked\n"
    assert asked == [(tmp_path / "run", Path("out"), probe) for probe in (True, False)]


def test_make_model_copies_what_was_made_to_where_it_is_asked_for(monkeypatch, capsys, tmp_path: Path):
    from gspo_dist.coldstart import make

    asked = []
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/config.json").write_text("{}")

    def made(config) -> Path:
        asked.append((config.recipe, config.cache_dir))
        return tmp_path / "kept"

    monkeypatch.setattr(make, "ensure_model", made)
    main(["make-model"])
    main(["make-model", "--recipe", "peer", "--cache-dir", "/c", "--to", str(tmp_path / "here")])
    assert asked == [("quickstart", "~/.cache/gspo_dist"), ("peer", "/c")]
    assert capsys.readouterr().out == f"{tmp_path / 'kept'}\n{tmp_path / 'here'}\n"
    assert (tmp_path / "here/config.json").read_text() == "{}"


@pytest.fixture
def study(monkeypatch) -> list[Any]:
    """What the studies' room is asked to do."""
    from gspo_dist.studies import report, runner

    done: list[Any] = []
    monkeypatch.setattr(runner, "run_study", lambda study: done.append(("run", study.name)))

    def written(study, folder: Path, command: str, *, html: bool) -> list[Path]:
        done.append(("report", folder, command, html))
        return [folder / "report.md"]

    monkeypatch.setattr(report, "write_report", written)
    return done


def test_compare_runs_the_study_then_writes_its_report(study, capsys):
    main(["compare", "study=learners", "study.dir=/r"])
    assert study == [
        ("run", "learners"),
        ("report", Path("/r/report"), "gspo compare study=learners study.dir=/r", False),
    ]
    assert capsys.readouterr().out == "report: /r/report/report.md\n"
    study.clear()
    main(["compare", "study=learners", "--report-only", "--html", "study.dir=/r"])
    assert study == [("report", Path("/r/report"), "gspo compare study=learners study.dir=/r", True)]


def test_every_arm_is_checked_before_the_first_one_starts(study, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "study=learners", "learner.token_budget=1"])
    assert (stop.value.code, study) == (2, [])
    assert "learner.token_budget must hold the longest sequence" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_says_that_the_runs_are_safe(study, monkeypatch, capsys):
    from gspo_dist.studies import report

    def full(*args: Any, **kwargs: Any) -> list[Path]:
        raise OSError("no space left")

    monkeypatch.setattr(report, "write_report", full)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "study=learners", "study.dir=/r"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert (
        "OSError: no space left\nthe runs are in /r; `gspo compare study=learners study.dir=/r --report-only`"
        in said
    )


def test_audit_takes_the_run_and_how_many_sequences(monkeypatch, capsys, tmp_path: Path):
    from gspo_dist.trainer import audit

    seen = []

    def audited(run: Path, sequences: int):
        seen.append((run, sequences))
        return audit.Audit(tokens=10, equal=9, largest=0.25, prefilled=False, difference=None)

    monkeypatch.setattr(audit, "audit_run", audited)
    monkeypatch.chdir(tmp_path)
    main(["audit", "run", "--sequences", "3"])
    assert seen == [(tmp_path / "run", 3)]
    said = capsys.readouterr().out
    assert "9 of 10 tokens have the same log-prob on both sides, the others differ by up to 0.25 nats" in said
    assert "its kernels depend on how many tokens run" in said
    assert "it is the head or the sampler" in said
    with pytest.raises(SystemExit) as refused:
        main(["audit", "run", "--sequences", "0"])
    assert refused.value.code == 2
    assert "--sequences must be at least 1: got 0" in capsys.readouterr().err
