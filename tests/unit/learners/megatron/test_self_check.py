"""The megatron learner's self-check passes what it builds right, and finds what it would get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_dist.learners.properties import TOLERANCE

FAULTS = Path(__file__).with_name("self_check_faults.py")


def written(family: str, name: str, **changes) -> dict:
    return json.loads(AutoConfig.for_model(family, architectures=[name], **changes).to_json_string())


def folder_of(config: dict, folder: Path) -> Path:
    """A model of this config as transformers writes it, without tokenizer."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_fault_of_the_learner_is_found_by_its_property_and_without_one_all_pass(tmp_path) -> None:
    """The faults are put into a learner's process one after the other; see the script. The whole model has 3
    layers, 12 experts and a vocabulary of 200, and its miniature 2, 8 and 128."""
    sizes = {"num_hidden_layers": 3, "num_experts": 12, "vocab_size": 200, "moe_intermediate_size": 8}
    config = written("qwen3_moe", "Qwen3MoeForCausalLM", hidden_size=64, intermediate_size=64, **sizes)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FAULTS), str(folder_of(config, tmp_path))],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert [f["property"] for f in seen["none"]] == ["alone", "packed", "names", "routes"]
    for found in seen["none"]:
        assert found["passed"], found
        if "up to" in found["measured"]:
            assert float(found["measured"].split("up to ")[1].split()[0]) <= TOLERANCE
    # Layers of 2 norms, 4 projections, 2 norms of heads, a router and 3 matrices per expert; tables, norm
    whole, small = 3 * (2 + 4 + 2 + 1 + 36) + 3, 2 * (2 + 4 + 2 + 1 + 24) + 3
    assert seen["none"][2]["measured"] == f"{whole} tensors; {small} tensors of a miniature, bit for bit"
    failed = {name: [f["property"] for f in found if not f["passed"]] for name, found in seen.items()}
    assert failed["rotary base"] == ["alone"]
    assert failed["no borders"] == ["packed"]
    assert failed["swapped halves"] == ["names"]
    assert failed["other name"] == ["names"]
    assert "layers.1.mlp.router.weight" in seen["other name"][2]["measured"]
    assert failed["no replay"] == ["routes"]
    assert failed["unknown family"] == ["alone", "packed", "names", "routes"]
    assert "does not know the architecture" in seen["unknown family"][0]["measured"]
