"""What the table of model families says of a measurement."""

from __future__ import annotations

import os
import time

import pytest

from benchmarks import model_families
from benchmarks.model_families import Row, apart, backend, notes, outcome, scales, startup, synced, table
from gspo_dist.learners.properties import Finding
from gspo_dist.models.shape import shape_from_config

RIGHT = {"start": 2e-6, "synced": 3e-6, "moved": 0.5}


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (None, ""),
        (RIGHT, "yes"),
        (RIGHT | {"start": 0.8}, "no: 8.0e-01 before it"),
        (RIGHT | {"synced": 2e-4}, "no: 2.0e-04 after it"),
        (RIGHT | {"moved": 0.0}, "no: nothing moved"),
        ({"error": "vLLM has no model"}, "no (note)"),
    ],
)
def test_a_sync_is_right_only_if_all_three_numbers_say_so(result, says) -> None:
    assert synced(result) == says


def test_what_failed_is_told_below_the_table() -> None:
    shape = shape_from_config(
        {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 8.0}
        | {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}
        | {"intermediate_size": 64}
    )
    row = Row("granite", shape, None, Finding("export", False, "log-probs differ by up to 1"), "", 0.1)
    zero3 = outcome([Finding("alone", True, ""), Finding("names", False, "no lm_head.weight")])
    measured = {"granite": {"zero3": zero3, "sync": {"error": "vLLM has no model"}}}
    assert scales(shape) == "x 0.125"
    assert (backend(zero3), backend("yes"), backend(None)) == ("no (note)", "yes", "")
    [_, _, line] = table([row], measured)
    assert line.split(" | ")[-4:] == ["no (note)", "", "no (note)", "not checked |"]
    assert list(notes([row], measured)) == [
        "- granite, export: log-probs differ by up to 1",
        "- granite, ZeRO 3: names: no lm_head.weight",
        "- granite, vLLM: vLLM has no model",
    ]


def _returns(family: str) -> str:
    return f"{family} in {os.getpid()}"


def _dies(family: str) -> str:
    os._exit(7)


def _hangs(family: str) -> str:
    time.sleep(60)
    return family


def test_a_measurement_happens_in_a_process_of_its_own_which_may_die_or_hang(monkeypatch) -> None:
    said = apart(_returns, "granite")
    assert isinstance(said, str)
    assert said.startswith("granite in ")
    assert said != _returns("granite")
    assert apart(_dies, "granite") == {"error": "the process ended with 7"}
    monkeypatch.setattr(model_families, "TIMEOUT_S", 0.1)
    assert apart(_hangs, "granite") == {"error": "no answer within 0 s"}


def test_what_the_check_costs_is_told_of_every_learner() -> None:
    seconds = {"loaded": 0.44, "autoep": 1.0, "zero3": 8.06, "megatron": 17.0, "engine": 12.5}
    lines = list(startup({kind: {"cpu": cpu, "elapsed": 99.0} for kind, cpu in seconds.items()}))
    assert [line.split(" | ")[-1] for line in lines if line.startswith("| ")] == [
        "seconds of CPU |",
        "0.4 |",
        "1.0 |",
        "8.1 |",
        "17.0 |",
        "12.5 |",
    ]
    assert list(startup({})) == []
