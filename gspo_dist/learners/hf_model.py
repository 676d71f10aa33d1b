"""An HF causal LM as a policy: packed tokens in, log-probs of the trained tokens out, logits never held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gspo_dist.learners import attention
from gspo_dist.learners.head.logprobs import taken_logprobs
from gspo_dist.learners.head.others import other_logprobs
from gspo_dist.learners.hf_folder import check_loaded, check_model_folder
from gspo_dist.learners.mixers import SequenceMixers, check_layers, check_mixers
from gspo_dist.models.shape import read_shape
from gspo_dist.types import PackedBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LogprobHead(nn.Module):
    """Stands where HF's LM head stood and gives log-probs of given tokens instead of logits.

    Its parameters are the replaced head's own objects under the same names. So the state dict, the
    tying with the embedding and the optimiser see no difference, and ZeRO-3 gathers the weight when
    this module is called.
    """

    weight: torch.Tensor
    """[V, H], a parameter."""
    bias: torch.Tensor | None
    """[V], a parameter, where the head has one."""

    def __init__(
        self,
        head: nn.Linear,
        temperature: float,
        fp32_head: bool,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = head.weight
        self.register_parameter("bias", head.bias)
        self.temperature = temperature
        self.fp32_head = fp32_head
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap

    def forward(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, others: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """hidden [N, H], token_ids [N] -> logprobs [N] float32, entropy [N] float32 (detached), in nats.

        With others [N, K] (more token ids) a third: their log-probs [N, K].
        """
        out = taken_logprobs(
            hidden,
            self.weight,
            token_ids,
            bias=self.bias,
            temperature=self.temperature,
            fp32_head=self.fp32_head,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
        )
        assert out.entropy is not None  # taken_logprobs computes it unless told otherwise
        if others is None:
            return out.logprobs, out.entropy
        more = other_logprobs(
            hidden,
            self.weight,
            token_ids,
            out.logprobs,
            others,
            bias=self.bias,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
        )
        return out.logprobs, out.entropy, more


class PolicyModel(nn.Module):
    """Wraps an HF causal LM. `forward` takes a packed batch's tensors, so that engines can
    wrap it in turn."""

    hf: PreTrainedModel
    """The model that was wrapped, its head replaced by a `LogprobHead`."""

    def __init__(
        self,
        hf: PreTrainedModel,
        temperature: float = 1.0,
        fp32_head: bool = True,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> None:
        """logit_scale, logit_softcap: what the model does to its logits (`ModelShape`)."""
        super().__init__()
        head = hf.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"model must have a linear LM head: got {type(head).__name__}")
        hf.set_output_embeddings(LogprobHead(head, temperature, fp32_head, logit_scale, logit_softcap))
        self.hf = hf
        self.mixers = SequenceMixers(hf)

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        index: torch.Tensor,
        others: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """[T], [T], [S + 1], [N] (places of the wanted tokens) -> their log-probs and entropies, [N] float32.

        With others [N, K] (more token ids at those places) also the log-probs of these, [N, K].

        Example: tokens [5 6 7 8] of one sequence and index [2, 3] give log p(7 | 5 6) and log p(8 | 5 6 7),
        from the hidden states at places 1 and 2.
        """
        layout = attention.PackedLayout.of(cu_seqlens, position_ids)
        self.mixers.set_layout(layout)
        out = self.hf.base_model(
            input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False, packed=layout
        )
        hidden = out.last_hidden_state[0]
        return self.hf.get_output_embeddings()(hidden[index - 1], token_ids[index], others)


def model_inputs(
    batch: PackedBatch, index: torch.Tensor, device: torch.device, *, with_candidates: bool = False
) -> dict[str, torch.Tensor]:
    """The keyword arguments of `PolicyModel.forward` for a packed batch, on `device`.

    with_candidates: also asks for the log-probs of the engine's likeliest tokens, which the batch has then.
    """
    tensors = {
        "token_ids": batch.token_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "index": index,
    }
    if with_candidates:
        assert batch.candidate_ids is not None  # `loss.missing` was asked first
        tensors["others"] = batch.candidate_ids[index]
    return {name: t.to(device, non_blocking=True) for name, t in tensors.items()}


def _from_pretrained(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    hf, seen = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=attention.NAME, output_loading_info=True
    )
    check_loaded(folder, seen["missing_keys"], seen["unexpected_keys"])
    return hf


def _train_padding(hf: PreTrainedModel) -> None:
    """Trains the embedding of the padding token where it also ends turns, as in many chat models.

    transformers (5.19) gives that row no gradient. Where the token only pads, it stays so: nothing is padded
    here, the row is zeros as a rule, and the norm behind it would make its gradient a thousand times as large
    as any other's if such a token were sampled. megatron-core trains every row.
    """
    embedding: Any = hf.get_input_embeddings()
    ends: set[int] = set()
    for config in (hf.config, getattr(hf, "generation_config", None)):
        found = getattr(config, "eos_token_id", None)
        ends |= {found} if isinstance(found, int) else set(found or ())
    if getattr(embedding, "padding_idx", None) in ends:
        embedding.padding_idx = None


def load_policy(
    path: str | Path,
    precision: str,
    *,
    temperature: float = 1.0,
    fp32_head: bool = True,
    activation_checkpointing: bool = False,
    consistency: str = "off",
    device: str = "cpu",
    make: Callable[[Path, PretrainedConfig, torch.dtype], PreTrainedModel] | None = None,
) -> PolicyModel:
    """Loads an HF folder for training: packed attention, weights in `precision` ("fp32", "bf16" or "fp16").

    temperature, fp32_head: of the `LogprobHead`.
    activation_checkpointing: layers are computed again in the backward instead of kept.
    consistency: "exact" computes with the engine's operators (`learners.exact`).
    device: the kind that it is moved to afterwards (cpu or cuda), whose operators those are.
    make: builds the HF model with attention `gspo_packed`, for learners that shard it. None: from_pretrained.

    Raises ValueError for a folder that is no HF model, and for an attention that packing would change.
    """
    folder = check_model_folder(path)
    shape = read_shape(folder)
    check_layers(shape)
    config = AutoConfig.from_pretrained(folder)
    hf = (make or _from_pretrained)(folder, config, DTYPES[precision])
    if activation_checkpointing:
        # The reentrant kind would lose the gradient of layers whose input needs none (frozen embeddings).
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    hf.train()
    _train_padding(hf)
    check_mixers(shape, hf)
    policy = PolicyModel(
        hf, temperature, fp32_head, logit_scale=shape.logit_scale, logit_softcap=shape.logit_softcap
    )
    if consistency == "exact":
        from gspo_dist.learners.exact import gpu, install  # they need vLLM

        (install if device == "cpu" else gpu).make_exact(hf)
    return policy
