"""A plan as text: its tables, its times, its verdict."""

from __future__ import annotations

from gspo_dist.planner.ahead import Ahead
from gspo_dist.planner.hardware import gib
from gspo_dist.planner.memory import MemoryTable
from gspo_dist.planner.plan import Plan
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
        parts = (
            f"collect {s.collect_s:.0f}, log-probs {s.logprobs_s:.0f}, train {s.train_s:.0f}, weight sync "
            f"{s.sync_s:.0f}, side passes {s.side_s:.1f}"
        )
        lines.append(
            f"about {s.total_s:.0f} s per step: {parts}; {s.tokens_per_s_per_gpu:,.0f} tokens/s per GPU "
            "(rough: see gspo_dist/planner/throughput.py for what is assumed)"
        )
        lines += [_format_timeout(limit) for limit in result.timeouts]
    lines += [f"note: {note}" for note in result.notes]
    if result.ahead:
        lines += ["", *_format_ahead(result.ahead, result.step.gpus if result.step else 0)]
    lines += ["", "fits" if result.fits else "does not fit"]
    lines += [f"  {problem}" for problem in result.problems]
    lines += [f"  try {advice}" for advice in result.advice]
    return "\n".join(lines)


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
