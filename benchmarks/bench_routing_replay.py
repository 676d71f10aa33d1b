"""What Routing Replay costs: bytes by arithmetic for Qwen3-30B-A3B, host work and step time by measurement.

    python benchmarks/bench_routing_replay.py                  # CPU, eager learner, a small random MoE
    python benchmarks/bench_routing_replay.py --arithmetic-only
    python benchmarks/bench_routing_replay.py --quickstart     # whole steps of the quickstart, all processes
    python benchmarks/bench_routing_replay.py --quickstart --overrides learner=megatron \\
        learner.deepspeed.expert_parallel=1 learner.megatron.expert_parallel=2
    python benchmarks/bench_routing_replay.py --device cuda --precision bf16 --layers 24 --hidden 1024 \\
        --experts 128 --top-k 8 --moe-intermediate 384 --sequences 8 --length 2048 --out replay.json

It has three parts:
    Arithmetic   bytes of a batch of 1,024 rollouts in every mode.
    Host         concatenating, checking and moving the trace of a micro-batch at Qwen3-30B-A3B's size.
    Step         the pass over old log-probs and forward + backward under none, r2 (records in the first pass,
                 replays in the second) and r3 (replays in both).

The r3 trace is the learner's own with the last token of every sequence unknown, as an engine leaves it. So
all modes compute the same network, and only the machinery differs. Modes are interleaved, round after round.
Medians and quartiles are printed. On a CPU the seconds are the process's CPU time. Before anything is timed,
the log-probs under the learner's own routes are compared with the plain ones. The exit status is 1 if one
changes by more than --tolerance.

--quickstart runs `gspo train experiment=quickstart` with GRPO and recomputed old log-probs under none, r2 and
r3, one after the other and round after round. A learning rate of 1e-12 lets every run sample the same
rollouts: the same work but for the replay. The overhead is the ratio of the lower quartiles of a step over
all rounds, because other work on a shared machine only ever adds time. The medians and each round's ratio of
medians are printed beside it.

A backend of several ranks runs under torchrun: every rank computes its own micro-batch, rank 0 prints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_dist.config import LearnerConfig
from gspo_dist.learners.loss import LossSpec
from gspo_dist.objectives.aggregate import Denominators
from gspo_dist.objectives.objective import get_objective
from gspo_dist.packing import pack_sequences
from gspo_dist.routing.replay import RouteFeeder, RouteRecorder, RouterShape, check_trace
from gspo_dist.routing.trace import RoutingTrace, replay_bytes, trace_bytes
from gspo_dist.trainer.setup.factories import make_learner
from gspo_dist.types import Completion, PackedBatch, Prompt, Rollout

QWEN = {"moe_layers": 48, "top_k": 8, "num_experts": 128}  # Qwen3-30B-A3B's config.json
ROLLOUTS = 1024
MODES = ("none", "r2", "r3")


# ---- arithmetic ----


def arithmetic(ranks: int) -> dict[str, object]:
    """Bytes of one rollout batch in every mode, for completions of 8k and 32k tokens."""
    rows = []
    for length in (8192, 32768):
        size = trace_bytes(ROLLOUTS * length, **QWEN)
        for label, mode, recompute in (
            ("none", "none", True),
            ("r2", "r2", True),
            ("r3, old log-probs recomputed", "r3", True),
            ("r3, engine's log-probs", "r3", False),
        ):
            cost = replay_bytes(mode, size, recompute_old_logprobs=recompute)
            share = {"device_copies_per_rank": cost.device_copies // ranks}
            rows.append({"length": length, "mode": label} | asdict(cost) | share)
    return {"bytes_per_token": trace_bytes(1, **QWEN), "ranks": ranks, "rows": rows}


def print_arithmetic(table: dict[str, object]) -> None:
    """Decimal gigabytes."""
    token = table["bytes_per_token"]
    print(
        f"Qwen3-30B-A3B: {QWEN['moe_layers']} layers x top-{QWEN['top_k']} = {token} bytes per token "
        f"(int32: {4 * token:,}; torch.topk's int64: {8 * token:,}); {ROLLOUTS:,} rollouts, GB:"
    )
    print(f"{'tokens':>7} {'mode':30} {'recorded':>9} {'held':>7} {'wire':>7} {'PCIe':>7} {'PCIe/rank':>10}")
    for r in table["rows"]:
        numbers = [
            r[k] / 1e9 for k in ("recorded", "host_held", "wire", "device_copies", "device_copies_per_rank")
        ]
        print(
            f"{r['length']:>7,} {r['mode']:30} {numbers[0]:>9.2f} {numbers[1]:>7.2f} {numbers[2]:>7.2f} "
            f"{numbers[3]:>7.2f} {numbers[4]:>10.3f}"
        )
    print(
        f"PCIe/rank: over {table['ranks']} data-parallel ranks. Tensor, context and pipeline parallel twins "
        "each receive their replica's trace over the wire.\n"
    )


# ---- timing ----


def quartiles(seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"median_s": middle, "q1_s": low, "q3_s": high}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of wall time on a GPU. On a CPU, CPU time of this process: others stretch it far less."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def host_work(tokens: int, rounds: int, device: torch.device) -> dict[str, object]:
    """Bookkeeping of one micro-batch of `tokens` tokens at Qwen3-30B-A3B's size, without a model."""
    rng = np.random.default_rng(0)
    layers, top_k, experts = QWEN["moe_layers"], QWEN["top_k"], QWEN["num_experts"]
    start = rng.integers(0, experts, (tokens, layers, 1))
    ids = ((start + np.arange(top_k) * 5) % experts).astype(np.uint8)  # distinct within a row
    trace = RoutingTrace(ids, np.ones(tokens, np.bool_), experts)
    parts = [trace[i : i + 2048] for i in range(0, tokens, 2048)]
    shape = RouterShape(tuple(f"layer {i}" for i in range(layers)), top_k, experts)
    native = torch.zeros(tokens, top_k, dtype=torch.int64, device=device)

    def feed() -> None:
        feeder = RouteFeeder([trace], shape, device)
        for layer in feeder.layers:
            layer.choose(native)
        feeder.finish()

    def record() -> None:
        recorder = RouteRecorder(shape)
        for layer in range(layers):
            recorder.see(layer, native)
        recorder.trace()

    work = {
        "concat": lambda: RoutingTrace.concat(parts),
        "check": lambda: check_trace(trace, shape),
        "check_and_feed_all_layers": feed,
        "record_all_layers": record,
    }
    results = {}
    for name, call in work.items():
        call()
        results[name] = quartiles([timed(call, device) for _ in range(rounds)])
    return {"tokens": tokens, "trace_bytes": trace.nbytes, **results}


# ---- the step ----


def write_model(folder: Path, args: argparse.Namespace) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    heads = max(2, args.hidden // 64)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
            moe_intermediate_size=args.moe_intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            head_dim=args.hidden // heads,
            num_experts=args.experts,
            num_experts_per_tok=args.top_k,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            max_position_embeddings=args.length,
        )
    )
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")


def make_batch(args: argparse.Namespace, rank: int) -> PackedBatch:
    """`--sequences` rollouts of `--length` tokens in one micro-batch. A quarter of each is the prompt."""
    rng = np.random.default_rng([1, rank])
    prompt = args.length // 4
    new = args.length - prompt
    rollouts = [
        Rollout(
            i,
            i,
            Prompt(str(i), tuple(rng.integers(0, args.vocabulary, prompt).tolist()), ""),
            Completion(
                rng.integers(0, args.vocabulary, new),
                np.ones(new, np.bool_),
                np.full(new, -2.0, np.float32),
                np.zeros(new, np.int32),
                "length",
                "",
            ),
            0.0,
        )
        for i in range(args.sequences)
    ]
    return pack_sequences(rollouts, rng.choice([-1.0, 1.0], args.sequences).tolist(), range(args.sequences))


class Step:
    """One learner and one micro-batch, run under any mode."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device(args.device)
        config = LearnerConfig(
            backend=args.backend,
            world_size=self.world,
            precision=args.precision,
            activation_checkpointing=args.checkpointing and args.backend != "megatron",
            token_budget=args.sequences * args.length,
            threads=args.threads,
        )
        if args.backend == "megatron" and args.checkpointing:
            config = replace(config, megatron=replace(config.megatron, recompute="full"))
        if args.expert_parallel > 1:
            part = replace(getattr(config, args.backend), expert_parallel=args.expert_parallel)
            config = replace(config, **{args.backend: part})
        self.learner = make_learner(
            config,
            str(folder),
            total_steps=1,
            temperature=1.0,
            keep_reference=False,
            device=args.device,
            rank=rank,
            world_size=self.world,
            master_addr=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(os.environ.get("MASTER_PORT", "29511")),
        )
        self.batch = make_batch(args, self.learner.data_parallel_rank)
        trained = int(self.batch.loss_mask.sum())
        self.spec = LossSpec(get_objective("gspo"), Denominators(args.sequences, trained, args.length))
        self.recorded = self.learner.logprobs([self.batch], record_routing=True)[0].routing
        known = self.recorded.known.copy()
        known[self.batch.cu_seqlens[1:].numpy() - 1] = False
        self.engine = RoutingTrace(self.recorded.expert_ids, known, self.recorded.num_experts)

    def old_logprobs(self, mode: str) -> PackedBatch:
        """The pass over old log-probs; returns the batch as the update gets it."""
        batch = self.batch.with_(routing=self.engine) if mode == "r3" else self.batch
        output = self.learner.logprobs([batch], record_routing=mode == "r2")[0]
        routing = output.routing if mode == "r2" else batch.routing
        return batch.with_(old_logprobs=output.logprobs, routing=routing)

    def update(self, batch: PackedBatch) -> None:
        self.learner.forward_backward([batch], self.spec)

    def measure(self, rounds: int) -> dict[str, dict[str, object]]:
        """Interleaved rounds, so that a slow spell of the machine falls on all modes alike."""
        seconds: dict[str, dict[str, list[float]]] = {
            m: {"old_logprobs": [], "update": [], "step": []} for m in MODES
        }
        for round_ in range(rounds + 1):
            for mode in MODES if round_ % 2 else MODES[::-1]:
                box: list[PackedBatch] = []
                first = timed(lambda m=mode, b=box: b.append(self.old_logprobs(m)), self.device)
                second = timed(lambda b=box: self.update(b[0]), self.device)
                if round_:  # the first round warms up
                    for name, value in (
                        ("old_logprobs", first),
                        ("update", second),
                        ("step", first + second),
                    ):
                        seconds[mode][name].append(value)
        return {mode: {name: quartiles(v) for name, v in parts.items()} for mode, parts in seconds.items()}

    def deviation(self) -> float:
        """Largest change of a log-prob by replaying the learner's own routes."""
        plain = self.old_logprobs("none").old_logprobs
        own = self.learner.logprobs([self.batch.with_(routing=self.recorded)])[0].logprobs
        return max(
            float((own - plain).abs().max()),
            float((self.old_logprobs("r3").old_logprobs - plain).abs().max()),
        )


def print_step(results: dict[str, dict[str, object]], step: Step, args: argparse.Namespace) -> None:
    trace = step.recorded
    print(
        f"{args.backend}, {args.device}, {args.precision}: {trace.num_layers} MoE layers, "
        f"top-{trace.top_k} of {trace.num_experts}, hidden {args.hidden}, "
        f"{args.sequences} x {args.length} tokens, "
        f"{'with' if args.checkpointing else 'without'} activation checkpointing, {step.world} rank(s)"
    )
    print(f"trace {trace.nbytes:,} bytes ({trace.expert_ids.nbytes // len(trace)} per token + 1 mark)")
    print(f"{'mode':5} {'old log-probs s':>22} {'forward+backward s':>22} {'step s':>22} {'over none':>10}")
    base = results["none"]["step"]["median_s"]
    for mode, parts in results.items():
        cells = [f"{p['median_s']:.4f} [{p['q1_s']:.4f} {p['q3_s']:.4f}]" for p in parts.values()]
        more = 100 * (parts["step"]["median_s"] / base - 1)
        print(f"{mode:5} " + " ".join(f"{c:>22}" for c in cells) + f" {more:>9.1f}%")


# ---- the quickstart ----


SPANS = ("collect", "old_logprobs", "update", "reward", "pack", "sync", "step")


def quickstart(args: argparse.Namespace) -> dict[str, object]:
    """Whole steps of the main job under every mode: seconds by part, bytes, and each round's overhead."""
    from bench_step import measure

    rows: dict[str, list[list[dict]]] = {mode: [] for mode in MODES}
    for round_ in range(args.rounds):
        for mode in MODES[:: 1 if round_ % 2 else -1]:
            print(f"round {round_ + 1}: {mode}", file=sys.stderr, flush=True)
            rows[mode].append(
                measure(
                    [
                        "experiment=quickstart",
                        "objective=grpo",
                        f"objective.routing_replay={mode}",
                        "flips.every=0",
                        "learner.optimizer.lr=1e-12",
                        "rollout.weight_sync.probe_every=0",
                        *args.overrides,
                    ],
                    args.steps,
                    None,
                )
            )
    out: dict[str, object] = {}
    for mode, rounds in rows.items():
        steps = [row for round_ in rounds for row in round_]
        ratios = [
            statistics.median(r["time/step_s"] for r in mine)
            / statistics.median(r["time/step_s"] for r in none)
            for mine, none in zip(rounds, rows["none"], strict=True)
        ]
        out[mode] = {
            "seconds": {span: quartiles([r[f"time/{span}_s"] for r in steps]) for span in SPANS},
            "ratios_to_none": ratios,
            "bytes": {
                k: statistics.median(r[k] for r in steps)
                for k in steps[0]
                if k.startswith(("routing/replay", "time/attach_routes"))
            },
            "completion_tokens": [int(r["rollout/completion_tokens_total"]) for r in rounds[0]],
        }
    return out


def print_quickstart(results: dict[str, dict], overrides: Sequence[str]) -> None:
    print(f"quickstart, GRPO, old log-probs recomputed {' '.join(overrides)}")
    parts = " | ".join(f"{span}, s" for span in SPANS)
    print(f"| mode | {parts} | step, lower quartile | over none | medians, each round |")
    print("|---|" + "---:|" * (len(SPANS) + 3))
    base = results["none"]["seconds"]["step"]["q1_s"]
    for mode, r in results.items():
        cells = [f"{r['seconds'][span]['median_s']:.4f}" for span in SPANS]
        low = r["seconds"]["step"]["q1_s"]
        each = ", ".join(f"{100 * (x - 1):+.1f}%" for x in r["ratios_to_none"])
        print(f"| {mode} | {' | '.join(cells)} | {low:.4f} | {100 * (low / base - 1):+.1f}% | {each} |")
    for mode, r in results.items():
        if r["bytes"]:
            print(f"{mode}: " + ", ".join(f"{k.split('/')[1]} {v:,.4g}" for k, v in r["bytes"].items()))
    same = len({tuple(r["completion_tokens"]) for r in results.values()}) == 1
    print(
        "the same number of tokens was sampled in every mode"
        if same
        else "NOT the same work: token counts differ"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arithmetic-only", action="store_true", help="measure nothing")
    parser.add_argument("--backend", choices=("eager", "deepspeed", "megatron"), default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument("--expert-parallel", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    for name, value in (
        ("layers", 6),
        ("hidden", 128),
        ("experts", 32),
        ("top-k", 4),
        ("moe-intermediate", 64),
        ("vocabulary", 2048),
        ("sequences", 4),
        ("length", 512),
        ("rounds", 9),
        ("host-tokens", 16384),
        ("ranks", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--quickstart", action="store_true", help="time whole steps of the main job instead")
    parser.add_argument("--steps", type=int, default=12, help="of each run (--quickstart)")
    parser.add_argument("--overrides", nargs="*", default=[], help="hydra overrides (--quickstart)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="of log-probs under the own routes, nats"
    )
    parser.add_argument("--out", type=Path, help="writes every number as JSON")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.quickstart:
        results = quickstart(args)
        print_quickstart(results, args.overrides)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
        return 0
    speaks = int(os.environ.get("RANK", "0")) == 0
    report: dict[str, object] = {"arithmetic": arithmetic(args.ranks)}
    if speaks:
        print_arithmetic(report["arithmetic"])
    status = 0
    if not args.arithmetic_only:
        device = torch.device(args.device)
        if speaks:
            report["host"] = host_work(args.host_tokens, args.rounds, device)
            work = [
                f"{k} {1e3 * q['median_s']:.1f}" for k, q in report["host"].items() if isinstance(q, dict)
            ]
            print(
                f"bookkeeping of {args.host_tokens:,} tokens at Qwen3-30B-A3B's size, ms: {', '.join(work)}\n"
            )
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), args)
            step = Step(Path(folder), args)
            worst = step.deviation()
            status = int(worst > args.tolerance)
            report["step"] = {
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "args": {k: str(v) for k, v in vars(args).items()},
                "max_logprob_change": worst,
                "trace_bytes": step.recorded.nbytes,
                "modes": step.measure(args.rounds),
            }
            if speaks:
                print_step(report["step"]["modes"], step, args)
                print(
                    f"largest change of a log-prob by replaying the own routes: {worst:.1e} nats"
                    + (f" (above --tolerance {args.tolerance:.0e})" if status else "")
                )
            step.learner.close()
    if speaks and args.out:
        args.out.write_text(json.dumps(report, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
