"""What a model must pass before a run: the learner computes what transformers computes, packed or not.

A learner lays sequences end to end, replaces the LM head, and streams weights under the names of the
model folder. Each of these holds for most architectures and fails in silence for some. So before any process
starts each is tried with numbers, on a miniature of the architecture (`models.miniature`), in float32 on the
CPU:

    alone    log-probs of one sequence equal those of transformers' own forward
             (scales after the head, windows, attention sinks, dropout and noise of the training mode)
    packed   log-probs of a sequence do not change when another one lies before it
             (layers with memory, chunked attention)
    names    the weights that the learner streams are those of the model folder, by name and shape
    routes   the experts of every token are recorded. Replayed they give the same log-probs, and other
             experts give others

`properties` measures them. Eager and DeepSpeed up to ZeRO 2 share a model, and one check serves both. ZeRO 3
and the megatron learner build models of their own, so where a run uses one of them it is asked instead, in a
process of its own (`own_process`): on one rank, with layers for a CPU. How a layout cuts the model and what
Transformer Engine's layers compute on a GPU is not checked before a run; tests/parity has the first.

Names and shapes are compared for the whole model (`stream_names`), before a weight is read.

The result depends on the config, the names in the folder, the learner and the versions of the libraries, and
is kept under their fingerprint. A second run with the same model reads it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gspo_dist.config import LearnerConfig, RunConfig
from gspo_dist.files import write_text
from gspo_dist.learners import own_process, stream_names
from gspo_dist.learners.properties import Finding, check_architecture, guarded
from gspo_dist.models.config_file import read_config
from gspo_dist.models.shape import shape_from_config
from gspo_dist.weights.folder import ModelFolder

log = logging.getLogger(__name__)

REVISION = 4
"""Raised when the check itself changes, so that results of an older one are not read."""
PROPERTIES = ("alone", "packed", "names", "routes")
"""What is checked, in this order."""

MEANING = {
    "alone": "the learner's log-probs of one sequence are those of transformers",
    "packed": "a sequence's log-probs do not depend on what is packed before it",
    "names": "the learner streams the tensors of the model folder",
    "routes": "experts can be recorded and replayed",
}
"""Property -> what holds where it passes."""
_OTHER = (
    "use a model of a family that passes (benchmarks/reports/models.md), or set model.self_check=false and "
    "answer for the result"
)
WAY_OUT = {
    "alone": f"mostly a head or an attention that the learner does not have; {_OTHER}",
    "packed": f"layers of this family carry something from one sequence into the next; {_OTHER}",
    "names": f"engines and exports would get other weights; copy the folder again, or {_OTHER}",
    "routes": "set objective.routing_replay=none and flips.every=0",
}
"""Property -> what to do where it fails."""


Kind = Literal["loaded", "autoep", "zero3", "megatron"]
"""Which learner is asked. loaded: the model that transformers loads, of eager and ZeRO 0 to 2. autoep: the
same with experts spread over ranks, whose weights leave under other names."""
MODULES: dict[Kind, str] = {
    "zero3": "gspo_dist.learners.deepspeed.self_check",
    "megatron": "gspo_dist.learners.megatron.self_check",
}
"""The learners that are asked in a process of their own, and by which program."""


def kind_of(learner: LearnerConfig) -> Kind:
    """Which learner a run has to ask."""
    if learner.backend == "megatron":
        return "megatron"
    if learner.backend == "deepspeed" and learner.deepspeed.zero_stage == 3:
        return "zero3"
    return "autoep" if learner.backend == "deepspeed" and learner.deepspeed.expert_parallel > 1 else "loaded"


@dataclass(frozen=True)
class SelfCheck:
    """The result for one model folder."""

    family: str
    """`model_type` of the language model."""
    findings: tuple[Finding, ...]
    """One per property, in the order of `PROPERTIES`; without `routes` for a dense model."""
    seconds: float
    """What the check took when it was made."""

    def failed(self, *properties: str) -> tuple[Finding, ...]:
        """The findings of these properties that did not pass."""
        return tuple(f for f in self.findings if not f.passed and f.property in properties)


def check_model_numerically(folder: str | Path, config: RunConfig) -> SelfCheck:
    """Checks the model of a run, or reads what an earlier check of the same model found.

    Results are kept in `self_check` below model.cache_dir. Raises ValueError for a property that the run
    needs and the model lacks: it names the property, what was measured, and the way out. May be called
    again at any time.
    """
    cache = Path(config.model.cache_dir).expanduser() / "self_check"
    source = Path(folder).expanduser()
    found = inspect(folder, cache, kind=kind_of(config.learner))
    refuse(found, source, required(config))
    for finding in found.failed(*PROPERTIES):
        log.warning("the run does without %s of %s: %s", finding.property, source, finding.measured)
    return found


def required(config: RunConfig) -> tuple[str, ...]:
    """The properties that a run needs."""
    uses_routes = config.objective.routing_replay != "none" or config.flips.every > 0
    return PROPERTIES if uses_routes else ("alone", "packed", "names")


def inspect(folder: str | Path, cache_dir: Path | None = None, *, kind: Kind = "loaded") -> SelfCheck:
    """What the self-check finds of a model folder, whatever it is.

    cache_dir: where results are kept. None: nowhere.
    kind: which learner is asked. Where its process does not come to a result, names alone are compared,
        which is logged and not kept.

    Raises ValueError for a folder that holds no model.
    """
    source = ModelFolder(folder)
    config = read_config(source.path / "config.json")
    kept = None if cache_dir is None else cache_dir / f"{fingerprint(config, source, kind)}.json"
    return remember(kept, lambda: _check(config, source, kind), least=2)


def remember(kept: Path | None, check: Callable[[], SelfCheck], *, least: int) -> SelfCheck:
    """The result in a file, or that of `check`, which is written there if it has `least` findings or more."""
    found = None if kept is None else _read(kept)
    if found is None:
        found = check()
        if kept is not None and len(found.findings) >= least:
            _keep(kept, found)
    return found


def fingerprint(config: dict[str, Any], source: ModelFolder, kind: Kind = "loaded") -> str:
    """16 hex digits over all that a result depends on."""
    more = {"megatron": ("megatron-core",), "zero3": ("deepspeed",)}.get(kind, ())
    libraries = ("torch", "transformers", *more)
    versions = {name: importlib.metadata.version(name) for name in libraries}
    tensors = sorted((name, tensor.shape) for name, tensor in source.tensors.items())
    facts = json.dumps([REVISION, kind, versions, config, tensors, source.tied], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _read(path: Path) -> SelfCheck | None:
    """A kept result; None where there is none, or a torn one."""
    try:
        kept = json.loads(path.read_text())
        return SelfCheck(kept["family"], tuple(Finding(**f) for f in kept["findings"]), kept["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, found: SelfCheck) -> None:
    """Writes a result. A cache that cannot be written costs the next run a second and stops none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(found), indent=2) + "\n")
    except OSError as error:
        log.warning("the result of the model's self-check is not kept: %s", error)


def _check(config: dict[str, Any], source: ModelFolder, kind: Kind) -> SelfCheck:
    """Runs every check on a miniature of the model, and the names on the model itself
    (without its weights)."""
    started = time.perf_counter()
    shape = shape_from_config(config)
    names = guarded("names", lambda: _names(source, kind))
    if kind in MODULES:
        found = [names]
        try:
            found = own_process.ask(MODULES[kind], config, source.path)
        except RuntimeError as error:
            log.warning("only the names of %s are checked: %s's process: %s", source.path, kind, error)
    else:
        found = list(check_architecture(config))
        found.insert(2, names)
    return SelfCheck(shape.family, tuple(found), round(time.perf_counter() - started, 2))


def _names(source: ModelFolder, kind: Kind) -> tuple[bool, str]:
    """Names and shapes of what a learner streams against the folder's."""
    if kind == "loaded":
        return stream_names.check_names(source, stream_names.of_loaded_model(source))
    return stream_names.check_names(source, stream_names.of_family(source))


def refuse(found: SelfCheck, path: Path, needed: tuple[str, ...]) -> None:
    """Raises ValueError for the first property of `needed` that did not pass."""
    failed = found.failed(*needed)
    if failed:
        first = failed[0]
        raise ValueError(
            f"model.path {path} ({found.family}) fails the self-check {first.property!r} "
            f"({MEANING[first.property]}): {first.measured}; {WAY_OUT[first.property]}"
        )
