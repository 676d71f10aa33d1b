"""Log-probabilities of the taken tokens from hidden states, without ever holding the logits.

    x = logit_scale (hidden @ weight.T + bias) / temperature
    lse_i = log sum_v exp x[i, v]
    logprob_i = x[i, y_i] - lse_i                         entropy_i = lse_i - sum_v p[i, v] x[i, v]
    dL/dx[i, v] = dL/dlogprob_i (1[v = y_i] - p[i, v])    p[i, v] = exp(x[i, v] - lse_i)

A model that caps its logits has x = cap(logit_scale (hidden @ weight.T + bias)) / temperature with
cap(z) = c tanh(z / c), whose slope multiplies the gradient.

The loss is a function of all log-probs at once (GSPO's ratio needs every token of a sequence), so the
gradient of a token's log-prob is not known in the forward pass. The backward pass therefore computes the
logits again, all but the first blocks, which are kept as far as `kept_bytes` go.

Both passes walk the vocabulary in blocks of columns, all tokens at a time, instead of the tokens in blocks of
rows. Nothing is lost by it: log-sum-exp merges over columns (Milakov and Gimelshein 2018, arXiv:1805.02867),
and over tensor-parallel ranks by the same rule. A block of `weight`'s gradient is then complete in one
matmul, summed over tokens in the matmul's float32 registers, rounded once and written once. Blocks of tokens
would read and write a float32 [V, H] accumulator for every block (1.2 GB of memory at Qwen3-30B-A3B's sizes).
What is accumulated over blocks here is the gradient of `hidden`, [N, H], in float32.

Flops: forward 2NHV. Backward 2NHV again for the logits that were not kept, and 2NHV for each of `hidden` and
`weight` that needs a gradient.
Shapes: N tokens, H hidden size, V vocabulary (of this rank, where the vocabulary is split).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo_dist.learners.head.choose import choose_passes
from gspo_dist.learners.head.inputs import check_all_taken, check_ids, check_numbers, check_tensors
from gspo_dist.learners.head.passes import Block, Passes, SoftmaxState, accumulator

# Bytes of logits held at once when chunk_tokens is not given. Wide blocks keep the traffic of `hidden` and of
# its [N, H] accumulator small beside the matmuls. On a CPU a block should also stay in the last-level cache,
# as far as it can with CPU_COLUMNS (4,096 tokens, H 2,048: 512 columns take two thirds of the time of 64).
GPU_BUDGET_BYTES = 512 << 20
CPU_BUDGET_BYTES = 4 << 20
CPU_COLUMNS = 512
# Bytes of logits kept from the forward pass for the backward pass when kept_bytes is not given: memory that
# buys back flops. Each is what 8,192 tokens of a vocabulary of 151,936 can have (bfloat16 on a GPU, float32
# on a CPU) and stay under an eighth of what plain log_softmax takes (benchmarks/reports/logprobs).
GPU_KEPT_BYTES = 1 << 30
CPU_KEPT_BYTES = 512 << 20
_LOWEST = -1e30  # "no maximum yet": finite, so that (lowest - m) * 0 is 0 and not nan


@dataclass(frozen=True)
class LogprobsAndEntropy:
    """What a learner's head returns, in nats: float32, and float64 for float64 inputs."""

    logprobs: Tensor
    """[N], differentiable, at the temperature of the call."""
    entropy: Tensor | None
    """[N], detached; None when it was not asked for."""


@dataclass(frozen=True)
class VocabParallel:
    """This rank's place in a vocabulary that is split over ranks.

    Every rank passes the same `hidden` and `token_ids` (global ids) and gets the same result. The same
    gradient must come back on every rank. Shards may differ in size and may be empty, but cut padding rows
    off: a padded row is a token to the softmax. Example: rows 0..15 of 29 on rank 0 (start 0) and 16..28 on
    rank 1 (start 16).
    """

    group: dist.ProcessGroup
    """The ranks that share the vocabulary."""
    start: int
    """The global id of the first row of this rank's `weight`."""
    reduce_hidden_grad: bool = True
    """A rank's shard gives only a part of `hidden`'s gradient. True: the parts are all-reduced here (in
    float32, before they are rounded), right for a replicated `hidden`. False: the caller sums them, as
    Megatron's gather from the sequence-parallel region does in its own backward (a reduce-scatter)."""


class _Options(NamedTuple):
    passes: Passes
    factor: float  # of `Block`
    cap: float | None  # of `Block`
    block: int  # columns of a block
    logits_dtype: torch.dtype
    with_entropy: bool
    parallel: VocabParallel | None
    kept_blocks: int  # the first blocks of logits, which the forward pass keeps for the backward pass


def taken_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
    kept_bytes: int | None = None,
    fp32_head: bool = False,
    with_entropy: bool = True,
    vocab_parallel: VocabParallel | None = None,
    implementation: str = "auto",
) -> LogprobsAndEntropy:
    """Log-prob of `token_ids[i]` under the head's softmax at `temperature`, and its entropy.

    hidden [N, H], weight [V, H], bias [V]: one floating dtype, one device; differentiable, once.
    token_ids: [N], integers.
    temperature: what the rollout engine sampled with, so that the two log-probs can be compared.
    logit_scale: factor that the model puts on its logits, before temperature and cap.
    logit_softcap: c of the model's cap c tanh(logits / c), before the temperature. None: no cap.
    chunk_tokens: hold at most chunk_tokens x V logits (scratch of the same shape included; at least one
        column of N), in blocks cut along the vocabulary. None: as many as fit a fixed number of bytes.
    kept_bytes: at most so many bytes of logits stay from forward to backward, where they are not computed a
        second time. 0 keeps none, None a fixed number of bytes. Only where a gradient will be asked for.
    fp32_head: logits of 16-bit inputs in float32 (exact products, float32 sums), where they would be rounded
        to the input dtype. The gradient's matmuls take the logits' gradient in the input dtype either way.
    with_entropy: False spares a sum over every block, and the result's entropy is None.
    vocab_parallel: this rank's place where `weight` is a shard. None: `weight` is whole.
    implementation: "chunked" is plain torch and runs everywhere, "compiled" is its torch.compile, "triton"
        needs a GPU, "auto" is triton on a GPU and chunked elsewhere (and for float64).

    Worked example: hidden [[1., 0.]], weight [[0., 9.], [log 3, 9.]], token_ids [1]: logits [0, log 3],
    logprobs [log 3/4], entropy [log 4 - 3/4 log 3].

    Raises ValueError, naming the argument, for shapes, dtypes, ids or numbers out of their range. The ids'
    range is read on the host: one synchronisation with the GPU per call.
    """
    check_tensors(hidden, weight, token_ids, bias)
    check_numbers(temperature, logit_scale, logit_softcap, chunk_tokens, kept_bytes)
    ids = token_ids.to(torch.int64).contiguous()
    if vocab_parallel is None:
        check_ids(ids, weight.shape[0])
    else:
        ids = ids - vocab_parallel.start
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    logits_dtype = torch.float32 if half and fp32_head else hidden.dtype
    passes = choose_passes(implementation, hidden, logits_dtype, capped=logit_softcap is not None)
    block = _block_width(hidden, weight, passes.logit_buffers, logits_dtype, chunk_tokens)
    options = _Options(
        passes=passes,
        factor=logit_scale / temperature,
        cap=None if logit_softcap is None else logit_softcap / temperature,
        block=block,
        logits_dtype=logits_dtype,
        with_entropy=with_entropy,
        parallel=vocab_parallel,
        kept_blocks=_blocks_to_keep(hidden, weight, block * logits_dtype.itemsize, kept_bytes),
    )
    logprobs, entropy = _TakenLogprobs.apply(hidden, weight, bias, ids, options)
    return LogprobsAndEntropy(logprobs, entropy)


class _TakenLogprobs(torch.autograd.Function):
    """hidden, weight, bias, ids -> logprobs, entropy.

    Keeps its inputs, one number per token and the first blocks of logits for the backward. The context is
    `Any` because torch gives what a function stores in it no type.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        empty = hidden.new_empty(4, len(ids), dtype=accumulator(hidden.dtype))
        state = SoftmaxState(
            empty[0].fill_(_LOWEST), empty[1].zero_(), empty[2].zero_(), empty[3].fill_(-torch.inf)
        )
        kept: list[Tensor] = []
        copied = options.passes.merge_destroys
        with torch.autocast(hidden.device.type, enabled=False):
            for columns, logits in _walk(hidden, weight, options, apart=0 if copied else options.kept_blocks):
                if len(kept) < options.kept_blocks:
                    kept.append(logits.clone() if copied else logits)
                options.passes.merge(_block(columns, logits, bias, ids, options), state, options.with_entropy)
        if options.parallel is not None:
            state = _reduce(state, options.parallel.group)
            check_all_taken(state.taken, ids + options.parallel.start)
        log_total = state.total.log()
        lse = state.peak + log_total
        entropy = log_total - state.dot / state.total if options.with_entropy else None
        ctx.options, ctx.kept = options, kept
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return state.taken - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        options: _Options = ctx.options
        kept, ctx.kept = ctx.kept, []  # gradient() destroys them: a second backward computes all logits again
        scale = grad_logprobs * options.factor
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for columns, logits in _walk(hidden, weight, options, kept=kept):
                block = _block(columns, logits, bias, ids, options)
                grad_logits = options.passes.gradient(block, lse, scale, hidden.dtype)
                if grad_hidden is not None:
                    _add_matmul(grad_hidden, grad_logits, weight[columns])
                if grad_weight is not None:
                    torch.mm(grad_logits.t(), hidden, out=grad_weight[columns])
                if grad_bias is not None:
                    grad_bias[columns] = grad_logits.sum(0, dtype=lse.dtype)
                del block, grad_logits, logits  # before the next block's are made
        if grad_hidden is not None:
            if options.parallel is not None and options.parallel.reduce_hidden_grad:
                dist.all_reduce(grad_hidden, group=options.parallel.group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _block(columns: slice, logits: Tensor, bias: Tensor | None, ids: Tensor, options: _Options) -> Block:
    mine = None if bias is None else bias[columns]
    return Block(logits, mine, ids - columns.start, options.factor, options.cap)


def _walk(
    hidden: Tensor, weight: Tensor, options: _Options, *, apart: int = 0, kept: list[Tensor] | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Each block of columns with its raw logits [N, v] (no bias, no temperature).

    The first blocks come from `kept`, which is emptied. The next `apart` blocks have memory of their own,
    which the caller may hold. All others are written into the same buffer.
    """
    kept = kept or []
    tokens, vocabulary = len(hidden), len(weight)
    buffer = None
    if options.logits_dtype != hidden.dtype and not hidden.is_cuda:
        hidden = hidden.to(options.logits_dtype)
    for start in range(0, vocabulary, options.block):
        columns = slice(start, min(start + options.block, vocabulary))
        if kept:
            yield columns, kept.pop(0)
            continue
        width = columns.stop - start
        if buffer is None:
            buffer = hidden.new_empty(tokens * width, dtype=options.logits_dtype)
        logits = buffer[: tokens * width].view(tokens, width)
        rows = weight[columns].t()
        if options.logits_dtype == weight.dtype:
            torch.mm(hidden, rows, out=logits)
        elif hidden.is_cuda:  # 16-bit tensor cores, float32 out: the products are exact in float32
            torch.mm(hidden, rows, out_dtype=options.logits_dtype, out=logits)
        else:  # torch has mm(out_dtype=) on CUDA only (2.8 to 2.13): cast this block of rows
            torch.mm(hidden, rows.to(options.logits_dtype), out=logits)
        yield columns, logits
        if apart > 0:
            apart, buffer = apart - 1, None


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:  # accumulated by the matmul itself, without a 16-bit round trip
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right))


def _reduce(state: SoftmaxState, group: dist.ProcessGroup) -> SoftmaxState:
    """The state over all ranks' columns: one MAX all-reduce of [2, N], one SUM of [2, N]."""
    largest = torch.stack((state.peak, state.taken))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    peak, taken = largest
    shift = state.peak - peak
    sums = torch.stack((state.total, state.dot + shift * state.total)).mul_(shift.exp())
    dist.all_reduce(sums, group=group)
    total, dot = sums
    return SoftmaxState(peak, total, dot, taken)


def _block_width(
    hidden: Tensor, weight: Tensor, buffers: int, logits_dtype: torch.dtype, chunk_tokens: int | None
) -> int:
    """Columns of a block: what `chunk_tokens` allows, or what fits the fixed budget of `hidden`'s device.

    buffers: tensors of a block's shape that a pass holds at once.
    """
    held = max(len(hidden) * buffers, 1)  # numbers per column
    if chunk_tokens is not None:
        most = chunk_tokens * len(weight) // held
    elif hidden.is_cuda:
        most = GPU_BUDGET_BYTES // (held * logits_dtype.itemsize)
    else:
        most = max(CPU_COLUMNS, CPU_BUDGET_BYTES // (held * logits_dtype.itemsize))
    return _block_columns(most, len(weight))


def _blocks_to_keep(hidden: Tensor, weight: Tensor, row_bytes: int, kept_bytes: int | None) -> int:
    """How many of the first blocks stay from forward to backward. None where no gradient will be asked for.

    row_bytes: one token's part of a block.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return 0
    if kept_bytes is None:
        kept_bytes = GPU_KEPT_BYTES if hidden.is_cuda else CPU_KEPT_BYTES
    return kept_bytes // max(1, len(hidden) * row_bytes)


def _block_columns(most: int, vocabulary: int) -> int:
    """The widest block of at most `most` columns in an even cut of the vocabulary.

    Wide blocks are multiples of 128 columns: a matmul's tile, and rows that start on 16 bytes. Example: most
    32,768 of 151,936: 5 blocks, of 30,464 columns (the last 30,080).
    """
    most = max(1, most)
    if most >= vocabulary:
        return max(1, vocabulary)
    align = 128 if most >= 128 else 1
    most -= most % align
    even = -(-vocabulary // -(-vocabulary // most))
    return min(most, -(-even // align) * align)
