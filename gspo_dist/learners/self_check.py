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

`properties` measures them. The megatron learner builds a model of its own, so it is asked instead of the
other learners where a run uses it, in a process of its own (`megatron.self_check`): whole, on one rank, with
the layers that megatron-core has for a CPU. How a layout cuts the model and what Transformer Engine's layers
compute on a GPU is not checked before a run; tests/parity has the first.

The result depends on the config, the names in the folder, the learner and the versions of the libraries, and
is kept under their fingerprint. A second run with the same model reads it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gspo_dist.config import RunConfig
from gspo_dist.files import write_text
from gspo_dist.learners.hf_folder import check_loaded
from gspo_dist.learners.megatron import self_check as megatron
from gspo_dist.learners.properties import Finding, check_architecture, guarded
from gspo_dist.models.config_file import read_config
from gspo_dist.models.shape import shape_from_config
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames

log = logging.getLogger(__name__)

REVISION = 3
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
    found = inspect(folder, cache, by_megatron=config.learner.backend == "megatron")
    refuse(found, source, required(config))
    for finding in found.failed(*PROPERTIES):
        log.warning("the run does without %s of %s: %s", finding.property, source, finding.measured)
    return found


def required(config: RunConfig) -> tuple[str, ...]:
    """The properties that a run needs."""
    uses_routes = config.objective.routing_replay != "none" or config.flips.every > 0
    return PROPERTIES if uses_routes else ("alone", "packed", "names")


def inspect(folder: str | Path, cache_dir: Path | None = None, *, by_megatron: bool = False) -> SelfCheck:
    """What the self-check finds of a model folder, whatever it is.

    cache_dir: where results are kept. None: nowhere.
    by_megatron: asks the megatron learner, and not the model that the other two share. Where its process
        does not come to a result, names alone are compared, which is logged and not kept.

    Raises ValueError for a folder that holds no model.
    """
    source = ModelFolder(folder)
    config = read_config(source.path / "config.json")
    kept = None if cache_dir is None else cache_dir / f"{fingerprint(config, source, by_megatron)}.json"
    found = None if kept is None else _read(kept)
    if found is None:
        found = _check(config, source, by_megatron)
        if kept is not None and len(found.findings) > 1:
            _keep(kept, found)
    return found


def fingerprint(config: dict[str, Any], source: ModelFolder, by_megatron: bool = False) -> str:
    """16 hex digits over all that a result depends on."""
    libraries = ("torch", "transformers", *(("megatron-core",) if by_megatron else ()))
    versions = {name: importlib.metadata.version(name) for name in libraries}
    tensors = sorted((name, tensor.shape) for name, tensor in source.tensors.items())
    facts = json.dumps([REVISION, versions, config, tensors], sort_keys=True)
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


def _check(config: dict[str, Any], source: ModelFolder, by_megatron: bool) -> SelfCheck:
    """Runs every check on a miniature of the model, and the names on the model itself
    (without its weights)."""
    started = time.perf_counter()
    shape = shape_from_config(config)
    names = guarded("names", lambda: _names(source))
    if by_megatron:
        found = [names]
        try:
            asked = megatron.findings(config)
            found = [names if f.property == "names" and not names.passed else f for f in asked]
        except RuntimeError as error:
            log.warning("only the names of %s are checked: megatron's process: %s", source.path, error)
    else:
        found = list(check_architecture(config))
        found.insert(2, names)
    return SelfCheck(shape.family, tuple(found), round(time.perf_counter() - started, 2))


def _names(source: ModelFolder) -> tuple[bool, str]:
    """Names and shapes of what a learner streams against the folder's, on a model without memory
    for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    model.tie_weights()
    expected = FileNames(model).expected()
    check_loaded(source.path, expected.keys() - source.tensors.keys(), source.streamed - expected.keys())
    source.check_shapes(expected, "the learner's stream")
    return True, f"{len(expected)} tensors"


def refuse(found: SelfCheck, path: Path, needed: tuple[str, ...]) -> None:
    """Raises ValueError for the first property of `needed` that did not pass."""
    failed = found.failed(*needed)
    if failed:
        first = failed[0]
        raise ValueError(
            f"model.path {path} ({found.family}) fails the self-check {first.property!r} "
            f"({MEANING[first.property]}): {first.measured}; {WAY_OUT[first.property]}"
        )
