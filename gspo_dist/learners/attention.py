"""Attention over packed sequences for HF models: no token of one sequence sees a token of another.

Registered with transformers as `gspo_packed`. In bf16 on CUDA it is torch's variable-length flash attention.
Elsewhere the sequences are padded to [S, heads, longest, dim] inside the attention alone, so that
projections, experts and the LM head never compute padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "gspo_packed"


@dataclass(frozen=True)
class PackedLayout:
    """Where the tokens of S packed sequences sit in a padded [S, longest] grid.

    Example: sequences of 2 and 3 tokens have cu_seqlens [0 2 5], longest 3 and slots [0 1 3 4 5];
    slot 2 is padding.
    """

    cu_seqlens: torch.Tensor
    """[S + 1]: sequence s is tokens cu_seqlens[s]:cu_seqlens[s + 1]."""
    longest: int
    """Tokens of the longest sequence."""
    slots: torch.Tensor
    """[T] int64: s * longest + position of every token."""

    @staticmethod
    def of(cu_seqlens: torch.Tensor, position_ids: torch.Tensor) -> PackedLayout:
        """From a packed batch's borders [S + 1] and positions [T]."""
        lengths = cu_seqlens.diff().long()
        longest = int(lengths.max())
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        return PackedLayout(cu_seqlens, longest, sequence * longest + position_ids)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: PackedLayout | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, dim]; key, value [1, kv_heads, T, dim] -> ([1, T, heads, dim], None); causal.

    asked: what else the model passes. Raises ValueError for a part of an attention that this one does not
    have: a soft cap, sinks, or a window shorter than the batch's longest sequence. Dropout is left out on
    purpose, since log-probs must repeat.
    """
    if packed is None:
        raise ValueError(f"attention {NAME!r} needs the packed layout: call the model through PolicyModel")
    refuse_other_parts(asked, packed)
    if query.is_cuda and query.dtype != torch.float32:  # flash attention has no fp32 kernel
        out = _flash(query, key, value, scaling, packed)
    else:
        out = _padded(query, key, value, scaling, packed)
    return out, None


def refuse_other_parts(asked: dict[str, Any], packed: PackedLayout) -> None:
    """ValueError for whatever changes the result and is not done here. It is never left out in silence."""
    for name, what in (("softcap", "a soft cap of its scores"), ("s_aux", "sinks")):
        if asked.get(name) is not None:
            raise ValueError(
                f"the model's attention has {what} ({name}), which the packed attention does not have; use a "
                "model without"
            )
    window = asked.get("sliding_window")
    if window is not None and window < packed.longest:
        raise ValueError(
            f"the model's attention sees {window} tokens, and a sequence has {packed.longest}: the packed "
            "attention has no windows; use a model with full attention"
        )


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, packed: PackedLayout
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    cu = packed.cu_seqlens.to(q.device, torch.int32)
    # A tensor, because neither the log-sum-exp nor auxiliary output is asked for.
    out: Any = varlen_attn(
        *(q, k, v, cu, cu, packed.longest, packed.longest),
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None]


def _padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, packed: PackedLayout
) -> torch.Tensor:
    rows = len(packed.cu_seqlens) - 1
    full = rows * packed.longest == q.shape[2]

    def pad(x: torch.Tensor) -> torch.Tensor:
        flat = x[0].transpose(0, 1)  # [T, heads, dim]
        if not full:
            grid = flat.new_zeros(rows * packed.longest, *flat.shape[1:])
            flat = grid.index_copy(0, packed.slots, flat)
        return flat.view(rows, packed.longest, *flat.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(q), pad(k), pad(v), is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    out = out.transpose(1, 2).reshape(rows * packed.longest, q.shape[1], -1)
    # index_select: twice as quick to differentiate as out[slots]
    return (out if full else out.index_select(0, packed.slots)).unsqueeze(0)


AttentionInterface.register(NAME, packed_attention)
# No mask is ever built: the layout alone says who sees whom.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
