"""benchmarks/gpu_rates.py without a GPU: its rows, with a clock instead of an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_rates
from gspo_dist.models.shape import read_shape
from gspo_dist.planner.hardware import find_gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_shape(gpu_rates.write_folder("Qwen3-30B-A3B", None, tmp_path_factory.mktemp("model")))


def test_the_folder_is_the_model_of_that_name(model):
    assert (model.layers, model.vocab, model.num_experts) == (48, 151_936, 128)


def test_a_decode_step_is_told_beside_the_planned_one(model):
    """One sequence meets 8 of 128 experts: weights of 3.05e9 parameters in bf16 at 0.6 of 3,350 GB/s, and
    48 layers of 80 us."""
    planned = 1e3 * (2 * 3.05e9 / (0.6 * 3350e9) + 48 * 80e-6)
    cells = gpu_rates.decode_row(model, find_gpu("H100"), 1, 0.005).split("|")
    assert cells[2].strip() == "5.00 ms"
    assert float(cells[3].split()[0]) == pytest.approx(planned, rel=0.01)
    assert float(cells[4]) == pytest.approx(5.0 / planned, abs=0.01)
    assert cells[5].strip() == "200"


def test_reading_a_token_is_told_beside_the_planned_seconds(model):
    cells = gpu_rates.prefill_row(model, find_gpu("H100"), 8, 20e-6).split("|")
    planned = 1e6 * model.forward_flops(1, 512) / (0.35 * 989e12)
    assert [cell.strip() for cell in cells[1:3]] == ["a token of 8 prompts of 1024", "20.00 us"]
    assert float(cells[3].split()[0]) == pytest.approx(planned, abs=0.01)
    assert cells[5].strip() == "50,000"


def test_a_step_is_the_difference_of_two_lengths_and_the_first_call_of_each_kind_is_not_counted(
    model, monkeypatch
):
    """An engine that takes 7 s to start sampling, 10 us per prompt token that it reads and 4 ms a token."""
    clock, warm = [0.0], set()

    def generate(prompts, spec, use_tqdm):
        kind = (len(prompts), len(prompts[0]["prompt_token_ids"]))
        clock[0] += 7.0 if kind not in warm else 0.0
        warm.add(kind)
        clock[0] += 1e-5 * kind[0] * kind[1] + 0.004 * (spec.max_tokens - 1)

    monkeypatch.setattr(gpu_rates, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    engine = SimpleNamespace(generate=generate)
    rows = gpu_rates.measure(engine, model, find_gpu("H100"), [4], 2048)
    assert [row.split("|")[2].strip() for row in rows] == ["4.00 ms", "10.00 us"]
