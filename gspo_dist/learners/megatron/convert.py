"""HF <-> megatron-core weights, name by name and shard by shard. No rank ever holds the whole model.

Loading reads from the safetensors files only the rows and columns that this rank owns.

The conversion is written here because neither public one serves the pinned stack (torch 2.13, transformers
5.19, megatron-core 0.16.1), on a CPU least of all:

- mbridge 0.15.1 reads `hf_config.rope_theta`, which transformers 5.19 no longer has. It maps Transformer
  Engine's fused names only, and moves exports to a CUDA device.
- megatron-bridge 0.3.1 pins transformers < 5 and requires transformer-engine, mamba-ssm and causal-conv1d.

Letters: H hidden, ng query groups, np query heads, d head dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from gspo_dist.models.shape import ModelShape
from gspo_dist.weights.folder import read_folder


class TensorSource(Protocol):
    """Where HF tensors come from."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole tensor. ValueError when there is none of that name."""
        ...

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """A tensor's rows and columns; a vector has rows only. ValueError when there is none of that name."""
        ...


class SafetensorsFolder:
    """The *.safetensors of an HF folder, read slice by slice.

    Experts may be named one by one (`experts.3.up_proj.weight`), as most files hold them. They may also be
    fused (`experts.gate_up_proj` [E, 2I, H]), as transformers 5 holds them in memory.

    Raises ValueError for a shard that is missing or torn, and later for a tensor that no shard holds.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.tensors = read_folder(self.folder)

    def _locate(self, name: str) -> tuple[str, int | None, int]:
        """(stored name, expert or None, which half of a fused gate_up).

        Example: experts.3.up_proj.weight in a fused folder is (experts.gate_up_proj, 3, 1).
        """
        if name in self.tensors:
            return name, None, 0
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if expert:
            stem, number, part = expert.groups()
            fused = f"{stem}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
            if fused in self.tensors:
                return fused, int(number), int(part == "up")
        raise ValueError(
            f"model.path has no tensor {name}: {self.folder} holds {len(self.tensors)} others; its "
            "config.json does not describe its weights, or a shard is missing"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        stored, expert, _ = self._locate(name)
        shape = self.tensors[stored].shape
        if expert is None:
            return shape
        return (shape[1] // 2, shape[2]) if stored.endswith("gate_up_proj") else shape[1:]

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        stored, expert, half = self._locate(name)
        with safe_open(self.folder / self.tensors[stored].file, "pt") as f:
            part = f.get_slice(stored)
            if expert is not None:
                size = self.shape(name)[0]
                start, stop, _ = rows.indices(size)
                offset = half * size if stored.endswith("gate_up_proj") else 0
                return part[expert, start + offset : stop + offset, columns]
            return part[rows] if len(self.tensors[stored].shape) == 1 else part[rows, columns]


class Rule(Protocol):
    """How one megatron parameter and its HF tensors become each other."""

    @property
    def sharded(self) -> bool:
        """Whether tensor ranks hold different parts of the parameter."""
        ...

    def load(self, source: TensorSource, rank: int, size: int) -> Tensor:
        """The shard of tensor rank `rank` of `size`."""
        ...

    def export(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """HF names and full tensors from the shards of all tensor ranks, in order."""
        ...


def _share(total: int, rank: int, size: int) -> slice:
    """Rank 1 of 4 has rows 3 to 5 of 12."""
    part = total // size
    return slice(rank * part, (rank + 1) * part)


@dataclass(frozen=True)
class Whole:
    """The same on every rank: norms, the router."""

    hf: str
    """Name of the HF tensor."""

    @property
    def sharded(self) -> bool:
        return False

    def load(self, source: TensorSource, rank: int, size: int) -> Tensor:
        return source.read(self.hf)

    def export(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield self.hf, shards[0]


@dataclass(frozen=True)
class Split:
    """Cut along one dimension."""

    hf: str
    """Name of the HF tensor."""
    dim: int
    """0 for rows (embedding, head), 1 for columns (attention output, down projection)."""

    @property
    def sharded(self) -> bool:
        return True

    def load(self, source: TensorSource, rank: int, size: int) -> Tensor:
        share = _share(source.shape(self.hf)[self.dim], rank, size)
        return source.read(self.hf, rows=share) if self.dim == 0 else source.read(self.hf, columns=share)

    def export(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield self.hf, torch.cat(shards, self.dim)


@dataclass(frozen=True)
class GateUp:
    """Gate and up projections stacked.

    Every rank holds its rows of the gate, then its rows of the up. Example: 4 rows each over two ranks give
    g0 g1 u0 u1 | g2 g3 u2 u3.
    """

    gate: str
    """Name of the HF tensor of the gate projection."""
    up: str
    """Name of the HF tensor of the up projection."""

    @property
    def sharded(self) -> bool:
        return True

    def load(self, source: TensorSource, rank: int, size: int) -> Tensor:
        share = _share(source.shape(self.gate)[0], rank, size)
        return torch.cat([source.read(self.gate, rows=share), source.read(self.up, rows=share)])

    def export(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield self.gate, torch.cat([s.chunk(2)[0] for s in shards])
        yield self.up, torch.cat([s.chunk(2)[1] for s in shards])


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values stacked group by group and cut by rows.

    Example: np 4 heads in ng 2 groups over two ranks give q0 q1 k0 v0 | q2 q3 k1 v1. One layer's three
    matrices are read whole on every rank.
    """

    q: str
    """Name of the HF tensor of the queries, weight or bias."""
    k: str
    """Name of the HF tensor of the keys."""
    v: str
    """Name of the HF tensor of the values."""
    groups: int
    """Query groups, which are the key-value heads: ng."""
    heads: int
    """Query heads: np."""
    head_dim: int
    """Rows per head: d."""

    @property
    def sharded(self) -> bool:
        return True

    def load(self, source: TensorSource, rank: int, size: int) -> Tensor:
        q, k, v = (source.read(name) for name in (self.q, self.k, self.v))
        tail = q.shape[1:]
        grouped = torch.cat([x.reshape(self.groups, -1, *tail) for x in (q, k, v)], 1).reshape(-1, *tail)
        return grouped[_share(grouped.shape[0], rank, size)].clone()

    def export(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        whole = torch.cat(shards)
        tail = whole.shape[1:]
        queries = self.heads // self.groups * self.head_dim
        parts = whole.reshape(self.groups, -1, *tail).split([queries, self.head_dim, self.head_dim], 1)
        for name, part in zip((self.q, self.k, self.v), parts, strict=True):
            yield name, part.reshape(-1, *tail)


def rule_for(name: str, model: ModelShape) -> Rule:
    """The rule of a parameter under its global name, which numbers layers and experts over all ranks.

    Names are megatron-core's, of both kinds of layers. Transformer Engine keeps a norm inside the projection
    after it (`linear_qkv.layer_norm_weight`), and the local layers keep it apart (`input_layernorm.weight`).

    Raises ValueError for a parameter that no rule knows.
    """
    outer: dict[str, Rule] = {
        "embedding.word_embeddings.weight": Split("model.embed_tokens.weight", 0),
        "output_layer.weight": Split("model.embed_tokens.weight" if model.tied else "lm_head.weight", 0),
        "decoder.final_layernorm.weight": Whole("model.norm.weight"),
    }
    if name in outer:
        return outer[name]
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    rule = _layer_rule(f"model.layers.{layer[1]}", layer[2], model) if layer else None
    if rule is None:
        raise ValueError(f"no conversion for the megatron parameter {name} of {model.architecture}")
    return rule


def _layer_rule(hf: str, name: str, model: ModelShape) -> Rule | None:
    """The rule of parameter `name` of the layer that HF calls `hf`, or None."""
    mixtral = model.family == "mixtral"
    attention, mlp = f"{hf}.self_attn", f"{hf}.{'block_sparse_moe' if mixtral else 'mlp'}"
    # Mixtral's files number the projections of an expert.
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    shared = f"{mlp}.shared_expert"
    qkv = re.fullmatch(r"self_attention\.linear_qkv\.(weight|bias)", name)
    if qkv:
        q, k, v = (f"{attention}.{p}_proj.{qkv[1]}" for p in "qkv")
        return QKV(q, k, v, model.kv_heads, model.heads, model.head_dim)
    expert = re.fullmatch(
        r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc([12])\.weight|linear_fc([12])\.weight(\d+))", name
    )
    if expert:
        number, which = expert[1] or expert[4], expert[2] or expert[3]
        mlp, name = f"{mlp}.experts.{number}", f"mlp.linear_fc{which}.weight"
    rules: dict[str, Rule] = {
        "input_layernorm.weight": Whole(f"{hf}.input_layernorm.weight"),
        "self_attention.linear_qkv.layer_norm_weight": Whole(f"{hf}.input_layernorm.weight"),
        "self_attention.q_layernorm.weight": Whole(f"{attention}.q_norm.weight"),
        "self_attention.k_layernorm.weight": Whole(f"{attention}.k_norm.weight"),
        "self_attention.linear_proj.weight": Split(f"{attention}.o_proj.weight", 1),
        "pre_mlp_layernorm.weight": Whole(f"{hf}.post_attention_layernorm.weight"),
        "mlp.linear_fc1.layer_norm_weight": Whole(f"{hf}.post_attention_layernorm.weight"),
        "mlp.router.weight": Whole(f"{mlp}.gate.weight"),
        "mlp.shared_experts.linear_fc1.weight": GateUp(
            f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"
        ),
        "mlp.shared_experts.linear_fc2.weight": Split(f"{shared}.down_proj.weight", 1),
        "mlp.shared_experts.gate_weight": Whole(f"{shared}_gate.weight"),
        "mlp.linear_fc1.weight": GateUp(f"{mlp}.{gate}.weight", f"{mlp}.{up}.weight"),
        "mlp.linear_fc2.weight": Split(f"{mlp}.{down}.weight", 1),
    }
    return rules.get(name)
