"""Fills a model parameter by parameter: each is read from the files into its place, in its own precision.

ZeRO 3 is partitioned from its first parameter on. `from_pretrained` holds the whole model in the memory of
every rank. So it does with transformers' own ZeRO-3 switch, which fuses the experts of the whole checkpoint
before it partitions. A host of eight ranks does not have that memory for a model that ZeRO-3 is worth using
for.

Up to ZeRO 2 every rank has the dense parameters, and under AutoEP its own experts: the others are not read.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from gspo_dist.learners.attention import NAME
from gspo_dist.learners.hf_folder import check_loaded
from gspo_dist.learners.stream_names import loaded_model
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames, stored_tensors


@dataclass(frozen=True)
class Part:
    """A piece of a parameter that the folder holds as a tensor of its own."""

    file: str
    """Its name in the folder."""
    row: int | None
    """The row of the parameter that it belongs to: an expert. None: the whole."""
    index: torch.Tensor
    """[n] int64: the place in that row, flattened, of each of its elements."""
    place: slice | torch.Tensor
    """The same, as a slice where the elements follow each other: it needs no copy to write to."""


def _place(index: torch.Tensor) -> slice | torch.Tensor:
    first = int(index[0])
    follows = torch.equal(index, torch.arange(first, first + len(index)))
    return slice(first, first + len(index)) if follows else index


def parts(name: str, shape: torch.Size, names: FileNames) -> Iterator[Part]:
    """What of a folder a parameter is made of, where the folder holds it under another name or form.

    transformers says only how a parameter is taken apart to be saved. So the numbers of its elements are
    taken apart, for one expert where the folder holds experts one by one, and say where each piece belongs.

    Example: `mlp.experts.gate_up_proj` [E, 2 I, H] has `mlp.experts.3.up_proj.weight` in row 3, at the
    elements I H to 2 I H - 1. Raises ValueError where the folder joins it with other parameters.
    """
    one = torch.arange(shape[1:].numel()).view(1, *shape[1:])
    try:
        first = list(names.split(name, one))
    except ValueError:  # not expert by expert, so whole
        whole = torch.arange(shape.numel()).view(shape)
        for file, index in names.split(name, whole):
            yield Part(file, None, index.flatten(), _place(index.flatten()))
        return
    places = [(index.flatten(), _place(index.flatten())) for _, index in first]
    for expert in range(shape[0]):
        # Their places are those of expert 0, so a blank is enough to ask for the names.
        files = names.split(name, torch.empty_like(one, device="meta"), expert)
        for (file, _), (index, place) in zip(files, places, strict=True):
            yield Part(file, expert, index, place)


def copy_into(
    target: torch.Tensor, name: str, weights: ModelFolder, names: FileNames, rows: range | None = None
) -> list[str]:
    """Fills the parameter `name` and returns the tensors that it was made of.

    rows: of the parameter, which are all that `target` has. The others are looked for and not read.

    Raises ValueError, naming what is missing, when the folder does not hold it.
    """
    whole = target.shape if rows is None else torch.Size((names.shapes[name][0], *target.shape[1:]))
    if name in weights.tensors:
        stored = weights.read(name)
        if stored.shape != whole:
            raise ValueError(
                f"model.path: {name} should be {list(whole)} by config.json: {weights.path} has "
                f"{list(stored.shape)}; the folder's config and weights are of different models"
            )
        target.copy_(stored if rows is None else stored[rows.start : rows.stop])
        return [name]
    if name in names.unchanged:
        check_loaded(weights.path, [name], [])
    found = list(parts(name, whole, names))
    check_loaded(weights.path, [part.file for part in found if part.file not in weights.tensors], [])
    first = 0 if rows is None else rows.start
    for part in found:
        if part.row is None and rows is not None:
            raise ValueError(f"{name} cannot be read by rows from {weights.path}; set expert_parallel=1")
        if rows is not None and part.row not in rows:
            continue
        row = (target if part.row is None else target[part.row - first]).view(-1)
        place = part.place if isinstance(part.place, slice) else part.place.to(target.device)
        row[place] = weights.read(part.file).flatten().to(target.device, target.dtype)
    return [part.file for part in found]


def load_in_place(
    device: torch.device, experts_later: bool, folder: Path, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The HF causal LM of `folder`, as `from_pretrained` would give it, on `device`.

    Beside the model one tensor of the files is in host memory, and no parameter after it has gone to a GPU.

    experts_later: leaves the experts without values and without memory, for `own_experts`.

    Raises ValueError when weights are missing, or are there without a place.
    """
    source = ModelFolder(folder)
    if source.has_untold_head:
        config = copy.deepcopy(config)
        config.get_text_config().tie_word_embeddings = False
    with no_init_weights():  # memory that nobody has written to is not taken yet
        hf: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    hf.tie_weights()
    hf._weight_conversions = loaded_model(source)._weight_conversions
    names = FileNames(hf)
    plan = hf._get_dtype_plan(dtype)  # what transformers keeps in another precision
    patterns, groups, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    read: set[str] = set()
    for name, tensor in stored_tensors(hf):
        if experts_later and ".mlp.experts." in name:
            # Asked for by name, so that a folder that lacks some is refused here, on every rank.
            read.update(copy_into(tensor[:0], name, source, names, range(0)))
            continue
        owner, _, leaf = name.rpartition(".")
        module = hf.get_submodule(owner)
        held = getattr(module, leaf)
        kept = patterns.search(name) if patterns is not None else None
        if kept is not None and kept.lastgroup is not None:
            held.data = held.data.to(plan[groups[kept.lastgroup]])
        read.update(copy_into(held.data, name, source, names))
        held.data = held.data.to(device)
    check_loaded(folder, [], source.streamed - read)
    return hf.eval()


@contextlib.contextmanager
def own_experts(hf: PreTrainedModel, folder: Path, device: torch.device) -> Iterator[None]:
    """While it is open, AutoEP takes over experts read from `folder`: this rank's alone, on `device`.

    AutoEP (0.19.8) cuts a rank's experts out of the whole ones. It is given a module that has no others.
    """
    from deepspeed.module_inject import auto_ep_layer

    source, names = ModelFolder(folder), FileNames(hf)
    prefixes = {id(module): name for name, module in hf.named_modules()}
    repack = auto_ep_layer.repack_expert_weights

    def from_files(experts_source: Any, spec: Any, ep_rank: int, ep_size: int) -> Any:
        each = spec.num_experts // ep_size
        rows = range(ep_rank * each, (ep_rank + 1) * each)
        own = SimpleNamespace()
        for leaf, parameter in experts_source.named_parameters():
            local = torch.empty((each, *parameter.shape[1:]), dtype=parameter.dtype)
            copy_into(local, f"{prefixes[id(experts_source)]}.{leaf}", source, names, rows)
            setattr(own, leaf, local)
        return tuple(t.to(device) for t in repack(own, dataclasses.replace(spec, num_experts=each), 0, 1))

    auto_ep_layer.repack_expert_weights = from_files
    try:
        yield
    finally:
        auto_ep_layer.repack_expert_weights = repack


def _renew_buffers(hf: PreTrainedModel, weights: ModelFolder | None) -> set[str]:
    """Gives the buffers their values; returns the names of those that a folder holds.

    Rotary tables are built again, because zero.Init had rounded them to the weights' precision. What the
    folder holds (the bias that routers choose by) is read by rank 0, which has `weights`, for all ranks.

    Collective. Raises ValueError on every rank for a buffer of another kind.
    """
    stored = {name for name, _ in stored_tensors(hf)} - {name for name, _ in hf.named_parameters()}
    device = next(buffer for buffer in hf.buffers()).device
    precise = tuple(getattr(hf, "_keep_in_fp32_modules_strict", None) or ())
    for name, module in list(hf.named_modules()):
        own = dict(module.named_buffers(recurse=False))
        kept = {leaf for leaf in own if f"{name}.{leaf}" in stored}
        for leaf in sorted(kept):
            buffer = own[leaf].float() if leaf.endswith(precise) else own[leaf]
            if weights is not None and f"{name}.{leaf}" in weights.tensors:
                buffer.copy_(weights.read(f"{name}.{leaf}"))
            dist.broadcast(buffer, 0)
            setattr(module, leaf, buffer)
        if len(kept) == len(own):
            continue
        if list(module.parameters()) or "Rotary" not in type(module).__name__:
            raise ValueError(
                "ZeRO 3 needs a model whose only buffers are rotary tables and what its folder holds: "
                f"{name} is a {type(module).__name__}; set learner.deepspeed.zero_stage=2"
            )
        hf.set_submodule(name, type(module)(config=hf.config).to(device))
    return stored


def load_partitioned(
    deepspeed: ModuleType,
    settings: dict[str, Any],
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The HF causal LM of `folder`, its parameters partitioned over all ranks. Rank 0 reads the files.

    settings: the engine's configuration.

    Collective. Raises ValueError on every rank when weights are missing.
    """
    # Without `dtype`, which zero.Init gets wrong on hosts without fp16 (0.19.8); the settings name it. Its
    # "memory efficient" linear layer would replace torch's in the whole process.
    with deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False), no_init_weights():
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    source = ModelFolder(folder)
    if source.tied:
        hf.tie_weights()  # zero.Init had made the tied head a parameter of its own
    weights = source if dist.get_rank() == 0 else None
    read = _renew_buffers(hf, weights)
    names = FileNames(hf)
    error: ValueError | None = None
    if weights is not None:
        try:
            check_loaded(folder, read - set(weights.tensors), [])
        except ValueError as raised:
            error = raised
    for name, parameter in hf.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if weights is not None and error is None:
                try:
                    read.update(copy_into(parameter.data, name, weights, names))
                except ValueError as raised:
                    error = raised  # told to all ranks below: a rank that left now would hang the others
    if weights is not None and error is None:
        try:
            check_loaded(folder, [], weights.streamed - read)
        except ValueError as raised:
            error = raised
    errors: list[ValueError | None] = [error]
    dist.broadcast_object_list(errors, src=0)
    if errors[0] is not None:
        raise errors[0]
    return hf
