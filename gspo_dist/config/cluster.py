"""Where processes run."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_dist.checks import above, choose


@dataclass(frozen=True)
class ClusterConfig:
    """Where processes run."""

    address: str | None = None
    """Address of a running Ray cluster, or `auto`. Null starts Ray on this host for the length of the run."""
    in_process: bool = False
    """No Ray at all: one engine and the eager learner in this process (tests, debugging, studies on a
    laptop). Rewards have processes of their own all the same."""
    device: str = "auto"
    """auto | cpu | cuda."""
    colocated: bool = False
    """Learner ranks and engines share the GPUs of one host. Engines sleep during the update."""
    placement_timeout_s: float = 600.0
    """Longest wait for the cluster to grant the resources that were asked for."""

    def __post_init__(self) -> None:
        choose("cluster.device", self.device, ("auto", "cpu", "cuda"))
        above("cluster.placement_timeout_s", self.placement_timeout_s, 0)
