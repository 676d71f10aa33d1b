"""Exact parameter counts of a decoder from its HF `config.json`, and what follows from them per token.

One block: RMSNorm, grouped-query attention, RMSNorm, SwiGLU, dense or a mixture of experts. The families differ in
biases, in a norm of queries and keys, in a shared expert.
Letters: h hidden, q = heads x head_dim, kv = kv_heads x head_dim, I feed-forward, E experts, k top-k, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder. Parameter counts are exact; `active` counts what one token passes through."""

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = "none"
    """none | head (one weight a head_dim: Qwen3) | full (one a channel: OLMoE)."""
    num_experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    """Shared expert with a gate of its own (Qwen2-MoE)."""
    moe_layers: int = 0

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """V x h, of the input embedding; the head is as large unless tied to it."""
        return self.vocab * self.hidden

    @property
    def head(self) -> int:
        return 0 if self.tied else self.embedding

    @property
    def attention(self) -> int:
        """Matrices and biases of one layer's attention: h(q + 2kv) + qh."""
        weights = self.hidden * (self.q + 2 * self.kv) + self.q * self.hidden
        return weights + self.qkv_bias * (self.q + 2 * self.kv) + self.out_bias * self.hidden

    @property
    def norms(self) -> int:
        """Norm weights of one layer."""
        qk = {"none": 0, "head": 2 * self.head_dim, "full": self.q + self.kv}[self.qk_norm]
        return 2 * self.hidden + qk

    @property
    def expert(self) -> int:
        """One routed expert: 3hI."""
        return 3 * self.hidden * self.expert_ffn

    @property
    def router(self) -> int:
        return self.hidden * self.num_experts

    @property
    def shared_expert(self) -> int:
        return (3 * self.hidden * self.shared_ffn + self.hidden) if self.shared_ffn else 0

    @property
    def dense_ffn(self) -> int:
        return 3 * self.hidden * self.ffn

    @property
    def experts_total(self) -> int:
        """All routed experts of all layers: what expert parallelism divides."""
        return self.moe_layers * self.num_experts * self.expert

    @property
    def total(self) -> int:
        """Every parameter."""
        per_layer = self.attention + self.norms
        moe = self.moe_layers * (self.router + self.shared_expert) + self.experts_total
        dense = (self.layers - self.moe_layers) * self.dense_ffn
        return self.embedding + self.head + self.layers * per_layer + moe + dense + self.hidden

    @property
    def active(self) -> int:
        """Parameters one token meets, both embedding tables counted whole (how model cards count)."""
        return self.total - self.moe_layers * (self.num_experts - self.top_k) * self.expert

    @property
    def active_without_embedding(self) -> int:
        """`active` without the input embedding, which is looked up and not multiplied: the N of 2N FLOPs a token."""
        return self.active - (0 if self.tied else self.embedding)

    @property
    def largest_layer(self) -> int:
        moe = self.router + self.shared_expert + self.num_experts * self.expert if self.moe_layers else 0
        dense = self.dense_ffn if self.moe_layers < self.layers else 0
        return self.attention + self.norms + max(moe, dense)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """KV cache of one token over all layers: 2 L kv bytes."""
        return 2 * self.layers * self.kv * bytes_per_value

    @property
    def trace_bytes_per_token(self) -> int:
        """One routing-trace row: L x k expert ids in the smallest unsigned type, and one byte that marks it known."""
        if not self.moe_layers:
            return 0
        return self.moe_layers * self.top_k * (1 if self.num_experts <= 256 else 2) + 1

    def forward_flops(self, tokens: float, mean_length: float) -> float:
        """2N a token for the matrices, and 4 L q x (length / 2) for causal attention."""
        return tokens * (2.0 * self.active_without_embedding + 2.0 * self.layers * self.q * mean_length)


_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "intermediate_size": 6144,
    "tie_word_embeddings": False,
}

# Published configurations of the models that plans most often ask about.
BUILT_IN: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        **_QWEN3_MOE,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": {
        **_QWEN3_MOE,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "moe_intermediate_size": 1536,
        "intermediate_size": 12288,
    },
    "OLMoE-1B-7B": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 1024,
    },
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 14336,
    },
}

_FAMILIES = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral", "olmoe")


def find_model(name: str) -> ModelShape:
    """The shape of the model that `find_config` finds."""
    return model_from_config(*find_config(name))


def find_config(name: str) -> tuple[Mapping[str, Any], str]:
    """A model's config and its name: a built-in model (case and vendor prefix do not matter), or the HF folder or
    config.json at a path."""
    for known, config in BUILT_IN.items():
        if name.lower().rsplit("/", 1)[-1] == known.lower():
            return config, known
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return read_config(path), path.resolve().parent.name
    raise ValueError(
        f"plan.model must be a folder with a config.json or one of {', '.join(BUILT_IN)}: got {name!r}"
    )


def read_config(path: Path) -> Mapping[str, Any]:
    """An HF config.json; ValueError names a file that is none."""
    way_out = "give plan.model or model.path the folder of an HF model"
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be an HF config.json: it is not JSON ({error}); {way_out}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be an HF config.json: it holds a {type(config).__name__}; {way_out}")
    return config


def model_from_config(config: Mapping[str, Any], name: str | None = None) -> ModelShape:
    """The shape that HF builds from this `config.json`; ValueError for a family that is not known, a size left out."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(_FAMILIES)}: got {family!r}")
    if config.get("mlp_bias"):
        raise ValueError(
            f"mlp_bias is not counted: got true for {family}; plan with the same model without it"
        )
    size = partial(_size, config, name or family)
    hidden, layers, heads = (size(k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3", "qwen3_moe", "olmoe")
    qwen2_bias = family == "qwen2" or (family == "qwen2_moe" and bool(config.get("qkv_bias", True)))
    return ModelShape(
        name=name or str(config.get("_name_or_path") or family),
        vocab=size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        # Qwen3's own default when config.json is silent; every other family splits the hidden size.
        head_dim=size("head_dim", 128 if family == "qwen3" else hidden // heads),
        ffn=size("intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or qwen2_bias,
        out_bias=bias,
        qk_norm={"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}.get(family, "none"),
        **_experts(config, family, layers, size),
    )


def _size(config: Mapping[str, Any], name: str, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if not value and default is not None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"the config.json of {name} must give {key}, a whole number above 0: got {value!r}; take the model's own file"
        )
    return value


def _experts(config: Mapping[str, Any], family: str, layers: int, size: Callable[..., int]) -> dict[str, int]:
    counted = "num_experts" if config.get("num_experts") else "num_local_experts"
    if family not in ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe") or not config.get(counted):
        return {}
    dense, step = config.get("mlp_only_layers") or (), size("decoder_sparse_step", 1)
    shared = family == "qwen2_moe" and config.get("shared_expert_intermediate_size")
    return {
        "num_experts": size(counted),
        "top_k": size("num_experts_per_tok"),
        "expert_ffn": size("moe_intermediate_size" if family.startswith("qwen") else "intermediate_size"),
        "shared_ffn": size("shared_expert_intermediate_size") if shared else 0,
        "moe_layers": sum(i not in dense and (i + 1) % step == 0 for i in range(layers)),
    }
