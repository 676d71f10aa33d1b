"""Where processes run."""

from __future__ import annotations

from dataclasses import dataclass, field

from gspo_dist.checks import above, at_least, choose


@dataclass(frozen=True)
class ClusterConfig:
    """Where processes run."""

    address: str | None = None
    """Address of a running Ray cluster, or `auto`. Null starts Ray on this host for the length of the run."""
    nodes: int | None = None
    """Hosts that a joined cluster must have before the run starts; it waits for them. Null: those that are
    there when it starts, and GPUs are waited for all the same."""
    in_process: bool = False
    """No Ray at all: one engine and the eager learner in this process (tests, debugging, studies on a
    laptop). Rewards have processes of their own all the same."""
    device: str = "auto"
    """auto | cpu | cuda."""
    colocated: bool = False
    """Learner ranks and engines share all GPUs, of one host or several. Engines sleep during the update, and
    the learner's states are in host memory while engines sample."""
    placement_timeout_s: float = 600.0
    """Longest wait for hosts that are still joining, and for the cluster to grant what was asked for."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of every process that a run starts: learner ranks, engines, rewards, environments.
    They win over those that the command passes on from its own: NCCL_*, GLOO_*, NVTE_*, TORCH_*, PYTORCH_*,
    VLLM_* and PYTHONPATH. Programs in a sandbox get none of them."""

    def __post_init__(self) -> None:
        at_least("cluster.nodes", self.nodes, 1)
        if self.address is None and (self.nodes or 1) > 1:
            raise ValueError(
                f"cluster.nodes is for a cluster that is joined: got {self.nodes} without cluster.address; "
                "set cluster=ray"
            )
        choose("cluster.device", self.device, ("auto", "cpu", "cuda"))
        above("cluster.placement_timeout_s", self.placement_timeout_s, 0)
