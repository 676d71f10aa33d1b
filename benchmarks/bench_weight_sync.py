"""A publication by its parts: the learner's stream, the transport, and a real vLLM engine in its own process.

    python benchmarks/bench_weight_sync.py                    # the three sizes of reports/weight_sync.md
    python benchmarks/bench_weight_sync.py --size 30b-names   # one of them: 30b-names, quickstart, 1gib

30b-names has the 18,867 tensors of Qwen3-30B-A3B under their names with small shapes, so that what is
measured is the cost per tensor. "tensors" sends each on its own, as every publication did before stacks.
"stacks" sends experts as `gspo_dist.weights.stacks` names them, as the product does.

Times are medians over rounds. The ways take turns, so that a busy machine slows all of them alike. Parts of
the two processes overlap, so they add up to more than the wall.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, dict[str, int]] = {
    "30b-names": {
        "num_hidden_layers": 48, "num_experts": 128, "hidden_size": 64, "moe_intermediate_size": 32,
        "intermediate_size": 64, "vocab_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32,
    },
    "quickstart": {
        "num_hidden_layers": 4, "num_experts": 8, "hidden_size": 128, "moe_intermediate_size": 64,
        "intermediate_size": 128, "vocab_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32,
    },
    "1gib": {
        "num_hidden_layers": 8, "num_experts": 16, "hidden_size": 1024, "moe_intermediate_size": 576,
        "intermediate_size": 576, "vocab_size": 4096, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip
"""Qwen3-MoE shapes in float32. quickstart: about its million parameters. 1gib: 0.92 GiB of weights."""
WAYS = [("tensors", "shm"), ("stacks", "shm"), ("tensors", "gloo"), ("stacks", "gloo")]
PARTS = ("export", "stage", "sum (sender)", "receive", "sum (engine)", "load", "finish")

Seconds = dict[str, float]


@contextlib.contextmanager
def timed(into: Seconds, part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into[part] += time.perf_counter() - start


def wrap(owner: Any, method: str, into: Seconds, part: str) -> None:
    """Counts the seconds of every call of `owner.method`."""
    real = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        with timed(into, part):
            return real(*args, **kwargs)

    setattr(owner, method, call)


def make_folder(folder: Path, shape: dict[str, int]) -> torch.nn.Module:
    """The model in memory, as a learner holds it, and its folder."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **shape, num_experts_per_tok=2, max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=1
    )
    hf = Qwen3MoeForCausalLM(config).float().eval()
    hf.save_pretrained(folder)
    write_tokenizer(folder)
    return hf


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)


def engine_process(folder: str, pipe: Connection) -> None:
    """Answers (verb, arguments) until the pipe closes."""
    from gspo_dist.config import RolloutConfig
    from gspo_dist.rollout.vllm.engine import VllmEngine

    config = RolloutConfig(
        precision="fp32", max_prompt_tokens=16, max_completion_tokens=16, max_num_seqs=4, kv_cache_gib=0.1,
        enforce_eager=True, threads=1,
    )  # fmt: skip
    engine = VllmEngine(config, folder)
    (receiver,) = engine.llm.collective_rpc(lambda worker: worker.weight_transfer_engine)
    parts: Seconds = defaultdict(float)
    wrap(receiver, "_load", parts, "load")
    wrap(receiver, "finish_weight_update", parts, "finish")
    pipe.send("up")
    while True:
        try:
            verb, arguments = pipe.recv()
        except EOFError:
            break
        if verb == "parts":
            answer: Any = dict(parts)
            parts.clear()
        else:
            answer = getattr(engine, verb)(*arguments)
        if verb == "init_weight_sync":
            count_arrivals(receiver.source, parts)
        pipe.send(answer)
    engine.close()


def count_arrivals(source: Any, parts: Seconds) -> None:
    begin = source.begin

    def counted(info: Any) -> Callable[[], Any]:
        with timed(parts, "receive"):
            arriving = begin(info)

        def arrived() -> Any:
            with timed(parts, "receive"):
                return arriving()

        return arrived

    source.begin = counted


class Engine:
    """The engine in its process."""

    def __init__(self, folder: Path) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=engine_process, args=(str(folder), theirs)
        )
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "up"

    def ask(self, verb: str, *arguments: Any) -> Any:
        self.pipe.send((verb, arguments))
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.close()
        self.process.join(60)


class Sender:
    """The learner's side over one transport."""

    def __init__(self, transport_name: str, engine: Engine) -> None:
        from gspo_dist.weights.send import make_transport

        where = {"address": "127.0.0.1", "engines": ["engine"]} if transport_name == "gloo" else {}
        self.engine = engine
        self.transport = make_transport(transport_name, **where)
        with ThreadPoolExecutor(1) as meeting:
            met = meeting.submit(self.transport.connect)
            engine.ask("init_weight_sync", self.transport.init_info(0))
            met.result()

    def publish(self, hf: torch.nn.Module, way: str, version: int, bucket_bytes: int) -> Seconds:
        from gspo_dist.weights.names import hf_named_weights
        from gspo_dist.weights.send import send_weights
        from gspo_dist.weights.stream import buckets
        from gspo_dist.weights.verify import verify_receipt

        parts: Seconds = defaultdict(float)
        stage = self.transport.stage
        wrap(self.transport, "stage", parts, "stage")
        start = time.perf_counter()
        self.engine.ask("start_weight_update")
        stream = buckets(
            hf_named_weights(hf, slice_bytes=bucket_bytes, stacked=way == "stacks"), bucket_bytes
        )
        report = send_weights(
            drawn(stream, parts), self.transport, lambda info: self.engine.ask("update_weights", info)
        )
        receipt = self.engine.ask("finish_weight_update", version)
        parts["wall"] = time.perf_counter() - start
        verify_receipt(report.checksums, receipt, version)
        self.transport.stage = stage  # type: ignore[method-assign]
        parts |= self.engine.ask("parts")
        parts["tensors"], parts["travelled"], parts["bytes"] = (
            report.tensors,
            len(report.checksums),
            report.bytes,
        )
        parts["sum (sender)"], parts["sum (engine)"] = report.seconds_checking, receipt.seconds_checking
        parts["stage"] -= report.seconds_checking
        parts["load"] -= receipt.seconds_checking
        return parts


def drawn(stream: Iterator[Any], parts: Seconds) -> Iterator[Any]:
    """The stream, and the seconds that drawing it takes."""
    while True:
        with timed(parts, "export"):
            bucket = next(stream, None)
        if bucket is None:
            return
        yield bucket


def copy_seconds(nbytes: int) -> float:
    """One copy of as many bytes within this host's memory: the least that any transport costs."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.empty(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(size: str, rounds: int, bucket_mib: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        hf = make_folder(Path(folder), SIZES[size])
        engine = Engine(Path(folder))
        rows: dict[tuple[str, str], list[Seconds]] = defaultdict(list)
        version = 0
        for _ in range(rounds + 1):  # the first one warms up
            for transport in ("shm", "gloo"):
                sender = Sender(transport, engine)
                for way in ("tensors", "stacks"):
                    version += 1
                    rows[way, transport].append(sender.publish(hf, way, version, bucket_mib << 20))
                sender.transport.close()
        engine.close()
    nbytes = int(rows[WAYS[0]][0]["bytes"])
    copy = copy_seconds(nbytes)
    print(f"\n### {size}: {int(rows[WAYS[0]][0]['tensors'])} tensors, {nbytes / 2**20:.1f} MiB, ", end="")
    print(f"one copy in memory {copy * 1e3:.2f} ms\n")
    print(
        "| way | transport | travel as | " + " | ".join(PARTS) + " | wall s | us per tensor | wall / copy |"
    )
    print("|---" * (len(PARTS) + 6) + "|")
    for way, transport in WAYS:
        kept = rows[way, transport][1:]
        middle = {part: statistics.median(row.get(part, 0.0) for row in kept) for part in (*PARTS, "wall")}
        each = middle["wall"] / kept[0]["tensors"] * 1e6
        print(
            f"| {way} | {transport} | {int(kept[0]['travelled'])} | "
            + " | ".join(f"{middle[part]:.3f}" for part in PARTS)
            + f" | {middle['wall']:.3f} | {each:.0f} | {middle['wall'] / copy:.1f} |"
        )
    walls = {way: [f"{row['wall']:.3f}" for row in rows[way][1:]] for way in WAYS}
    print("\nwall of every round: " + "; ".join(f"{' '.join(w)} {', '.join(v)}" for w, v in walls.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bucket-mib", type=int, default=256)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, one thread each"
    )
    for size in SIZES if chosen.size == "all" else [chosen.size]:
        measure(size, chosen.rounds, chosen.bucket_mib)
    print(f"\npeak memory of the sender {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
