"""The report of a study: its numbers, its pages, and what is left when one cannot be written."""

from __future__ import annotations

import errno
import json

import pytest

from gspo_dist.metrics.names import metric_of
from gspo_dist.studies import report
from gspo_dist.studies.analysis import RunData, load_runs
from gspo_dist.studies.report import AGE, CONTRACT, COST, FINAL, write_report
from gspo_dist.studies.study import Study


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Heading -> the rows of its table, by column."""
    found = {}
    for section in text.split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        cells = [line[2:-2].split(" | ") for line in lines if line.startswith("|")]
        found[heading] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]] if cells else []
    return found


@pytest.mark.slow
def test_the_report_has_the_numbers_of_the_runs(written_study, tmp_path):
    (path,) = write_report(written_study, tmp_path / "report", "gspo compare study=s")
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["report.md"]  # no report.html
    text = path.read_text()
    assert text.startswith("# A <study>\n")
    assert "Made by `gspo compare study=s`." in text
    found = tables(text)
    gspo, grpo = found["Final values"]
    assert (gspo["arm"], gspo["held-out before"], gspo["held-out after"]) == (
        "gspo",
        "0.300 ± 0.000",
        "0.520 ± 0.000",
    )
    assert (grpo["held-out after"], grpo["collapsed"]) == ("0.520", "0/1")
    assert gspo["reward, last 5 steps"] == "0.390 ± 0.000"
    assert gspo["held-out after, points over grpo"] == "+0.0 (one seed)"
    assert grpo["held-out after, points over grpo"] == "reference"
    contract = found["The contract of the log-probs"][0]  # offsets +1 and -1 in turn: mean 0, size 1
    assert (contract["offset, clip widths"], contract["size of the offset"]) == (
        "+0.00 ± 0.00",
        "1.00 ± 0.00",
    )
    assert (found["Cost"][0]["step s"], found["Cost"][0]["peak memory GiB"]) == ("2.00 ± 0.00", "1.00 ± 0.00")
    assert [row["seconds, start to end"] for row in found["Every run"]] == ["60", "60", "60"]
    assert "3 minutes of processes" in text
    assert "![Clipped tokens (logarithmic)](figures/clipping.png)" in text


@pytest.mark.slow
def test_html_is_made_on_demand(written_study, tmp_path):
    pages = write_report(written_study, tmp_path / "report", "x", html=True)
    assert [path.name for path in pages] == ["report.md", "report.html"]
    page = pages[1].read_text()
    assert "data:image/png;base64," in page
    assert "A &lt;study&gt;" in page


def test_every_column_is_of_a_metric_that_runs_log():
    asked = set()

    class Recording(RunData):
        def series(self, key):
            asked.add(key)
            return super().series(key)

    runs = [Recording("a", 0, "done", "", [], None)]
    for columns in (FINAL, CONTRACT, AGE, COST):
        for cell in columns.values():
            cell(runs)
    assert len(asked) > 20
    assert [key for key in asked if metric_of(key) is None] == []


@pytest.mark.slow
def test_only_rollouts_begun_ahead_have_an_age(tmp_path, monkeypatch):
    """A row per arm whose tokens are old. The oldest is the largest of all steps, the rest are means."""
    monkeypatch.setattr(report, "draw_all", lambda *_: {})
    study = Study("s", (), {"now": (), "late": ()}, (0,), "now", str(tmp_path / "runs"))
    for arm, seed in study.runs:
        rows = [{"step": i, "rollout/reward_mean": 0.5, "staleness/token_fraction": 0.0} for i in range(2)]
        if arm == "late":
            for row, age in zip(rows, (4.0, 8.0), strict=True):
                row |= {
                    "staleness/token_fraction": 1.0,
                    "rollout/staleness": age,
                    "rollout/staleness_mean": age / 2,
                    "rollout/versions_per_completion": 1.5,
                    "staleness/log_ratio_mean": -age / 1000,
                    "staleness/log_ratio_std": 0.03,
                    "staleness/outside_clip_fraction": 0.9,
                    "staleness/ignored": 1.0,
                    "objective/mini_batch_0/clip_fraction": 0.5,
                }
        study.run_dir(arm, seed).mkdir(parents=True)
        (study.run_dir(arm, seed) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = tables(write_report(study, tmp_path / "report", "x")[0].read_text())
    assert found["The age of rollouts"] == [
        {
            "arm": "late",
            "oldest, optimiser steps": "8",
            "mean age, optimiser steps": "3.0",
            "versions per completion": "1.50",
            "mean of log s": "-6.0e-03",
            "its spread": "3.0e-02",
            "outside of the clip": "0.90",
            "clipped in mini-batch 0": "0.500",
            "ratio ignores the age": "1",
        }
    ]


def test_a_study_without_runs_has_no_report(tmp_path):
    with pytest.raises(ValueError, match=r"study s has no runs in .*none: run `gspo compare` first"):
        write_report(
            Study("s", (), {"a": ()}, (0,), "a", str(tmp_path / "none")), tmp_path / "r", "gspo compare"
        )
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_report_of_one_seed_says_why_nothing_is_decided(tmp_path):
    study = Study("s", (), {"gspo": (), "grpo": ()}, (0,), "grpo", str(tmp_path / "runs"))
    for arm, seed in study.runs:
        study.run_dir(arm, seed).mkdir(parents=True)
        rows = [{"step": i, "eval/heldout/accuracy": 0.5, "rollout/reward_mean": 0.5} for i in range(3)]
        (study.run_dir(arm, seed) / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = write_report(study, tmp_path / "report", "x")[0].read_text()
    assert "| not testable: one seed that both arms have; at least two are needed |" in text


def test_a_full_disk_leaves_the_old_report_whole(written_study, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_all", lambda *_: {})  # the figures have tests of their own
    (path,) = write_report(written_study, tmp_path / "report", "x")
    before = path.read_text()

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(written_study, tmp_path / "report", "y")
    assert path.read_text() == before


def test_a_report_without_any_figure_has_its_numbers(written_study, tmp_path, monkeypatch):
    """matplotlib fails on every figure: a missing font, a full disk."""

    def broken(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    (path,) = write_report(written_study, tmp_path / "report", "x")
    text = path.read_text()
    assert "| gspo | 0.300 ± 0.000 |" in text
    assert "![" not in text
    assert load_runs(written_study)[0].status == "done"
