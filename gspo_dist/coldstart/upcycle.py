"""Sparse upcycling: a dense HF model as a mixture of experts that starts from what the dense one knows.

Every feed-forward layer becomes `experts` copies of itself behind a router (Komatsuzaki et al.,
arXiv 2212.05055). The weights of a token's top-k experts sum to one. So with equal experts the layer computes
sum_i w_i f(x) = f(x), whatever the router says: without noise the outputs are the dense model's. Noise tells
the experts apart, so that routing matters and experts can part ways.

Tensors are made and written one after the other. Beside the one in the making, the feed-forward matrices of
its dense layer are in memory, and no file is.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_dist.coldstart.upcycle_config import SHARED_WIDTH, family_for, moe_config
from gspo_dist.files import whole_folder
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.export import WEIGHT_FILES, verify_folder
from gspo_dist.weights.folder import ModelFolder, StoredTensor
from gspo_dist.weights.shards import DTYPES, ShardWriter

SHARD_BYTES = 1 << 30
"""Bytes of a weight file. A larger tensor has a file of its own."""
Planned = tuple[str, StoredTensor, Callable[[], torch.Tensor]]
"""A tensor of the MoE: its name, what it will be in the file, and what makes it."""
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_PARTS = ("gate", "up", "down")
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Upcycling:
    """What is made of each feed-forward layer."""

    experts: int
    """Experts per layer."""
    top_k: int = 2
    """Experts that one token meets."""
    noise: float = 0.02
    """Spread of the experts' noise, as a share of that of the matrix it is added to. 0: all equal."""
    router_std: float = 0.02
    """Standard deviation of the router's weights. With 0 every token ties, and meets the same experts."""
    seed: int = 0
    """Of noise and routers. The same seed gives the same bytes."""
    family: str | None = None
    """mixtral | qwen2_moe | qwen3_moe. None: the one that fits the dense model."""

    def __post_init__(self) -> None:
        if self.top_k < 2:
            raise ValueError(
                f"top_k must be at least 2: got {self.top_k}; a token's weights are scaled to sum to one, so "
                "a single expert always has weight 1 and its router never gets a gradient"
            )
        if self.experts < self.top_k:
            raise ValueError(f"experts must be at least top_k: got {self.experts} and {self.top_k}")
        for name in ("noise", "router_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0: got {getattr(self, name)}")


def upcycle(source: Path, target: Path, plan: Upcycling, *, shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """Writes the MoE of the dense HF folder `source` to `target`; returns {parameters, tensors, layers}.

    Tokenizer and generation config are copied. The folder is written beside `target`, read back, compared by
    checksum, and only then appears, whole.

    ValueError: `target` is not empty, the model cannot be mapped (upcycle_config), its tensors are not
    exactly those of its config, or there is no room on the disk.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"the folder to upcycle to must be new or empty: {target} is not; name another")
    folder = ModelFolder(source)
    family = family_for(folder.config, plan.family)
    config = moe_config(folder.config, family, plan.experts, plan.top_k)
    # The files decide (ModelFolder.tied): a config may say tied beside a head of its own.
    config.tie_word_embeddings = folder.tied
    _check_tensors(folder, family)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(folder, plan, target.parent)
    with whole_folder(target) as partial:
        # recipe.json would say of the mixture what coldstart/ wrote of the dense model.
        left_out = shutil.ignore_patterns(*WEIGHT_FILES, "config.json", "recipe.json")
        shutil.copytree(source, partial, ignore=left_out)
        config.save_pretrained(partial)
        facts = _write(lambda: _tensors(folder, family, plan), partial, shard_bytes)
    return facts | {"layers": int(config.num_hidden_layers)}


def _write(tensors: Callable[[], Iterator[Planned]], folder: Path, shard_bytes: int) -> dict[str, int]:
    """Writes the weight files and their index, and reads them back.

    tensors: lists them anew at each call. The first listing makes none: a file's head needs the names only.
    """
    writer = ShardWriter(folder, shard_bytes, {name: stored for name, stored, _ in tensors()})
    sent: dict[str, int] = {}
    parameters = 0
    try:
        for name, _, make in tensors():
            tensor = make().contiguous()
            sent[name] = host_checksum(tensor)
            writer.add(name, tensor)
            parameters += tensor.numel()
            del tensor  # before the next one is made
        writer.close()
    finally:
        writer.abandon()
    verify_folder(folder, sent)
    return {"parameters": parameters, "tensors": len(sent)}


def _layer_names(config: Any, family: str) -> list[str]:
    """What a dense layer holds besides its feed-forward matrices, without the prefix of the layer."""
    kind = config.model_type
    names = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    if kind == "qwen2":
        names += [f"self_attn.{p}_proj.bias" for p in "qkv"]
    elif getattr(config, "attention_bias", False):
        names += [f"self_attn.{p}_proj.bias" for p in "qkvo"]
    if kind == "qwen3":
        names += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    return [*names, "input_layernorm.weight", "post_attention_layernorm.weight"]


def _check_tensors(folder: ModelFolder, family: str) -> None:
    """Raises ValueError unless the folder holds exactly the tensors of its config, in a type for noise."""
    config = folder.config
    inner = [*_layer_names(config, family), *(f"mlp.{part}_proj.weight" for part in _PARTS)]
    wanted = {f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in inner}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"} | (
        set() if folder.tied else {"lm_head.weight"}
    )
    held = {n for n in folder.tensors if not n.endswith("rotary_emb.inv_freq")}
    held -= set(folder.twin[:1]) if folder.twin else set()
    if missing := sorted(wanted - held):
        raise ValueError(
            f"model folder {folder.path} lacks {missing[0]} ({len(missing)} such), which its config.json "
            "needs; copy the folder again"
        )
    if extra := sorted(held - wanted):
        raise ValueError(
            f"{family} has no place for {extra[0]} ({len(extra)} such) of {folder.path}; upcycle a model "
            "without it"
        )
    if odd := sorted(n for n in wanted if folder.tensors[n].dtype not in _BYTES):
        raise ValueError(
            f"weights must be one of {', '.join(_BYTES)}: {odd[0]} of {folder.path} is "
            f"{folder.tensors[odd[0]].dtype}; save the model in bf16 or fp32 first"
        )


def _check_room(folder: ModelFolder, plan: Upcycling, parent: Path) -> None:
    """Raises ValueError when the disk has no room for the MoE."""
    needed = 0
    for name, tensor in folder.tensors.items():
        copies = plan.experts if ".mlp." in name else 1
        size = _BYTES.get(tensor.dtype, 4)
        for length in tensor.shape:
            size *= length
        needed += copies * size
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"no room for the MoE: it needs {needed / 2**20:.0f} MiB, and {parent} has "
            f"{free / 2**20:.0f} MiB free; make room, or take fewer experts"
        )


def _tensors(folder: ModelFolder, family: str, plan: Upcycling) -> Iterator[Planned]:
    """The MoE's tensors under the names of its published folders, layer by layer."""

    def kept(name: str) -> Planned:
        return name, folder.tensors[name], functools.partial(folder.read, name)

    yield kept("model.embed_tokens.weight")
    for i in range(folder.config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for name in _layer_names(folder.config, family):
            yield kept(prefix + name)
        if family == "qwen2_moe" and folder.config.model_type != "qwen2":
            # vLLM 0.30 builds these biases whatever `qkv_bias` says, so they are there, and zero.
            for p in "qkv":
                weight = folder.tensors[f"{prefix}self_attn.{p}_proj.weight"]
                yield _zeros(f"{prefix}self_attn.{p}_proj.bias", weight.dtype, weight.shape[0])
        yield from _experts(folder, prefix, family, plan)
    yield kept("model.norm.weight")
    if not folder.tied:
        yield kept("lm_head.weight")


def _zeros(name: str, kind: str, *shape: int) -> Planned:
    return name, StoredTensor(kind, shape, ""), lambda: torch.zeros(shape, dtype=_TYPES[kind])


def _experts(folder: ModelFolder, prefix: str, family: str, plan: Upcycling) -> Iterator[Planned]:
    """The router and the experts of one layer, and the silent shared expert of Qwen2-MoE."""
    block = prefix + ("block_sparse_moe." if family == "mixtral" else "mlp.")
    sources = {part: f"{prefix}mlp.{part}_proj.weight" for part in _PARTS}
    read = functools.cache(folder.read)  # once for all experts of the layer, and forgotten with it
    gate = folder.tensors[sources["gate"]]
    hidden, kind = gate.shape[1], gate.dtype

    def drawn(name: str, *shape: int) -> Planned:
        def make() -> torch.Tensor:
            return (plan.router_std * _normal(shape, plan.seed, name)).to(_TYPES[kind])

        return name, StoredTensor(kind, shape, ""), make

    def expert(name: str, source: str) -> Planned:
        return name, folder.tensors[source], lambda: _noised(read(source), plan, name)

    yield drawn(block + "gate.weight", plan.experts, hidden)
    for e in range(plan.experts):
        for part in _PARTS:
            leaf = _MIXTRAL[part] if family == "mixtral" else f"{part}_proj"
            yield expert(f"{block}experts.{e}.{leaf}.weight", sources[part])
    if family == "qwen2_moe":
        shared = block + "shared_expert."
        for part in ("gate", "up"):
            yield drawn(f"{shared}{part}_proj.weight", SHARED_WIDTH, hidden)
        yield _zeros(f"{shared}down_proj.weight", kind, hidden, SHARED_WIDTH)
        yield _zeros(f"{block}shared_expert_gate.weight", kind, 1, hidden)


def _noised(matrix: torch.Tensor, plan: Upcycling, name: str) -> torch.Tensor:
    """The matrix with the noise of the tensor `name`. Drawn and added in float32."""
    if plan.noise == 0:
        return matrix
    exact = matrix.float()
    return (exact + plan.noise * exact.std() * _normal(tuple(matrix.shape), plan.seed, name)).to(matrix.dtype)


def _normal(shape: tuple[int, ...], seed: int, name: str) -> torch.Tensor:
    """Standard normal numbers that depend on seed and name alone, so no order of writing changes them."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def largest_difference(dense: Path, moe: Path, *, tokens: int = 64, seed: int = 0) -> tuple[float, float]:
    """(mean, largest) |difference| of the two folders' log-probs over random tokens, in nats, in float32.

    Every entry of the vocabulary counts. Both models are held at once.
    """
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (dense, moe)]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(models[0].config.vocab_size, (1, tokens), generator=generator)
    ours, theirs = (m(ids, use_cache=False).logits[0].log_softmax(-1) for m in models)
    gap = (ours - theirs).abs()
    return float(gap.mean()), float(gap.max())
