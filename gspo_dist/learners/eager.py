"""The reference learner: one process, plain PyTorch. Every other backend is compared with it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gspo_dist.config import LearnerConfig
from gspo_dist.learners import determinism
from gspo_dist.learners.gradient_norm import total_norm
from gspo_dist.learners.hf_model import PolicyModel, load_policy, model_inputs
from gspo_dist.learners.learner import OptimStep, WeightBucket
from gspo_dist.learners.loss import LossSpec, micro_batch_loss, missing, trained_index
from gspo_dist.learners.loss_scale import LossScale
from gspo_dist.learners.parking import Held
from gspo_dist.learners.schedule import lr_factor, set_groups
from gspo_dist.learners.state_files import check_resume, map_state, read_state, write_layout, write_state
from gspo_dist.metrics.stat import Stat, merge_stats
from gspo_dist.routing import huggingface as routers
from gspo_dist.routing.scores import ScoreRecorder, ShiftMeter
from gspo_dist.types import LogprobOutput, PackedBatch
from gspo_dist.weights.names import hf_named_weights
from gspo_dist.weights.stream import NamedTensor, buckets

FILE = "eager.pt"


def scatter_output(
    batch: PackedBatch, index: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor
) -> LogprobOutput:
    """[N] values of the trained tokens as [T] fields on the host, zero elsewhere."""
    full = torch.zeros(2, batch.num_tokens)
    full[0, index] = logprobs.detach().float().cpu()
    full[1, index] = entropy.detach().float().cpu()
    return LogprobOutput(full[0], full[1])


class EagerLearner:
    """Implements `Learner` with torch.optim.AdamW on fp32 master weights, whatever the weights' precision."""

    data_parallel_rank = 0
    is_exporter = True

    def __init__(
        self,
        config: LearnerConfig,
        model_path: str | Path,
        *,
        total_steps: int,
        temperature: float = 1.0,
        keep_reference: bool = False,
        device: str = "cpu",
    ) -> None:
        """total_steps: optimiser steps of the whole run, which the schedule is stretched over.
        temperature: what the engines sample with.
        keep_reference: keeps a frozen copy of the starting policy for the KL term.

        Raises ValueError for a model folder that cannot be trained.
        """
        if config.deterministic:
            determinism.turn_on()
        self.config = config
        self.device = torch.device(device)
        self.policy_version = 0
        self.policy = load_policy(
            model_path,
            config.precision,
            temperature=temperature,
            fp32_head=config.fp32_head,
            activation_checkpointing=config.activation_checkpointing,
            consistency=config.consistency,
            device=self.device.type,
        ).to(self.device)
        self.reference: PolicyModel | None = None
        if keep_reference:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        # Also in fp32, where they are plain copies: one update path, and one checkpoint format, for both.
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.gradients: list[torch.Tensor | None] = [None] * len(self.parameters)
        for i, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(self._gradient_collector(i))
        self.lr_factor = lr_factor(config.optimizer, total_steps)
        self.scale = LossScale.of(config.precision, config.initial_loss_scale)
        self.optimizer = torch.optim.AdamW(self.masters)  # its settings: before every step

    def _gradient_collector(self, i: int) -> Callable[[torch.Tensor], None]:
        """Sums gradients in fp32 whatever the weights' precision, micro-batch after micro-batch."""

        def collect(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None  # torch calls this hook right after it has filled it
            grad = parameter.grad.float()
            total = self.gradients[i]
            self.gradients[i] = grad if total is None else total.add_(grad)
            parameter.grad = None  # or the next micro-batch would be added in the weights' precision

        return collect

    @torch.no_grad()
    def logprobs(
        self,
        batches: Sequence[PackedBatch],
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[LogprobOutput]:
        policy = self.policy
        if reference:
            if self.reference is None:
                raise ValueError("no reference is kept: set objective.kl_coef above 0")
            policy = self.reference
            batches = [b.with_(routing=None) for b in batches]  # the reference routes by itself
        return [
            hf_logprobs(policy, policy.hf, batch, self.device, record_routing, record_scores)
            for batch in batches
        ]

    def forward_backward(self, batches: Sequence[PackedBatch], spec: LossSpec) -> dict[str, Stat]:
        if error := missing(batches, spec):
            raise error
        parts = []
        for batch in batches:
            with replaying(self.policy.hf, batch):
                seen = hf_forward(self.policy, self.policy.hf, batch, self.device, spec)
                loss, stats = micro_batch_loss(*seen.values, batch, spec, **seen.extra)
                (loss if self.scale is None else self.scale.apply(loss)).backward()
            parts.append(stats)
        return merge_stats(parts)

    @torch.no_grad()
    def optim_step(self) -> OptimStep:
        grads = [
            torch.zeros_like(m) if g is None else g for m, g in zip(self.masters, self.gradients, strict=True)
        ]
        scaled = None
        if self.scale is not None:
            scaled = self.scale.value
            torch._foreach_div_(grads, scaled)
        norm = total_norm(grads)
        lr = self.config.optimizer.lr * self.lr_factor(self.policy_version)
        skipped = not torch.isfinite(norm)
        if self.scale is not None:
            self.scale.update(skipped)
        if skipped:
            self.gradients = [None] * len(self.parameters)
            return OptimStep(float(norm), lr, self.policy_version, skipped, scaled)
        clip = self.config.optimizer.grad_clip
        # The 1e-6 is that of torch.nn.utils.clip_grad_norm_, which DeepSpeed and Megatron follow.
        scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad.mul_(scale)
        set_groups(self.optimizer.param_groups, self.config.optimizer, lr)
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)
            master.grad = None
        self.gradients = [None] * len(self.parameters)
        self.policy_version += 1
        return OptimStep(float(norm), lr, self.policy_version, loss_scale=scaled)

    def held(self) -> Held:
        weights = [*self.policy.parameters(), *self.policy.buffers()]
        return Held(
            self.device, weights, [self.policy, self.reference, self.masters, self.gradients, self.optimizer]
        )

    def weights(
        self, bucket_bytes: int, *, stacked: bool = False, exporters: Sequence[int] | None = None
    ) -> Iterator[WeightBucket]:
        weights = hf_named_weights(self.policy.hf, slice_bytes=bucket_bytes, stacked=stacked)
        yield from buckets(weights, bucket_bytes)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_layout(folder, self.config)
        state = {
            "masters": self.masters,
            "optimizer": self.optimizer.state_dict(),
            "policy_version": self.policy_version,
            "rng": torch.get_rng_state(),
            "loss_scale": self.scale and self.scale.state_dict(),
        }
        write_state(state, folder / FILE)

    def load(self, folder: Path) -> None:
        check_resume(folder, self.config)
        state = read_state(folder / FILE, self.device)
        with torch.no_grad():
            for parameter, master, saved in zip(self.parameters, self.masters, state["masters"], strict=True):
                if master.shape != saved.shape:
                    raise ValueError(
                        f"checkpoint {folder} is of another model: {saved.shape} for {master.shape}"
                    )
                master.copy_(saved)
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scale is not None:
            self.scale.load_state_dict(state["loss_scale"])
        self.policy_version = state["policy_version"]
        torch.set_rng_state(state["rng"].cpu())

    def wait_saved(self) -> None:
        """Saves are synchronous here."""

    def close(self) -> None:
        """Nothing to leave: there is no process group."""


def stored_weights(folder: Path, model_path: str | Path, precision: str) -> Iterator[NamedTensor]:
    """Streams the weights that `EagerLearner.save` wrote to `folder`, as it would export them.

    The masters are mapped and the optimiser's states not read. The model itself is in memory, since this
    learner is for models that are. Raises ValueError as `load` does.
    """
    hf = load_policy(model_path, precision).hf
    masters = map_state(folder / FILE)["masters"]
    with torch.no_grad():
        for parameter, saved in zip(hf.parameters(), masters, strict=True):
            if parameter.shape != saved.shape:
                raise ValueError(
                    f"checkpoint {folder} is of another model: {saved.shape} for {parameter.shape}"
                )
            parameter.copy_(saved)
    yield from hf_named_weights(hf)


def replaying(
    hf: torch.nn.Module, batch: PackedBatch, adapter: ModuleType = routers
) -> AbstractContextManager[Any]:
    """The replay block of a batch that carries a trace, and an empty block for one that carries none.

    adapter: the module of gspo_dist.routing that knows `hf`'s routers.
    """
    if batch.routing is None:
        return contextlib.nullcontext()
    return adapter.replay(hf, batch.routing, tokens=batch.num_tokens)


def hf_logprobs(
    call: torch.nn.Module,
    hf: torch.nn.Module,
    batch: PackedBatch,
    device: torch.device,
    record_routing: bool,
    record_scores: bool = False,
    adapter: ModuleType = routers,
) -> LogprobOutput:
    """One forward pass without loss, replaying the batch's trace if it has one.

    call: the policy, or an engine around it.
    hf: the HF model inside `call`, whose routers are hooked.
    record_routing: whether the output carries the experts of this pass.
    record_scores: whether it carries what the routers thought of them.
    adapter: the module of gspo_dist.routing that knows `hf`'s routers.
    """
    index = trained_index(batch)
    scores = ScoreRecorder() if record_scores else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaying(hf, batch, adapter))
        recorder = stack.enter_context(adapter.record(hf)) if record_routing else None
        if scores is not None:
            stack.enter_context(adapter.watch(hf, scores))
        logprobs, entropy = call(**model_inputs(batch, index, device))
    return replace(
        scatter_output(batch, index, logprobs, entropy),
        routing=None if recorder is None else recorder.trace(),
        router=None if scores is None else scores.scores(),
    )


@dataclass(frozen=True)
class Forward:
    """What a pass with gradient gave of a micro-batch: arguments of `micro_batch_loss`."""

    values: tuple[torch.Tensor, torch.Tensor]
    """Log-probs, with gradient, and entropies of the trained tokens, [N]."""
    extra: dict[str, Any]
    """index, and what the objective reads beside."""


def hf_forward(
    call: torch.nn.Module,
    hf: torch.nn.Module,
    batch: PackedBatch,
    device: torch.device,
    spec: LossSpec,
    adapter: ModuleType = routers,
) -> Forward:
    """One forward pass with gradient, and what `spec`'s objective reads of it.

    Arguments are those of `hf_logprobs`.

    The block in which the batch's trace is replayed is the caller's, because the backward belongs in it too.
    """
    index, reads, meter = trained_index(batch), spec.objective.spec.reads, None
    if "router_shift" in reads:
        assert batch.old_router is not None  # `missing` was asked first
        meter = ShiftMeter(batch.old_router)
    inputs = model_inputs(batch, index, device, with_candidates="expected_score" in reads)
    with contextlib.nullcontext() if meter is None else adapter.watch(hf, meter):
        logprobs, entropy, *others = call(**inputs)
    return Forward(
        (logprobs, entropy),
        {
            "index": index,
            # The router that helps to predict token t sees token t - 1.
            "router_shift": None if meter is None else meter.shift()[index.to(device) - 1],
            "candidate_logprobs": others[0] if others else None,
        },
    )
