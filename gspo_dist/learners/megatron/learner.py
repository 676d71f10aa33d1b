"""The megatron-core learner: one rank of the process group, behind the learner's verbs.

The way of a micro-batch:

    lay_out            this context rank's rows
    schedule           the pipeline, to the hidden states of the last stage
    taken_logprobs     log-probs over the tensor ranks' shards of the vocabulary
    micro_batch_loss   shared by all learners; its sequence sums all-reduce over the context ranks
    gradient buffers   megatron's, summed over data and context ranks

Gradients are summed and not averaged, because denominators are global.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from gspo_dist.config import LearnerConfig
from gspo_dist.learners.head.logprobs import VocabParallel, taken_logprobs
from gspo_dist.learners.learner import OptimStep, WeightBucket, refuse_scores
from gspo_dist.learners.loss import LossSpec, micro_batch_loss
from gspo_dist.learners.loss_scale import LossScale
from gspo_dist.learners.megatron import balance, checkpoint, cpu_shim
from gspo_dist.learners.megatron import model as builder
from gspo_dist.learners.megatron import optimizer as optim
from gspo_dist.learners.megatron.architecture import read_architecture
from gspo_dist.learners.megatron.convert import SafetensorsFolder
from gspo_dist.learners.megatron.layout import check_knobs, check_layout, check_transformer_engine
from gspo_dist.learners.megatron.rows import Rows, lay_out
from gspo_dist.learners.megatron.shards import export_weights, load_weights
from gspo_dist.learners.schedule import lr_factor
from gspo_dist.metrics.stat import Stat, merge_stats
from gspo_dist.routing.megatron import Routers
from gspo_dist.types import LogprobOutput, PackedBatch
from gspo_dist.weights.stream import buckets


class _SumOverContext(torch.autograd.Function):
    """Sum over the context ranks.

    The backward pass sums too, because the loss is the sum of the ranks' losses.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=mpu.get_context_parallel_group())
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad, group=mpu.get_context_parallel_group())
        return grad


@dataclass(frozen=True)
class _MicroBatch:
    """A packed batch and this rank's share of it. It is what `routing.megatron` calls a MicroBatch."""

    batch: PackedBatch
    """The batch of the whole replica."""
    rows: Rows
    """This context rank's rows."""

    @property
    def source(self) -> Tensor:
        return self.rows.source


class MegatronLearner:
    """Implements `Learner`.

    The default process group is initialised from the environment unless it is already. On a CPU, making one
    replaces parts of torch for the whole process (`cpu_shim`).
    """

    def __init__(
        self,
        config: LearnerConfig,
        model_path: str | Path,
        *,
        total_steps: int,
        temperature: float = 1.0,
        keep_reference: bool = False,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """
        total_steps: optimiser steps of the whole run, for the learning rate's schedule.
        temperature: of the log-probs.
        keep_reference: whether to hold the starting policy for the KL term.
        device: "cpu", or this rank's GPU.
        seed: of megatron's random states, which nothing draws from.

        Raises ValueError for a model, a layout or knobs that this learner cannot run, before a process group
        is made or a tensor is read.
        """
        self.config, self.temperature = config, temperature
        self.architecture = read_architecture(model_path)
        self.layout = check_layout(config.megatron, self.architecture, config.world_size)
        self.gpu = torch.device(device).type == "cuda"
        check_knobs(config, gpu=self.gpu)
        if self.gpu:
            check_transformer_engine()
        source = SafetensorsFolder(model_path)
        self.device = torch.device(device)
        cpu_shim.install()
        self._join(config)
        builder.start_groups(self.layout, config.timeout_s, seed)
        self.transformer = builder.transformer_config(
            self.architecture, self.layout, config.megatron, config.precision, gpu=self.gpu
        )
        optim.ddp_config(config), optim.optimizer_config(config)  # what they refuse, before weights are read
        self.chunks = builder.build_chunks(self.architecture, self.layout, self.transformer, gpu=self.gpu)
        load_weights(self.chunks, source, self.architecture)
        self.reference = self._frozen_copy(source) if keep_reference else None
        self.ddp = optim.wrap(self.chunks, self.transformer, config)
        self.optimizer = optim.build_optimizer(self.ddp, config)
        self.scale = LossScale.of(config.precision, config.initial_loss_scale)
        if self.scale is not None:
            # The schedules apply it, to the auxiliary loss too.
            self.transformer.grad_scale_func = self.scale.apply
        self._let_schedules_sync()
        self.routers = Routers(
            builder.routers(self.chunks),
            self.architecture.expert_layers,
            self.architecture.top_k,
            self.architecture.num_experts,
            recompute=builder.recomputes_routers(self.transformer),
            sequence_parallel=self.layout.sequence_parallel,
        )
        self.lr_factor = lr_factor(config.optimizer, total_steps)
        self.writer = checkpoint.CheckpointWriter(config.megatron.async_save)
        self.policy_version = 0
        self.data_parallel_rank = mpu.get_data_parallel_rank()
        self.is_exporter = dist.get_rank() == 0
        self._accumulated = 0
        for ddp in self.ddp:
            ddp.zero_grad_buffer()

    def _join(self, config: LearnerConfig) -> None:
        """Joins the default process group. ValueError when it has another number of ranks than configured."""
        if not dist.is_initialized():
            timeout = timedelta(seconds=config.timeout_s)
            dist.init_process_group("nccl" if self.gpu else "gloo", timeout=timeout)
        if dist.get_world_size() != config.world_size:
            raise ValueError(
                f"learner.world_size must be the number of ranks: got {config.world_size} for "
                f"{dist.get_world_size()}"
            )

    def _frozen_copy(self, source: SafetensorsFolder) -> list[Any]:
        """The starting policy for the KL term: chunks of its own, without gradients or replay."""
        chunks = builder.build_chunks(self.architecture, self.layout, self.transformer, gpu=self.gpu)
        load_weights(chunks, source, self.architecture)
        for chunk in chunks:
            chunk.requires_grad_(False)
        return chunks

    def _let_schedules_sync(self) -> None:
        """Lets the schedules overlap reductions with the last micro-batch, and gathers with the first."""
        megatron, config = self.config.megatron, self.transformer
        if megatron.overlap_grad_reduce:
            no_sync = [ddp.no_sync for ddp in self.ddp]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if megatron.overlap_param_gather:
            for ddp in self.ddp:
                ddp.enable_forward_pre_hook()

    # ---- forward passes

    def _items(self, batches: Sequence[PackedBatch]) -> list[_MicroBatch]:
        rank = mpu.get_context_parallel_rank()
        return [_MicroBatch(batch, lay_out(batch, self.layout, rank, self.device)) for batch in batches]

    def _schedule(
        self,
        chunks: list[Any],
        items: list[_MicroBatch],
        finish: Callable[[_MicroBatch, Any, Tensor], Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Runs the items through this rank's chunks.

        The last stage calls `finish(item, chunk, hidden)` for each item, in order.
        Returns what `finish` returned last: a list on the last stage, and an empty one elsewhere. Collective.
        """

        def forward_step(
            iterator: Iterator[_MicroBatch], wrapped: Any
        ) -> tuple[Tensor, Callable[[Tensor], Any]]:
            item = next(iterator)
            chunk = getattr(wrapped, "module", wrapped)
            mask = item.rows.padding_mask(
                self.layout, mpu.get_tensor_model_parallel_rank(), chunk.pre_process
            )
            out = wrapped(
                input_ids=item.rows.token_ids,
                position_ids=item.rows.position_ids,
                attention_mask=None,
                packed_seq_params=item.rows.packed,
                padding_mask=mask,
            )
            return out, partial(finish, item, chunk)

        iterators: list[Any] = [iter(items) for _ in chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(items),
            seq_length=max(item.rows.token_ids.shape[1] for item in items) * self.layout.context,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _logprobs(self, item: _MicroBatch, chunk: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [1, t, H] -> log-probs and entropies [N] of this rank's trained tokens, in nats.

        A rank without trained tokens still projects one row and drops it. The head's weight must get a
        gradient in every micro-batch, be it zero, or an overlapped reduction waits for it for ever.
        """
        count = len(item.rows.labels)
        at, labels = item.rows.hidden_rows, item.rows.labels
        if not count:
            at, labels = at.new_zeros(1), labels.new_zeros(1)
        rows = hidden[0].index_select(0, at)
        parallel = None
        if self.layout.tensor > 1:
            shard = self.architecture.vocab // self.layout.tensor
            parallel = VocabParallel(
                mpu.get_tensor_model_parallel_group(),
                mpu.get_tensor_model_parallel_rank() * shard,
                reduce_hidden_grad=not self.layout.sequence_parallel,
            )
        out = taken_logprobs(
            rows,
            builder.head_weight(chunk),
            labels,
            temperature=self.temperature,
            fp32_head=self.config.fp32_head,
            vocab_parallel=parallel,
        )
        assert out.entropy is not None  # it was asked for: with_entropy is on unless turned off
        return out.logprobs[:count], out.entropy[:count]

    @torch.no_grad()
    def logprobs(
        self,
        batches: Sequence[PackedBatch],
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[LogprobOutput]:
        refuse_scores(record_scores)
        if reference and self.reference is None:
            raise ValueError("no reference is kept: set objective.kl_coef above 0")
        chunks: list[Any] = self.reference if reference and self.reference is not None else self.ddp
        items = self._items(batches)
        # The interleaved schedule needs a micro-batch per stage. Copies fill up, and their
        # results are dropped.
        fill = max(0, self.layout.pipeline - len(items)) if self.layout.virtual_stages > 1 else 0
        work = items + items[:1] * fill

        def finish(item: _MicroBatch, chunk: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            nothing = hidden.new_zeros(())
            return nothing, torch.zeros((), dtype=torch.int), self._logprobs(item, chunk, hidden)

        with contextlib.ExitStack() as stack:
            recorder = stack.enter_context(self.routers.recording()) if record_routing else None
            if not reference:
                stack.enter_context(self.routers.replaying(work))
            results = self._schedule(chunks, work, finish, forward_only=True)
        values = self._assemble(items, results[: len(items)])
        traces = self.routers.gather(recorder, items) if recorder is not None else [None] * len(items)
        return [LogprobOutput(v[0], v[1], trace) for v, trace in zip(values, traces, strict=True)]

    def _assemble(self, items: list[_MicroBatch], results: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Log-probs and entropies [2, T] per batch, on every rank of the replica.

        They are summed over context ranks, each of which has some tokens and zeros elsewhere, and sent
        from the last stage. Example: batches of 24 and 25 tokens lie at columns 0 to 23 and 24 to 48
        of what is sent.
        """
        sizes = [item.batch.num_tokens for item in items]
        flat = torch.zeros(2, sum(sizes), device=self.device)
        start = 0
        # Only the last stage has results.
        for item, size, (logprobs, entropy) in zip(items, sizes, results, strict=True) if results else ():
            at = (item.rows.index + start).to(self.device)
            flat[0, at], flat[1, at] = logprobs.float(), entropy.float()
            start += size
        if self.layout.context > 1:
            dist.all_reduce(flat, group=mpu.get_context_parallel_group())
        if self.layout.pipeline > 1:
            dist.broadcast(
                flat,
                src=mpu.get_pipeline_model_parallel_last_rank(),
                group=mpu.get_pipeline_model_parallel_group(),
            )
        return list(flat.cpu().split(sizes, dim=1))

    # ---- training

    def forward_backward(self, batches: Sequence[PackedBatch], spec: LossSpec) -> dict[str, Stat]:
        if self.config.megatron.overlap_grad_reduce and self._accumulated:
            raise ValueError(
                "learner.megatron.overlap_grad_reduce sends gradients during forward_backward: call it once "
                "per optim_step, or turn it off"
            )
        if self.layout.virtual_stages > 1 and len(batches) < self.layout.pipeline:
            raise ValueError(
                "learner.megatron.virtual_stages needs at least pipeline_parallel micro-batches per "
                f"mini-batch: got {len(batches)} and {self.layout.pipeline}; lower learner.token_budget or "
                "set virtual_stages=1"
            )
        self._accumulated += 1
        balance.start(self.chunks, batches, self.config.megatron)
        all_reduce = _SumOverContext.apply if self.layout.context > 1 else None

        def finish(item: _MicroBatch, chunk: Any, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Stat]]:
            logprobs, entropy = self._logprobs(item, chunk, hidden)
            # A filler runs like any micro-batch, so that collectives match, and trains nothing.
            if not item.batch.loss_mask.any():
                return logprobs.sum(), torch.zeros((), dtype=torch.int), {}
            loss, stats = micro_batch_loss(
                logprobs, entropy, item.batch, spec, index=item.rows.index, all_reduce=all_reduce
            )
            return loss, torch.zeros((), dtype=torch.int), stats

        items = self._items(batches)
        with self.routers.replaying(items):
            parts = self._schedule(self.ddp, items, finish, forward_only=False)
        stats = merge_stats(parts) if parts else {}
        # One rank of each context shard speaks for its tensor twins; balance metrics come from
        # the expert counts.
        if mpu.get_tensor_model_parallel_rank() or not mpu.is_pipeline_last_stage():
            stats = {}
        return stats | balance.stats(self.chunks, self.architecture)

    @torch.no_grad()
    def optim_step(self) -> OptimStep:
        finalize_model_grads(self.ddp)
        lr = self.config.optimizer.lr * self.lr_factor(self.policy_version)
        scaled = None if self.scale is None else self.scale.value
        if scaled is not None:
            for ddp in self.ddp:
                ddp.scale_gradients(1.0 / scaled)
        norm = optim.clipped_step(self.optimizer, self.config.optimizer, lr)
        for ddp in self.ddp:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._accumulated = 0
        skipped = not math.isfinite(norm)
        self.policy_version += not skipped
        if self.scale is not None:
            self.scale.update(skipped)
        if self.gpu:
            # The step is over when this returns, so that its time is not counted as the next verb's.
            torch.cuda.synchronize()
        return OptimStep(norm, lr, self.policy_version, skipped, scaled)

    def _gather_parameters(self) -> None:
        """Completes the gathers that overlap_param_gather left for the next forward pass."""
        if self.config.megatron.overlap_param_gather:
            for ddp in self.ddp:
                ddp.start_param_sync(force_sync=True)

    # ---- weights and checkpoints

    def weights(self, bucket_bytes: int, *, stacked: bool = False) -> Iterator[WeightBucket]:
        self._gather_parameters()
        weights = export_weights(self.chunks, self.architecture, bucket_bytes, stacked=stacked)
        yield from buckets(weights, bucket_bytes)

    @property
    def _state(self) -> checkpoint.LearnerState:
        return checkpoint.LearnerState(self.chunks, self.optimizer, self.architecture, self.scale)

    def save(self, folder: Path) -> None:
        self._gather_parameters()
        self.writer.save(self._state, self.policy_version, folder)

    def load(self, folder: Path) -> None:
        self.policy_version = checkpoint.load(self._state, folder)

    def wait_saved(self) -> None:
        self.writer.wait()

    def close(self) -> None:
        self.wait_saved()
        self.writer.close()
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
