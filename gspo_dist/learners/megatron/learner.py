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
from dataclasses import replace
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
from gspo_dist.learners import determinism
from gspo_dist.learners.forward import in_groups
from gspo_dist.learners.learner import OptimStep, WeightBucket
from gspo_dist.learners.loss import LossSpec, micro_batch_loss, missing
from gspo_dist.learners.loss_scale import LossScale
from gspo_dist.learners.megatron import balance, checkpoint, cpu_shim
from gspo_dist.learners.megatron import model as builder
from gspo_dist.learners.megatron import optimizer as optim
from gspo_dist.learners.megatron.architecture import read_architecture
from gspo_dist.learners.megatron.convert import SafetensorsFolder
from gspo_dist.learners.megatron.head import Head, assemble
from gspo_dist.learners.megatron.layout import check_knobs, check_layout, check_transformer_engine
from gspo_dist.learners.megatron.rows import MicroBatch, lay_out
from gspo_dist.learners.megatron.shards import export_weights, load_weights
from gspo_dist.learners.parking import Held
from gspo_dist.learners.schedule import lr_factor
from gspo_dist.metrics.stat import Stat, merge_stats
from gspo_dist.routing.megatron import Routers
from gspo_dist.routing.scores import ShiftMeter
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
        self.config = config
        self.architecture = read_architecture(model_path)
        self.layout = check_layout(config.megatron, self.architecture, config.world_size)
        self.gpu = torch.device(device).type == "cuda"
        check_knobs(config, gpu=self.gpu)
        if config.deterministic:
            determinism.turn_on()
        if self.gpu:
            check_transformer_engine()
        source = SafetensorsFolder(model_path)
        self.device = torch.device(device)
        cpu_shim.install()
        self._join(config)
        builder.start_groups(self.layout, config.timeout_s, seed)
        self.transformer = builder.transformer_config(
            self.architecture,
            self.layout,
            config.megatron,
            config.precision,
            gpu=self.gpu,
            deterministic=config.deterministic,
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
        self.routers = self._routers()
        self.head = Head(self.layout, self.architecture.vocab, temperature, config.fp32_head)
        self.lr_factor = lr_factor(config.optimizer, total_steps)
        self.writer = checkpoint.CheckpointWriter(config.megatron.async_save)
        self.policy_version = 0
        self.data_parallel_rank = mpu.get_data_parallel_rank()
        self.is_exporter = dist.get_rank() == 0
        self._accumulated = 0
        for ddp in self.ddp:
            ddp.zero_grad_buffer()

    def _routers(self) -> Routers:
        """Those of the trained chunks."""
        return Routers(
            builder.routers(self.chunks),
            self.architecture.expert_layers,
            self.architecture.top_k,
            self.architecture.num_experts,
            recompute=builder.recomputes_routers(self.transformer),
            sequence_parallel=self.layout.sequence_parallel,
        )

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

    def _items(self, batches: Sequence[PackedBatch]) -> list[MicroBatch]:
        rank = mpu.get_context_parallel_rank()
        return [MicroBatch(batch, lay_out(batch, self.layout, rank, self.device)) for batch in batches]

    def _schedule(
        self,
        chunks: list[Any],
        items: list[MicroBatch],
        finish: Callable[[MicroBatch, Any, Tensor], Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Runs the items through this rank's chunks.

        The last stage calls `finish(item, chunk, hidden)` for each item, in order.
        Returns what `finish` returned last: a list on the last stage, and an empty one elsewhere. Collective.
        """

        def forward_step(
            iterator: Iterator[MicroBatch], wrapped: Any
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

    @torch.no_grad()
    def logprobs(
        self,
        batches: Sequence[PackedBatch],
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[LogprobOutput]:
        if reference and self.reference is None:
            raise ValueError("no reference is kept: set objective.kl_coef above 0")
        chunks: list[Any] = self.reference if reference and self.reference is not None else self.ddp
        items = self._items(batches)
        work = items + items[:1] * self._missing_stages(items)  # their results are dropped

        def finish(item: MicroBatch, chunk: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            nothing = hidden.new_zeros(())
            return nothing, torch.zeros((), dtype=torch.int), self.head(item, chunk, hidden)[:2]

        with contextlib.ExitStack() as stack:
            recorder = stack.enter_context(self.routers.recording()) if record_routing else None
            scores = stack.enter_context(self.routers.scoring()) if record_scores else None
            if not reference:
                stack.enter_context(self.routers.replaying(work))
            results = self._schedule(chunks, work, finish, forward_only=True)
        values = assemble(items, results[: len(items)], self.device)
        traces = self.routers.gather(recorder, items) if recorder is not None else [None] * len(items)
        outputs = [LogprobOutput(v[0], v[1], trace) for v, trace in zip(values, traces, strict=True)]
        if scores is None:
            return outputs
        old = self.routers.gather_scores(scores, items)
        return [replace(out, router=router) for out, router in zip(outputs, old, strict=True)]

    def _missing_stages(self, items: list[MicroBatch]) -> int:
        """Copies that a forward pass takes beside its items: the interleaved schedule needs one per stage."""
        return max(0, self.layout.pipeline - len(items)) if self.layout.virtual_stages > 1 else 0

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
        if error := missing(batches, spec):
            raise error
        self._accumulated += 1
        items = self._items(batches)
        all_reduce = _SumOverContext.apply if self.layout.context > 1 else None
        with_candidates = "expected_score" in spec.objective.spec.reads
        with self._measuring(items, "router_shift" in spec.objective.spec.reads) as shifts:

            def finish(
                item: MicroBatch, chunk: Any, hidden: Tensor
            ) -> tuple[Tensor, Tensor, dict[str, Stat]]:
                logprobs, entropy, candidates = self.head(
                    item, chunk, hidden, with_candidates=with_candidates
                )
                shift = None if shifts is None else next(shifts)
                # A filler runs like any micro-batch, so that collectives match, and trains nothing.
                if not item.batch.loss_mask.any():
                    return logprobs.sum(), torch.zeros((), dtype=torch.int), {}
                loss, stats = micro_batch_loss(
                    *(logprobs, entropy, item.batch, spec),
                    index=item.rows.index,
                    all_reduce=all_reduce,
                    router_shift=shift,
                    candidate_logprobs=candidates,
                )
                return loss, torch.zeros((), dtype=torch.int), stats

            balance.start(self.chunks, batches, self.config.megatron)
            with self.routers.replaying(items):
                parts = self._schedule(self.ddp, items, finish, forward_only=False)
        stats = merge_stats(parts) if parts else {}
        # One rank of each context shard speaks for its tensor twins; balance metrics come from
        # the expert counts.
        if mpu.get_tensor_model_parallel_rank() or not mpu.is_pipeline_last_stage():
            stats = {}
        return stats | balance.stats(self.chunks, self.architecture)

    @contextlib.contextmanager
    def _measuring(self, items: list[MicroBatch], wanted: bool) -> Iterator[Iterator[Tensor] | None]:
        """The routers' shift at this rank's trained tokens, [N], of item after item while they run inside.

        A pipeline's last stage would need what the other stages measure of the same item, which have gone
        on by then. So there the shifts are found in a forward pass of their own, before the others.
        """
        if not wanted:
            yield None
        elif self.layout.pipeline > 1:
            yield iter(self._shifts_before(items))
        else:
            with self.routers.metering(items) as meter:
                yield (self._shift(meter, i, item) for i, item in enumerate(items))

    def _shift(self, meter: ShiftMeter, at: int, item: MicroBatch) -> Tensor:
        # The router that helps to predict a token sees the one before it, whose row that is.
        return self.routers.shift(meter, at)[item.rows.hidden_rows]

    @torch.no_grad()
    def _shifts_before(self, items: list[MicroBatch]) -> list[Tensor]:
        """Of each item [N], by a forward pass. It computes as many items at once as its token budget has room
        for at the longest, so that all ranks join as many.
        """
        size = max(1, self.config.forward_budget // self.config.token_budget)
        joined = self._items(in_groups([item.batch for item in items], size))
        work = joined + joined[:1] * self._missing_stages(joined)

        def finish(item: MicroBatch, chunk: Any, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
            return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), None

        with self.routers.metering(work) as meter:
            with self.routers.replaying(work):
                self._schedule(self.ddp, work, finish, forward_only=True)
            found = torch.cat([self._shift(meter, i, item) for i, item in enumerate(joined)])
        # Sequences keep their order and their cut over context ranks, so tokens stand as in the items.
        return list(found.split([len(item.rows.index) for item in items]))

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

    def held(self) -> Held:
        self._gather_parameters()
        weights = [tensor for chunk in self.chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
        return Held(self.device, weights, [self.ddp, self.optimizer, self.reference])

    def weights(
        self, bucket_bytes: int, *, stacked: bool = False, exporters: Sequence[int] | None = None
    ) -> Iterator[WeightBucket]:
        self._gather_parameters()
        weights = export_weights(
            self.chunks, self.architecture, bucket_bytes, exporters or (0,), stacked=stacked
        )
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
