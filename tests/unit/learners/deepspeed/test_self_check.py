"""The self-check of ZeRO 3 passes what it loads right, and finds what it would get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

FAULTS = Path(__file__).with_name("self_check_faults.py")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_fault_is_found_by_its_property_and_without_one_all_pass(tmp_path) -> None:
    """The whole model has 3 layers, 12 experts and a vocabulary of 200, and its miniature 2, 8 and 128."""
    sizes = {"num_hidden_layers": 3, "num_experts": 12, "vocab_size": 200, "moe_intermediate_size": 8}
    config = AutoConfig.for_model("qwen3_moe", hidden_size=64, intermediate_size=64, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FAULTS), str(tmp_path)],
        input=config.to_json_string(),
        capture_output=True,
        text=True,
        check=False,
        timeout=220,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert [f["property"] for f in seen["none"]] == ["alone", "packed", "names", "routes"]
    # Layers of 2 norms, 4 projections, 2 norms of heads, a router and 3 matrices per expert; tables, norm
    whole, small = 3 * (2 + 4 + 2 + 1 + 36) + 3, 2 * (2 + 4 + 2 + 1 + 24) + 3
    assert seen["none"][2]["measured"] == f"{whole} tensors; {small} tensors of a miniature, bit for bit"
    failed = {name: [f["property"] for f in found if not f["passed"]] for name, found in seen.items()}
    assert failed == {
        "none": [],
        "reversed rows": ["alone", "names"],
        "swapped halves": ["names"],
        "no router": ["names"],
    }
    assert "layers.2.mlp.gate.weight" in seen["no router"][2]["measured"]
