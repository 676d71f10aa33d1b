"""Log-probs without the logits: time, memory and error at the size of Qwen3-30B-A3B's head.

    python benchmarks/bench_logprobs.py                      # CPU, float32, 512 and 1,024 tokens
    python benchmarks/bench_logprobs.py --device cuda --out logprobs.json
    python benchmarks/bench_logprobs.py --gpu H100           # no measurement: what a card's data sheet allows

The head has a hidden size H of 2,048 and a vocabulary V of 151,936. First every implementation of this
package is checked against float64 at small sizes. The exit status is 1 if one is wrong. Then each method runs
forward alone, without gradient, as the pass over old log-probs does. It also runs forward + backward with an
arbitrary gradient per token. It needs torch, and triton on a GPU. liger-kernel, cut-cross-entropy and torch's
own linear_cross_entropy take part where they are installed.

Time is compared with floors: the matrix products of N tokens alone, measured on the same device.
    2NHV   FLOPs of the forward pass.
    6NHV   FLOPs of forward + backward when the logits are kept.
    8NHV   FLOPs of forward + backward when the backward pass computes them once more.

Memory is what the first call takes beyond its inputs: the peak allocated on CUDA, the peak resident set on a
CPU. It includes the gradients of hidden and weight, whose size stands in a column of its own.

Errors are against float64 of the same inputs. Those of the gradients are relative norms, over the first rows
of hidden's and over a sample of the rows of weight's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gspo_dist.host import usable_cores
from gspo_dist.learners.head import logprobs as head
from gspo_dist.learners.head.logprobs import taken_logprobs
from gspo_dist.planner.hardware import Gpu, find_gpu

Method = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, token ids -> logprobs
ROWS, SAMPLE, BLOCK = 256, 512, 8192  # rows of hidden's gradient, rows of weight's, float64 columns at once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# ---- methods ----


def naive(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def naive_with_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        (logp.exp() * logp).sum(-1)
    return logp.gather(1, ids[:, None])[:, 0]


def ours(
    implementation: str,
    fp32_head: bool = False,
    budget_mib: int | None = None,
    entropy: bool = True,
    kept_bytes: int | None = None,
) -> Method:
    def run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        chunk = (
            None
            if budget_mib is None
            else max(1, (budget_mib << 20) // (len(weight) * hidden.element_size()))
        )
        return taken_logprobs(
            hidden,
            weight,
            ids,
            implementation=implementation,
            fp32_head=fp32_head,
            chunk_tokens=chunk,
            kept_bytes=kept_bytes,
            with_entropy=entropy,
        ).logprobs

    return run


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden, weight, ids, reduction="none")


def torch_linear_cross_entropy_chunked(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, ids, reduction="none", options=options)


def liger(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, ids)


def cut_cross_entropy(impl: str) -> Method:
    def run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, ids, reduction="none", impl=impl)

    return run


def methods(cuda: bool, budgets_mib: list[int]) -> dict[str, Method]:
    """What can run here, by name. Liger's and cut-cross-entropy's kernels are for GPUs only."""
    table = {"naive": naive, "naive + entropy": naive_with_entropy, "chunked": ours("chunked")}
    table["chunked, no entropy"] = ours("chunked", entropy=False)
    table["chunked, nothing kept"] = ours("chunked", kept_bytes=0)
    table["compiled"] = ours("compiled")
    if cuda:
        table |= {"triton": ours("triton"), "triton fp32_head": ours("triton", fp32_head=True)}
        table["triton, nothing kept"] = ours("triton", kept_bytes=0)
        table |= {f"triton {mib} MiB": ours("triton", budget_mib=mib) for mib in budgets_mib}
        if importlib.util.find_spec("liger_kernel"):
            table["liger"] = liger
        if importlib.util.find_spec("cut_cross_entropy"):
            table |= {f"cut-cross-entropy {i}": cut_cross_entropy(i) for i in ("cce", "cce_exact")}
    else:
        table |= {f"chunked {mib} MiB": ours("chunked", budget_mib=mib) for mib in budgets_mib}
    if hasattr(F, "linear_cross_entropy"):
        table["torch linear_cross_entropy"] = torch_linear_cross_entropy
        table["torch linear_cross_entropy, options"] = torch_linear_cross_entropy_chunked
    return table


# ---- data and truth ----


def make_inputs(tokens: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden of unit variance and logits of standard deviation 2.3; a gradient of either sign per token."""
    generator = torch.Generator(args.device).manual_seed(0)
    kwargs = {"generator": generator, "device": args.device}
    hidden = torch.randn(tokens, args.hidden, **kwargs).to(DTYPES[args.dtype])
    weight = (
        torch.randn(args.vocab, args.hidden, **kwargs).mul_(2.3 / args.hidden**0.5).to(DTYPES[args.dtype])
    )
    ids = torch.randint(args.vocab, (tokens,), **kwargs)
    return hidden.requires_grad_(), weight.requires_grad_(), ids, torch.randn(tokens, **kwargs) / tokens


@torch.no_grad()
def truth(hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """float64, one block of columns at a time, and independent of the package's code."""
    h, g = hidden.double(), upstream.double()
    blocks = [weight[a : a + BLOCK] for a in range(0, len(weight), BLOCK)]
    lse = torch.stack([(h @ b.double().T).logsumexp(1) for b in blocks]).logsumexp(0)
    rows = slice(0, min(len(h), ROWS))
    grad_hidden = weight[ids[rows]].double()
    for b in blocks:
        grad_hidden -= (h[rows] @ b.double().T - lse[rows, None]).exp() @ b.double()
    sample = torch.unique(
        torch.cat((ids[: SAMPLE // 2], torch.arange(0, len(weight), 2 * len(weight) // SAMPLE + 1).to(ids)))
    )
    p = (h @ weight[sample].double().T - lse[:, None]).exp()
    onehot = (ids[:, None] == sample[None]).double()
    return {
        "logprobs": (h * weight[ids].double()).sum(1) - lse,
        "grad_hidden": grad_hidden * g[rows, None],
        "grad_weight": ((onehot - p) * g[:, None]).T @ h,
        "sample": sample,
    }


def errors(logprobs: Tensor, grads: tuple[Tensor, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    error = (logprobs.detach().double() - true["logprobs"]).abs()
    rows = len(true["grad_hidden"])
    got = {"hidden": grads[0][:rows], "weight": grads[1][true["sample"]]}
    relative = {
        f"grad_{k}_error": ((v.double() - true[f"grad_{k}"]).norm() / true[f"grad_{k}"].norm()).item()
        for k, v in got.items()
    }
    return {"logprob_max_error": error.max().item(), "logprob_mean_error": error.mean().item()} | relative


# ---- measuring ----


def seconds(work: Callable[[], object], args: argparse.Namespace, warmup: bool = True) -> float:
    """The median of `args.repeats` runs; CUDA events on a GPU."""
    cuda = args.device == "cuda"
    for _ in range(2 if cuda and warmup else 0):
        work()
    times = []
    for _ in range(args.repeats):
        if cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def resident(field: str) -> int:
    """Bytes under VmRSS (now) or VmHWM (peak) of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def measure_floor(tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the three matmuls alone, in blocks of columns with reused outputs."""
    hidden, weight, _, _ = make_inputs(tokens, args)
    block = min(args.vocab, max(1024, (1 << 30) // (tokens * hidden.element_size()) // 128 * 128))
    logits = torch.randn(tokens, block, device=args.device, dtype=hidden.dtype)
    out_hidden, out_weight = torch.empty_like(hidden), torch.empty_like(weight[:block])

    def walk(kind: str) -> None:
        for a in range(0, args.vocab, block):
            b = weight[a : a + block]
            n = len(b)
            x = logits.view(-1)[: tokens * n].view(tokens, n)
            if kind == "logits":
                torch.mm(hidden, b.t(), out=x)
            elif kind == "hidden":
                torch.mm(x, b, out=out_hidden)
            else:
                torch.mm(x.t(), hidden, out=out_weight[:n])

    kinds = {kind: seconds(lambda kind=kind: walk(kind), args) for kind in ("hidden", "weight", "logits")}
    flops = 2 * tokens * args.hidden * args.vocab
    return {
        "floor_2nhv": kinds["logits"],
        "floor_6nhv": sum(kinds.values()),
        "floor_8nhv": sum(kinds.values()) + kinds["logits"],
        "matmul_tflops": 3 * flops / sum(kinds.values()) / 1e12,
    }


def measure(name: str, tokens: int, true: dict[str, Tensor], args: argparse.Namespace) -> dict[str, float]:
    """One method at one size: its memory and errors on one call, then its times.

    On a CPU that call is the first but for a small one. On CUDA the method has run at this size before.
    """
    run = methods(args.device == "cuda", args.budget_mib)[name]
    cuda = args.device == "cuda"
    torch.compiler.reset()  # the dtypes of the check would count against this one's recompilations
    hidden, weight, ids, upstream = make_inputs(tokens, args)

    def step() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logprobs = run(hidden, weight, ids)
        return logprobs, torch.autograd.grad(logprobs, (hidden, weight), upstream.to(logprobs.dtype))

    def forward() -> None:
        with torch.no_grad():
            run(hidden, weight, ids)

    # A small call first, so that libraries load and compile outside the count.
    small = [hidden[:8].detach().requires_grad_(), weight[:640].detach().clone().requires_grad_()]
    torch.autograd.grad(run(*small, ids[:8] % 640).sum(), small)
    if cuda:
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = resident("VmRSS")
    logprobs, grads = step()
    if cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resident("VmHWM")
    result = {
        "extra_bytes": peak - before,
        "gradient_bytes": sum(g.numel() * g.element_size() for g in grads),
    }
    result |= errors(logprobs, grads, true)
    del logprobs, grads
    return result | {"step_s": seconds(step, args, warmup=False), "forward_s": seconds(forward, args)}


def in_fresh_process(name: str, tokens: int, truth_file: Path, args: argparse.Namespace) -> dict[str, float]:
    """`measure` (or the floor) in a process of its own, so that the peak resident set is this method's."""
    arguments = ["--device", args.device, "--dtype", args.dtype, "--tokens", tokens, "--hidden", args.hidden]
    arguments += ["--vocab", args.vocab, "--repeats", args.repeats, "--threads", args.threads]
    arguments += ["--budget-mib", *args.budget_mib] if args.budget_mib else []
    command = [sys.executable, __file__, *map(str, arguments), "--worker", name, "--truth", str(truth_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(tokens: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    names = [
        n for n in methods(args.device == "cuda", args.budget_mib) if not args.methods or n in args.methods
    ]
    true = truth(*make_inputs(tokens, args))
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "truth.pt"
        torch.save(true, file)
        for name in ["floor", *names]:
            print(f"{tokens} tokens: {name}", file=sys.stderr, flush=True)
            if args.device == "cpu":
                results[name] = in_fresh_process(name, tokens, file, args)
                continue
            try:
                results[name] = (
                    measure_floor(tokens, args) if name == "floor" else measure(name, tokens, true, args)
                )
            except (torch.OutOfMemoryError, RuntimeError, ValueError, NotImplementedError) as error:
                results[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}
            torch.cuda.empty_cache()
    return results


# ---- without the device ----


def calculated(gpu: Gpu, args: argparse.Namespace) -> str:
    """The head in bfloat16 on a GPU, matmuls and passes each at the data sheet's rate: no measurement.

    A pass moves each logit once (tests/unit/learners/head/test_kernels.py reads that in the machine code):
    forward 2 bytes read, backward 2 read and 2 written. What a matmul itself writes counts for the floor as
    for the head. Memory: naive holds its log-softmax, that one's gradient and the logits' at once, in float32
    (measured on a CPU, within 0.2%); the head both gradients, a float32 sum of hidden's, and the logits kept.
    """
    rates = f"{gpu.tflops:g} TFLOP/s, {gpu.hbm_gb_s:g} GB/s"
    lines = [
        f"## Log-probs, calculated for {gpu.name}: {rates}, H {args.hidden}, V {args.vocab}, bfloat16",
        "",
        "| tokens | 2NHV, ms | forward / 2NHV | kept | forward + backward / 8NHV | / 6NHV | MiB "
        "| naive's / this |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for tokens in args.tokens:
        logits = 2 * tokens * args.vocab  # bytes
        matmul = 2 * tokens * args.hidden * args.vocab / (gpu.tflops * 1e12)
        read = logits / (gpu.hbm_gb_s * 1e9)
        kept = min(1.0, head.GPU_KEPT_BYTES / logits)
        memory = 2 * args.hidden * args.vocab + 4 * tokens * args.hidden + kept * logits
        step = (4 - kept) * matmul + 3 * read
        lines.append(
            f"| {tokens} | {matmul * 1e3:.2f} | {1 + read / matmul:.2f} | {kept:.0%} "
            f"| {step / (4 * matmul):.2f} | {step / (3 * matmul):.2f} | {memory / 2**20:,.0f} "
            f"| {12 * tokens * args.vocab / memory:.1f} |"
        )
    return "\n".join(lines)


# ---- correctness at small sizes ----


def check(args: argparse.Namespace) -> list[str]:
    """Every implementation against float64, at odd and even sizes; what is wrong, in words."""
    wrong, cuda = [], args.device == "cuda"
    generator = torch.Generator().manual_seed(1)
    for implementation in ("chunked", "compiled") + (("triton",) if cuda else ()):
        for n, h, v, biased, temperature, chunk in (
            (37, 64, 1003, True, 0.7, 5),
            (128, 256, 12800, False, 1.0, None),
        ):
            tensors = [torch.randn(*s, generator=generator) for s in ((n, h), (v, h), (v,))]
            tensors[1] *= 3 / h**0.5
            ids, upstream = torch.randint(v, (n,), generator=generator), torch.randn(n, generator=generator)
            ids, upstream = ids.to(args.device), upstream.to(args.device)
            for dtype, fp32_head in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
                leaves = [t.to(args.device, dtype).requires_grad_() for t in tensors][: 2 + biased]
                exact = [t.detach().double().requires_grad_() for t in leaves]
                x = F.linear(*exact) / temperature
                logp = x.log_softmax(1)
                want = logp.gather(1, ids[:, None])[:, 0]
                want_entropy = -(logp.exp() * logp).sum(1)
                want_grads = torch.autograd.grad(want, exact, upstream.double())
                out = taken_logprobs(
                    leaves[0],
                    leaves[1],
                    ids,
                    bias=leaves[2] if biased else None,
                    temperature=temperature,
                    chunk_tokens=chunk,
                    fp32_head=fp32_head,
                    implementation=implementation,
                )
                grads = torch.autograd.grad(out.logprobs, leaves, upstream)
                narrow = dtype == torch.bfloat16 and not fp32_head
                # A bfloat16 logit is rounded by up to 2**-9 of itself, and so is the taken one.
                limit = x.abs().max().item() * 2**-7 if narrow else 2e-4
                found = {
                    "logprobs": ((out.logprobs - want).abs().max().item(), limit),
                    "entropy": ((out.entropy - want_entropy).abs().max().item(), limit),
                }
                for which, g, e in zip(("hidden", "weight", "bias"), grads, want_grads, strict=False):
                    relative = ((g - e).norm() / e.norm()).item()
                    found[f"gradient of {which}"] = (relative, 1e-4 if dtype == torch.float32 else 1.5e-2)
                for what, (error, most) in found.items():
                    if not error <= most:
                        case = f"{implementation}, {dtype}, fp32_head={fp32_head}, N={n}, V={v}"
                        wrong.append(f"{case}: {what} off by {error:.2e}, allowed {most:.2e}")
    return wrong


# ---- report ----


def table(tokens: int, results: dict[str, dict[str, float]]) -> str:
    floor = results["floor"]
    if "failed" in floor:
        return f"### {tokens} tokens\n\nfloor failed: {floor['failed']}"
    base = results.get("naive", {}).get("extra_bytes")
    ms = {
        name: f"{floor[f'floor_{name}'] * 1e3:.4g} ms ({name.upper()})" for name in ("2nhv", "8nhv", "6nhv")
    }
    heads = ("method", "forward, ms", "/ 2NHV", "forward + backward, ms", "/ 8NHV", "/ 6NHV")
    heads += ("extra memory, MiB", "of them gradients", "naive's / this", "logprob error max", "mean")
    heads += ("gradient error hidden", "weight")
    lines = [f"### {tokens} tokens", ""]
    lines += [
        f"Matmuls alone, at {floor['matmul_tflops']:.3g} TFLOP/s: forward {ms['2nhv']}, forward + backward"
    ]
    lines[-1] += f" {ms['8nhv']} or {ms['6nhv']}."
    lines += ["", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, r in results.items():
        if name == "floor":
            continue
        if "failed" in r:
            lines.append(f"| {name} | {r['failed'].replace('|', '/')} |" + " |" * 11)
            continue
        less = f"{base / r['extra_bytes']:.1f}" if base and r["extra_bytes"] else ""
        lines.append(
            f"| {name} | {r['forward_s'] * 1e3:.4g} | {r['forward_s'] / floor['floor_2nhv']:.2f} "
            f"| {r['step_s'] * 1e3:.4g} | {r['step_s'] / floor['floor_8nhv']:.2f} "
            f"| {r['step_s'] / floor['floor_6nhv']:.2f} | {r['extra_bytes'] / 2**20:.0f} "
            f"| {r['gradient_bytes'] / 2**20:.0f} | {less} | {r['logprob_max_error']:.1e} "
            f"| {r['logprob_mean_error']:.1e} | {r['grad_hidden_error']:.1e} | {r['grad_weight_error']:.1e} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="default: 4096 8192 16384 32768 on cuda, 512 1024 on cpu"
    )
    parser.add_argument("--hidden", type=int, default=2048, help="H")
    parser.add_argument("--vocab", type=int, default=151_936, help="V, 640 at least")
    parser.add_argument("--repeats", type=int, help="default: 7 on cuda, 2 on cpu")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads")
    parser.add_argument("--methods", nargs="+", help="only these rows")
    parser.add_argument(
        "--budget-mib", type=int, nargs="*", default=[], help="also try these sizes of a chunk"
    )
    parser.add_argument("--gpu", help="GPU kind, e.g. H100: calculate from its data sheet, measure nothing")
    parser.add_argument("--skip-check", action="store_true", help="measure without the float64 check first")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--truth", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        args.gpu = find_gpu(args.gpu) if args.gpu else None
    except ValueError as error:
        parser.error(f"--gpu: {error}")
    cuda = args.device == "cuda" or args.gpu is not None
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.tokens = args.tokens or ([4096, 8192, 16384, 32768] if cuda else [512, 1024])
    args.repeats = args.repeats or (7 if cuda else 2)
    return args


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.gpu:
        print(calculated(args.gpu, args))
        return 0
    if args.worker:
        if args.worker == "floor":
            print(json.dumps(measure_floor(args.tokens[0], args)))
        else:
            print(json.dumps(measure(args.worker, args.tokens[0], torch.load(args.truth), args)))
        return 0
    if not args.skip_check:
        wrong = check(args)
        print("float64 check: " + ("all right" if not wrong else "WRONG"), *wrong, sep="\n")
        if wrong:
            return 1
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    about = {
        "device": device,
        "torch": torch.__version__,
        "dtype": args.dtype,
        "hidden": args.hidden,
        "vocab": args.vocab,
        "gpu_budget_bytes": head.GPU_BUDGET_BYTES,
        "cpu_budget_bytes": head.CPU_BUDGET_BYTES,
    }
    sizes = f"H {args.hidden}, V {args.vocab}"
    print(f"\n## Log-probs, {device}, {args.dtype}, {sizes}, torch {torch.__version__}\n")
    report = {"about": about, "tokens": {}}
    for tokens in args.tokens:
        report["tokens"][tokens] = results = measure_all(tokens, args)
        print(table(tokens, results) + "\n", flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
