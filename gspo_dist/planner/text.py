"""A plan as text: its tables, its times, its verdict."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.planner.ahead import Ahead
from gspo_dist.planner.hardware import GIB, gib
from gspo_dist.planner.memory import MemoryTable
from gspo_dist.planner.plan import Plan
from gspo_dist.planner.search import Found
from gspo_dist.planner.throughput import StepTime
from gspo_dist.planner.timeouts import Timeout


def format_plan(result: Plan) -> str:
    """The plan as text."""
    model = result.model
    where = f"{result.nodes} x {result.gpus_per_node} {result.gpu.name}" if result.gpu else "CPU host"
    unit, name = (1e9, "B") if model.total >= 1e9 else (1e6, "M")
    size = f"{model.total / unit:.3f} {name} parameters, {model.active / unit:.3f} {name} active"
    cache = f"KV cache {model.kv_bytes_per_token():,} bytes per token (bf16)"
    lines = [f"{model.name}: {size}; {cache}", f"on {where}", ""]
    for table in (result.learner, result.engine.table if result.engine else None, result.host):
        if table is not None and table.items:
            lines += [*_format_table(table), ""]
    if result.engine:
        lines.append(
            f"an engine caches {result.engine.kv_tokens:,} tokens: {result.engine.concurrency} sequences of "
            f"the longest length, {result.engine.concurrency_mean} of the mean"
        )
    if result.step:
        s = result.step
        lines.append(
            f"about {s.total_s:.0f} s per step: {_parts(s)}; {s.tokens_per_s_per_gpu:,.0f} tokens/s per GPU "
            "(benchmarks/reports/planner.md: how far this clock is from published runs)"
        )
        lines += [_format_timeout(limit) for limit in result.timeouts]
    lines += [f"note: {note}" for note in result.notes]
    if result.ahead:
        lines += ["", *_format_ahead(result.ahead, result.step.gpus if result.step else 0)]
    lines += ["", "fits" if result.fits else "does not fit"]
    lines += [f"  {problem}" for problem in result.problems]
    lines += [f"  try {advice}" for advice in result.advice]
    return "\n".join(lines)


def _parts(s: StepTime) -> str:
    """The parts of a step. Those that only some runs have are named where they take time."""
    always = {"collect": s.collect_s, "log-probs": s.logprobs_s, "train": s.train_s, "weight sync": s.sync_s}
    some = {
        "side passes": s.side_s,
        "sleep and wake": s.switch_s,
        "checkpoints": s.checkpoint_s,
        "evaluation": s.evaluation_s,
        "driver": s.driver_s,
    }
    said = [f"{name} {seconds:.0f}" for name, seconds in always.items()]
    return ", ".join(said + [f"{name} {seconds:.1f}" for name, seconds in some.items() if seconds])


def format_found(found: Sequence[Found]) -> str:
    """The table of a search, and the overrides of each of its rows."""
    if not found:
        return "nothing fits: no layout of these GPUs that the run accepts has room"
    lines = [
        "      s per  tokens/s                    GiB of a  GiB of an    GiB of",
        "       step   per GPU  ahead     GPUs     learner  engine GPU   a host  limited by",
    ]
    for i, f in enumerate(found, 1):
        assert f.plan.engine is not None
        learner, engine, host = (
            table.total / GIB for table in (f.plan.learner, f.plan.engine.table, f.plan.host)
        )
        ranks = f.overrides[0].partition("=")[2]
        rest = "shared" if "cluster.colocated=true" in f.overrides else _engine_gpus(f.overrides)
        lines.append(
            f"{i:>3}{f.outcome.step_s:>8.0f}{f.tokens_per_s_per_gpu:>10,.0f}{f.outcome.steps_ahead:>7}"
            f"{f'{ranks}+{rest}':>12}{learner:>9.1f}{engine:>12.1f}{host:>9.0f}  {f.limit}"
        )
    return "\n".join([*lines, "", *(f"{i:>3}  {' '.join(f.overrides)}" for i, f in enumerate(found, 1))])


def _engine_gpus(overrides: Sequence[str]) -> int:
    values = dict(word.split("=") for word in overrides)
    return int(values["rollout.engines"]) * int(values["rollout.tensor_parallel"])


def _format_timeout(limit: Timeout) -> str:
    word = "would fire" if limit.fires else "near, since the plan is rough" if limit.close else "ok"
    times = f"{limit.predicted_s:,.0f} of {limit.allowed_s:,.0f} s for {limit.what}"
    return f"timeout {limit.knob}: {times} ({word})"


def _format_ahead(ahead: Ahead, gpus: int) -> list[str]:
    """What rollouts begun ahead gain, by K, and the best split of the GPUs."""
    lengths, base = ahead.lengths, ahead.outcomes[0].step_s
    lines = [
        "rollouts begun ahead (rollout.steps_ahead), simulated (gspo_dist/planner/pipeline.py): lengths "
        f"lognormal, mean {lengths.mean:,.0f}, spread {lengths.spread:.3g}, cut at {lengths.limit:,}",
        "  ahead  s per step   gain  staleness mean, max  engines idle  learner idle",
    ]
    for found in ahead.outcomes:
        lines.append(
            f"  {found.steps_ahead:>5}{found.step_s:>12.0f}{base / found.step_s:>6.2f}x"
            f"{found.staleness_mean:>16.1f},{found.staleness_max:>4}{found.engine_idle:>14.0%}"
            f"{found.learner_idle:>14.0%}"
        )
    own = next(o for o in ahead.outcomes if o.steps_ahead == ahead.split_at)
    if ahead.splits:
        best = ahead.splits[0]
        lines.append(
            f"best split of {gpus} GPUs at steps_ahead={ahead.split_at}: learner.world_size={best.ranks} "
            f"rollout.engines={best.engines}, {best.step_s:.0f} s per step (this one {own.step_s:.0f})"
        )
    return lines


def _format_table(table: MemoryTable) -> list[str]:
    lines = [f"{table.owner}: {gib(table.total)} of {gib(table.capacity)}"]
    for item in table.items:
        lines.append(f"  {item.name:<22}{gib(item.bytes):>12}  {item.note}".rstrip())
    return lines
