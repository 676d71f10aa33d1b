"""The learner for scale on HF models: the eager learner's arithmetic, its state sharded by DeepSpeed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import distributed as dist

from gspo_dist.config import LearnerConfig
from gspo_dist.learners import determinism
from gspo_dist.learners.deepspeed.config import check, check_values, engine_config, import_deepspeed
from gspo_dist.learners.deepspeed.export import full_weights
from gspo_dist.learners.deepspeed.load import load_in_place, load_partitioned, own_experts
from gspo_dist.learners.eager import hf_forward, hf_logprobs, replaying
from gspo_dist.learners.gradient_norm import total_norm
from gspo_dist.learners.hf_folder import check_model_folder
from gspo_dist.learners.hf_model import PolicyModel, load_policy
from gspo_dist.learners.learner import OptimStep, WeightBucket
from gspo_dist.learners.loss import LossSpec, micro_batch_loss, missing
from gspo_dist.learners.loss_scale import LossScale
from gspo_dist.learners.parking import Held
from gspo_dist.learners.schedule import lr_factor, set_groups
from gspo_dist.learners.state_files import check_resume, read_state, write_layout, write_state, writing
from gspo_dist.metrics.stat import Stat, merge_stats
from gspo_dist.models.shape import read_shape
from gspo_dist.routing import deepspeed as autoep_routers
from gspo_dist.routing import huggingface as hf_routers
from gspo_dist.types import LogprobOutput, PackedBatch
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.stream import buckets

TAG = "deepspeed"


class DeepSpeedLearner:
    """Implements `Learner` with a DeepSpeed engine around `PolicyModel`. Every rank is a replica.

    ZeRO 0 to 3. With `expert_parallel` above 1 AutoEP spreads the experts of every MoE layer over
    that many ranks. Weights are fp32, or bf16 or fp16 with fp32 masters, fp32 gradient accumulation
    (ZeRO 1 to 3) and fp32 reduction.
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
        rank: int = 0,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int = 29500,
    ) -> None:
        """total_steps, temperature, keep_reference: as for `EagerLearner`.
        rank, world_size: this process of the learner's processes.
        master_addr, master_port: where they meet.

        Collective. Raises ValueError for settings that cannot run, before the process group is made.
        """
        if world_size != config.world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"rank and world_size must fit learner.world_size {config.world_size}: got {rank} and "
                f"{world_size}"
            )
        self.shape = read_shape(check_model_folder(model_path))
        check(config, self.shape, device)
        if config.deterministic:
            determinism.turn_on()
        self.config = config
        # torch.cuda.set_device needs an index. It is 0, because Ray shows each rank its own GPU alone.
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        self.rank = self.data_parallel_rank = rank
        self.world_size = world_size
        self.is_exporter = rank == 0
        self.policy_version = 0
        self.deepspeed = import_deepspeed(device)
        self._join(master_addr, master_port)
        check_values(
            self.deepspeed, engine_config(config, self.shape, device=device), config.deepspeed.config
        )
        self.routers: ModuleType = autoep_routers if config.deepspeed.expert_parallel > 1 else hf_routers
        self.lr_factor = lr_factor(config.optimizer, total_steps)
        self.engine = self._wrap(model_path, temperature, trains=True)
        self.reference = self._wrap(model_path, temperature, trains=False) if keep_reference else None
        self.policy: PolicyModel = self.engine.module
        self.scale = LossScale.of(config.precision, config.initial_loss_scale)
        self._plain_norm: torch.Tensor | None = None
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):
            self.engine.optimizer.register_step_pre_hook(self._clip_plain)

    def _join(self, master_addr: str, master_port: int) -> None:
        # DeepSpeed 0.19.8 reads these whatever it is told by argument. Without LOCAL_RANK its engine
        # does not start.
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.device.index or 0),
            MASTER_ADDR=master_addr,
            MASTER_PORT=str(master_port),
        )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if dist.is_initialized():
            return  # a second learner of the same ranks shares their process group
        self.deepspeed.init_distributed(
            "gloo" if self.device.type == "cpu" else "nccl",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=self.config.timeout_s),
            init_method=f"tcp://{master_addr}:{master_port}",
            rank=self.rank,
            world_size=self.world_size,
        )

    def _wrap(self, model_path: str | Path, temperature: float, *, trains: bool) -> Any:
        """An engine around the model of `model_path`; the frozen reference is sharded like the policy."""
        settings = engine_config(self.config, self.shape, trains=trains, device=self.device.type)
        stage, experts = self.config.deepspeed.zero_stage, self.config.deepspeed.expert_parallel > 1
        make = partial(load_in_place, self.device, experts)
        if stage == 3:
            make = partial(load_partitioned, self.deepspeed, settings)
        policy = load_policy(
            model_path,
            self.config.precision,
            temperature=temperature,
            fp32_head=self.config.fp32_head,
            activation_checkpointing=self.config.activation_checkpointing and trains,
            consistency=self.config.consistency,
            device=self.device.type,
            make=make,
        )
        policy.config = policy.hf.config  # where AutoEP looks for the model's sizes
        policy.requires_grad_(trains)
        own: AbstractContextManager[None] = contextlib.nullcontext()
        if experts and stage < 3:
            own = own_experts(policy.hf, ModelFolder(model_path).path, self.device)
        with own:
            engine, *_ = self.deepspeed.initialize(
                model=policy,
                model_parameters=list(policy.parameters()) if trains else None,
                config=settings,
                dist_init_required=False,
            )
        return engine

    @torch.no_grad()
    def logprobs(
        self,
        batches: Sequence[PackedBatch],
        *,
        record_routing: bool = False,
        record_scores: bool = False,
        reference: bool = False,
    ) -> list[LogprobOutput]:
        engine = self.engine
        if reference:
            if self.reference is None:
                raise ValueError("no reference is kept: set objective.kl_coef above 0")
            engine = self.reference
            batches = [b.with_(routing=None) for b in batches]  # the reference routes by itself
        self._same_count(len(batches))
        hf = engine.module.hf
        return [
            hf_logprobs(engine, hf, batch, self.device, record_routing, record_scores, self.routers)
            for batch in batches
        ]

    def forward_backward(self, batches: Sequence[PackedBatch], spec: LossSpec) -> dict[str, Stat]:
        self._same_count(len(batches))
        if spec.objective.spec.reads:
            self._agree(missing(batches, spec))
        if self.scale is not None:
            self.engine.optimizer.loss_scaler.cur_scale = self.scale.value
        parts = []
        for batch in batches:
            hf = self.policy.hf
            with replaying(hf, batch, self.routers):
                seen = hf_forward(self.engine, hf, batch, self.device, spec, self.routers)
                error = None
                try:
                    loss, stats = micro_batch_loss(*seen.values, batch, spec, **seen.extra)
                except (FloatingPointError, ValueError) as raised:
                    error = raised
                self._agree(error)
                # DeepSpeed divides the ranks' summed gradients by the number of ranks, dense and expert
                # weights alike (0.19.8). Denominators are global here, so the sum is wanted, and no division
                # by the number of micro-batches either.
                self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
            parts.append(stats)
        return merge_stats(parts)

    def optim_step(self) -> OptimStep:
        lr = self.config.optimizer.lr * self.lr_factor(self.policy_version)
        set_groups(self.engine.optimizer.param_groups, self.config.optimizer, lr)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() if self._plain_norm is None else self._plain_norm)
        # The norm is of all ranks' gradients, so all ranks skip together. DeepSpeed (0.19.8) marks a bad one
        # by inf or -1, and has not stepped then. In fp16 it leaves the norm of the step before, and says it.
        skipped = not 0 <= norm < float("inf")
        scaled = None
        if self.scale is not None:
            skipped |= bool(self.engine.optimizer.overflow)
            scaled = self.scale.value
            self.scale.update(skipped)
        if skipped:
            return OptimStep(float("inf"), lr, self.policy_version, skipped, scaled)
        self.policy_version += 1
        return OptimStep(norm, lr, self.policy_version, loss_scale=scaled)

    def _clip_plain(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Clips for ZeRO 0 in fp32, whose bare torch optimiser reports no norm to DeepSpeed.

        All replicas hold the same summed gradient then, so each clips alone. The 1e-6 is the eager learner's.
        A gradient that is not finite is taken away: AdamW leaves parameters without one as they are.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._plain_norm = total_norm(gradients)
        if not torch.isfinite(self._plain_norm):
            for parameter in parameters:
                parameter.grad = None
            return
        clip = self.config.optimizer.grad_clip
        if clip:
            torch._foreach_mul_(gradients, min(1.0, clip / (float(self._plain_norm) + 1e-6)))

    def _same_count(self, micro_batches: int) -> None:
        """Raises ValueError on every rank when they got unequal numbers: they would wait for each other."""
        least_most = torch.tensor([-micro_batches, micro_batches], device=self.device)
        dist.all_reduce(least_most, dist.ReduceOp.MAX)
        if int(least_most.sum()):
            raise ValueError(
                "every rank must get as many micro-batches (packing fills up with masked ones): got "
                f"{-int(least_most[0])} on one rank and {int(least_most[1])} on another"
            )

    def _agree(self, error: Exception | None) -> None:
        """Raises on every rank when one has an error: the others would hang in the backward's collectives."""
        bad = torch.tensor(int(error is not None), device=self.device)
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not int(bad):
            return
        errors: list[Exception | None] = [None] * self.world_size
        dist.all_gather_object(errors, error and type(error)(str(error)))
        kind = next(type(e) for e in errors if e is not None)
        raise kind("; ".join(f"rank {r}: {e}" for r, e in enumerate(errors) if e is not None)) from error

    def held(self) -> Held:
        # Under ZeRO 3 a parameter's share is in `ds_tensor`, which DeepSpeed hangs on it.
        parameters = list(self.policy.parameters())
        shares = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        weights = [*parameters, *self.policy.buffers(), *shares]
        reference = None if self.reference is None else self.reference.module
        return Held(self.device, weights, [self.policy, self.engine.optimizer, reference])

    def weights(
        self, bucket_bytes: int, *, stacked: bool = False, exporters: Sequence[int] | None = None
    ) -> Iterator[WeightBucket]:
        zero = self.deepspeed.zero if self.config.deepspeed.zero_stage == 3 else None
        weights = full_weights(
            self.policy,
            rank=self.rank,
            exporters=exporters or (0,),
            bucket_bytes=bucket_bytes,
            zero=zero,
            stacked=stacked,
        )
        yield from buckets(weights, bucket_bytes)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "policy_version": self.policy_version,
            "loss_scale": self.scale and self.scale.state_dict(),
        }
        if self.rank == 0:
            write_layout(folder, self.config)
        with writing(folder):
            self.engine.save_checkpoint(str(folder), tag=TAG, client_state=state, save_latest=False)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        write_state(random, folder / f"random_{self.rank}.pt")
        dist.barrier()

    def load(self, folder: Path) -> None:
        """As `Learner.load`. Needs as many ranks, the same ZeRO stage and expert parallelism as at `save`."""
        check_resume(folder, self.config)
        if not (folder / TAG).is_dir():
            raise ValueError(f"no DeepSpeed checkpoint in {folder}: expected its folder {TAG!r}")
        random = read_state(folder / f"random_{self.rank}.pt")
        _, state = self.engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        if hasattr(self.engine.optimizer, "clip_grad"):
            # ZeRO 1 and 2 take the saved one (0.19.8), though the engine was made with the configuration's.
            self.engine.optimizer.clip_grad = self.engine.gradient_clipping()
        if self.scale is not None:
            self.scale.load_state_dict(state["loss_scale"])
        self.policy_version = state["policy_version"]
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def wait_saved(self) -> None:
        """Saves are synchronous here."""

    def close(self) -> None:
        """Collective: leaves the process group."""
        self.engine.destroy()
        if self.reference is not None:
            self.reference.destroy()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
