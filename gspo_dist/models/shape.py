"""The one reader of an HF `config.json`: a decoder's sizes and switches, and its counts per token.

Sizes, layers and scales are read for every family. Parameters are counted for one kind of block: RMSNorm,
grouped-query attention, RMSNorm, and SwiGLU, dense or as a mixture of experts. Within it the families differ
in biases, in a norm of queries and keys, and in a shared expert. `countable` refuses any other kind.

In the formulas h is the hidden size, q = heads x head_dim, kv = kv_heads x head_dim, I the inner width of a
feed-forward layer, E the experts, k the top-k, L the layers and V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_dist.models.config_file import find_config, read_config, text_config
from gspo_dist.models.layers import CHUNKED, MEMORY, SLIDING, expert_layers, layer_kinds

COUNTED = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral", "olmoe")
"""Families (`model_type`) whose parameters the formulas below count exactly."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of one decoder."""

    name: str
    """What messages call the model: its folder or its published name."""
    vocab: int
    """Rows of the embedding (V)."""
    hidden: int
    """Width of the residual stream (h)."""
    layers: int
    """Decoder layers."""
    heads: int
    """Query heads per layer."""
    kv_heads: int
    """Heads of keys and values per layer."""
    head_dim: int
    """Width of one head."""
    ffn: int
    """Inner width of a dense feed-forward layer (I)."""
    tied: bool = False
    """Embedding and LM head are one matrix."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections."""
    out_bias: bool = False
    """Bias of the attention's output projection."""
    qk_norm: str = "none"
    """none | head (one weight per channel of a head: Qwen3) | full (one per channel of all heads: OLMoE)."""
    num_experts: int = 0
    """Routed experts per MoE layer (E). 0 for a dense model."""
    top_k: int = 0
    """Experts that one token meets per MoE layer (k)."""
    expert_ffn: int = 0
    """Inner width of one routed expert."""
    shared_ffn: int = 0
    """Inner width of the shared expert with a gate of its own (Qwen2-MoE). 0 where there is none."""
    expert_layers: tuple[bool, ...] = ()
    """Whether layer i has routed experts."""
    renormalises_top_k: bool = True
    """The weights of a token's top-k experts are scaled to sum to one."""
    family: str = ""
    """`model_type` of the language model."""
    architecture: str = ""
    """Name of the HF class that the config asks for."""
    context: int | None = None
    """Longest sequence that the positions allow, in tokens. None where the config sets no bound."""
    layer_kinds: tuple[str, ...] = ()
    """What layer i attends to: full_attention, sliding_attention, linear_attention, ... (`layers`)."""
    window: int | None = None
    """Tokens that a sliding layer sees. None where no layer slides."""
    chunk: int | None = None
    """Tokens per chunk of chunked attention. None where no layer uses it."""
    logit_scale: float = 1.0
    """Factor of the logits after the LM head: 1 / logits_scaling (Granite), logit_scale (Cohere)."""
    logit_softcap: float | None = None
    """Cap c of logits as c tanh(x / c) (Gemma 2). None where they are not capped."""
    norm_eps: float = 1e-6
    """Epsilon of the RMS norms."""
    rope_theta: float = 10000.0
    """Base of the rotary positions."""
    rope_type: str = "default"
    """Kind of rotary positions: default, yarn, llama3, ..."""
    activation: str = "silu"
    """Activation of the gated feed-forward layers."""
    mlp_bias: bool = False
    """Biases in the feed-forward layers."""

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts: the depth of a routing trace."""
        return sum(self.expert_layers)

    @property
    def layers_with_memory(self) -> tuple[int, ...]:
        """Layers that carry a state from token to token (linear attention, Mamba, short convolutions)."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind in MEMORY)

    @property
    def scales_logits(self) -> bool:
        """The logits are more than the LM head's product."""
        return self.logit_scale != 1.0 or self.logit_softcap is not None

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """V x h, of the input embedding. The head is as large unless it is tied to it."""
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
        """The N of 2N FLOPs per token: `active` without the input embedding, which is only looked up."""
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
        """One row of a routing trace: L x k expert ids of 1 or 2 bytes, and a byte that says it is known."""
        if not self.moe_layers:
            return 0
        return self.moe_layers * self.top_k * (1 if self.num_experts <= 256 else 2) + 1

    @property
    def score_bytes_per_token(self) -> int:
        """One row of `routing.trace.RouterScores`: L x k expert ids and log-probabilities of 4 bytes."""
        return 8 * self.moe_layers * self.top_k

    def forward_flops(self, tokens: float, mean_length: float) -> float:
        """2N per token for the matrices, and 4 L q x (length / 2) for causal attention."""
        return tokens * (2.0 * self.active_without_embedding + 2.0 * self.layers * self.q * mean_length)


def find_model(name: str) -> ModelShape:
    """The countable shape of the model that `find_config` finds."""
    return countable(shape_from_config(*find_config(name)))


def read_shape(folder: str | Path) -> ModelShape:
    """The shape of the HF model in `folder`. ValueError where it has no config.json that can be read."""
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"model.path must be a folder of an HF model: {path} is missing; point it at one")
    return shape_from_config(read_config(path), path.resolve().parent.name)


def countable(shape: ModelShape) -> ModelShape:
    """`shape` itself. ValueError where its parameter counts would be wrong."""
    if shape.family not in COUNTED:
        raise ValueError(f"model_type must be one of {', '.join(COUNTED)}: got {shape.family!r}")
    if shape.mlp_bias:
        raise ValueError(
            f"mlp_bias is not counted: got true for {shape.family}; plan with the same model without it"
        )
    return shape


def shape_from_config(config: Mapping[str, Any], name: str | None = None) -> ModelShape:
    """The shape that HF builds from this `config.json`, of any family.

    Both spellings of a config are read: transformers 4 (`rope_theta`) and 5 (`rope_parameters`). A missing
    size is 0. In a family of `COUNTED` it raises ValueError, and so does one that is no whole number above 0.
    """
    outer, config = config, text_config(config)
    family = str(config.get("model_type") or "")
    read = _Sizes(config, name or family, strict=family in COUNTED)
    hidden = read.size("hidden_size", "n_embd", "d_model", "dim")
    layers = read.size("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = read.size("num_attention_heads", "n_head", "n_heads")
    kinds = layer_kinds(config, layers)
    bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3", "qwen3_moe", "olmoe")
    qwen2_bias = family == "qwen2" or (family == "qwen2_moe" and bool(config.get("qkv_bias", True)))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return ModelShape(
        name=name or str(config.get("_name_or_path") or family),
        vocab=read.size("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=read.size("num_key_value_heads", default=heads),
        # Qwen3's own default when config.json is silent; every other family splits the hidden size.
        head_dim=read.size("head_dim", default=128 if family == "qwen3" else hidden // max(heads, 1)),
        ffn=read.size("intermediate_size", "ffn_dim"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or qwen2_bias,
        out_bias=bias,
        qk_norm={"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}.get(family, "none"),
        family=family,
        architecture=str((outer.get("architectures") or config.get("architectures") or [""])[0]),
        context=config.get("max_position_embeddings") or config.get("n_positions"),
        layer_kinds=kinds,
        window=config.get("sliding_window") if SLIDING in kinds else None,
        chunk=config.get("attention_chunk_size") if CHUNKED in kinds else None,
        logit_scale=_logit_scale(config, family),
        logit_softcap=config.get("final_logit_softcapping") or config.get("logits_soft_cap"),
        norm_eps=float(config.get("rms_norm_eps") or config.get("layer_norm_eps") or 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_type=str(rope.get("rope_type", rope.get("type", "default"))),
        activation=str(config.get("hidden_act") or config.get("hidden_activation") or "silu"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        **_experts(config, family, layers, read),
    )


# The config's name of a number of experts, and of those that one token meets, in the order in which they
# are tried.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_KEYS = (
    "num_experts_per_tok",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "num_experts_per_token",
)
_EXPERT_SIZE_KEYS = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
)
# Families whose class leaves `norm_topk_prob` off where the config does not give it.
_NOT_RENORMALISED = frozenset(
    {"qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v2", "dots1", "doge"}
)


class _Sizes:
    """Reads whole numbers above 0 from a config under any of several names."""

    def __init__(self, config: Mapping[str, Any], name: str, *, strict: bool) -> None:
        self.config, self.name, self.strict = config, name, strict

    def size(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that the config gives, else `default`.

        A list (one number per layer) counts as its largest. Where no whole number above 0 is found, strict
        reading raises ValueError with the first key, and lenient reading gives 0.
        """
        value = next((self.config[k] for k in keys if self.config.get(k)), default)
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
        if not self.strict:
            return 0
        raise ValueError(
            f"the config.json of {self.name} must give {keys[0]}, a whole number above 0: got "
            f"{self.config.get(keys[0]) if value is None else value!r}; take the model's own file"
        )


def _experts(config: Mapping[str, Any], family: str, layers: int, read: _Sizes) -> dict[str, Any]:
    """The fields of ModelShape that describe routed experts. A dense model has none of them."""
    if isinstance(config.get("ffn_config"), Mapping):  # dbrx keeps its experts one level down
        config = {**config, **config["ffn_config"]}
        read = _Sizes(config, read.name, strict=read.strict)
    counted = next((k for k in _EXPERT_KEYS if config.get(k)), None)
    # Families with a switch name a number of experts even where it is off.
    if counted is None or config.get("enable_moe_block") is False or config.get("is_moe") is False:
        return {}
    experts, has = read.size(counted), expert_layers(config, layers)
    if experts == 1 and family in ("jamba", "hunyuan_v1_moe"):  # one expert is their word for a dense layer
        return {}
    # The Qwen families and those that split the two sizes must give both; the rest have one.
    own = _EXPERT_SIZE_KEYS[:1] if family in ("qwen2_moe", "qwen3_moe") else _EXPERT_SIZE_KEYS
    shared = family == "qwen2_moe" and config.get("shared_expert_intermediate_size")
    return {
        "num_experts": experts,
        "top_k": read.size(*_TOP_K_KEYS),
        "expert_ffn": read.size(*own),
        "shared_ffn": read.size("shared_expert_intermediate_size") if shared else 0,
        "renormalises_top_k": bool(config.get("norm_topk_prob", family not in _NOT_RENORMALISED)),
        "expert_layers": has,
    }


# Families that divide the logits by `logits_scaling`; any other that has the key multiplies (hyperclovax).
_DIVIDE = frozenset(
    {"granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"}
)
# The default of Cohere's classes, for a config that leaves it out.
_COHERE_SCALE = 0.0625


def _logit_scale(config: Mapping[str, Any], family: str) -> float:
    """What the model multiplies its logits by after the LM head."""
    if "logits_scaling" in config:
        return 1.0 / float(config["logits_scaling"]) if family in _DIVIDE else float(config["logits_scaling"])
    if "logit_scale" in config or family in ("cohere", "cohere2"):
        return float(config.get("logit_scale", _COHERE_SCALE))
    return float(config.get("lm_head_multiplier", config.get("output_multiplier", 1.0)) or 1.0)
