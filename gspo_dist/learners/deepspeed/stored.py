"""The weights of a DeepSpeed checkpoint under HF names, read by one process that starts no engine.

    ZeRO 0 to 2     mp_rank_00_model_states.pt has the parameters whole, in their own precision
    with AutoEP     ... but for the experts, each in a file of its own
    ZeRO 3          no parameter is stored. The fp32 masters are, cut over the ranks' optimiser files, and a
                    learner that loads them rounds them to its precision, as is done here

Files are mapped into memory, so only the pages of tensors that are asked for are read. The moments stay on
the disk. At most one parameter is copied at a time.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gspo_dist.learners.deepspeed.config import import_deepspeed
from gspo_dist.learners.deepspeed.export import HF_PROJECTION, hf_name
from gspo_dist.learners.deepspeed.learner import TAG
from gspo_dist.learners.state_files import map_state
from gspo_dist.learners.stream_names import blank_model, loaded_model
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames, stored_tensors
from gspo_dist.weights.stream import NamedTensor

WHOLE = "mp_rank_00_model_states.pt"
"""The file with the parameters, up to ZeRO 2."""


class _Partitions:
    """ZeRO 3's masters: for every parameter the fragments that the ranks hold."""

    def __init__(self, folder: Path) -> None:
        states = _by_rank(folder, "model_states")
        masters = _by_rank(folder, "optim_states", trusted=_trusted())
        ranks = states[0]["dp_world_size"]
        if not len(states) == len(masters) == ranks:
            raise ValueError(
                f"checkpoint {folder} was saved by {ranks} ranks: it has the model states of {len(states)} "
                f"and the optimiser states of {len(masters)}; copy it again"
            )
        self.state = states[0]
        self.kinds = {name: tensor.dtype for name, tensor in self.state["module"].items()}
        self.shapes: dict[str, torch.Size] = {}
        self.fragments: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        """(name, expert rank) -> replica -> its fragment. Dense parameters have expert rank 0."""
        for rank, (state, master) in enumerate(zip(states, masters, strict=True)):
            layers = {layer["expert_key_prefix"]: layer for layer in state.get("ds_autoep_layers") or ()}
            groups = master["optimizer_state_dict"]["fp32_flat_groups"]
            for shapes, flat in zip(state["param_shapes"], groups, strict=True):
                start = 0
                for name, shape in shapes.items():
                    layer = layers.get(name.rpartition(".")[0])
                    # A rank's experts are cut over their replicas, everything else over all ranks.
                    owner, replica, replicas = 0, rank, ranks
                    if layer is not None:
                        owner, replica = layer["ep_rank"], layer["expert_data_parallel_rank"]
                        replicas = layer["expert_data_parallel_world_size"]
                    self.shapes[name] = torch.Size(shape)
                    count = math.ceil(self.shapes[name].numel() / replicas)
                    held = self.fragments.setdefault((name, owner), {})
                    held[replica] = flat[start : start + count]
                    start += count

    def read(self, name: str, expert_rank: int = 0) -> torch.Tensor:
        """A whole parameter (of an expert rank: its experts), rounded to its own precision."""
        if name not in self.shapes:  # a buffer, which every rank has whole
            return self.state["module"][name]
        flat = torch.empty(self.shapes[name].numel(), dtype=self.kinds.get(name, self.dtype))
        start = 0
        for _, fragment in sorted(self.fragments[name, expert_rank].items()):
            # The last one is filled up, so that all are of one length.
            count = min(len(fragment), len(flat) - start)
            flat[start : start + count] = fragment[:count]
            start += count
        return flat.view(self.shapes[name])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the parameters that the model states do not list: the experts'."""
        return next(iter(self.kinds.values()))


def stored_weights(folder: Path, source: ModelFolder) -> Iterator[NamedTensor]:
    """Streams the weights that `DeepSpeedLearner.save` wrote to `folder`, as it would export them.

    source: the folder that the run started from.

    Raises ValueError for a checkpoint that is torn or lacks a rank's file.
    """
    folder = folder / TAG
    if not folder.is_dir():
        raise ValueError(f"no DeepSpeed checkpoint in {folder.parent}: expected its folder {TAG!r}")
    partitions = None if (folder / WHOLE).is_file() else _Partitions(folder)
    state = partitions.state if partitions is not None else map_state(folder / WHOLE)

    def read(name: str) -> torch.Tensor:
        return partitions.read(name) if partitions is not None else state["module"][name]

    if state.get("ds_autoep_layers"):
        yield from _with_experts(folder, state, partitions)
        return
    hf = loaded_model(source) if partitions is None else blank_model(source)
    names = FileNames(hf)
    for name, _ in stored_tensors(hf):
        yield from names.split(name, read(f"hf.{name}"))


def _with_experts(
    folder: Path, state: dict[str, Any], partitions: _Partitions | None
) -> Iterator[NamedTensor]:
    """A model whose experts AutoEP had spread over ranks."""
    layers = {layer["expert_key_prefix"]: layer for layer in state["ds_autoep_layers"]}
    for shapes in state["param_shapes"]:
        for name in shapes:
            if name.rpartition(".")[0] not in layers:
                yield hf_name(name), partitions.read(name) if partitions else state["module"][name]
    for prefix, layer in layers.items():
        experts, each = layer["num_experts"], layer["num_local_experts"]
        if partitions is not None:
            for w, projection in HF_PROJECTION.items():
                for rank in range(experts // each):
                    local = partitions.read(f"{prefix}.{w}", rank)
                    for i, tensor in enumerate(local):
                        yield hf_name(f"{prefix}.{rank * each + i}.{projection}.weight"), tensor
            continue
        for expert in range(experts):
            stored = map_state(folder / f"layer_{layer['moe_layer_id']}_expert_{expert}_{WHOLE}")
            for w, projection in HF_PROJECTION.items():
                yield hf_name(f"{prefix}.{expert}.{projection}.weight"), stored[f"{prefix}.{w}.{expert}"]


def _by_rank(folder: Path, what: str, trusted: list[Any] | None = None) -> list[dict[str, Any]]:
    """The files of all ranks in their order: [bf16_]zero_pp_rank_3_mp_rank_00_<what>.pt"""
    found = {}
    for path in folder.glob(f"*zero_pp_rank_*_mp_rank_00_{what}.pt"):
        rank = re.search(r"zero_pp_rank_(\d+)_", path.name)
        assert rank is not None  # the glob has it
        found[int(rank[1])] = path
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(f"checkpoint {folder} lacks the {what} of some ranks: it has {sorted(found)}")
    return [map_state(found[rank], trusted) for rank in sorted(found)]


def _trusted() -> list[Any]:
    """What lies in the optimiser files of DeepSpeed (0.19.8) beside tensors, as `map_state` takes it."""
    import_deepspeed("cpu")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    def stage(kind: Any, name: str) -> Any:
        """Python before 3.11.4 pickles a member of an enumeration as getattr(kind, name). Of nothing else may
        a file name attributes: by them it could reach any code.
        """
        if kind is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"Unsupported global: getattr({kind!r}, {name!r})")
        return ZeroStageEnum[name]

    return [LossScaler, ZeroStageEnum, (stage, "builtins.getattr")]
