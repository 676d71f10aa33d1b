"""What the clock assumes, in one table, each number with where it is from.

"Rows" are published runs. benchmarks/published.toml has their settings, and says which of them set a number
here and which were kept to test all of them. `python benchmarks/plan_rows.py --fit` sets the numbers anew.
benchmarks/reports/planner.md is the outcome. No number belongs to one row: a GPU, a host or a link has one
value, whoever ran on it. `gspo plan --calibrate=RUN` measures `learner_speed` and `engine_speed` on a run of
one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gspo_dist.planner.hardware import Gpu


@dataclass(frozen=True)
class GpuSpeed:
    """How much of its data sheet one kind of GPU reaches, and how fast its host feeds it."""

    train: float
    """Share of its FLOP/s in the products of training. What launching and waiting cost comes on top."""
    decode: float
    """Share of its memory bandwidth while it decodes."""
    host: float = 1.0
    """Launches and the host's own work, as a multiple of an x86 host's time."""


# H100 and GB200 are set by rows. The rest are assumed, since nobody publishes rows of theirs with all inputs:
# slow chips are easily fed (H20), and all decode at the share that H100 and GB200 share.
SPEEDS: Mapping[str, GpuSpeed] = {
    "A100": GpuSpeed(0.50, 0.60),
    "H100": GpuSpeed(0.45, 0.60),
    "H200": GpuSpeed(0.45, 0.60),
    "H20": GpuSpeed(0.60, 0.60),
    "B200": GpuSpeed(0.40, 0.60),
    "B300": GpuSpeed(0.40, 0.60),
    "GB200": GpuSpeed(0.40, 0.60, host=0.9),
    "L40S": GpuSpeed(0.45, 0.60),
}


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of every run."""

    speeds: Mapping[str, GpuSpeed] = field(default_factory=lambda: SPEEDS)
    """By the family of a GPU."""
    layer_s: float = 0.0041
    """One MoE layer's forward pass of a micro-batch, however small it is: launches, the router's waits for
    the host, permutations. A backward pass takes twice that. Rows, above all SkyRL's training time."""
    expert_s: float = 0.0001
    """Each local expert of a layer on top of that, where they are computed one after the other
    (learner.megatron.grouped_gemm=false). Rows."""
    dense_layer_s: float = 0.0006
    """The same as `layer_s` of a layer without experts. Rows."""
    other_backends: float = 0.45
    """Speed of HF models under DeepSpeed or eager, as a share of Megatron's. Assumed."""
    link_share: float = 0.6
    """Share of NVLink and of a network card that collectives reach. Assumed."""
    decode_mfu: float = 0.35
    """Share of a GPU's FLOP/s that prefill and decoding of large batches reach. Assumed."""
    decode_layer_s: float = 0.00008
    """One layer's share of launching, scheduling and sampling a decode step (CUDA graphs). Rows."""
    reduce_s: float = 0.00003
    """One all-reduce of a decode step among the GPUs of a node. Assumed: NCCL's latency."""
    reduce_far_s: float = 0.00007
    """The same across nodes. Rows with engines of 16 GPUs."""
    sync_share: float = 0.4
    """Share of a network card that a publication reaches. Row: verl's Qwen3-30B."""
    sync_tensor_s: float = 0.0001
    """Each tensor of a publication: naming, copying, summing. The same row."""
    host_adam_gb_s: float = 100.0
    """Memory traffic of an optimiser step in host memory, in 1e9 bytes per second and host. Assumed: half of
    what a server with two sockets reads and writes."""
    pcie_share: float = 0.5
    """Share of the GPU's link to its host that moving states reaches."""
    driver_s: float = 1.0
    """The driver's own work per step (benchmarks/bench_driver.py: calls to every process)."""
    rollout_s: float = 0.0005
    """The driver's work per rollout: judging, packing, files (benchmarks/bench_step.py)."""
    learner_speed: float = 1.0
    """Measured on a run of one's own: the learner's planned seconds over its real ones."""
    engine_speed: float = 1.0
    """The same of the engines."""

    def speed(self, gpu: Gpu) -> GpuSpeed:
        return self.speeds[gpu.name.split("-")[0]]


ASSUMPTIONS = Assumptions()
