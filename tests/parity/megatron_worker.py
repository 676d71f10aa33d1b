"""A rank of the megatron learner in the parity tests: runs job after job of a crew (ranks.py).

A job names the model, the layout and the actions; see `main`. Each job has a learner and process groups of
its own.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu

from gspo_dist.learners.megatron import model as builder
from gspo_dist.learners.megatron.learner import MegatronLearner
from gspo_dist.learners.parking import Parking
from gspo_dist.weights.stacks import unstack
from tests.parity import megatron_case as case
from tests.parity.ranks import deliver, jobs
from tests.parity.reads import with_candidates, with_other_routers


def logits_of(learner: MegatronLearner, batches: list) -> list:
    """Per batch, this rank's tokens and their logits over its part of the vocabulary (last stage only)."""

    def finish(item, chunk, hidden):
        logits = hidden[0] @ builder.head_weight(chunk).t()
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int), (item.rows.source, logits)

    with torch.no_grad():
        return learner._schedule(learner.ddp, learner._items(batches), finish, forward_only=True)


def train(learner: MegatronLearner, batches: list, steps: int, spec: case.LossSpec) -> list[dict]:
    """Optimiser steps on the same data: all but the first are off-policy."""
    seen = []
    for _ in range(steps):
        stats = learner.forward_backward(batches, spec)
        step = learner.optim_step()
        seen.append(
            {
                "stats": stats,
                "grad_norm": step.grad_norm,
                "lr": step.lr,
                "policy_version": step.policy_version,
                "loss_scale": step.loss_scale,
            }
        )
    return seen


def main(job: dict, rank: int) -> dict:
    torch.set_num_threads(1)
    config = case.make_config(job["world_size"], job.get("precision", "fp32"), **job["layout"])
    if "initial_loss_scale" in job:
        config = replace(config, initial_loss_scale=job["initial_loss_scale"])
    if job.get("deterministic"):
        config = replace(config, deterministic=True)
    if "optimizer" in job:
        config = replace(config, optimizer=replace(config.optimizer, **job["optimizer"]))
    learner = MegatronLearner(
        config,
        job["model"],
        total_steps=10,
        temperature=job.get("temperature", 1.0),
        keep_reference=job.get("keep_reference", False),
    )
    data = torch.load(job["batches"], weights_only=False)
    spec = case.make_spec(data, job.get("objective", "gspo"))
    every = learner.layout.data
    mine = [b for i, b in enumerate(data) if i % every == learner.data_parallel_rank]
    out: dict = {"data_rank": learner.data_parallel_rank, "exporter": learner.is_exporter, "passes": []}
    out["mode"] = (learner.transformer.deterministic_mode, torch.are_deterministic_algorithms_enabled())
    out["at"] = {
        "tensor": mpu.get_tensor_model_parallel_rank(),
        "context": mpu.get_context_parallel_rank(),
        "replica": mpu.get_data_parallel_rank(),
        "pipeline": mpu.get_pipeline_model_parallel_rank(),
        "expert_tensor": mpu.get_expert_tensor_parallel_rank(),
        "expert": mpu.get_expert_model_parallel_rank(),
    }
    schedule = learner._schedule

    def counted(chunks, items, finish, *, forward_only):
        out["passes"].append((forward_only, len(items)))
        return schedule(chunks, items, finish, forward_only=forward_only)

    learner._schedule = counted
    for action in job["actions"]:
        name, argument = action if isinstance(action, list) else (action, None)
        if name == "logits":
            out["logits"] = logits_of(learner, mine)
        elif name == "logprobs":
            out.setdefault("logprobs", []).append(learner.logprobs(mine))
        elif name == "reference":
            out["reference"] = learner.logprobs(mine, reference=True)
        elif name == "scores":
            out["scores"] = learner.logprobs(mine, record_scores=True)
            mine = [with_other_routers(b, o.router) for b, o in zip(mine, out["scores"], strict=True)]
        elif name == "candidates":
            mine = [with_candidates(b, case.VOCAB) for b in mine]
        elif name == "objective":
            spec = case.make_spec(data, argument)
        elif name == "record":
            outputs = learner.logprobs(mine, record_routing=True)
            out["recorded"] = outputs
            mine = [b.with_(routing=o.routing) for b, o in zip(mine, outputs, strict=True)]
        elif name == "foreign_routes":
            routes = torch.load(argument, weights_only=False)
            mine = [
                b.with_(routing=routes[i])
                for i, b in enumerate(data)
                if i % every == learner.data_parallel_rank
            ]
        elif name == "train":
            out.setdefault("steps", []).extend(train(learner, mine, argument or case.STEPS, spec))
        elif name == "weights":
            stream = {n: t.clone() for bucket in learner.weights(argument or 1 << 20) for n, t in bucket}
            out.setdefault("weights", []).append(stream)
            stacked, travelled = {}, 0
            for bucket in learner.weights(argument or 1 << 20, stacked=True):
                travelled += len(bucket)
                stacked |= {n: t.clone() for n, t in unstack(bucket)}
            assert stacked.keys() == stream.keys()
            assert all(torch.equal(stacked[n], stream[n]) for n in stream)
            out.setdefault("travelled", []).append((travelled, len(stream)))
        elif name == "several":  # every rank exports, then only some
            for exporters in (range(job["world_size"]), argument or ()):
                found = learner.weights(1 << 16, stacked=True, exporters=tuple(exporters))
                stream = {n: t.clone() for bucket in found for n, t in unstack(bucket)}
                out.setdefault("several", []).append(stream)
        elif name == "nap":
            parking = Parking(learner)
            out["parked"] = (parking.sleep(keep_weights=True), parking.sleep())
            assert not any(p.untyped_storage().nbytes() for c in learner.chunks for p in c.parameters())
            out["host"] = sum(buffer.nbytes for buffer in parking._buffers.values())
            parking.wake_up(weights_only=True)
            learner.logprobs(mine)
            parking.wake_up()
        elif name == "skip":
            learner.forward_backward(mine, spec)
            if rank == 1:
                next(p for p in learner.ddp[0].parameters()).main_grad.fill_(float("nan"))
            step = learner.optim_step()
            out["skipped"] = (step.skipped, step.policy_version)
        elif name == "save":
            learner.save(Path(argument))
        elif name == "wait":
            learner.wait_saved()
        elif name == "load":
            learner.load(Path(argument))
            out["version"] = learner.policy_version
        elif name == "groups":
            keys = ("lr", "betas", "eps", "weight_decay")
            out["groups"] = [{key: group[key] for key in keys} for group in learner.optimizer.param_groups]
        elif name == "load_error":
            try:
                learner.load(Path(argument))
            except ValueError as error:
                out.setdefault("errors", []).append(str(error))
        elif name == "bias":
            out["bias"] = {
                r.layer_number - 1: (r.expert_bias.clone(), r.load.clone())
                for r in builder.routers(learner.chunks)
            }
    learner.close()
    torch.use_deterministic_algorithms(False)  # the process goes on with other jobs
    return out


if __name__ == "__main__":
    gc.freeze()  # what the imports made stays: collections look at the jobs' objects only
    for job, rank in jobs():
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(job["world_size"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(job["port"]),
        }
        deliver(job, rank, main(job, rank))
        gc.collect()
