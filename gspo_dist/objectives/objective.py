"""Objectives by name: the surrogate, the aggregation it owns, its defaults; and the loss that a learner
calls."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gspo_dist.checks import choose
from gspo_dist.metrics.stat import Stat
from gspo_dist.objectives import legality, losses, specs
from gspo_dist.objectives.aggregate import AGGREGATE, Denominators, Segments
from gspo_dist.objectives.kl import KL
from gspo_dist.objectives.losses import Surrogate


@dataclass(frozen=True, eq=False)
class ObjectiveResult:
    """loss: this call's share of the mini-batch loss, a scalar to call backward on; stats: name -> Stat."""

    loss: Tensor
    stats: dict[str, Stat]


@dataclass(frozen=True)
class Objective:
    """A surrogate with the aggregation it owns.

    advantage: the estimator it was published with; defaults: parameters of the surrogate and their values;
    sequence_level: the clipped ratio is the sequence's; params: overrides, normally made by `get_objective`.
    """

    name: str
    surrogate: Callable[..., Surrogate]
    aggregation: str
    advantage: str = "group_std"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sequence_level: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    kl_coef: float = 0.0
    kl_estimator: str = "k3"

    def __post_init__(self) -> None:
        choose(f"objective {self.name}: aggregation", self.aggregation, specs.AGGREGATIONS)
        choose(f"objective {self.name}: advantage", self.advantage, specs.ADVANTAGES)
        choose(f"objective {self.name}: kl_estimator", self.kl_estimator, specs.KL_ESTIMATORS)
        if not (isinstance(self.kl_coef, (int, float)) and 0 <= self.kl_coef < math.inf):
            raise ValueError(
                f"objective {self.name}: kl_coef must be a finite number >= 0: got {self.kl_coef!r}"
            )
        specs.resolve_params(f"objective {self.name}", self.defaults, self.params)

    @property
    def resolved(self) -> dict[str, Any]:
        """The parameters in force."""
        return {**self.defaults, **self.params}

    def loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        segments: Segments,
        denominators: Denominators,
        *,
        ref_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
        keep: Tensor | None = None,
        offset: float | None = None,
    ) -> ObjectiveResult:
        """This rank's and micro-batch's share of: aggregate(weights * keep * surrogate) + kl_coef *
        aggregate(KL).

        All tensors [N]; only logprobs gets a gradient. weights: importance corrections; keep: bool, False
        gives a token no policy loss (denominators stay). offset: subtracted from every log ratio
        (old_logprobs + offset). The KL term against ref_logprobs is neither weighted nor masked.
        ValueError names the argument that has a wrong shape, type, or a number that is not finite.
        """
        old, advantages = old_logprobs.detach(), advantages.detach()
        _check_inputs(segments, logprobs, old, advantages, ref_logprobs, weights, keep, offset)
        if self.kl_coef > 0 and ref_logprobs is None:
            raise ValueError(
                f"objective {self.name}: ref_logprobs are needed with kl_coef={self.kl_coef}: got None"
            )
        centred = old if not offset else old + offset
        surrogate = self.surrogate(logprobs, centred, advantages, segments, **self.resolved)
        per_token = surrogate.loss
        if weights is not None:
            per_token = per_token * weights.detach().to(per_token.dtype)
        if keep is not None:
            per_token = per_token.masked_fill(~keep, 0.0)
        aggregate = AGGREGATE[self.aggregation]
        policy_loss = loss = aggregate(per_token, segments, denominators)
        stats = _stats(surrogate, logprobs.detach() - old, advantages, segments, weights, keep, offset)
        if ref_logprobs is not None:
            kl = KL[self.kl_estimator](logprobs, ref_logprobs.detach())
            stats["objective/kl_reference"] = Stat.mean(kl)
            if self.kl_coef > 0:
                kl_loss = self.kl_coef * aggregate(kl, segments, denominators)
                loss = policy_loss + kl_loss
                stats["objective/kl_loss"] = Stat.sum(kl_loss)
        stats["objective/policy_loss"], stats["objective/loss"] = Stat.sum(policy_loss), Stat.sum(loss)
        return ObjectiveResult(loss, stats)


def _check_inputs(
    segments: Segments, logprobs: Tensor, old: Tensor, advantages: Tensor,
    ref: Tensor | None, weights: Tensor | None, keep: Tensor | None, offset: float | None,
) -> None:  # fmt: skip
    """Shapes, types and finiteness, with one synchronisation of the device."""
    numbers = {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages}
    numbers.update({k: v for k, v in (("ref_logprobs", ref), ("weights", weights)) if v is not None})
    for name, x in numbers.items():
        segments.check(x, name)
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64, sums in less lose the clip width: got {x.dtype}"
            )
    if keep is not None:
        segments.check(keep, "keep")
        if keep.dtype != torch.bool:
            raise ValueError(f"keep must be bool, True = counts: got {keep.dtype}")
    if offset is not None and not math.isfinite(offset):
        raise ValueError(f"offset must be a finite number: got {offset}")
    # A sum is finite only if all its terms are, and costs a fortieth of testing each; the exact test follows
    # it.
    sums = torch.stack([x.detach().sum().double() for x in numbers.values()]).isfinite().tolist()
    for name, finite in zip(numbers, sums, strict=True):
        broken = [] if finite else (~torch.isfinite(numbers[name])).nonzero().flatten().tolist()
        if broken:
            at = broken[0]
            raise ValueError(
                f"{name} must be finite: got {float(numbers[name][at])} at token {at} of sequence "
                f"{int(segments.ids[at])}; -inf means that the token was cut away by top-k or top-p"
            )


@torch.no_grad()
def _stats(
    surrogate: Surrogate, log_ratio: Tensor, advantages: Tensor, segments: Segments,
    weights: Tensor | None, keep: Tensor | None, offset: float | None,
) -> dict[str, Stat]:  # fmt: skip
    """What the loss saw. log_ratio is raw (the offset is not taken out); ratio_* are those that were clipped.

    sequence_*: mean over sequences of the mean over their tokens; a rank that holds a part of a sequence
    counts that part, so the sums are exact under any layout.
    """
    clipped = surrogate.clipped_low | surrogate.clipped_high
    positive, negative = advantages > 0, advantages < 0
    share = segments.expand(1.0 / segments.lengths.to(log_ratio.dtype))
    sequence_log_ratio = segments.expand(segments.mean(log_ratio))
    stats = {
        "objective/clip_fraction": Stat.mean(clipped),
        "objective/clip_fraction_low": Stat.mean(surrogate.clipped_low),
        "objective/clip_fraction_high": Stat.mean(surrogate.clipped_high),
        "objective/clip_fraction_positive": Stat.mean(clipped, positive),
        "objective/clip_fraction_negative": Stat.mean(clipped, negative),
        "objective/sequence_clip_fraction": Stat.mean(clipped, share),
        "objective/sequence_clip_fraction_positive": Stat.mean(clipped, share * positive),
        "objective/sequence_clip_fraction_negative": Stat.mean(clipped, share * negative),
        "objective/approx_kl_k1": Stat.mean(-log_ratio),
        "objective/approx_kl_k3": Stat.mean(log_ratio.clamp(max=20.0).expm1() - log_ratio),
        "objective/ratio_mean": Stat.mean(surrogate.ratio),
        "objective/ratio_min": Stat.min(surrogate.ratio),
        "objective/ratio_max": Stat.max(surrogate.ratio),
        "objective/sequence_log_ratio_mean": Stat.mean(sequence_log_ratio, share),
        "objective/sequence_log_ratio_square": Stat.mean(sequence_log_ratio.double().square(), share),
        "objective/advantage_mean": Stat.mean(advantages),
        "objective/tokens": Stat.sum(torch.ones_like(log_ratio)),
        "objective/sequences": Stat.sum(share),
        "values/sequence_log_ratio": Stat.concat(segments.mean(log_ratio)),
    }
    if weights is not None:
        stats["objective/correction_weight_mean"] = Stat.mean(weights)
    if keep is not None:
        stats["objective/correction_keep_fraction"] = Stat.mean(keep)
    if offset is not None:
        stats["objective/offset"] = Stat.mean(torch.full_like(log_ratio, offset))
    return stats


def sequence_log_ratio_std(stats: Mapping[str, Stat]) -> float:
    """Standard deviation over sequences of the mean log ratio, from merged stats of `Objective.loss`."""
    mean = stats["objective/sequence_log_ratio_mean"].result()
    return math.sqrt(max(stats["objective/sequence_log_ratio_square"].result() - mean * mean, 0.0))


OBJECTIVES: dict[str, Objective] = {
    spec.name: Objective(
        spec.name,
        getattr(losses, spec.name),
        spec.aggregation,
        spec.advantage,
        spec.defaults,
        spec.sequence_level,
    )
    for spec in specs.OBJECTIVE_SPECS.values()
}


def get_objective(
    name: str,
    *,
    aggregation: str | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    allow_wide_clip: bool = False,
    **params: object,
) -> Objective:
    """The objective `name`, bound to `params` and checked before anything heavy starts.

    name: one of OBJECTIVES, or the import path of a user's own, "package.module:NAME": an Objective, or a
    function with the signature of those in `policy` (its keyword-only arguments are the parameters; give
    `aggregation` too). ValueError: unknown name or parameter, a clip that is negative or the wrong way round,
    an aggregation that changes the objective's meaning, a token-sized clip on a sequence ratio (unless
    allow_wide_clip).
    """
    base = _import_objective(name, aggregation) if ":" in str(name) else None
    if base is None:
        base = OBJECTIVES[choose("objective", name, OBJECTIVES)]
    spec = specs.OBJECTIVE_SPECS.get(name)
    owner = f"objective {name}"
    resolved = specs.resolve_params(owner, base.defaults, {**base.params, **params})
    specs.check_params(owner, resolved, clip=spec.clip if spec else "ratio")
    legality.check_clip_and_aggregation(
        name, base.sequence_level, aggregation or base.aggregation,
        resolved.get("clip_low"), resolved.get("clip_high"), allow_wide_clip=allow_wide_clip,
    )  # fmt: skip
    return replace(
        base,
        aggregation=aggregation or base.aggregation,
        params=resolved,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )


def _import_objective(path: str, aggregation: str | None) -> Objective:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"objective must import as package.module:NAME: got {path!r} ({error})") from error
    if isinstance(found, Objective):
        return found
    keywords = [p for p in _parameters(path, found) if p.kind is p.KEYWORD_ONLY]
    if aggregation is None:
        raise ValueError(
            f"objective {path} is a bare function and owns no aggregation: give aggregation="
            f"{'|'.join(specs.AGGREGATIONS)}, or name an Objective"
        )
    for parameter in keywords:
        if parameter.default is parameter.empty:
            raise ValueError(f"objective {path}: parameter {parameter.name!r} needs a default")
    return Objective(path, found, aggregation, defaults={p.name: p.default for p in keywords})


def _parameters(path: str, found: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(found).parameters.values())
    except TypeError as error:
        raise ValueError(f"objective {path} must be an Objective or a function: got {found!r}") from error
