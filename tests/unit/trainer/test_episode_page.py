"""The page of episodes: what every token is, and texts that are no HTML."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gspo_dist.cli.main import main
from gspo_dist.metrics.jsonl import append
from gspo_dist.trainer.episode_page import EPISODES, episode_rows, page_of
from gspo_dist.types import Completion, Prompt, Rollout, Turn


def rollouts(count=1):
    turns = (Turn(0, 0, 1, "", "<"), Turn(1, 3, 4, "ab", "&", 0.5), Turn(4, 5, 5, "c", failed="timeout"))
    mask = np.array([False, True, True, False, True])
    c = Completion(
        np.arange(5), mask, np.where(mask, -3.0, 0.0), np.where(mask, 7, -1), "failed", "", turns=turns
    )
    return [Rollout(i, 0, Prompt("p", (1,), "2<3?"), c, 0.25, {"n": 2.0}) for i in range(count)]


def test_rows_hold_every_token_with_what_is_known_of_it() -> None:
    (row,) = episode_rows(
        rollouts(), [np.array([0, 1.5, 1.5, 0, -1.0])], lambda ids: [f"t{i}" for i in ids], 2
    )
    assert row["tokens"] == ["t0", "t1", "t2", "t3", "t4"]
    assert row["mask"] == [0, 1, 1, 0, 1]
    assert row["logprobs"] == [0.0, -3.0, -3.0, 0.0, -3.0]
    assert row["versions"] == [-1, 7, 7, -1, 7]
    assert row["advantages"] == [0.0, 1.5, 1.5, 0.0, -1.0]
    assert [t["reward"] for t in row["turns"]] == [0.0, 0.5, 0.0]
    many = episode_rows(rollouts(9), [1.0] * 9, lambda ids: [""] * len(ids), 3)
    assert [row["rollout_id"] for row in many] == [0, 4, 8]
    assert many[0]["advantages"] == [1.0] * 5
    assert episode_rows(rollouts(), [1.0], lambda ids: [], 0) == []


def test_numbers_have_four_digits_after_the_point() -> None:
    (episode,) = rollouts()
    episode.completion.logprobs[1] = -1.23456
    (row,) = episode_rows([episode], [np.array([0, 0.98765, 0, 0, 0])], lambda ids: ["t"] * len(ids), 1)
    assert (row["logprobs"][1], row["advantages"][1]) == (-1.2346, 0.9877)


def test_a_token_is_as_red_as_the_legend_says(tmp_path) -> None:
    """From white at 0 to the deepest red at -6 nats, and no deeper."""
    (row,) = episode_rows(rollouts(), [0.0], lambda ids: ["t"] * len(ids), 1)
    row["logprobs"] = [0.0, -20.0, -4.5, 0.0, 0.0]
    append(tmp_path / EPISODES, [{"step": 1, **row}])
    page = page_of(tmp_path, 5)
    for shade, nats in (("0.00", "0"), ("0.50", "-3"), ("1.00", "-6")):
        assert f'<span style="background: rgba(220, 60, 40, {shade})">{nats}</span>' in page
    for token, shade in ((1, "1.00"), (2, "0.75"), (4, "0.00")):
        assert f'<span style="background: rgba(220, 60, 40, {shade})" title="token {token}: log' in page


def test_the_page_is_made_by_the_command(tmp_path, capsys) -> None:
    given = [np.array([0, 0.5, 2.5, 0, -1.0])]
    rows = episode_rows(rollouts(), given, lambda ids: ["<", "b>", "\n", "&", "e"], 1)
    append(tmp_path / EPISODES, [{"step": step, **rows[0]} for step in (1, 2, 3)])
    main(["episodes", str(tmp_path), "--steps", "2"])
    path = tmp_path / "episodes.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text()
    assert page == page_of(tmp_path, 2)
    assert [f"Step {step}, rollout 0" in page for step in (1, 2, 3)] == [False, True, True]
    red = "background: rgba(220, 60, 40, 0.50)"
    assert page.count('class="environment" title="token') == 4
    more = "token 1: log-prob -3, version 7, advantage 0.5"
    assert page.count(f'<span class="more" style="{red}" title="{more}">b&gt;</span>') == 2
    end_of_line = "token 2: log-prob -3, version 7, advantage 2.5"  # seen, and kept
    assert page.count(f'<span class="more" style="{red}" title="{end_of_line}">\u23ce\n</span>') == 2
    less = "token 4: log-prob -3, version 7, advantage -1"
    assert page.count(f'<span class="less" style="{red}" title="{less}">e</span>') == 2
    assert "2&lt;3?" in page
    assert "reward 0.25, ended by failed, answer None, n 2" in page
    cells = [re.findall("<td[^>]*>(.*?)</td>", line) for line in page.split("<tr>")]
    assert [own for own in cells if own][:3] == [
        ["reset", "", "&lt;", "0", "", "", ""],
        ["1", "ab", "&amp;", "0.5", "1.500", "-3.000", "7"],
        ["2", "c", "timeout", "0", "-1.000", "-3.000", "7"],
    ]


def test_a_reset_that_says_nothing_is_no_row(tmp_path) -> None:
    (row,) = episode_rows(rollouts(), [0.0], lambda ids: ["t"] * len(ids), 1)
    row["turns"][0]["answer"] = ""
    append(tmp_path / EPISODES, [{"step": 1, **row}])
    page = page_of(tmp_path, 5)
    assert ">reset</td>" not in page
    assert '<span class="more" style' not in page
    assert '<span class="less" style' not in page


def test_a_run_without_episodes_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["episodes", str(tmp_path)])
    assert end.value.code == 2
    assert "must be a run with an environment" in capsys.readouterr().err
