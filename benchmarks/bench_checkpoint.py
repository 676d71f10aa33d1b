"""A checkpoint by its costs: host memory, bytes and seconds of a save and of a load, on real ranks (gloo).

    python benchmarks/bench_checkpoint.py                      # the tables of reports/checkpoint.md
    python benchmarks/bench_checkpoint.py --only "megatron DP2" --hidden 256

Every rank is a process with one learner of a random Qwen3-MoE. It saves twice and loads twice, and the second
of each is measured: the first starts what later ones keep (the writers' server, imports).

Memory is what the rank's process and its children hold at most, beyond what they held before, per parameter
that the rank holds: anonymous pages, a fork's only where they differ from its parent's. Bytes written are the
sizes of files with the rank's number. Bytes read are those of the items (Megatron) and files (DeepSpeed) that
the rank opens. "read" is their sum over ranks, as a multiple of the bytes of the checkpoint. "model" and
"build" are the peak resident memory, pages of mapped files included, that a rank takes while it reads the
model's folder (DeepSpeed) and while it makes its learner, per parameter of the model. "export" is that of a
process of its own which writes an HF folder from the checkpoint's files, as `gspo export --no-probe` does:
the second of two as well. --profile FOLDER leaves cProfile's tables of rank 0's save and load there, for
`python -m pstats FOLDER/save.prof`.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "megatron DP2": (2, {"backend": "megatron"}),
    "megatron EP2 x 2 replicas": (4, {"backend": "megatron", "expert_parallel": 2}),
    "deepspeed ZeRO 1": (2, {"backend": "deepspeed", "zero_stage": 1}),
    "deepspeed ZeRO 2": (2, {"backend": "deepspeed", "zero_stage": 2}),
    "deepspeed ZeRO 2, EP4": (4, {"backend": "deepspeed", "zero_stage": 2, "expert_parallel": 4}),
}


class Peak:
    """The most anonymous memory of a process and its children in the block, beyond what it was before."""

    def __init__(self, every_s: float = 0.05) -> None:
        self.every_s, self.extra, self.seconds = every_s, 0, 0.0

    def __enter__(self) -> Peak:
        self.before = held()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.start = time.perf_counter()
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.is_set():
            self.extra = max(self.extra, held() - self.before)
            self.stop.wait(self.every_s)

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.stop.set()
        self.thread.join()


def held(pid: int | None = None) -> int:
    """Bytes of anonymous memory of this process, and what its children (of `pid`) have of their own.

    A fork's pages are its parent's until one writes. Shares of them (Pss) would count pages twice where
    a fork happens between two readings.
    """
    total = 0
    with contextlib.suppress(OSError):  # a child may end in between
        file, key = ("smaps_rollup", "Private_Dirty:") if pid else ("status", "RssAnon:")
        for line in Path(f"/proc/{pid or 'self'}/{file}").read_text().splitlines():
            if line.startswith(key):
                total += int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid or 'self'}/task").iterdir():
            total += sum(held(int(child)) for child in (task / "children").read_text().split())
    return total


class Resident:
    """Peak resident memory of this process beyond what it was, in all and while a part of the work runs."""

    def __init__(self) -> None:
        self.before, self.peaks, self.part = self._status("VmRSS:"), [0], 0
        self._reset()

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is held

    def whole(self) -> int:
        """The peak since the beginning."""
        return max(*self.peaks, self._status("VmHWM:")) - self.before

    def counted(self, verb: Any) -> Any:
        """`verb`, whose own peak is kept in `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.peaks.append(self._status("VmHWM:"))
            begun = self._status("VmRSS:")
            self._reset()
            try:
                return verb(*args, **kwargs)
            finally:
                self.peaks.append(self._status("VmHWM:"))
                self.part = max(self.part, self.peaks[-1] - begun)

        return call


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Counts what is read of a checkpoint: items of torch's distributed format, and files of torch.save."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    sizes: list[int] = []
    slice_file, load = FileSystemReader._slice_file, torch.load

    def sliced(self: Any, file: Any, info: Any) -> Any:
        sizes.append(info.length)
        return slice_file(self, file, info)

    def loaded(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str | Path):
            sizes.append(Path(file).stat().st_size)
        return load(file, *args, **kwargs)

    FileSystemReader._slice_file, torch.load = sliced, loaded  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        FileSystemReader._slice_file, torch.load = slice_file, load  # type: ignore[method-assign]


def written_by(folder: Path, rank: int) -> int:
    """Bytes of the files that carry this rank's number; rank 0 also has those that carry none."""
    total = 0
    for path in (p for p in folder.rglob("*") if p.is_file()):
        found = re.match(r"__(\d+)_|(?:bf16_)?zero_pp_rank_(\d+)_|random_(\d+)\.pt", path.name)
        owner = next((int(n) for n in found.groups() if n is not None), 0) if found else 0
        total += path.stat().st_size if owner == rank else 0
    return total


@contextlib.contextmanager
def profiled(job: dict[str, Any], rank: int, name: str) -> Iterator[None]:
    """Notes where rank 0 spends the block's seconds, where that was asked for."""
    if rank or not job["profile"]:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    profile.dump_stats(f"{job['profile']}/{name}.prof")


def rank_main(job: dict[str, Any], rank: int) -> dict[str, float]:
    """One rank: builds, saves twice, loads twice; what the second ones cost."""
    import torch

    from gspo_dist.config import DeepSpeedConfig, LearnerConfig, MegatronConfig

    torch.set_num_threads(1)
    layout = dict(job["layout"])
    backend, world = layout.pop("backend"), job["world"]
    common = {"backend": backend, "world_size": world, "precision": job["precision"]}
    empty = held()
    learner: Any
    if backend == "megatron":
        from gspo_dist.learners.megatron.learner import MegatronLearner

        config = LearnerConfig(**common, megatron=MegatronConfig(**layout))
        resident = Resident()
        learner = MegatronLearner(config, job["model"], total_steps=1)
        parameters = sum(p.numel() for chunk in learner.chunks for p in chunk.parameters())
    else:
        from gspo_dist.learners.deepspeed import learner as module
        from gspo_dist.learners.deepspeed.config import import_deepspeed

        import_deepspeed("cpu")  # not counted
        config = LearnerConfig(**common, deepspeed=DeepSpeedConfig(**layout))
        resident = Resident()
        module.load_policy = resident.counted(module.load_policy)
        learner = module.DeepSpeedLearner(
            config, job["model"], total_steps=1, rank=rank, world_size=world, master_port=job["port"]
        )
        parameters = sum(p.numel() for p in learner.policy.parameters())
    built, size = resident.whole(), job["parameters"]
    folder = Path(job["checkpoint"])
    for _ in range(2):
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        torch.distributed.barrier()
        with Peak() as save, profiled(job, rank, "save"):
            learner.save(folder)
            learner.wait_saved()
    torch.distributed.barrier()
    written = written_by(folder, rank)
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    for _ in range(2):
        torch.distributed.barrier()
        with Peak() as load, counted_reads() as read, profiled(job, rank, "load"):
            learner.load(folder)
    state = held() - empty
    torch.distributed.barrier()
    learner.close()
    return {
        "parameters": parameters,
        "state": state / parameters,
        "model": resident.part / size,
        "build": built / size,
        "save_extra": save.extra / parameters,
        "save_s": save.seconds,
        "written": written,
        "load_extra": load.extra / parameters,
        "load_s": load.seconds,
        "read": sum(read),
        "total": total,
    }


def export_main(job: dict[str, Any]) -> dict[str, float]:
    """Writes an HF folder from the checkpoint, without a learner: peak resident memory, and seconds."""
    from gspo_dist.config import DeepSpeedConfig, LearnerConfig, MegatronConfig
    from gspo_dist.trainer.setup.factories import stored_weights
    from gspo_dist.weights.export import write_hf_folder

    layout = dict(job["layout"])
    backend = layout.pop("backend")
    section = {backend: (MegatronConfig if backend == "megatron" else DeepSpeedConfig)(**layout)}
    config = LearnerConfig(backend=backend, world_size=job["world"], precision=job["precision"], **section)
    folder, model = Path(job["checkpoint"]), Path(job["model"])
    for target in ("first", "second"):  # the first imports what reads models: 180 MiB
        resident, start = Resident(), time.perf_counter()
        write_hf_folder(stored_weights(config, str(model), folder), model, folder.parent / target)
    return {"export": resident.whole() / job["parameters"], "export_s": time.perf_counter() - start}


def make_model(folder: Path, hidden: int) -> Path:
    """A random Qwen3-MoE whose experts hold most of its weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=hidden // 8,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=hidden // 2,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    ).bfloat16()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def head_of(file: Path) -> bytes:
    """The head of a safetensors file, which is JSON."""
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))


def measure(
    world: int, layout: dict[str, Any], model: Path, precision: str, profile: str | None
) -> list[dict[str, float]]:
    """What every rank of a layout tells."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        job = {"world": world, "layout": layout, "model": str(model), "precision": precision}
        job["profile"] = profile and str(Path(profile).resolve())
        job["parameters"] = sum(
            math.prod(entry["shape"])
            for file in model.glob("*.safetensors")
            for name, entry in json.loads(head_of(file)).items()
            if name != "__metadata__"
        )
        job |= {"checkpoint": f"{folder}/checkpoint", "port": port}
        environment = os.environ | {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            # Freed memory goes back at once: a peak could hide in what an earlier save left behind.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        ranks = []
        for rank in range(world):
            log = open(f"{folder}/log{rank}", "w+")  # noqa: SIM115 - read below
            command = [sys.executable, __file__, "--rank", f"{folder}/rank{rank}.json", json.dumps(job)]
            process = subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=log, stderr=log)
            ranks.append((process, log))
        try:
            for rank, (process, log) in enumerate(ranks):
                if process.wait(timeout=900):
                    log.seek(0)
                    raise SystemExit(f"rank {rank} failed:\n{log.read()[-3000:]}")
        finally:
            for process, log in ranks:
                process.kill()
                process.wait()
                log.close()
        told = [json.loads(Path(f"{folder}/rank{rank}.json").read_text()) for rank in range(world)]
        command = [sys.executable, __file__, "--export", f"{folder}/export.json", json.dumps(job)]
        subprocess.run(command, env=environment, check=True, timeout=900, stdout=subprocess.DEVNULL)
        exported = json.loads(Path(f"{folder}/export.json").read_text())
        return [rank | exported for rank in told]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(LAYOUTS), help="names of layouts")
    parser.add_argument("--hidden", type=int, default=768, help="width; 768 makes 69 million parameters")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--profile", metavar="FOLDER", help="an existing folder for cProfile's tables")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)  # where to write, the job
    parser.add_argument("--export", nargs=2, help=argparse.SUPPRESS)  # the same
    options = parser.parse_args()
    if options.export:
        out, job = options.export
        Path(out).write_text(json.dumps(export_main(json.loads(job))))
        return
    if options.rank:
        out, job = options.rank
        Path(out).write_text(json.dumps(rank_main(json.loads(job), int(os.environ["RANK"]))))
        return
    print("Bytes per parameter that the rank holds; the largest and the smallest rank where they differ.\n")
    print(
        "| layout | model | build | save: extra | save: s | written per rank "
        "| load: extra | load: s | read per rank | read | export | export: s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", options.hidden)
        for name in options.only or LAYOUTS:
            ranks = measure(*LAYOUTS[name], model, options.precision, options.profile)

            def span(key: str, per: bool = False, ranks: list[dict[str, float]] = ranks) -> str:
                values = [rank[key] / (rank["parameters"] if per else 1) for rank in ranks]
                low, high = f"{min(values):.1f}", f"{max(values):.1f}"
                return low if low == high else f"{low} to {high}"

            read = sum(rank["read"] for rank in ranks) / ranks[0]["total"]
            print(
                f"| {name} | {span('model')} | {span('build')} | {span('save_extra')} | {span('save_s')} | "
                f"{span('written', True)} | {span('load_extra')} | {span('load_s')} | {span('read', True)} | "
                f"{read:.2f} | {ranks[0]['export']:.2f} | {span('export_s')} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
