"""Weight sync into a real vLLM engine: what is published is what it computes, and what goes wrong is seen."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run_vllm_case import run_case


@pytest.mark.parametrize("case", ["sync", "tied", "dense_layer"])
def test_the_engine_computes_the_published_weights_after_every_sync(case, tmp_path):
    """Two syncs of changed weights in several buckets; the first would hide a reload that works only once."""
    result = run_case(case, tmp_path)
    for version, step in enumerate(result["steps"], start=1):
        assert step["gap"] < 1e-5
        assert step["sampled_gap"] < 1e-5
        assert step["wrong_routes"] == 0
        assert step["moved"] > 0.01
        assert step["versions"] == [version]
        assert len(set(step["tensors"])) == 1
        assert len(set(step["bytes"])) == 1
        assert step["proven"] >= 8
    assert result["files"] == []


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
