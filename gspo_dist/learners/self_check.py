"""What a model must pass before a run: the learner computes what transformers computes, packed or not.

A learner lays sequences end to end, replaces the LM head, and streams weights under the names of the
model folder. Each of these holds for most architectures and fails in silence for some. So each is
tried with numbers on a miniature of the architecture (`models.miniature`), in float32 on the CPU,
before any process starts:

    alone    log-probs of one sequence equal those of transformers' own forward
             (scales after the head, windows, attention sinks, dropout and noise of the training mode)
    packed   log-probs of a sequence do not change when another one lies before it
             (layers with memory, chunked attention)
    names    the weights that the learner streams are those of the model folder, by name and shape
    routes   the experts of every token are recorded; replayed they give the same log-probs, and other
             experts give others

The megatron learner builds a model of its own, so of these only `names` says anything about it. What the
other three would say is tested in tests/parity, for the families that it builds, and not before a run.

The result depends on the config, the names in the folder and the versions of the libraries, and is kept
under their fingerprint. A second run with the same model reads it.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gspo_dist.config import RunConfig
from gspo_dist.files import write_text
from gspo_dist.learners.eager import hf_logprobs
from gspo_dist.learners.hf_model import PolicyModel, load_policy
from gspo_dist.models.config_file import read_config
from gspo_dist.models.miniature import VOCABULARY, miniature
from gspo_dist.models.shape import shape_from_config
from gspo_dist.probes import from_sequences
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import PackedBatch
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames

log = logging.getLogger(__name__)

TOLERANCE = 2e-5
"""Largest |difference| of log-probs in nats. Two ways through float32 differ by about 2e-6; faults by
1e-2 and more."""
LENGTHS = (40, 33)
"""Tokens of the two sequences: longer than a miniature's windows and chunks, and no multiple of them."""
MOST_PARAMETERS = 50_000_000
"""A miniature has about a million. A family whose sizes are not all known is not built in memory."""
REVISION = 2
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
NAMES_ALONE = (
    "the self-check compared names and shapes of %s alone: learner=megatron builds a model of its own, which "
    "tests/parity compares with transformers, and no check before the run does"
)
"""What the log of a run with the megatron learner says."""


@dataclass(frozen=True)
class Finding:
    """What one property came to."""

    property: str
    """One of `PROPERTIES`."""
    passed: bool
    """Whether it holds."""
    measured: str
    """The number or the name that decided."""


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
    found, source = inspect(folder, cache), Path(folder).expanduser()
    refuse(found, source, required(config))
    if config.learner.backend == "megatron":
        log.info(NAMES_ALONE, source)  # the other findings are of a model that this run does not build
        return found
    for finding in found.failed(*PROPERTIES):
        log.warning("the run does without %s of %s: %s", finding.property, source, finding.measured)
    return found


def required(config: RunConfig) -> tuple[str, ...]:
    """The properties that a run needs.

    Megatron builds its own layers, head and routers, for families that it names itself. Of the model folder
    it needs the names alone.
    """
    if config.learner.backend == "megatron":
        return ("names",)
    uses_routes = config.objective.routing_replay != "none" or config.flips.every > 0
    return PROPERTIES if uses_routes else ("alone", "packed", "names")


def inspect(folder: str | Path, cache_dir: Path | None = None) -> SelfCheck:
    """What the self-check finds of a model folder, whatever it is. cache_dir: where results are
    kept; None: nowhere.

    Raises ValueError for a folder that holds no model.
    """
    source = ModelFolder(folder)
    config = read_config(source.path / "config.json")
    kept = None if cache_dir is None else cache_dir / f"{fingerprint(config, source)}.json"
    found = None if kept is None else _read(kept)
    if found is None:
        found = _check(config, source)
        if kept is not None:
            _keep(kept, found)
    return found


def fingerprint(config: dict[str, Any], source: ModelFolder) -> str:
    """16 hex digits over all that a result depends on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
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


def _check(config: dict[str, Any], source: ModelFolder) -> SelfCheck:
    """Runs every check on a miniature of the model, and the names on the model itself
    (without its weights)."""
    started = time.perf_counter()
    shape = shape_from_config(config)
    findings = list(check_architecture(config))
    findings.insert(2, _guarded("names", lambda: _names(source)))
    return SelfCheck(shape.family, tuple(findings), round(time.perf_counter() - started, 2))


def check_architecture(config: dict[str, Any]) -> Iterator[Finding]:
    """The findings that need no weights: alone, packed and (with experts) routes, on a miniature."""
    shape = shape_from_config(config)
    try:
        pair = Pair.of(config)
    except Exception as error:  # whatever a class of transformers raises, the model cannot be checked
        cause = (str(error).splitlines() or [""])[0][:300]
        text = f"it cannot be made or loaded: {type(error).__name__}: {cause}"
        for name in ("alone", "packed", *(("routes",) if shape.moe_layers else ())):
            yield Finding(name, False, text)
        return
    yield _guarded("alone", lambda: _alone(pair))
    yield _guarded("packed", lambda: _difference(pair.packed([1])[0], pair.packed([0, 1])[1]))
    if shape.moe_layers:
        yield _guarded("routes", lambda: _routes(pair))


def _guarded(name: str, check: Callable[[], tuple[bool, str]]) -> Finding:
    """The finding of a check; an exception of the model is a finding as well, never the end of the check."""
    try:
        with torch.no_grad():
            return Finding(name, *check())
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return Finding(name, False, f"{type(error).__name__}: {first[:300]}")


@dataclass
class Pair:
    """One miniature twice, with the same weights: as the learner runs it, and as transformers does."""

    policy: PolicyModel
    """As a run loads it: packed attention, the learner's head, in training mode."""
    original: PreTrainedModel
    """With transformers' own attention and head."""
    sequences: list[np.ndarray]
    """Random tokens, one array per length of `LENGTHS`."""

    @staticmethod
    def of(config: dict[str, Any]) -> Pair:
        """Builds both from the config of a model of any size. Raises whatever transformers raises."""
        with torch.random.fork_rng(devices=[]), _one_thread():
            torch.manual_seed(0)
            small = small_config(config)
            _check_small(small)
            original = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            spread(original)
            policy = _as_a_run_loads(original)
        random = np.random.default_rng(0)
        sequences = [random.integers(1, min(VOCABULARY, _vocabulary(small)), n) for n in LENGTHS]
        return Pair(policy, original, sequences)

    def batch(self, which: list[int], routing: RoutingTrace | None = None) -> PackedBatch:
        """These sequences in one packed batch, every token but the first marked."""
        [[batch]] = from_sequences([(self.sequences[i], 1) for i in which], replicas=1)
        return batch.with_(routing=routing)

    def packed(self, which: list[int]) -> list[torch.Tensor]:
        """The learner's log-probs [length - 1] of each sequence, laid end to end in this order."""
        return self.by_sequence(self.batch(which))

    def by_sequence(self, batch: PackedBatch) -> list[torch.Tensor]:
        """The learner's log-probs of a batch, one tensor per sequence, in the order of the call."""
        device = torch.device("cpu")
        out = hf_logprobs(self.policy, self.policy.hf, batch, device, record_routing=False).logprobs
        parts = {}
        for row, index in enumerate(batch.rollout_index.tolist()):
            rows = batch.rows(row)
            parts[index] = out[rows][batch.loss_mask[rows]]
        return [parts[i] for i in sorted(parts)]

    def reference(self, which: int) -> torch.Tensor:
        """Log-probs [length - 1] of one sequence by transformers' own forward."""
        tokens = torch.from_numpy(self.sequences[which])
        logits = self.original(tokens[None], use_cache=False).logits[0].float()
        return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]


def _as_a_run_loads(original: PreTrainedModel) -> PolicyModel:
    """The learner's policy from a folder with these weights, by the loader that every run uses."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "miniature"
        original.save_pretrained(folder)
        (folder / "tokenizer.json").touch()  # a model folder has one; nothing here reads it
        return load_policy(folder, "fp32")


def small_config(config: dict[str, Any]) -> PretrainedConfig:
    """The miniature's config as transformers reads it from a file, which is how it reads every model's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(miniature(config)))
        return AutoConfig.from_pretrained(folder)


def _check_small(config: PretrainedConfig) -> None:
    """ValueError where the config has a size that `miniature` does not know, so that the
    model stays large."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"it would have {parameters:,} parameters")


def _vocabulary(config: PretrainedConfig) -> int:
    return int(config.get_text_config().vocab_size)


def spread(model: nn.Module) -> None:
    """Weights wide enough that every layer moves the logits; transformers' 0.02 would hide a fault
    in a miniature."""
    for name, parameter in model.named_parameters():
        expert = _routed(name)
        if parameter.dim() > 1 and (
            expert or name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight"))
        ):
            fan_in = parameter.shape[-1]
            nn.init.normal_(parameter, 0.0, 1.0 if "embed" in name else fan_in**-0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, 0.0, 0.2)


def _routed(name: str) -> bool:
    """Whether a parameter belongs to experts or their router."""
    return "experts" in name or ".gate." in name or ".router." in name


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small are slower with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _difference(expected: torch.Tensor, got: torch.Tensor) -> tuple[bool, str]:
    """Whether two [N] log-probs agree, and by how much they differ at most."""
    largest = float((expected - got).abs().max())
    return largest <= TOLERANCE, f"log-probs differ by up to {largest:.1e} nats"


def _alone(pair: Pair) -> tuple[bool, str]:
    """The learner against transformers' forward; before that, the learner against itself, so that noise is
    named as such."""
    first, again = pair.packed([1])[0], pair.packed([1])[0]
    repeats, measured = _difference(first, again)
    if not repeats:
        return False, (
            "the model draws random numbers in training (set its dropout and router noise to 0 in "
            f"config.json): in two passes over the same tokens {measured}"
        )
    return _difference(pair.reference(1), first)


def _names(source: ModelFolder) -> tuple[bool, str]:
    """Names and shapes of what a learner streams against the folder's, on a model without memory
    for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    model.tie_weights()
    expected = FileNames(model).expected()
    source.check_shapes(expected, "the learner's stream")
    source.check_whole(expected, "the learner's stream")
    return True, f"{len(expected)} tensors"


def _routes(pair: Pair) -> tuple[bool, str]:
    """Recorded experts, replayed, give the same log-probs; other experts give others."""
    batch = pair.batch([0, 1])
    native = pair.by_sequence(batch)
    device = torch.device("cpu")
    recorded = hf_logprobs(pair.policy, pair.policy.hf, batch, device, record_routing=True).routing
    assert recorded is not None  # hf_logprobs records what it is told to
    again = pair.by_sequence(pair.batch([0, 1], recorded))
    same, measured = _difference(torch.cat(native), torch.cat(again))
    if not same:
        return False, f"replayed {measured}"
    shifted = (recorded.expert_ids.astype(np.int64) + 1) % recorded.num_experts
    other = RoutingTrace(shifted.astype(recorded.expert_ids.dtype), recorded.known, recorded.num_experts)
    moved = pair.by_sequence(pair.batch([0, 1], other))
    change = float((torch.cat(native) - torch.cat(moved)).abs().max())
    if change <= TOLERANCE:
        return False, "other experts, replayed, change no log-prob"
    return True, f"replayed {measured}"


def refuse(found: SelfCheck, path: Path, needed: tuple[str, ...]) -> None:
    """Raises ValueError for the first property of `needed` that did not pass."""
    failed = found.failed(*needed)
    if failed:
        first = failed[0]
        raise ValueError(
            f"model.path {path} ({found.family}) fails the self-check {first.property!r} "
            f"({MEANING[first.property]}): {first.measured}; {WAY_OUT[first.property]}"
        )
