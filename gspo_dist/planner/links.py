"""Seconds of bytes between GPUs: over NVLink inside its domain, over network cards beyond it."""

from __future__ import annotations

from gspo_dist.planner.calibration import Assumptions
from gspo_dist.planner.hardware import Gpu


def exchange_s(sent: float, ranks: int, gpu: Gpu, assume: Assumptions) -> float:
    """Each of `ranks` GPUs in a row sends `sent` bytes, evenly to all others.

    What goes to GPUs of the same NVLink domain and what leaves it travel at the same time, so the slower of
    the two is the time.
    """
    if ranks <= 1:
        return 0.0
    near = min(ranks, gpu.nvlink_gpus)
    inside = sent * (near - 1) / (ranks - 1) / (gpu.nvlink_gb_s * 1e9 * assume.link_share)
    outside = sent * (ranks - near) / (ranks - 1) / (gpu.network_gb_s * 1e9 * assume.link_share)
    return max(inside, outside)


def gather_s(whole: float, ranks: int, gpu: Gpu, assume: Assumptions) -> float:
    """Each of `ranks` GPUs in a row gets `whole` bytes of which it has an equal share; or sums them away.

    A ring: every GPU passes on the (n - 1) / n that it lacks, and the slowest link between two neighbours
    is the pace.
    """
    if ranks <= 1:
        return 0.0
    link = gpu.nvlink_gb_s if ranks <= gpu.nvlink_gpus else gpu.network_gb_s
    return whole * (ranks - 1) / ranks / (link * 1e9 * assume.link_share)
