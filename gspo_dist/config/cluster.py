"""Where processes run."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_dist.checks import above, at_least, choose


@dataclass(frozen=True)
class ClusterConfig:
    """Where processes run."""

    address: str | None = None
    """Address of a running Ray cluster, or `auto`. Null starts Ray on this host for the length of the run."""
    in_process: bool = False
    """No Ray at all: one engine and the eager learner in this process (tests, debugging, studies on a
    laptop). Rewards then have no deadline."""
    device: str = "auto"
    """auto | cpu | cuda."""
    colocated: bool = False
    """Learner ranks and engines share the GPUs of one host. Engines sleep during the update."""
    placement_timeout_s: float = 600.0
    """Longest wait for the cluster to grant the resources that were asked for."""
    plan_gpu: str | None = None
    """`gspo plan`: the kind of GPU (H100, H200, ...); null plans a CPU host."""
    plan_nodes: int = 1
    plan_gpus_per_node: int | None = None
    """`gspo plan`: null takes the GPU's own (8; 4 for GB200)."""
    plan_model: str | None = None
    """`gspo plan`: a known model's name, where model.path is not on this host."""

    def __post_init__(self) -> None:
        choose("cluster.device", self.device, ("auto", "cpu", "cuda"))
        above("cluster.placement_timeout_s", self.placement_timeout_s, 0)
        at_least("cluster.plan_nodes", self.plan_nodes, 1)
        at_least("cluster.plan_gpus_per_node", self.plan_gpus_per_node, 1)
