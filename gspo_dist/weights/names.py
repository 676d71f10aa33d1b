"""From an HF model in memory to the names and tensors of its model folder.

transformers 5 loads many files under other names and shapes than they have: it fuses the experts of a layer
into one parameter, renames modules, joins or splits projections. A learner streams what the *folder* holds,
because that is what engines load and what an export must hold. The rules are transformers' own, turned
round; they are kept with the model that was loaded, so a folder that was written in another way is answered
in its own way.

    in memory                                       in the folder
    layers.0.mlp.experts.gate_up_proj [8, 64, H]    Qwen3-MoE: layers.0.mlp.experts.0.gate_proj.weight [32, H]
                                                    Mixtral: layers.0.block_sparse_moe.experts.0.w1.weight
    layers.0.mlp.gate.e_score_correction_bias [8]   DeepSeek-V3: the same (a buffer, not a parameter)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from gspo_dist.weights.stacks import Stack, stack_of
from gspo_dist.weights.stream import NamedTensor

SLICE_BYTES = 64 << 20
"""Experts are taken out of a fused parameter in slices of about this size, since each slice may be a copy."""


def stored_tensors(hf: torch.nn.Module) -> Iterator[NamedTensor]:
    """Every tensor that a folder of this model holds, under its name in memory: parameters
    and persistent buffers.

    A tensor with two names, such as a head that is tied to the embedding, comes once, under the first. The
    tensors are detached, not copied.
    """
    for name, parameter in hf.named_parameters():
        yield name, parameter.detach()
    for name, buffer in hf.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in hf.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer.detach()


class FileNames:
    """The names of one model's folder. `hf` is the model as transformers loaded it; its tensors may
    be on meta.
    """

    def __init__(self, hf: torch.nn.Module) -> None:
        # Under ZeRO 3 a parameter is empty between its uses, and DeepSpeed notes its shape in `ds_shape`.
        held = dict(hf.named_parameters())
        self.shapes = {
            name: tuple(getattr(held.get(name), "ds_shape", tensor.shape))
            for name, tensor in stored_tensors(hf)
        }
        transforms: list[WeightTransform] | None = getattr(hf, "_weight_conversions", None)
        if transforms is None:
            # A model that no folder was loaded into: transformers' defaults for its kind, as when
            # it saves one.
            transforms = [
                t
                for t in get_model_conversion_mapping(hf, add_legacy=False)
                if not isinstance(t, PrefixChange)
            ]
        # What transformers reads of a model to go back. The model itself would make it look up its rules at
        # every call, which takes milliseconds.
        self._rules = SimpleNamespace(_weight_conversions=transforms, config=hf.config)
        back = [t.reverse_transform() for t in reversed(transforms)]
        self._renamings = [t for t in back if isinstance(t, WeightRenaming)]
        self._converters = [t for t in back if isinstance(t, WeightConverter)]
        self._sliced: dict[str, list[str] | None] = {}
        self._in_order: dict[str, bool] = {}
        groups: dict[str, list[str]] = {}
        self._same: set[str] = set()
        for name in self.shapes:
            target, converter = rename_source_key(name, self._renamings, self._converters, reverse=True)
            groups.setdefault(target, []).append(name)
            if converter is None and target == name:
                self._same.add(name)
        self.groups = list(groups.values())
        """Names in memory; those that make one tensor of the folder together. Most groups are one name."""
        self._joined = {name for group in self.groups if len(group) > 1 for name in group}

    @property
    def unchanged(self) -> frozenset[str]:
        """Names in memory of tensors that the folder holds as they are, under the same name."""
        return frozenset(self._same)

    def join(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[NamedTensor]:
        """The folder's tensors that a group of tensors in memory makes."""
        yield from revert_weight_conversion(self._rules, dict(tensors)).items()

    def split(
        self,
        name: str,
        tensor: torch.Tensor,
        first: int = 0,
        *,
        slice_bytes: int | None = None,
        stacked: bool = False,
    ) -> Iterator[NamedTensor]:
        """The folder's tensors of one parameter.

        stacked: experts stay together where a stack (weights.stacks) can name them, in slices of about
        `slice_bytes` (if not given, `SLICE_BYTES`). They are views, while experts one by one may be copies.

        Where the folder names experts one by one, `tensor` may be a part of the fused parameter: the experts
        from `first` on. Example: a fused [8, 64, H] whose rows 4 and 5 are given with first=4 yields the
        tensors of the experts 4 and 5. KeyError: the model has no such parameter. ValueError: a part of a
        parameter that the folder does not hold expert by expert.
        """
        if name in self._joined:
            raise ValueError(
                f"the folder joins {name} with other parameters into one tensor, which this learner cannot "
                "do: use learner.backend=eager"
            )
        if name in self._same:
            yield name, tensor
            return
        if slice_bytes is None or not stacked:
            slice_bytes = SLICE_BYTES
        per_expert = self._per_expert(name)
        if per_expert is None:
            if tuple(tensor.shape) != self.shapes[name]:
                raise ValueError(
                    f"{name} must be given whole, since the folder does not hold it expert by expert: got "
                    f"{list(tensor.shape)} of {list(self.shapes[name])}"
                )
            yield from self.join({name: tensor})
            return
        experts = self.shapes[name][0]
        step = max(1, slice_bytes // max(1, tensor[0].nbytes))
        for start in range(0, len(tensor), step):
            part = tensor[start : start + step]
            if stacked:
                stack = self._stack(name, per_expert, first + start, len(part))
                if stack is not None:
                    yield stack.name, part
                    continue
            # The names of a part count from 0. Those of the whole come in the same order: for each kind of
            # tensor (gate, up) the experts 0, 1, ...
            for i, piece in enumerate(revert_weight_conversion(self._rules, {name: part}).values()):
                kind, expert = divmod(i, len(part))
                yield per_expert[kind * experts + first + start + expert], piece

    def _per_expert(self, name: str) -> list[str] | None:
        """The folder's names of a fused parameter, if every one of them depends on one index of
        its first axis.
        """
        if name not in self._sliced:
            shape = self.shapes[name]
            self._sliced[name] = None
            if len(shape) > 1:
                whole, one = (list(self._on_meta(name, (n, *shape[1:]))) for n in (shape[0], 1))
                if len(whole) == shape[0] * len(one):
                    self._sliced[name] = whole
        return self._sliced[name]

    def _stack(self, name: str, per_expert: list[str], first: int, count: int) -> Stack | None:
        """How a slice of a fused parameter is called. None: the folder does not hold its rows in order."""
        experts = self.shapes[name][0]
        kinds = len(per_expert) // experts
        if name not in self._in_order:
            # transformers may transpose or reorder. Numbers sent its way show whether it only cuts.
            probe = torch.arange(2 * kinds * 2 * 3.0).view(2, kinds * 2, 3)
            pieces = list(revert_weight_conversion(self._rules, {name: probe}).values())
            wanted = [probe[e, k * 2 : k * 2 + 2] for k in range(kinds) for e in range(2)]
            self._in_order[name] = len(self.shapes[name]) == 3 and all(
                torch.equal(piece, want) for piece, want in zip(pieces, wanted, strict=True)
            )
        if not self._in_order[name]:
            return None
        return stack_of([per_expert[kind * experts + first] for kind in range(kinds)], count)

    def _on_meta(self, name: str, shape: tuple[int, ...]) -> Iterable[str]:
        return revert_weight_conversion(self._rules, {name: torch.empty(shape, device="meta")})

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of everything that the model streams, without touching a weight."""
        found: dict[str, tuple[int, ...]] = {}
        for group in self.groups:
            blank = {name: torch.empty(self.shapes[name], device="meta") for name in group}
            found |= {name: tuple(tensor.shape) for name, tensor in self.join(blank)}
        return found


def hf_named_weights(
    hf: torch.nn.Module, *, slice_bytes: int | None = None, stacked: bool = False
) -> Iterator[NamedTensor]:
    """All weights of an HF model in memory under its folder's names, detached; fused experts in slices.

    stacked: as `FileNames.split` takes it.
    """
    names, tensors = FileNames(hf), dict(stored_tensors(hf))
    for group in names.groups:
        if len(group) == 1:
            name = group[0]
            yield from names.split(name, tensors[name], slice_bytes=slice_bytes, stacked=stacked)
        else:
            yield from names.join({name: tensors[name] for name in group})
