"""What DeepSpeed is told, and what is refused before it starts."""

from __future__ import annotations

import pytest
from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from gspo_dist.config import DeepSpeedConfig, LearnerConfig, OptimizerConfig
from gspo_dist.learners.deepspeed.config import check, check_values, engine_config, import_deepspeed
from gspo_dist.learners.deepspeed.passed import FREE, TOP
from gspo_dist.models.shape import ModelShape, shape_from_config


def shape(model: PretrainedConfig) -> ModelShape:
    return shape_from_config(model.to_dict())


MOE = shape(Qwen3MoeConfig(num_experts=12, norm_topk_prob=True))


def config(world_size: int = 4, precision: str = "fp32", **ds: object) -> LearnerConfig:
    return LearnerConfig(
        backend="deepspeed",
        world_size=world_size,
        precision=precision,
        deepspeed=DeepSpeedConfig(**ds),
        optimizer=OptimizerConfig(lr=3e-6, grad_clip=0.7),
    )


@pytest.mark.parametrize(
    ("ds", "model", "device", "message"),
    [
        ({"offload_optimizer": True}, MOE, "cpu", "offload_optimizer needs a GPU host: got device 'cpu'"),
        ({"offload_params": True, "zero_stage": 3}, MOE, "cpu", "offload_params needs a GPU host"),
        ({"grouped_mm": True}, MOE, "cpu", "grouped_mm needs a GPU host"),
        ({"grouped_mm": True}, MOE, "cuda", "grouped_mm needs learner.precision=bf16: got fp32"),
        (
            {"offload_optimizer": True, "zero_stage": 0},
            MOE,
            "cuda",
            "offload_optimizer needs zero_stage 1 to 3: got 0",
        ),
        ({"expert_parallel": 2, "zero_stage": 0}, MOE, "cpu", "expert_parallel needs zero_stage 1 to 3"),
        ({"expert_parallel": 2}, shape(Qwen3Config()), "cpu", "must be 1 for a qwen3 model: got 2"),
        ({"expert_parallel": 8}, MOE, "cpu", "must divide num_experts: got 8 and 12; try 1, 2, 4"),
    ],
)
def test_settings_that_cannot_run_are_refused(ds: dict, model: ModelShape, device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(config(world_size=8, **ds), model, device)


def test_settings_that_can_run_pass() -> None:
    check(config(zero_stage=3, expert_parallel=4), MOE, "cpu")
    all_on = {"offload_optimizer": True, "offload_params": True, "grouped_mm": True}
    check(config(precision="bf16", zero_stage=3, **all_on), MOE, "cuda")


@pytest.mark.parametrize(
    ("asked", "device", "precision", "grouped"),
    [
        (None, "cuda", "bf16", True),
        (None, "cuda", "fp32", False),
        (None, "cpu", "bf16", False),
        (False, "cuda", "bf16", False),
        (True, "cuda", "bf16", True),
    ],
)
def test_experts_are_multiplied_together_where_that_can_be(
    asked: bool | None, device: str, precision: str, grouped: bool
) -> None:
    settings = config(precision=precision, expert_parallel=2, grouped_mm=asked)
    section = engine_config(settings, MOE, device=device)["expert_parallel"]
    assert section["use_grouped_mm"] is grouped


def test_gradients_accumulate_and_travel_in_fp32() -> None:
    for stage in (1, 2, 3):
        out = engine_config(config(precision="bf16", zero_stage=stage), MOE)
        assert out["bf16"]["enabled"]
        assert out["data_types"]["grad_accum_dtype"] == "fp32"
        assert out["communication_data_type"] == "fp32"
        assert out["managed_gradient_accumulation"] is False
        assert out["zero_optimization"]["stage"] == stage
        assert out["gradient_clipping"] == 0.7


def test_the_reference_has_no_optimiser_and_is_sharded_as_the_policy() -> None:
    for stage, expected in ((0, 0), (1, 0), (2, 0), (3, 3)):
        ep = 2 if stage else 1
        out = engine_config(config(zero_stage=stage, expert_parallel=ep), MOE, trains=False)
        assert "optimizer" not in out
        assert out["zero_optimization"]["stage"] == expected
        assert ("expert_parallel" in out) == (ep > 1)
        for precision in ("bf16", "fp16"):
            half = config(zero_stage=stage, expert_parallel=ep, precision=precision)
            assert (precision in engine_config(half, MOE, trains=False)) == (stage == 3)
            assert precision in engine_config(half, MOE)


def test_gate_weights_are_renormalised_exactly_where_the_model_does() -> None:
    for model, norm in ((MOE, True), (shape(Qwen2MoeConfig(num_experts=12, norm_topk_prob=False)), False)):
        assert engine_config(config(expert_parallel=2), model)["expert_parallel"]["route_norm"] is norm


def test_the_optimiser_is_torchs_adamw_with_the_runs_numbers() -> None:
    for offload in (False, True):
        out = engine_config(config(zero_stage=2, offload_optimizer=offload), MOE)
        kernel = {} if offload else {"torch_adam": True}
        numbers = {"lr": 3e-6, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
        assert out["optimizer"] == {"type": "AdamW", "params": numbers | kernel}


def test_only_a_bare_torch_optimiser_is_left_to_the_learner_to_clip() -> None:
    clips = {
        (stage, precision): engine_config(config(precision=precision, zero_stage=stage), MOE)[
            "gradient_clipping"
        ]
        for stage in (0, 1)
        for precision in ("fp32", "bf16")
    }
    assert clips == {(0, "fp32"): 0.0, (0, "bf16"): 0.7, (1, "fp32"): 0.7, (1, "bf16"): 0.7}


def test_offloading_is_of_what_the_reference_has() -> None:
    settings = config(zero_stage=3, offload_optimizer=True, offload_params=True)
    policy = engine_config(settings, MOE)["zero_optimization"]
    reference = engine_config(settings, MOE, trains=False)["zero_optimization"]
    assert policy["offload_optimizer"] == policy["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert reference["offload_param"] == policy["offload_param"]
    assert "offload_optimizer" not in reference


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        (
            {"comms_loger": {}},
            r"learner\.deepspeed\.config must hold names that DeepSpeed's configuration has: got "
            r"'comms_loger'; did you mean 'comms_logger'\?",
        ),
        (
            {"zero_optimization": {"reduce_bucket_sise": 5}},
            r"config\.zero_optimization must hold .*: got 'reduce_bucket_sise'; did you mean 'reduce_",
        ),
        ({"timers": {"throughput": {"enable": False}}}, r"timers\.throughput must .*did you mean 'enabled'"),
        ({"flops_profiler": {"step": 1}}, r"flops_profiler must hold names .*got 'step'"),
        ({"zero_optimization": 3}, r"zero_optimization must be a section: got 3"),
        (
            {"zero_optimization": {"stage": 3}},
            r"leave alone what gspo_dist sets itself: got stage=3; set learner\.deepspeed\.zero_stage",
        ),
        ({"gradient_clipping": 2.0}, r"gradient_clipping=2\.0; set learner\.optimizer\.grad_clip"),
        ({"bf16": {"enabled": True}}, r"enabled=True; set learner\.precision"),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            r"offload_optimizer needs learner\.deepspeed\.offload_optimizer: got false",
        ),
    ],
)
def test_what_cannot_be_passed_on_is_refused_with_the_way_out(passed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(config(config=passed), MOE, "cpu")


def test_what_is_passed_on_is_merged_section_by_section() -> None:
    passed = {
        "zero_optimization": {
            "stage3_prefetch_bucket_size": 7,
            "overlap_comm": False,
            "offload_optimizer": {"ratio": 0.5},
        },
        "wall_clock_breakdown": True,
    }
    mine = config(zero_stage=2, offload_optimizer=True, config=passed)
    check(mine, MOE, "cuda")
    out = engine_config(mine, MOE)
    plain = engine_config(config(zero_stage=2, offload_optimizer=True), MOE)
    assert out.pop("wall_clock_breakdown") is True
    zero, own = out.pop("zero_optimization"), plain.pop("zero_optimization")
    assert zero == own | {
        "stage3_prefetch_bucket_size": 7,
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.5},
    }
    assert out == plain
    frozen = engine_config(mine, MOE, trains=False)  # its states are nowhere
    assert frozen["zero_optimization"] == {
        "stage": 0,
        "overlap_comm": False,
        "stage3_prefetch_bucket_size": 7,
    }
    assert passed["zero_optimization"]["offload_optimizer"] == {"ratio": 0.5}  # the user's own is untouched


class Asked(dict):
    """A configuration that notes which of its keys DeepSpeed asks for."""

    keys_asked: set[str]

    def __init__(self, *pairs: object) -> None:
        super().__init__(*pairs)
        self.keys_asked = set()

    def _asked(self, key: str) -> None:
        self.keys_asked.add(key)

    def __contains__(self, key: object) -> bool:
        self._asked(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: object = None) -> object:
        self._asked(key)
        return super().get(key, default)

    def keys(self) -> Asked:  # type: ignore[override]
        return self


def test_the_list_of_keys_is_what_deepspeed_reads() -> None:
    asked = Asked({"train_micro_batch_size_per_gpu": 1})
    import_deepspeed("cpu").DeepSpeedConfig(asked)
    assert asked.keys_asked == set(FREE) | set(TOP)


def test_a_wrong_type_is_told_before_deepspeed_gets_a_model() -> None:
    deepspeed = import_deepspeed("cpu")
    check_values(deepspeed, engine_config(config(), MOE), {})
    passed = {"zero_optimization": {"reduce_bucket_size": "many"}}
    with pytest.raises(
        ValueError, match=r"DeepSpeed refuses learner\.deepspeed\.config=.*reduce_bucket_size"
    ):
        check_values(deepspeed, engine_config(config(config=passed), MOE), passed)
