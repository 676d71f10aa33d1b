"""A rank of the DeepSpeed parity tests, of a crew (ranks.py). job.pt in its folder holds more of the job.

job["cases"]: name -> {"config": arguments of make_config, "model": folder, "do": name of a function below,
...}. All cases of a launch share one process group.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gspo_dist.learners.deepspeed.config import import_deepspeed
from gspo_dist.learners.deepspeed.learner import DeepSpeedLearner
from gspo_dist.learners.parking import Parking, tensors_below
from tests.parity import deepspeed_case as case
from tests.parity.ranks import deliver, jobs


class Ranks:
    """Makes learners of one rank's process group."""

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        self.job, self.rank = job, rank

    def learner(self, spec: dict[str, Any], **changes: Any) -> DeepSpeedLearner:
        return DeepSpeedLearner(
            case.make_config(self.job["world_size"], **dict(spec["config"])),
            spec["model"],
            total_steps=6,
            temperature=0.8,
            rank=self.rank,
            world_size=self.job["world_size"],
            master_port=self.job["port"],
            **changes,
        )


def train(ranks: Ranks, spec: dict[str, Any]) -> dict[str, Any]:
    kl_coef = spec.get("kl_coef", 0.0)
    learner = ranks.learner(spec, keep_reference=kl_coef > 0)
    seen = case.train(learner, spec["data"], [ranks.rank], kl_coef, spec.get("objectives", ("gspo",)))
    out = {"steps": seen, "weights": case.exported(learner)}
    learner.engine.destroy()
    return out


def routes(ranks: Ranks, spec: dict[str, Any]) -> dict[str, Any]:
    """Records the first mini-batch's routes, replays the given ones in a step, and misuses a trace."""
    learner = ranks.learner(spec)
    mine = list(spec["data"][0].micro_batches[ranks.rank])
    recorded = learner.logprobs(mine, record_routing=True)
    given = [b.with_(routing=t) for b, t in zip(mine, spec["traces"][ranks.rank], strict=True)]
    again = learner.logprobs(given, record_routing=True)
    stats = learner.forward_backward(given, case.make_spec(spec["data"][0]))
    step = learner.optim_step()
    short = [b.with_(routing=b.routing[slice(0, b.num_tokens - 1)]) for b in given]
    try:
        learner.logprobs(short)
        error = None
    except ValueError as raised:
        error = str(raised)
    out = {
        "recorded": [o.routing for o in recorded],
        "replayed": [o.routing for o in again],
        "logprobs": [o.logprobs for o in again],
        "stats": stats,
        "grad_norm": step.grad_norm,
        "error": error,
        "weights": case.exported(learner),
    }
    learner.engine.destroy()
    return out


def resume(ranks: Ranks, spec: dict[str, Any]) -> dict[str, Any]:
    """Two steps, save, two more; another learner loads and makes those two."""
    folder = Path(spec["folder"])
    first = ranks.learner(spec)
    case.train(first, spec["data"][:2], [ranks.rank])
    torch.manual_seed(77 + ranks.rank)
    if first.scale is not None:
        first.scale.value = 512.0
    first.save(folder)
    noise = torch.rand(3)
    saved = case.exported(first)
    on = case.train(first, spec["data"][2:], [ranks.rank])
    out = {"on": on, "weights_saved": saved, "weights_on": case.exported(first), "noise_on": noise}
    first.engine.destroy()
    second = ranks.learner(spec)
    out["refused"] = _refused(lambda: second.load(folder.parent / "elsewhere"))
    second.load(folder)
    out["version"] = second.policy_version
    out["noise_back"] = torch.rand(3)
    nap(second)
    out["back"] = case.train(second, spec["data"][2:], [ranks.rank])
    nap(second)
    out["weights_back"] = case.exported(second)
    out["several"] = case.exported(second, exporters=(1, 0))
    second.engine.destroy()
    return out


def nap(learner: DeepSpeedLearner) -> None:
    """To host memory and back, as a colocated learner; the weights come first, for a publication."""
    parking, held = Parking(learner), learner.held()
    parking.sleep(keep_weights=True)
    assert all(t.untyped_storage().nbytes() for t in held.weights if t.numel())
    assert parking.sleep() > 0
    found = [*held.weights, *tensors_below(held.others)]
    storages = [t.untyped_storage() for t in found if not t.is_meta]  # DeepSpeed keeps shapes as meta tensors
    left = sum(s.nbytes() for s in storages if s.resizable())  # a CPU maps what torch.load reads
    assert left == 0, f"{left} bytes stayed"
    parking.wake_up(weights_only=True)
    case.exported(learner)
    parking.wake_up()


def accepted(ranks: Ranks, spec: dict[str, Any]) -> dict[str, Any]:
    """Two steps, save; a learner with other settings of the optimiser loads and makes two more."""
    folder = Path(spec["folder"])
    first = ranks.learner(spec)
    case.train(first, spec["data"][:2], [ranks.rank])
    first.save(folder)
    first.engine.destroy()
    second = ranks.learner(spec | {"config": spec["config"] | {"optimizer": case.OTHER_OPTIMIZER}})
    second.load(folder)
    steps = case.train(second, spec["data"][2:], [ranks.rank])
    groups = [
        {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for group in second.engine.optimizer.param_groups
    ]
    out = {"steps": steps, "groups": groups, "weights": case.exported(second)}
    second.engine.destroy()
    return out


def _refused(verb: Callable[[], object]) -> str:
    try:
        verb()
    except ValueError as raised:
        return str(raised)
    return "nothing was refused"


def other_layout(ranks: Ranks, spec: dict[str, Any]) -> dict[str, Any]:
    """Saves, then loads with another ZeRO stage."""
    folder = Path(spec["folder"])
    first = ranks.learner(spec)
    first.save(folder)
    first.engine.destroy()
    second = ranks.learner(spec | {"config": {"deepspeed": {"zero_stage": 3}}})
    out = {"refused": _refused(lambda: second.load(folder)), "version": second.policy_version}
    second.engine.destroy()
    return out


def wrong_weights(ranks: Ranks, spec: dict[str, Any]) -> dict[str, Any]:
    """Tries to build a learner from folders whose weights are not those of their config."""
    return {
        name: _refused(partial(ranks.learner, spec | {"model": spec[name]})) for name in ("lacks", "extra")
    }


def broken(ranks: Ranks, spec: dict[str, Any]) -> dict[str, Any]:
    """On one rank a log-prob goes wrong, then a gradient, then the number of micro-batches."""
    learner = ranks.learner(spec)
    mine = list(spec["data"][0].micro_batches[ranks.rank])
    out: dict[str, Any] = {"rollouts": mine[0].rollout_index.tolist()}
    if ranks.rank == 1:
        head = learner.policy.hf.lm_head
        poison = head.register_forward_hook(
            lambda module, inputs, output: (output[0] * float("nan"), output[1])
        )
    for name, batches in {"loss": mine, "count": mine[ranks.rank :]}.items():
        try:
            learner.forward_backward(batches, case.make_spec(spec["data"][0]))
        except (FloatingPointError, ValueError) as raised:
            out[name] = f"{type(raised).__name__}: {raised}"
    if ranks.rank == 1:
        poison.remove()
    learner.engine.destroy()
    learner = ranks.learner(spec)
    poisoned = [ranks.rank == 1]  # a gradient that overflows after a finite loss
    next(p for p in learner.policy.parameters() if p.requires_grad).register_hook(
        lambda g: g * float("nan") if poisoned[0] else g
    )
    own = case.make_spec(spec["data"][0])
    out["weights"] = []
    out["steps"] = []
    for bad in (False, True, False):
        poisoned[0] = bad and ranks.rank == 1
        learner.forward_backward(mine, own)
        out["steps"].append(learner.optim_step())
        out["weights"].append({n: t.clone() for bucket in learner.weights(1 << 20) for n, t in bucket})
    learner.engine.destroy()
    learner = ranks.learner(spec)  # one that never saw it
    for _ in range(2):
        learner.forward_backward(mine, own)
        learner.optim_step()
    out["weights"].append({n: t.clone() for bucket in learner.weights(1 << 20) for n, t in bucket})
    learner.engine.destroy()
    return out


def main(job: dict[str, Any], rank: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    ranks = Ranks(job, rank)
    out = {}
    for name, spec in job["cases"].items():
        print("case", name, flush=True)
        # DeepSpeed collects in every engine: spare it the objects that the libraries' imports left
        # (some import late).
        gc.freeze()
        out[name] = globals()[spec["do"]](ranks, spec)
        gc.collect()
    return out


if __name__ == "__main__":
    import_deepspeed("cpu")
    # DeepSpeed's first engine imports torch's compiler, which takes seconds. The ranks find it imported.
    importlib.import_module("torch._inductor.compile_fx")
    for job, rank in jobs():
        job |= torch.load(Path(job["out"]) / "job.pt", weights_only=False)
        deliver(job, rank, main(job, rank))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
