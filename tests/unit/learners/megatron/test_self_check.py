"""The megatron learner's self-check passes what it builds right, and finds what it would get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from gspo_dist.learners.megatron import self_check
from gspo_dist.learners.properties import TOLERANCE

FAULTS = Path(__file__).with_name("self_check_faults.py")


def written(family: str, name: str, **changes) -> dict:
    return json.loads(AutoConfig.for_model(family, architectures=[name], **changes).to_json_string())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_fault_of_the_learner_is_found_by_its_property_and_without_one_all_pass() -> None:
    """The faults are put into a learner's process one after the other; see the script."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(FAULTS)],
        input=json.dumps(written("qwen3_moe", "Qwen3MoeForCausalLM")),
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
    # 2 layers of 2 norms, 4 projections, 2 norms of heads, a router and 8 x 3 expert matrices; tables, norm
    assert (
        seen["none"][2]["measured"] == f"{2 * (2 + 4 + 2 + 1 + 24) + 3} tensors of a miniature, bit for bit"
    )
    failed = {name: [f["property"] for f in found if not f["passed"]] for name, found in seen.items()}
    assert failed["rotary base"] == ["alone"]
    assert failed["no borders"] == ["packed"]
    assert failed["swapped halves"] == ["names"]
    assert failed["no replay"] == ["routes"]
    assert failed["unknown family"] == ["alone", "packed", "names", "routes"]
    assert "does not know the architecture" in seen["unknown family"][0]["measured"]


def test_a_process_that_comes_to_nothing_says_how_it_ended(tmp_path, monkeypatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'Fatal: no such kernel' >&2; exit 134\n")
    program.chmod(0o755)
    monkeypatch.setattr(self_check.sys, "executable", str(program))
    with pytest.raises(RuntimeError, match=r"it ended with 134: Fatal: no such kernel"):
        self_check.findings({"model_type": "llama"})
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(self_check, "TIMEOUT_S", 0.2)
    with pytest.raises(RuntimeError, match="more than 0 s"):
        self_check.findings({"model_type": "llama"})
