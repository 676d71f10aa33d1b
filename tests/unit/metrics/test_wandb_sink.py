"""W&B is tried before a run and stays out of its way: real wandb, offline and against local servers."""

from __future__ import annotations

import errno
import json
import logging
import math
import subprocess
from datetime import date
from decimal import Decimal

import pytest

from gspo_dist.config import WandbConfig
from gspo_dist.metrics import wandb_sink
from gspo_dist.metrics.jsonl import MetricsFile, read_jsonl
from gspo_dist.metrics.sinks import Sinks
from gspo_dist.metrics.wandb_sink import NUMBERS, choose_mode, open_wandb

ROWS = [
    {"rollout_id": 1, "prompt": "6*7", "answer": 42, "reward": 1.0, "tokens": 3},
    {"rollout_id": 2, "prompt": "f", "answer": "x+1", "reward": math.nan, "tokens": 4},
    {"rollout_id": 3, "prompt": "pi", "answer": Decimal("3.14"), "reward": 0.0, "tokens": 5},
    {"rollout_id": 4, "prompt": "when", "answer": date(2026, 1, 2), "reward": 0.0, "tokens": 6},
    {"rollout_id": 5, "prompt": "raw", "answer": b"\xff", "reward": 0.0, "tokens": 7},
]


@pytest.fixture
def offline(no_wandb, tmp_path):
    """A real sink of an offline run; wandb's own process ends with the test."""
    import wandb

    sink = open_wandb("offline", WandbConfig(mode="offline"), tmp_path, {"seed": 1}, "abc123")
    yield sink
    wandb.teardown()


# -- before the run --


def test_off_and_offline_ask_nobody(no_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(subprocess, "run", None)
    assert choose_mode(WandbConfig(mode="off")) is None
    assert choose_mode(WandbConfig(mode="offline")) == "offline"


def test_auto_without_a_key_is_offline_and_asks_nobody(no_wandb, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert choose_mode(WandbConfig(mode="auto")) == "offline"


def test_online_without_a_key_is_refused_with_the_way_out(no_wandb):
    with pytest.raises(ValueError, match=r"mode=online needs a key .*no key is set.*wandb login.*mode=auto"):
        choose_mode(WandbConfig(mode="online"))


def test_a_key_is_looked_for_under_the_servers_name(no_wandb, monkeypatch, tmp_path):
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert wandb_sink.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com:8080/")
    assert not wandb_sink.has_key()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_key_that_the_server_takes_is_online(wandb_server, mode):
    wandb_server("works")
    assert choose_mode(WandbConfig(mode=mode)) == "online"


@pytest.mark.slow
def test_a_key_that_the_server_rejects_is_refused_online_and_offline_by_auto(wandb_server, caplog):
    server = wandb_server("rejects")
    with pytest.raises(ValueError, match=rf"needs a key that {server.url} takes: got .*not logged in"):
        choose_mode(WandbConfig(mode="online"))
    with caplog.at_level(logging.WARNING):
        assert choose_mode(WandbConfig(mode="auto")) == "offline"
    assert "not logged in" in caplog.text
    assert "`wandb sync` sends it later" in caplog.text


@pytest.mark.slow
def test_a_key_of_the_wrong_form_is_refused(wandb_server, monkeypatch):
    wandb_server("works")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ValueError, match=r"needs a key .* takes: got .*must have 40"):
        choose_mode(WandbConfig(mode="online"))


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["hangs", "fails"])
def test_a_server_that_does_not_answer_costs_seconds_and_the_run_is_offline(
    wandb_server, caplog, elapsed, behaviour
):
    """Also for `online`: the network is no mistake of the settings, and nothing is lost offline."""
    wandb_server(behaviour)
    with caplog.at_level(logging.WARNING):
        assert choose_mode(WandbConfig(mode="online")) == "offline"
    assert elapsed() < wandb_sink.LOGIN_TIMEOUT_S + 5
    assert "the run is logged offline" in caplog.text


@pytest.mark.slow
def test_a_server_that_refuses_connections_is_offline(wandb_server, monkeypatch, elapsed):
    server = wandb_server("works")
    server.http.server_close()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert choose_mode(WandbConfig(mode="auto")) == "offline"
    assert elapsed() < wandb_sink.LOGIN_TIMEOUT_S + 5


def test_a_login_that_hangs_by_itself_is_ended(wandb_server, monkeypatch, caplog, elapsed):
    """Whatever wandb waits for: its process is ended from outside."""
    wandb_server("works")
    monkeypatch.setattr(wandb_sink, "LOGIN", "import time; time.sleep(600)")
    monkeypatch.setattr(wandb_sink, "LOGIN_TIMEOUT_S", 0.5)
    assert choose_mode(WandbConfig(mode="online")) == "offline"
    assert "no answer within 0.5 s" in caplog.text
    assert elapsed() < 10


def test_a_login_that_dies_is_offline(wandb_server, monkeypatch, caplog):
    wandb_server("works")
    monkeypatch.setattr(wandb_sink, "LOGIN", "import os; os._exit(9)")
    assert choose_mode(WandbConfig(mode="auto")) == "offline"
    assert "the login ended with status 9" in caplog.text


# -- in the run --


@pytest.mark.slow
def test_an_offline_run_takes_answers_of_any_type(offline, tmp_path):
    """wandb refuses a table whose column has two types: 42 and "x+1" in one file ended runs."""
    offline.samples(1, ROWS)
    offline.log(1, {"objective/loss": 0.5, "objective/entropy": math.nan})
    assert offline.run.summary["objective/loss"] == 0.5
    assert offline.run.summary.get("objective/entropy") is None
    offline.close({"steps": 1, "peak": {"host": 1}, "checkpoint": None})
    tables = list(tmp_path.rglob("*.table.json"))
    assert len(tables) == 1
    assert '"x+1"' in tables[0].read_text()
    assert '"42"' in tables[0].read_text()


def test_a_column_has_one_type_in_every_step():
    """Numbers in the columns that are always numbers, texts elsewhere, whatever a step's rows hold."""
    for row in ROWS:
        for name, value in row.items():
            cell = wandb_sink._cell(name, value)
            assert isinstance(cell, (int, float, type(None)) if name in NUMBERS else str)
    assert wandb_sink._cell("reward", math.nan) is None
    assert wandb_sink._cell("rollout_id", 7) == 7


def test_an_episode_is_read_turn_by_turn():
    turns = [
        {"said": "", "answer": "Höre:", "reward": 0.0, "tokens": 0, "versions": []},
        {"said": "2+3\n=", "answer": "5", "reward": 0.5, "tokens": 4, "versions": [3, 4]},
    ]
    shown = wandb_sink._cell("turns", turns).splitlines()
    assert [json.loads(line) for line in shown] == turns
    assert shown[0].startswith('{"said": "", "answer": "Höre:"')


@pytest.mark.slow
def test_a_resumed_run_sends_no_step_twice(offline):
    offline.repeated = 3
    sent = []
    offline.run.log = sent.append
    for step in (3, 4):
        offline.log(step, {"objective/loss": 0.5})
        offline.samples(step, ROWS[:1])
    assert [row["step"] for row in sent] == [4, 4]


@pytest.mark.slow
def test_a_run_that_the_server_does_not_begin_is_offline(
    wandb_server, monkeypatch, tmp_path, caplog, elapsed
):
    """The login works and the server hangs when the run is created."""
    import wandb

    wandb_server("hangs after login")
    monkeypatch.setattr(wandb_sink, "INIT_TIMEOUT_S", 3.0)
    sink = open_wandb("online", WandbConfig(), tmp_path, {}, "abc124")
    try:
        assert sink is not None
        assert sink.run.settings.mode == "offline"
        sink.log(1, {"objective/loss": 0.5})
        sink.close({"steps": 1})
    finally:
        wandb.teardown()
    assert "W&B cannot begin the run" in caplog.text
    assert elapsed() < 60


def test_a_run_that_cannot_even_be_kept_offline_goes_on_without(no_wandb, monkeypatch, tmp_path, caplog):
    import wandb

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wandb, "init", full)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    assert open_wandb("online", WandbConfig(), tmp_path, {}, "abc125") is None
    assert caplog.text.count("W&B cannot begin the run: OSError") == 2
    assert "the run is not logged there" in caplog.text


def test_uploads_at_the_end_are_waited_for_with_a_bound(no_wandb, monkeypatch, tmp_path):
    import wandb

    asked = {}

    class Run:
        def __init__(self) -> None:
            self.summary = {"step": 7}

        def define_metric(self, *_, **__):
            pass

    def init(**kwargs):
        asked.update(kwargs)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    config = WandbConfig(project="p", entity="e", group="g", name="n", tags=["a", "b"])
    sink = open_wandb("online", config, tmp_path, {"seed": 1}, "abc126")
    assert sink.repeated == 7  # of the run that this one goes on with
    settings = asked.pop("settings")
    assert settings.finish_timeout == 300.0
    assert settings.init_timeout == 30.0
    assert asked == {
        **{"project": "p", "entity": "e", "group": "g", "name": "n", "tags": ["a", "b"]},
        **{"config": {"seed": 1}, "dir": str(tmp_path), "mode": "online", "id": "abc126", "resume": "allow"},
    }


@pytest.mark.slow
def test_a_server_that_is_lost_in_the_run_costs_a_bounded_wait_at_its_end(
    wandb_server, monkeypatch, tmp_path, elapsed, caplog
):
    """The run begins online; then nothing is answered any more. Everything lies in the run folder."""
    import wandb

    server = wandb_server("hangs after the run began")
    monkeypatch.setattr(wandb_sink, "FINISH_TIMEOUT_S", 4.0)
    sink = open_wandb("online", WandbConfig(), tmp_path, {}, "abc127")
    try:
        assert sink.run.settings.mode == "online"
        sinks, began = Sinks(MetricsFile(tmp_path), [sink]), elapsed()
        for step in range(1, 11):
            sinks.samples(step, ROWS)
            sinks.log(step, {"objective/loss": 0.5})
        assert elapsed() - began < 25  # one table waits, not ten
        sinks.close({"steps": 10})
        assert elapsed() - began < 50
    finally:
        wandb.teardown()
    assert server.began
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 10
    assert caplog.text.count("the run goes on without samples in WandbSink") == 1
    assert [path.stat().st_size > 1000 for path in tmp_path.rglob("*.wandb")] == [True]
