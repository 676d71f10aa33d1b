"""From the last stage's hidden states to log-probs, and those of all ranks to whole packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from gspo_dist.learners.head.logprobs import VocabParallel, taken_logprobs
from gspo_dist.learners.head.others import other_logprobs
from gspo_dist.learners.megatron import model as builder
from gspo_dist.learners.megatron.layout import Layout
from gspo_dist.learners.megatron.rows import MicroBatch


@dataclass(frozen=True)
class Head:
    """The LM head over this replica's tensor ranks."""

    layout: Layout
    """How the model is cut."""
    vocabulary: int
    """Rows of the whole head."""
    temperature: float
    """What the engines sample with."""
    fp32_head: bool
    """Whether logits are float32 whatever the weights are."""

    def __call__(
        self, item: MicroBatch, chunk: Any, hidden: Tensor, *, with_candidates: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden [1, t, H] -> log-probs and entropies [N] of this rank's trained tokens, in nats.

        with_candidates: also the log-probs [N, K] of the engine's likeliest tokens there.

        A rank without trained tokens still projects one row and drops it. The head's weight must get a
        gradient in every micro-batch, be it zero, or an overlapped reduction waits for it for ever.
        """
        count = len(item.rows.labels)
        at, labels = item.rows.hidden_rows, item.rows.labels
        if not count:
            at, labels = at.new_zeros(1), labels.new_zeros(1)
        rows = hidden[0].index_select(0, at)
        weight, parallel = builder.head_weight(chunk), self._vocab_parallel()
        out = taken_logprobs(
            rows,
            weight,
            labels,
            temperature=self.temperature,
            fp32_head=self.fp32_head,
            vocab_parallel=parallel,
        )
        assert out.entropy is not None  # it was asked for: with_entropy is on unless turned off
        candidates = None
        if with_candidates:
            assert item.batch.candidate_ids is not None  # `loss.missing` was asked first
            candidates = other_logprobs(
                rows[:count],
                weight,
                labels[:count],
                out.logprobs[:count],
                item.batch.candidate_ids[item.rows.index].to(hidden.device),
                temperature=self.temperature,
                vocab_parallel=parallel,
            )
        return out.logprobs[:count], out.entropy[:count], candidates

    def _vocab_parallel(self) -> VocabParallel | None:
        """This rank's rows of the head, or None where it has all of them."""
        if self.layout.tensor == 1:
            return None
        shard = self.vocabulary // self.layout.tensor
        return VocabParallel(
            mpu.get_tensor_model_parallel_group(),
            mpu.get_tensor_model_parallel_rank() * shard,
            reduce_hidden_grad=not self.layout.sequence_parallel,
        )


def assemble(
    items: Sequence[MicroBatch], results: Sequence[tuple[Tensor, Tensor]], device: torch.device
) -> list[Tensor]:
    """Log-probs and entropies [2, T] per batch, on every rank of the replica (collective).

    They are summed over context ranks, each of which has some tokens and zeros elsewhere, and sent
    from the last stage. Example: batches of 24 and 25 tokens lie at columns 0 to 23 and 24 to 48
    of what is sent.
    """
    sizes = [item.batch.num_tokens for item in items]
    flat = torch.zeros(2, sum(sizes), device=device)
    start = 0
    # Only the last stage has results.
    for item, size, (logprobs, entropy) in zip(items, sizes, results, strict=True) if results else ():
        at = (item.rows.index + start).to(device)
        flat[0, at], flat[1, at] = logprobs.float(), entropy.float()
        start += size
    if mpu.get_context_parallel_world_size() > 1:
        dist.all_reduce(flat, group=mpu.get_context_parallel_group())
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            flat,
            src=mpu.get_pipeline_model_parallel_last_rank(),
            group=mpu.get_pipeline_model_parallel_group(),
        )
    return list(flat.cpu().split(sizes, dim=1))
