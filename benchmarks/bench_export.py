"""An export by its costs: host memory, bytes read, seconds; from the checkpoint's files and with its learner.

    python benchmarks/bench_export.py                      # the table of reports/checkpoint.md
    python benchmarks/bench_export.py --only "megatron" --hidden 256

A learner of one rank saves a random Qwen3-MoE. Then two processes export the checkpoint: "files"
as `gspo export` does, "learner" as it did before: it builds the learner, loads the checkpoint and streams.
Both folders must hold the same bytes.

Memory is the most anonymous memory beyond what the process held after its imports, per parameter of the
model. "read" are the bytes of the checkpoint's files that are in the page cache after the export and were not
before, as a share of the checkpoint: the kernel reads ahead, so it is at least what was asked for.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_checkpoint import Peak, head_of, make_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "megatron": {"backend": "megatron"},
    "deepspeed ZeRO 2": {"backend": "deepspeed", "zero_stage": 2},
    "deepspeed ZeRO 3": {"backend": "deepspeed", "zero_stage": 3},
}


def learner_of(layout: dict[str, Any], model: str, port: int) -> Any:
    """One rank's learner."""
    from gspo_dist.config import DeepSpeedConfig, LearnerConfig, MegatronConfig
    from gspo_dist.trainer.setup.factories import make_learner

    rest = dict(layout)
    backend = rest.pop("backend")
    section = {"megatron": MegatronConfig, "deepspeed": DeepSpeedConfig}[backend](**rest)
    config = LearnerConfig(backend=backend, world_size=1, precision="bf16", **{backend: section})
    common = {"total_steps": 1, "temperature": 1.0, "keep_reference": False, "device": "cpu"}
    return config, lambda: make_learner(config, model, **common, master_port=port)


def cached(folder: Path) -> int:
    """Bytes of a folder's files in the page cache."""
    libc, page, total = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, 0
    for path in (p for p in folder.rglob("*") if p.is_file() and p.stat().st_size):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE,
                                                 flags=mmap.MAP_PRIVATE) as held:  # fmt: skip
            pages = -(-len(held) // page)
            vector = (ctypes.c_ubyte * pages)()
            start = ctypes.addressof(ctypes.c_char.from_buffer(held))
            libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(held)), vector)
            total += page * sum(v & 1 for v in vector)
    return total


def drop(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def work(job: dict[str, Any]) -> dict[str, float]:
    """What a process of its own does: saves, or exports in one of the two ways."""
    import torch

    from gspo_dist.learners.group import LocalLearnerGroup
    from gspo_dist.trainer.setup.factories import stored_weights
    from gspo_dist.weights.export import write_hf_folder

    torch.set_num_threads(1)
    model, folder, target = Path(job["model"]), Path(job["folder"]), Path(job["target"])
    config, make = learner_of(job["layout"], str(model), job["port"])
    if job["do"] == "save":
        group = LocalLearnerGroup(make())
        group.save(folder)
        group.wait_saved()
        group.close()
        return {}
    if job["do"] == "learner" and config.backend == "deepspeed":
        from gspo_dist.learners.deepspeed.config import import_deepspeed

        import_deepspeed("cpu")
    drop(folder)
    before = cached(folder)
    with Peak(0.002) as peak:
        if job["do"] == "files":
            write_hf_folder(stored_weights(config, str(model), folder), model, target)
        else:
            group = LocalLearnerGroup(make())
            group.load(folder, 0)
            group.export(model, target)
    return {"extra": peak.extra, "seconds": peak.seconds, "read": cached(folder) - before}


def run(job: dict[str, Any], do: str, scratch: Path) -> dict[str, float]:
    """`work` in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        job = job | {"do": do, "port": probe.getsockname()[1], "target": str(scratch / do)}
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    out = scratch / f"{do}.json"
    command = [sys.executable, __file__, "--work", str(out), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{do} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (
        {n: t for f in d.glob("*.safetensors") for n, t in load_file(f).items()} for d in (one, other)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(LAYOUTS), help="names of layouts")
    parser.add_argument("--hidden", type=int, default=768, help="width; 768 makes 69 million parameters")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # where to write, the job
    options = parser.parse_args()
    if options.work:
        out, job = options.work
        Path(out).write_text(json.dumps(work(json.loads(job))))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", options.hidden)
        heads = (json.loads(head_of(file)) for file in model.glob("*.safetensors"))
        sizes = [
            e["data_offsets"][1] - e["data_offsets"][0] for h in heads for n, e in h.items() if n[0] != "_"
        ]
        print(f"{sum(sizes) // 2:,} parameters, the largest tensor {max(sizes) / 2**20:.0f} MiB\n")
        print(
            "| checkpoint | export from | memory: MiB | bytes per parameter | read, of the checkpoint | s |"
        )
        print("|---|---|---|---|---|---|")
        for name in options.only or LAYOUTS:
            with tempfile.TemporaryDirectory() as place:
                scratch = Path(place)
                job = {"model": str(model), "folder": str(scratch / "saved"), "layout": LAYOUTS[name]}
                run(job, "save", scratch)
                total = sum(p.stat().st_size for p in (scratch / "saved").rglob("*") if p.is_file())
                for how in ("learner", "files"):
                    cost = run(job, how, scratch)
                    each = 2 * cost["extra"] / sum(sizes)
                    print(
                        f"| {name} | {how} | {cost['extra'] / 2**20:.0f} | {each:.2f} "
                        f"| {cost['read'] / total:.2f} | {cost['seconds']:.1f} |",
                        flush=True,
                    )
                assert same(scratch / "learner", scratch / "files"), "the two exports differ"


if __name__ == "__main__":
    main()
