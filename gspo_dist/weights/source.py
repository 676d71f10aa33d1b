"""The one place that turns what a transport says of itself into the engine's side of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo_dist.weights.collective import CollectiveSource
from gspo_dist.weights.shm import ShmSource
from gspo_dist.weights.transport import Source


def make_source(init_info: Mapping[str, Any], worker: int = 0) -> Source:
    """The engine worker's side of the transport that made `init_info`; a collective one is met here.

    worker: this process among those of its engine. WeightSyncError: the sender was not met.
    """
    if init_info["transport"] == "shm":
        return ShmSource()
    return CollectiveSource(init_info, worker)
