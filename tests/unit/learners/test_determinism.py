"""The deterministic mode: what it sets, what it refuses, and that a gradient repeats itself under it."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from gspo_dist.config import LearnerConfig
from gspo_dist.learners import determinism
from gspo_dist.learners.eager import EagerLearner
from gspo_dist.learners.loss import LossSpec
from gspo_dist.models.shape import find_model
from gspo_dist.objectives.objective import get_objective
from tests.unit.learners.test_forward import mini_of, model  # noqa: F401


@pytest.fixture
def undone(monkeypatch):
    """Gives the process its flags and variables back."""
    for name in determinism.VARIABLES:
        monkeypatch.setenv(name, "")  # so that they are taken away again
        monkeypatch.delenv(name)
    fill, cudnn = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.deterministic = cudnn


def test_it_sets_flags_and_variables_and_keeps_the_users(undone, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "^NVLS")
    determinism.turn_on()
    determinism.turn_on()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    got = {name: os.environ[name] for name in determinism.VARIABLES}
    assert got == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "^NVLS",
    }


def test_after_cuda_has_started_it_is_too_late(undone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match=r"too late: CUDA started without CUBLAS_WORKSPACE_CONFIG, NVTE"):
        determinism.turn_on()
    for name, values in determinism.VARIABLES.items():
        monkeypatch.setenv(name, values[0])
    determinism.turn_on()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("NCCL_ALGO", "Tree"), ("NCCL_ALGO", "Ring,NVLS"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
    ],
)
def test_a_variable_that_undoes_it_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"needs {name} to be one of .*: got '{value}'.*unset it"):
        determinism.check_environment({name: value})
    determinism.check_environment({"NCCL_ALGO": "Ring,CollnetDirect", "HOME": "/"})


def test_layers_with_memory_are_refused_on_a_gpu_alone():
    shape = find_model("Qwen3-30B-A3B")
    determinism.check(shape, "cuda")
    with_memory = replace(shape, layer_kinds=("full_attention", "linear_attention"))
    determinism.check(with_memory, "cpu")
    with pytest.raises(ValueError, match=r"cannot repeat layers of kind linear_attention on a GPU"):
        determinism.check(with_memory, "cuda")


def gradient(config: LearnerConfig, folder) -> torch.Tensor:
    learner, mini = EagerLearner(config, folder, total_steps=1), mini_of([20, 9, 14, 3], 1, 60)
    batches = [b.with_(advantages=torch.where(b.loss_mask, 0.5, 0.0)) for b in mini.micro_batches[0]]
    learner.forward_backward(batches, LossSpec(get_objective("gspo"), mini.denominators))
    return torch.cat([g.flatten() for g in learner.gradients if g is not None])


def test_two_learners_have_one_gradient_bit_for_bit(model, undone):  # noqa: F811
    """A CPU repeats itself anyway: what is shown is that every operation of a step is allowed."""
    config = LearnerConfig(backend="eager", precision="bf16", token_budget=64)
    plain = gradient(config, model)
    assert not torch.are_deterministic_algorithms_enabled()
    config = LearnerConfig(backend="eager", precision="bf16", token_budget=64, deterministic=True)
    first, second = gradient(config, model), gradient(config, model)
    assert torch.are_deterministic_algorithms_enabled()
    assert first.abs().sum() > 0
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain, rtol=1e-2, atol=1e-4)
