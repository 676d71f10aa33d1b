"""One step of gpu_check.py, in this process: it measures, compares with what is expected, and prints JSON.

    python benchmarks/gpu_steps.py head --device cuda

gpu_check.py runs the steps one after the other, each in a process of its own, so that one that dies ends
nobody else. host, head and eager need only torch, triton and transformers. The others need the whole
installation, and import it when they run.
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_dist.config import LearnerConfig, MegatronConfig, OptimizerConfig, RolloutConfig
from gspo_dist.learners.loss import LossSpec
from gspo_dist.learners.parking import Parking
from gspo_dist.models.config_file import find_config
from gspo_dist.models.shape import read_shape
from gspo_dist.objectives.objective import get_objective
from gspo_dist.packing import MiniBatch, pack
from gspo_dist.planner.hardware import GIB, Gpu, find_gpu
from gspo_dist.planner.layout import LearnerLayout
from gspo_dist.planner.memory import learner_memory
from gspo_dist.probes import from_sequences
from gspo_dist.routing.flips import flip_stats
from gspo_dist.types import Completion, LogprobOutput, PackedBatch, Prompt, Rollout, SamplingSpec

SAMPLED = 64
"""Tokens of each completion of the engine's steps."""
GPU_FAMILIES = ("qwen3_moe", "mixtral", "llama", "qwen3", "qwen2", "mistral")
"""`model_type` of what `learners/exact/gpu.py` knows, mixtures first."""
RESULT = "RESULT "
"""Begins the line of JSON in a step's output."""


class NotHereError(Exception):
    """A step that cannot run on this host, with the reason."""


@dataclass(frozen=True)
class Size:
    """What a step computes: on a GPU layers of Qwen3-30B-A3B, on a CPU a toy of the same architecture."""

    precision: str
    layers: int
    hidden: int
    vocabulary: int
    tokens: int
    """Of one micro-batch, which is also the head's."""
    logprob_gap: float
    """Largest mean |difference| of log-probs, in nats, between two ways to compute them. Random weights give
    more than trained ones, and a wrong computation about 1."""
    flips: float
    """Largest share of routers that may choose other experts on the two sides."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """Sizes that differ from Qwen3-30B-A3B's."""


SIZES = {
    "cuda": Size("bf16", 2, 2048, 151_936, 8192, logprob_gap=0.1, flips=0.05),
    "cpu": Size(
        "fp32",
        2,
        64,
        512,
        256,
        logprob_gap=1e-4,
        flips=0.0,
        changes={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
}


class Step:
    """What a step measured, and what was expected of it."""

    def __init__(self, device: str, work: Path) -> None:
        self.device, self.work, self.size = device, work, SIZES[device]
        self.measured: dict[str, float | str] = {}
        self.expected: list[dict[str, Any]] = []
        self.miniature: Path | None = None

    def note(self, name: str, value: float | str) -> None:
        """A figure for the report, of which nothing is expected."""
        self.measured[name] = value

    def expect(
        self, name: str, value: float, *, most: float | None = None, least: float | None = None
    ) -> None:
        """A figure with its bound. nan meets none."""
        self.note(name, value)
        met = (most is None or value <= most) and (least is None or value >= least)
        bound = f"at most {most:.4g}" if most is not None else f"at least {least:.4g}"
        self.expected.append({"name": name, "value": value, "bound": bound, "met": bool(met)})

    @property
    def gpu(self) -> Gpu | None:
        """The card as the planner knows it, where it does."""
        if self.device == "cpu":
            return None
        try:
            return find_gpu(torch.cuda.get_device_name(0))
        except ValueError:
            return None

    def model(self) -> Path:
        """A random model of the step's size, made once and shared by the steps, or the miniature."""
        if self.miniature is not None:
            return self.miniature
        folder = self.work / "model"
        if not (folder / "tokenizer.json").is_file():
            make_model(folder, self.size)
        return folder

    def use_miniature(self, family: str, precision: str) -> None:
        """Makes a miniature of a family, in this precision, the step's model."""
        from benchmarks.exact_families import prepare

        folder = self.work / "families" / f"{family}_{precision}"
        folder.mkdir(parents=True, exist_ok=True)
        prepare(family, precision, folder)
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        self.size = replace(self.size, precision=precision, vocabulary=vocabulary)
        self.miniature = folder

    def in_own_process(self, name: str, *arguments: str) -> dict[str, Any]:
        """What a step with these arguments measures in a process of its own, where vLLM keeps no other model.

        RuntimeError with its last lines, where it does not come to an end.
        """
        command = [sys.executable, __file__, name, "--device", self.device, "--work", str(self.work)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        told = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        if done.returncode or not told:
            raise RuntimeError(
                f"{name} {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}"
            )
        return json.loads(told[-1].removeprefix(RESULT))["measured"]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes the seconds of a block, the GPU's work included."""
        start = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.note(name, time.perf_counter() - start)


def make_model(folder: Path, size: Size) -> None:
    """Layers of Qwen3-30B-A3B with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from gspo_dist.coldstart.tokenizer import build_tokenizer

    known, _ = find_config("Qwen3-30B-A3B")
    shape = {k: v for k, v in known.items() if k not in ("architectures", "model_type")}
    config = Qwen3MoeConfig(**{**shape, **size.changes, "num_hidden_layers": size.layers})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if size.precision == "bf16" else torch.float32)
    try:
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    build_tokenizer().save_pretrained(folder)


def mini_batch(size: Size) -> MiniBatch:
    """One full micro-batch of sequences with a long tail of lengths."""
    rng, rollouts, left = np.random.default_rng(0), [], size.tokens
    while left > 16:
        n = int(np.clip(rng.lognormal(np.log(size.tokens / 12), 0.6), 8, left - 8))
        tokens = rng.integers(3, size.vocabulary, n)
        prompt = Prompt("p", tuple(rng.integers(3, size.vocabulary, 8).tolist()), "")
        completion = Completion(
            tokens, np.ones(n, bool), np.full(n, -1.0, np.float32), np.zeros(n, np.int32), "stop", ""
        )
        rollouts.append(Rollout(len(rollouts), 0, prompt, completion, float(len(rollouts) % 2)))
        left -= n + 8
    signs = [1.0 if r.reward else -1.0 for r in rollouts]
    return pack(
        rollouts, signs, replicas=1, token_budget=size.tokens, mini_batches=1,
        max_completion_length=size.tokens, seed=(0,),
    )[0]  # fmt: skip


def learner_config(step: Step, backend: str) -> LearnerConfig:
    return LearnerConfig(
        backend=backend,
        precision=step.size.precision,
        token_budget=step.size.tokens,
        optimizer=OptimizerConfig(lr=1e-5),
        megatron=MegatronConfig(recompute="none", async_save=False),
    )


def make(step: Step, backend: str, config: LearnerConfig | None = None) -> Any:
    """A learner of one rank in this process."""
    config, options = config or learner_config(step, backend), {"total_steps": 10, "temperature": 1.0}
    if backend == "eager":  # directly: the chooser imports what a bare torch does not have
        from gspo_dist.learners.eager import EagerLearner

        return EagerLearner(config, step.model(), device=step.device, **options)
    from gspo_dist.trainer.setup.factories import make_learner

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    return make_learner(
        config,
        str(step.model()),
        keep_reference=False,
        device=step.device,
        master_port=port,
        **options,
    )


def completed(batch: PackedBatch, output: LogprobOutput) -> torch.Tensor:
    """Log-probs of the trained tokens, [N]."""
    return output.logprobs[batch.loss_mask]


def train(step: Step, learner: Any) -> list[torch.Tensor]:
    """Three updates on one batch, timed after the first. Returns the log-probs before them."""
    mini = mini_batch(step.size)
    (batches,) = mini.micro_batches
    with step.timed("log-probs, first call s"):
        before = learner.logprobs(batches)
    with step.timed("log-probs s"):
        learner.logprobs(batches)
    spec = LossSpec(get_objective("gspo"), mini.denominators)
    for name in ("update, first call s", "update s", "update s"):
        with step.timed(name):
            stats = learner.forward_backward(batches, spec)
            optim = learner.optim_step()
    step.expect("gradient norm", optim.grad_norm, least=1e-12)
    step.expect("loss is finite", float(np.isfinite(float(stats["objective/loss"].result()))), least=1)
    tokens, seconds = mini.num_tokens, float(step.measured["update s"])
    step.note("update tokens/s", tokens / seconds)
    if step.gpu is not None:
        flops = 3 * read_shape(step.model()).forward_flops(tokens, tokens / 12)
        step.expect("MFU of the update", flops / seconds / (step.gpu.tflops * 1e12), least=0.05)
    return [completed(b, o) for b, o in zip(batches, before, strict=True)]


# ---- the steps, in the order of what most likely breaks


def host(step: Step) -> None:
    """torch, its build, the cards."""
    step.note("torch", torch.__version__)
    step.note("CUDA of the build", str(torch.version.cuda))
    if step.device == "cpu":
        return
    step.expect("GPUs", torch.cuda.device_count(), least=1)
    step.note("card", torch.cuda.get_device_name(0))
    step.note("compute capability", ".".join(map(str, torch.cuda.get_device_capability(0))))
    step.note("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    free, total = torch.cuda.mem_get_info(0)
    step.expect("free share of the first GPU's memory", free / total, least=0.9)
    if step.gpu is not None:
        step.expect("memory over what the planner counts with", total / step.gpu.memory, least=0.98)


def head(step: Step) -> None:
    """The fused head (Triton on a GPU) against the matrix products that it cannot do without."""
    from gspo_dist.learners.head.logprobs import taken_logprobs

    size = step.size
    dtype = torch.bfloat16 if size.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(size.tokens, size.hidden, generator=generator).to(step.device, dtype)
    w = (torch.randn(size.vocabulary, size.hidden, generator=generator) / size.hidden**0.5).to(
        step.device, dtype
    )
    ids = torch.randint(size.vocabulary, (size.tokens,), generator=generator).to(step.device)
    h.requires_grad_(), w.requires_grad_()

    def ours() -> torch.Tensor:
        return taken_logprobs(h, w, ids, fp32_head=True).logprobs

    def floor() -> None:
        with torch.no_grad():
            gradient = torch.empty(size.tokens, 4096, device=step.device, dtype=dtype)
            for block in w.split(4096):
                torch.mm(h, block.t())
                torch.mm(h, block.t())  # the backward pass computes the logits again
                torch.mm(gradient[:, : len(block)], block)
                torch.mm(gradient[:, : len(block)].t(), h)

    rows = slice(0, 64)
    with torch.no_grad():
        exact = (h[rows].double() @ w.double().t()).log_softmax(-1).gather(1, ids[rows, None])[:, 0]
    error = float((ours().detach()[rows].double() - exact).abs().max())
    step.expect("largest error of a log-prob, nats", error, most=1e-3 if step.device == "cuda" else 1e-4)
    both = {
        "matmul floor, forward + backward s": floor,
        "head, forward + backward s": lambda: ours().sum().backward(),
    }
    for name, work in both.items():
        for warm in range(2):
            with step.timed(name if warm else f"{name} (first)"):
                work()
    ratio = float(step.measured["head, forward + backward s"]) / float(
        step.measured["matmul floor, forward + backward s"]
    )
    if step.device == "cpu":
        step.note("head over floor", ratio)
        return
    step.expect("head over floor", ratio, most=1.5)
    if step.gpu is not None:
        sheet = 8 * size.tokens * size.hidden * size.vocabulary / (step.gpu.tflops * 1e12)
        step.expect(
            "floor over the data sheet",
            float(step.measured["matmul floor, forward + backward s"]) / sheet,
            most=2.5,
        )


def eager(step: Step) -> None:
    """The reference learner at the real layers' shapes: packing, update, memory."""
    learner = make(step, "eager")
    (batches,) = mini_batch(step.size).micro_batches
    (batch,) = batches
    packed = learner.logprobs([batch])[0]
    rows = batch.rows(batch.num_sequences - 1)
    start = int(batch.loss_mask[rows].nonzero()[0])
    [[alone]] = from_sequences(
        [(batch.token_ids[rows].numpy(), start)], replicas=1, token_budget=step.size.tokens
    )
    gap = (
        learner.logprobs([alone])[0].logprobs[alone.loss_mask] - packed.logprobs[rows][batch.loss_mask[rows]]
    )
    step.expect(
        "packed against alone, mean size of the difference, nats",
        float(gap.abs().mean()),
        most=step.size.logprob_gap,
    )
    train(step, learner)
    if step.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        layout = LearnerLayout(learner_config(step, "eager"))
        table, _ = learner_memory(read_shape(step.model()), layout, 0)
        step.note("peak GiB", peak / GIB)
        step.expect("peak over the plan", peak / (table.total - table.bytes_of("runtime")), most=1.25)


def against_eager(step: Step, backend: str) -> None:
    """A learner's log-probs against the eager learner's, and three updates of it."""
    (batches,) = mini_batch(step.size).micro_batches
    reference = make(step, "eager")
    wanted = [completed(b, o) for b, o in zip(batches, reference.logprobs(batches), strict=True)]
    reference.close()
    del reference
    gc.collect()  # its hooks refer to it in a circle
    if step.device == "cuda":
        torch.cuda.empty_cache()
    with step.timed("start s"):
        learner = make(step, backend)
    found = train(step, learner)
    gap = torch.cat(found) - torch.cat(wanted)
    step.expect(
        "against eager, mean size of the difference, nats",
        float(gap.abs().mean()),
        most=step.size.logprob_gap,
    )
    learner.close()


def deepspeed(step: Step) -> None:
    """DeepSpeed, one rank, ZeRO 2."""
    against_eager(step, "deepspeed")


def megatron(step: Step) -> None:
    """Megatron-core, one rank, with Transformer Engine on a GPU."""
    needs_transformer_engine(step)
    against_eager(step, "megatron")


def needs_transformer_engine(step: Step) -> None:
    from gspo_dist.learners.megatron.layout import check_transformer_engine

    if step.device == "cuda":
        try:
            check_transformer_engine()
        except ValueError as missing:
            raise NotHereError(str(missing)) from None


def gradients_of(learner: Any, backend: str) -> list[torch.Tensor]:
    """Copies of the gradients of the step that was just made, where betas[0] is 0: AdamW's first moments."""
    if backend == "megatron":
        parts = getattr(learner.optimizer, "chained_optimizers", [learner.optimizer])
        inner = [part.optimizer for part in parts]
    else:
        inner = [learner.optimizer if backend == "eager" else learner.engine.optimizer.optimizer]
    return [state["exp_avg"].clone() for one in inner for state in one.state.values()]


def deterministic(step: Step) -> None:
    """The gradient of one mini-batch, computed twice by each backend in its deterministic mode."""
    mini = mini_batch(step.size)
    (batches,) = mini.micro_batches
    spec = LossSpec(get_objective("gspo"), mini.denominators)
    for backend in ("eager", "deepspeed", "megatron"):
        if backend == "megatron":
            try:
                needs_transformer_engine(step)
            except NotHereError as reason:
                step.note(backend, f"left out: {reason}")
                continue
        # A learning rate that is 0 in float32: a step moves nothing. Its first moments are the gradients.
        still = OptimizerConfig(lr=1e-300, betas=(0.0, 0.95), weight_decay=0.0, grad_clip=0.0)
        config = replace(learner_config(step, backend), deterministic=True, optimizer=still)
        learner, seen, norms = make(step, backend, config), [], []
        for name in ("first", "second"):
            with step.timed(f"{backend}, {name} s"):
                learner.forward_backward(batches, spec)
                norms.append(learner.optim_step().grad_norm)
            seen.append(gradients_of(learner, backend))
        step.expect(f"{backend}: gradient norm", norms[0], least=1e-12)
        step.expect(f"{backend}: values compared", float(sum(g.numel() for g in seen[0])), least=1)
        differ = sum(int((a != b).sum()) for a, b in zip(*seen, strict=True)) + (norms[0] != norms[1])
        step.expect(f"{backend}: gradient values that differ", float(differ), most=0.0)
        learner.close()
        del learner, seen
        gc.collect()
        if step.device == "cuda":
            torch.cuda.empty_cache()


def start_engine(step: Step, *, eager: bool = False, **options: Any) -> Any:
    from gspo_dist.rollout.vllm.engine import VllmEngine

    config = RolloutConfig(
        precision=step.size.precision, max_prompt_tokens=64, max_completion_tokens=64, kv_cache_gib=0.25,
        enforce_eager=eager or step.device == "cpu", gpu_memory_utilization=0.4,
    )  # fmt: skip
    with step.timed("engine start s"):
        return VllmEngine(config, step.model(), device=step.device, threads=1, **options)


def sampled(step: Step, engine: Any, **options: Any) -> tuple[list[Prompt], list[list[Completion]]]:
    """64 completions (8 on a CPU), sampled twice: the first call warms up."""
    rng = np.random.default_rng(1)
    asked = [Prompt(f"p{i}", tuple(rng.integers(3, step.size.vocabulary, 24).tolist()), "") for i in range(8)]
    spec = SamplingSpec(
        n=8 if step.device == "cuda" else 1, max_tokens=SAMPLED, seed=0, stop_token_ids=(), **options
    )
    for name in ("sampling, first call s", "sampling s"):
        with step.timed(name):
            groups = engine.generate(asked, spec, range(8))
    tokens = sum(len(c) for group in groups for c in group)
    step.note("sampled tokens/s", tokens / float(step.measured["sampling s"]))
    return asked, groups


def joined(asked: list[Prompt], groups: list[list[Completion]]) -> list[tuple[np.ndarray, int]]:
    """Prompt and first completion of each group, as a probe takes them."""
    return [
        (np.concatenate([prompt.token_ids, group[0].token_ids]), len(prompt.token_ids))
        for prompt, group in zip(asked, groups, strict=True)
    ]


def vllm(step: Step) -> None:
    """The engine starts, samples, and its log-probs are the learner's."""
    engine = start_engine(step)
    asked, groups = sampled(step, engine)
    sequences = joined(asked, groups)
    theirs = np.concatenate([group[0].logprobs for group in groups])
    scored = engine.logprobs_of([tokens for tokens, _ in sequences])
    again = np.concatenate([row[start - 1 :] for row, (_, start) in zip(scored, sequences, strict=True)])
    engine.close()
    learner = make(step, "eager")
    [batches] = from_sequences(sequences, replicas=1, token_budget=step.size.tokens)
    ours: dict[int, torch.Tensor] = {}
    for batch, output in zip(batches, learner.logprobs(batches), strict=True):
        for s, index in enumerate(batch.rollout_index.tolist()):
            ours[index] = output.logprobs[batch.rows(s)][batch.loss_mask[batch.rows(s)]]
    wanted = torch.cat([ours[i] for i in range(len(sequences))]).numpy()
    for name, values in (("decoding", theirs), ("prefill", again)):
        gap = float(np.abs(values - wanted).mean())
        step.expect(
            f"{name} against the learner, mean size of the difference, nats", gap, most=step.size.logprob_gap
        )


def exact(step: Step) -> None:
    """`learner.consistency=exact`: engine and learner give every token one number, or the first operator
    that keeps them from it is named. On a GPU this is what would prove or refute learners/exact/gpu.py.
    """
    from gspo_dist.learners.hf_model import load_policy
    from gspo_dist.trainer.audit import compare

    fp32_head = step.size.precision == "fp32"
    engine = start_engine(step, eager=True, batch_invariant=True, fp32_head=fp32_head)
    asked, groups = sampled(step, engine)
    policy = load_policy(
        step.model(),
        step.size.precision,
        fp32_head=fp32_head,
        consistency="exact",
        device=step.device,
    ).to(step.device)
    found = compare(engine, policy, asked, [group[0] for group in groups])
    engine.close()
    step.note("tokens compared", found.tokens)
    step.note("engine, decoding = prefill", "yes" if found.prefilled else "no")
    step.note("first operator that differs", str(found.difference or "none"))
    step.note("largest difference, nats", found.largest)
    step.expect("tokens that differ", found.tokens - found.equal, most=0.0)


def families(step: Step) -> None:
    """`exact` for a miniature of every family that GPUs have, in both precisions, each in its own process."""
    chosen = GPU_FAMILIES if step.device == "cuda" else GPU_FAMILIES[:1]
    for family in chosen:
        for precision in ("bf16", "fp32"):
            measured = step.in_own_process("exact", "--family", family, "--precision", precision)
            name = f"{family} {precision}"
            step.note(f"{name}: tokens compared", measured["tokens compared"])
            step.note(f"{name}: first operator that differs", measured["first operator that differs"])
            step.expect(f"{name}: tokens that differ", float(measured["tokens that differ"]), most=0.0)


def routes(step: Step) -> None:
    """The engine's experts are those that the learner chooses, and the learner can replay them."""
    engine = start_engine(step, record_routing=True)
    asked, groups = sampled(step, engine, record_routing=True)
    sequences = joined(asked, groups)
    traces = [group[0].routing for group in groups]
    engine.close()
    learner = make(step, "eager")
    total = rows = left_out = 0.0
    for i, (tokens, start) in enumerate(sequences):
        [[batch]] = from_sequences([(tokens, start)], replicas=1, token_budget=step.size.tokens)
        (free,) = learner.logprobs([batch], record_routing=True)
        stats = flip_stats(traces[i], free.routing)
        total, rows = total + stats.fraction * stats.rows, rows + stats.rows
        (replayed,) = learner.logprobs([batch.with_(routing=traces[i])], record_routing=True)
        left_out = max(left_out, flip_stats(traces[i], replayed.routing).fraction)
    step.expect("routes that a replay left out", left_out, most=0.0)
    step.expect("experts that differ, engine against learner", total / rows, most=step.size.flips)


def run_quickstart(step: Step, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Two steps of a small run, as a user starts it; its rows of metrics."""
    from gspo_dist.cli.compose import run_config
    from gspo_dist.metrics.jsonl import read_jsonl
    from gspo_dist.trainer.loop import train as run_loop
    from gspo_dist.trainer.setup.build import build

    folder = step.work / name
    config = run_config([
        "experiment=quickstart", "model=local", f"model.path={step.model()}", f"run_dir={folder}",
        "steps=2", "mini_batches=2", "learner.world_size=1", "learner.deepspeed.expert_parallel=1",
        f"learner.precision={step.size.precision}", f"rollout.precision={step.size.precision}",
        "learner.token_budget=512", "rollout.engines=1", "rollout.prompts_per_step=4", "rollout.group_size=4",
        "rollout.weight_sync.probe_every=1", "evaluation.prompts=4", "flips.every=1",
        "checkpoint.save_last=false", "checkpoint.every=0", "logger=quiet",
        f"cluster.device={step.device}", *overrides,
    ])  # fmt: skip
    run = build(config)
    try:
        run_loop(run)
    finally:
        run.release()
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "sync/probe_mean_abs" in row]


def check_rows(step: Step, rows: list[dict[str, Any]]) -> None:
    step.expect("steps that were probed", len(rows), least=2)
    step.expect(
        "probe, mean size of the difference, nats",
        rows[-1]["sync/probe_mean_abs"],
        most=step.size.logprob_gap,
    )
    step.note("sync GiB/s", rows[-1]["sync/gib_per_s"])
    step.note("step s", rows[-1]["time/step_s"])


def sync(step: Step) -> None:
    """Two steps with the engine on another GPU: weights cross by NCCL (gloo between CPU processes)."""
    if step.device == "cuda" and torch.cuda.device_count() < 2:
        raise NotHereError("needs two GPUs: NCCL takes no two ranks on one")
    transport = "nccl" if step.device == "cuda" else "gloo"
    check_rows(step, run_quickstart(step, "sync", f"rollout.weight_sync.transport={transport}"))


def colocation(step: Step) -> None:
    """Two steps with learner and engine on one GPU, the engine asleep while the learner works."""
    if step.device == "cpu":
        raise NotHereError("needs a GPU: engines on a CPU cannot sleep")
    check_rows(
        step,
        run_quickstart(step, "colocation", "cluster.colocated=true", "rollout.gpu_memory_utilization=0.4"),
    )


def exact_run(step: Step) -> None:
    """Two steps of training with `learner.consistency=exact` on one GPU, weight syncs among them."""
    if step.device == "cpu":
        raise NotHereError("needs a GPU: engines on a CPU cannot sleep")
    rows = run_quickstart(
        step, "exact_run", "cluster.colocated=true", "rollout.gpu_memory_utilization=0.4",
        "learner.consistency=exact", "learner.exact_on_gpu=true", "learner.fp32_head=false",
    )  # fmt: skip
    step.expect("steps", len(rows), least=2)
    largest = max(row["mismatch/abs_log_ratio_max"] for row in rows)
    step.expect("largest log-ratio of a token, nats", largest, most=0.0)


def parking(step: Step) -> None:
    """A learner's memory to the host and back, as between two turns of colocated parts."""
    learner = make(step, "eager")
    train(step, learner)
    (batches,) = mini_batch(step.size).micro_batches
    before = learner.logprobs(batches)
    parked = Parking(learner)
    parked.sleep(), parked.wake_up()  # the first time pins host memory
    gc.collect()
    with step.timed("to the host s"):
        moved = parked.sleep()
    step.note("GiB moved", moved / GIB)
    if step.device == "cuda":
        step.expect("GiB that stay on the GPU", torch.cuda.memory_allocated() / GIB, most=0.5)
    with step.timed("back s"):
        parked.wake_up()
    pairs = zip(before, learner.logprobs(batches), strict=True)
    changed = sum(int((was.logprobs != now.logprobs).sum()) for was, now in pairs)
    step.expect("log-probs that changed", float(changed), most=0.0)


def shared(step: Step) -> None:
    """Two steps with two ranks and an engine over both of their GPUs."""
    if step.device == "cpu" or torch.cuda.device_count() < 2:
        raise NotHereError("needs two GPUs, for an engine with tensor parallel 2")
    knobs = ("learner.world_size=2", "rollout.tensor_parallel=2", "rollout.gpu_memory_utilization=0.4")
    check_rows(step, run_quickstart(step, "shared", "cluster.colocated=true", *knobs))


STEPS: dict[str, Callable[[Step], None]] = {
    f.__name__: f
    for f in (
        *(host, head, eager, deepspeed, megatron, deterministic, vllm, exact, families, routes, sync),
        *(colocation, exact_run, parking, shared),
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS, help="what to run")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a toy, to try the step"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_check"), help="folder of models and runs")
    parser.add_argument("--family", choices=GPU_FAMILIES, help="exact: a miniature of it, and not the model")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the miniature")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    step = Step(args.device, args.work)
    if args.family:
        step.use_miniature(args.family, args.precision)
    skipped = ""
    try:
        STEPS[args.step](step)
    except NotHereError as reason:
        skipped = str(reason)
    result = {"measured": step.measured, "expected": step.expected, "skipped": skipped}
    print(RESULT + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
