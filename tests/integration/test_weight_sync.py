"""Weight sync into a real vLLM engine: what is published is what it computes, and what goes wrong is seen."""

import pytest

from tests.integration.run_vllm_case import run_case


@pytest.mark.parametrize("case", ["sync", "tied", "dense_layer"])
def test_the_engine_computes_the_published_weights_after_every_sync(case, tmp_path):
    """Changed weights in several buckets, as tensors, as parts of stacks, and as whole stacks over gloo.

    One sync alone would hide a reload that works only once.
    """
    result = run_case(case, tmp_path)
    for version, step in enumerate(result["steps"], start=1):
        assert step["gap"] < 1e-5
        assert step["sampled_gap"] < 1e-5
        assert step["wrong_routes"] == 0
        assert step["moved"] > 0.01
        assert step["versions"] == [version]
        assert len(set(step["tensors"])) == 1
        assert len(set(step["bytes"])) == 1
        assert (step["sums"] == step["tensors"][0]) == (version == 1)
        assert step["proven"] >= 8
    # 48 or 72 expert tensors travel as two stacks per layer of experts.
    assert result["steps"][2]["sums"] - result["steps"][0]["tensors"][0] in (4 - 48, 6 - 72)
    assert result["files"] == []


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "glm4_moe", "deepseek_v3"])
def test_families_with_names_of_their_own_are_synced_too(family, tmp_path):
    """Their folders name or hold experts otherwise than Qwen's. GLM-4's router has a buffer,
    and DeepSeek's attention hands its rotary embedding slices of heads."""
    result = run_case(family, tmp_path)
    if family == "mixtral":  # two sequences after each of two syncs, to the bit
        assert result["equal"] == [True] * 4
    # Log-probs move by more than 2 nats; the largest difference seen is 9e-6 (Granite).
    assert result["start"] < 2e-5
    assert max(result["gaps"]) < 2e-5
    assert min(result["moved"]) > 1
    assert len(set(result["tensors"])) == 1


def test_a_head_of_its_own_is_used_though_the_config_says_tied(tmp_path):
    assert max(run_case("untold_head", tmp_path)["gaps"]) < 1e-5


def test_what_the_engine_cannot_place_is_named_before_it_is_loaded(tmp_path):
    name, shape, missing = run_case("wrong_names", tmp_path)["says"]
    assert "engine cannot place model.layers.0.mlp.experts.0.gate_proj.weight [96, 128]" in name
    assert "engine cannot place lm_head.weight: it comes as [499, 128] and is [500, 128]" in shape
    assert "engine got no lm_head.weight (1 of " in missing


@pytest.fixture(scope="module")
def corruption(tmp_path_factory):
    return run_case("corruption", tmp_path_factory.mktemp("corruption"))


def test_the_probe_sees_a_reload_that_checksums_cannot(corruption):
    """vllm 0.30.0 without the expert repack: every byte arrives, the logits are wrong."""
    assert "disagree after the sync of version 1" in corruption["caught"]
    assert corruption["mended"] < 1e-5


def test_one_flipped_bit_is_seen_and_named(corruption):
    assert "received other bytes for model.embed_tokens.weight in version 3" in corruption["flipped"]


def test_an_engine_with_half_an_update_refuses_to_work(tmp_path):
    says = run_case("half_update", tmp_path)["says"]
    assert "middle of a weight update" in says[0]
    assert "does not exist" in says[1]
    assert "half-loaded weights" in says[2]
    assert says[3].startswith("WeightSyncError")


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    return run_case("sharp_bf16", tmp_path_factory.mktemp("sharp"))


def test_the_engines_head_computes_in_float32_before_and_after_a_sync(sharp):
    """Logits up to 15: exact to float32's rounding, where bf16 rounds them to 1/16."""
    for error, dtype, largest in sharp["heads"]:
        assert (dtype, largest > 10) == ("torch.float32", True)
        assert error < 1e-5
    error, dtype, _ = sharp["bf16_head"][0]
    assert (dtype, error > 1e-2) == ("torch.bfloat16", True)


def test_a_healthy_sync_passes_the_probe_though_logits_are_peaked_and_precision_is_bf16(sharp):
    """The fixed 0.02 nats of before would have stopped this run."""
    assert {round(mean, 9) for mean in sharp["healthy"]} == {round(sharp["healthy"][0], 9)}
    assert 0.02 < sharp["healthy"][0] < 0.04


def test_the_first_sync_of_a_run_finds_one_wrong_expert_below_the_mismatch(sharp):
    assert sorted(sharp["first"]) == [
        "expert_not_loaded",
        "expert_zero",
        "experts_swapped",
        "last_layers_swapped",
    ]
    for fault, said in sharp["first"].items():
        assert "another policy after a sync of the very weights that it had loaded" in str(said), fault


def test_every_later_probe_finds_two_layers_in_each_others_place(sharp):
    assert sorted(sharp["later"]) == ["01", "12", "23"]
    for layers, said in sharp["later"].items():
        assert "can be mismatch, which was 0.02" in str(said), layers
