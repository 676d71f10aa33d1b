"""Learner checkpoints in megatron-core's distributed format: saved in the background,
loaded under any layout.

Weights and optimiser state are stored under global names, with their place in the whole. What depends
on the layout, such as the groups of parameters, stays out. So a run saved with expert_parallel 2 goes
on with tensor_parallel 2. The learner has no dropout and draws no random numbers, so there is no
random state to keep.

Every rank writes and reads its share. Optimiser states are pieces of whole tensors (`shares.py`), and what
replicas have in common is divided among them (megatron-core's wrappers).
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException

from gspo_dist.learners.loss_scale import LossScale
from gspo_dist.learners.megatron import shares
from gspo_dist.learners.megatron.stored import read_finished
from gspo_dist.learners.state_files import writing
from gspo_dist.models.shape import ModelShape

# fully_reshardable: optimiser state in the shape of its parameter, not in the buffers of one layout.
# chained_optim_avoid_prefix: dense and expert parameters have two optimisers under expert parallelism
# and one without.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
}
COMMON = "gspo_dist"
"""Key of the part that is the same on every rank."""


@dataclass(frozen=True)
class LearnerState:
    """What a checkpoint holds."""

    chunks: list[Any]
    """This rank's model chunks."""
    optimizer: Any
    """Their optimiser."""
    architecture: ModelShape
    """Which model they are."""
    scale: LossScale | None = None
    """The loss scale of float16."""


class CheckpointWriter:
    """Starts saves and waits for them. Finishing one is collective, so every rank calls `wait` alike."""

    def __init__(self, asynchronous: bool) -> None:
        """asynchronous: whether a forked process writes while training goes on."""
        self.queue = AsyncCallsQueue() if asynchronous else None
        self.folder = Path()  # of the save that is under way

    def save(self, learner: LearnerState, policy_version: int, folder: Path) -> None:
        """Returns once the state is staged for the forked process or, without one, written. Collective.

        Raises OSError on a full disk, as `writing` does.
        An earlier save is finished first, so one is under way at most.
        """
        self.wait()
        folder = Path(folder)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        state, _ = sharded_state(learner, loading=False)
        state[COMMON] = {
            "policy_version": policy_version,
            "loss_scale": learner.scale and learner.scale.state_dict(),
            "architecture": asdict(learner.architecture),
        }
        self.folder = folder
        with writing(folder):
            request = dist_checkpointing.save(
                state, str(folder), save_strategy(), async_sharded_save=self.queue is not None
            )
        if self.queue is not None and request is not None:
            self.queue.schedule_async_request(request)

    def wait(self) -> None:
        """Returns when every started save is on disk, its metadata last. Collective; may be called again.

        Raises OSError on a full disk, as `writing` does.
        """
        if self.queue is not None:
            with writing(self.folder):
                self.queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Ends the writing process. Call `wait` first."""
        if self.queue is not None:
            self.queue.close()


def save_strategy() -> Any:
    """The file format, its writing divided among the replicas of each tensor."""
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _replicas())


def load_strategy(folder: Path) -> Any:
    """Its reading likewise: one replica reads a tensor and sends it to the others."""
    return FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _replicas())


def _replicas() -> dist.ProcessGroup:
    """The ranks that hold the same dense weights. Copies of an expert are among them.

    Not all ranks: copies over tensor ranks (norms) may be cut into other pieces there. Two pieces that
    begin at one place would be taken for the same.
    """
    return mpu.get_data_parallel_group(with_context_parallel=True)


def sharded_state(
    learner: LearnerState, *, loading: bool
) -> tuple[dict[str, Any], dict[int, list[shares.Held]]]:
    """Weights and optimiser state with their global places. All else is marked as this rank's own.

    The second is what the distributed optimisers of the chain hold: the memory that a load reads into.
    """
    # A copy, because 0.16.1 writes the data-parallel group of the moment into it.
    metadata = dict(METADATA)
    models = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(learner.chunks)
    }
    with shares.instead_of_gathering(learner.optimizer) as held, short_collections():
        state = learner.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    # 0.16.1's plain optimisers mark some of it themselves; loading undoes one mark.
    kept = (ShardedBase, LocalNonpersistentObject)
    dict_list_map_inplace(lambda x: x if isinstance(x, kept) else LocalNonpersistentObject(x), state)
    for part in models.values():
        _drop_extra_state(part)
    return {"models": models, "optimizer": state}, held


@contextlib.contextmanager
def short_collections() -> Iterator[None]:
    """A block in which garbage is looked for among the objects that it has made itself.

    0.16.1 collects garbage once for each of its optimisers. A collection looks at every object of the
    process, which takes as long as what the imports have left there.
    """
    if gc.get_freeze_count():  # somebody else froze, and counts on it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _drop_extra_state(part: dict[str, Any]) -> None:
    """Leaves out Transformer Engine's extra state (fp8 scales): an object per rank, which nothing here uses.

    A grouped linear has one for every local expert: _extra_state, _extra_state1, ...
    """
    for key in [k for k in part if re.search(r"_extra_state\d*$", k)]:
        del part[key]


@torch.no_grad()
def load(learner: LearnerState, folder: Path) -> int:
    """Restores weights and optimiser, whatever the layout they were saved under. Returns the policy version.

    Raises ValueError, before a tensor is read, for a folder that is not a whole checkpoint of this model.
    """
    folder = Path(folder)
    state, held = sharded_state(learner, loading=True)
    check(state, folder)
    try:
        loaded = dist_checkpointing.load(state, str(folder), load_strategy(folder))
    except CheckpointException as error:  # no Exception (torch 2.13): nothing would tell how the run ended
        raise ValueError(f"{folder} cannot be read: {error}") from error
    for i, chunk in enumerate(learner.chunks):
        # Not strict, because the extra state was left out. `check` has seen every tensor.
        chunk.load_state_dict(loaded["models"][f"model{i}"], strict=False)
    policy_version = int(loaded[COMMON]["policy_version"])
    _load_optimizer(learner.optimizer, loaded["optimizer"], policy_version, held)
    if learner.scale is not None:
        learner.scale.load_state_dict(loaded[COMMON]["loss_scale"])
    return policy_version


def check(state: dict[str, Any], folder: Path) -> None:
    """Refuses a folder that is not a whole checkpoint of this model, before a tensor is read.

    ValueError names the missing file, or the first tensor whose name or shape differs.
    """
    read_finished(folder)
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    for tensor in nested_values(state):
        for wanted in _tensors(tensor):
            if wanted.key not in stored:
                raise ValueError(_absent(folder, wanted.key, list(wanted.global_shape)))
            found = stored[wanted.key].global_shape
            if tuple(found) != tuple(wanted.global_shape):
                raise ValueError(
                    f"checkpoint {folder} is of another model: {wanted.key} has shape {list(found)} there "
                    f"and {list(wanted.global_shape)} here; point model.path at the model it was trained from"
                )


def _absent(folder: Path, key: str, shape: list[int]) -> str:
    """Why a checkpoint without tensor `key` cannot be loaded, and the way out."""
    if key.startswith("optimizer."):
        return (
            f"checkpoint {folder} keeps its optimiser in another way: it has no {key}; resume with the "
            "learner.megatron.distributed_optimizer, precision_aware_optimizer and optimizer_cpu_offload "
            "that it was saved with"
        )
    return (
        f"checkpoint {folder} is of another model: it has no {key}, which this model has with shape {shape}; "
        "point model.path at the model it was trained from"
    )


def _tensors(value: Any) -> list[ShardedTensor]:
    """The tensors with a global place in `value`: itself, those that a factory makes, or none."""
    if isinstance(value, ShardedTensorFactory):
        return [t for t in nested_values(value.build()) if isinstance(t, ShardedTensor)]
    return [value] if isinstance(value, ShardedTensor) else []


def _load_optimizer(
    optimizer: Any, state: dict[Any, Any], steps: int, held: dict[int, list[shares.Held]]
) -> None:
    """Gives each optimiser of the chain its state, and Adam the steps that its moments have seen.

    Every parameter is updated in every step, so the count is the policy version, and no checkpoint stores it.

    - torch's AdamW keeps the count with each parameter. It must be out while 0.16.1's distributed optimiser
      copies the moments, because that copies whatever the states hold.
    - Transformer Engine's FusedAdam and the offloaded optimiser keep it with each group. A fresh group has
      none, and would correct the moments' bias as at the first step.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    # 0.16.1 numbers the states of a chain, and hands over the state itself where one optimiser is alone.
    states = [state] if len(parts) == 1 else [state[i] for i in range(len(parts))]
    for i, (part, own) in enumerate(zip(parts, states, strict=True)):
        inner = part.optimizer
        own.pop("param_state", None)
        adamw = isinstance(inner, torch.optim.AdamW)
        stored = own.get("optimizer", own)
        # The plain optimisers of 0.16.1 drop a step of 0 when they prepare to load, and torch wants one.
        for values in stored.get("state", {}).values() if adamw else ():
            if isinstance(values, dict):
                values.setdefault("step", torch.tensor(float(steps)))
        for group in () if adamw else stored.get("param_groups", ()):
            group["step"] = steps
        part.load_state_dict(own)
        if adamw:
            for values in inner.state.values():
                values.pop("step", None)
        if i in held:
            shares.restore(part, held[i])
        if adamw:
            for values in inner.state.values():
                values["step"] = torch.tensor(float(steps))
