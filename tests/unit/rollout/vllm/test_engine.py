"""What of the vLLM engine needs no engine: arguments and folders that are refused before vLLM starts."""

from __future__ import annotations

import json
import os

import pytest

from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.vllm import engine as engine_module
from gspo_dist.rollout.vllm.engine import VllmEngine, check_architecture, prepare_process
from gspo_dist.weights.folder import ModelFolder
from tests.unit.weights.tiny_models import make


def test_a_device_that_vllm_was_not_built_for_is_refused(tmp_path) -> None:
    make(tmp_path, "qwen3")
    with pytest.raises(
        ValueError, match=r"cluster\.device=cuda needs vLLM built for it: .* runs on cpu; .*GSPO_ACC.*gpu"
    ):
        VllmEngine(RolloutConfig(), tmp_path, device="cuda")


def test_a_torn_weight_file_is_named_before_vllm_starts(tmp_path) -> None:
    make(tmp_path, "qwen3")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors is torn: .*copy it again"):
        VllmEngine(RolloutConfig(), tmp_path)


def test_an_architecture_that_vllm_does_not_have_is_named(tmp_path) -> None:
    make(tmp_path, "qwen3")
    check_architecture(ModelFolder(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for architectures, said in ((["Dots1ForCausalLM"], "Dots1ForCausalLM"), (None, "a config without")):
        path.write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(ValueError, match=f"no model of its own for {said}.*rollout=reference"):
            check_architecture(ModelFolder(tmp_path))


def test_a_deepseek_that_does_not_say_how_it_routes_is_refused(tmp_path) -> None:
    """transformers takes sigmoid scores and a bias in any case; vLLM takes what the file says."""
    make(tmp_path, "deepseek_v3")
    with pytest.raises(ValueError, match=r'"scoring_func": "sigmoid".*got.*"topk_method": null.*add them'):
        check_architecture(ModelFolder(tmp_path))
    path = tmp_path / "config.json"
    told = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    check_architecture(ModelFolder(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "must be cpu or cuda: got 'tpu'"),
        ({"sleep_mode": True}, r"cannot sleep on a CPU host: set cluster\.colocated=false"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message, tmp_path) -> None:
    config = options.pop("config", RolloutConfig())
    with pytest.raises(ValueError, match=message):
        VllmEngine(config, tmp_path, **options)


@pytest.mark.parametrize(
    ("device", "asked", "told"), [("cuda", True, "1"), ("cuda", False, None), ("cpu", True, None)]
)
def test_batch_invariant_kernels_are_asked_for_before_vllm_is_imported(
    device, asked, told, monkeypatch
) -> None:
    """vLLM reads the variable when its modules are imported. Its CPU build has none of these kernels."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")})
    prepare_process(device, 0, "fp32", batch_invariant=asked)
    assert os.environ.get("VLLM_BATCH_INVARIANT") == told


class ToldError(Exception):
    """Carries what vLLM would have been started with."""


@pytest.mark.parametrize(
    ("changes", "fp32_head", "told"),
    [
        ({"precision": "bf16"}, True, ({"head_dtype": "float32"}, 256)),
        ({"precision": "bf16", "max_num_seqs": 3}, False, ({"head_dtype": "model"}, 3)),
        ({"precision": "fp32"}, True, ({}, 256)),
    ],
)
def test_vllm_is_started_with_the_learners_head_and_the_number_of_sequences(
    changes, fp32_head, told, tmp_path, monkeypatch
) -> None:
    import vllm

    def start(**arguments):
        raise ToldError(arguments["hf_overrides"], arguments["max_num_seqs"])

    monkeypatch.setattr(vllm, "LLM", start)
    make(tmp_path, "qwen3")
    with pytest.raises(ToldError) as started:
        VllmEngine(
            RolloutConfig(max_prompt_tokens=8, max_completion_tokens=8, **changes),
            tmp_path,
            fp32_head=fp32_head,
        )
    assert started.value.args == told


@pytest.mark.parametrize(("asked", "steps"), [(True, ["invariant", "start"]), (False, ["start"])])
def test_products_are_made_invariant_before_the_engine_packs_a_weight(tmp_path, monkeypatch, asked, steps):
    """On a CPU with AMX vLLM chooses a product per layer when it starts, and keeps it."""
    make(tmp_path, "qwen3_moe")
    seen: list[str] = []

    def start(self, *told):
        seen.append("start")
        raise RuntimeError("far enough")

    monkeypatch.setattr(engine_module, "use_batch_invariant_kernels", lambda: seen.append("invariant"))
    monkeypatch.setattr(engine_module, "prepare_process", lambda *told, **more: None)
    monkeypatch.setattr(VllmEngine, "_start", start)
    with pytest.raises(RuntimeError, match="far enough"):
        VllmEngine(RolloutConfig(precision="bf16"), tmp_path, batch_invariant=asked)
    assert seen == steps
