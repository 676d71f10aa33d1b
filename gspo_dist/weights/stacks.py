"""Many experts' weights as one tensor on the way to the engines.

A model folder names experts one by one, 18,432 tensors of the 18,867 of Qwen3-30B-A3B. Learners and engines
hold them fused. Taking them apart on one side and putting them together on the other costs Python time per
tensor and moves no byte. So they travel as stacks, whose names say what they stand for:

    layers.0.mlp.experts.{4..7}.{gate_proj,up_proj}.weight [4, 64, H]
        -> layers.0.mlp.experts.4.gate_proj.weight [32, H] is row 0, its first 32 rows
           layers.0.mlp.experts.4.up_proj.weight   [32, H] is row 0, its last 32 rows
           ...
           layers.0.mlp.experts.7.up_proj.weight   [32, H] is row 3, its last 32 rows
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gspo_dist.weights.stream import NamedTensor

_ONE = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)(\..*)?")
_STACK = re.compile(r"(.*\.experts)\.\{(\d+)\.\.(\d+)\}\.\{([\w,]+)\}(\..*)?")


@dataclass(frozen=True)
class Stack:
    """What a stack's name says."""

    prefix: str
    """layers.0.mlp.experts"""
    first: int
    """Its first expert."""
    count: int
    """Its experts, which are consecutive."""
    projections: tuple[str, ...]
    """(gate_proj, up_proj): what the rows of each expert hold, in equal parts."""
    suffix: str
    """What follows in the folder's names: .weight"""

    @property
    def name(self) -> str:
        """The name under which it travels."""
        experts = f"{{{self.first}..{self.first + self.count - 1}}}"
        return f"{self.prefix}.{experts}.{{{','.join(self.projections)}}}{self.suffix}"

    @staticmethod
    def parse(name: str) -> Stack | None:
        """None for the name of a tensor that stands for itself."""
        found = _STACK.fullmatch(name)
        if found is None:
            return None
        prefix, first, last, projections, suffix = found.groups(default="")
        return Stack(prefix, int(first), int(last) - int(first) + 1, tuple(projections.split(",")), suffix)

    def members(self) -> Iterator[str]:
        """The folder's names, expert after expert."""
        for expert in range(self.first, self.first + self.count):
            for projection in self.projections:
                yield f"{self.prefix}.{expert}.{projection}{self.suffix}"


def stack_of(names: Sequence[str], count: int) -> Stack | None:
    """The stack of `count` experts whose first one's tensors are `names`; None where names do not allow it.

    Example: (experts.4.gate_proj.weight, experts.4.up_proj.weight), 4 -> the stack of the module's docstring.
    """
    found = [_ONE.fullmatch(name) for name in names]
    parts = [f.groups(default="") for f in found if f is not None]
    if len(parts) != len(names) or len({(prefix, e, suffix) for prefix, e, _, suffix in parts}) != 1:
        return None
    prefix, expert, _, suffix = parts[0]
    return Stack(prefix, int(expert), count, tuple(projection for _, _, projection, _ in parts), suffix)


def member_shapes(name: str, shape: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the folder's tensors that a travelling tensor stands for: itself, or a stack's.

    ValueError: a stack whose shape is not of its experts and projections.
    """
    stack = Stack.parse(name)
    if stack is None:
        yield name, tuple(shape)
        return
    if len(shape) < 2 or shape[0] != stack.count or shape[1] % len(stack.projections):
        raise ValueError(
            f"a stack [experts, rows of all projections, ...] has another shape: {name} {list(shape)}"
        )
    one = (shape[1] // len(stack.projections), *shape[2:])
    for member in stack.members():
        yield member, one


def unstack(tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """The folder's tensors of a stream: stacks are taken apart into views, the others pass."""
    for name, tensor in tensors:
        stack = Stack.parse(name)
        if stack is None:
            yield name, tensor
            continue
        pieces = tensor.unflatten(1, (len(stack.projections), -1)).flatten(0, 1)
        yield from zip(stack.members(), pieces.unbind(), strict=True)
