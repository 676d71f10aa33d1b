"""The properties that the self-check tries with numbers, on a miniature of a model's architecture.

A learner is compared with transformers' own forward over the same weights and the same random tokens, in
float32 on the CPU. What a learner is does not matter here: a `Pair` asks it for log-probs of packed batches.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gspo_dist.learners.eager import hf_logprobs
from gspo_dist.learners.hf_model import load_policy
from gspo_dist.models.config_file import text_config
from gspo_dist.models.miniature import VOCABULARY, miniature
from gspo_dist.models.shape import shape_from_config
from gspo_dist.probes import from_sequences
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import LogprobOutput, PackedBatch
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.stream import NamedTensor

TOLERANCE = 1e-4
"""Largest |difference| of log-probs in nats. Two ways through float32 differ by about 2e-6, and by 3e-5 at
most over all families; faults by 1e-2 and more."""
LENGTHS = (40, 33)
"""Tokens of the two sequences: longer than a miniature's windows and chunks, and no multiple of them."""
MOST_PARAMETERS = 50_000_000
"""A miniature has about a million. A family whose sizes are not all known is not built in memory."""

Ask = Callable[[PackedBatch, bool], LogprobOutput]
"""A learner: (batch, whether to record routes) -> log-probs, replaying the batch's routes if it has some."""


@dataclass(frozen=True)
class Finding:
    """What one property came to."""

    property: str
    """One of alone, packed, names, routes; engine, where an engine was asked (trainer/setup/engine_check)."""
    passed: bool
    """Whether it holds."""
    measured: str
    """The number or the name that decided."""


def check_architecture(
    config: dict[str, Any], learner: Callable[[PreTrainedModel], Ask] | None = None
) -> Iterator[Finding]:
    """The findings that need no weights: alone, packed and (with experts) routes, on a miniature.

    learner: makes the learner of a miniature that transformers has built. None: the eager learner's model.
    """
    shape = shape_from_config(config)
    try:
        pair = Pair.of(config, learner or _eager)
    except Exception as error:  # whatever a class of transformers raises, the model cannot be checked
        cause = (str(error).splitlines() or [""])[0][:300]
        text = f"it cannot be made or loaded: {type(error).__name__}: {cause}"
        for name in ("alone", "packed", *(("routes",) if shape.moe_layers else ())):
            yield Finding(name, False, text)
        return
    yield guarded("alone", lambda: _alone(pair))
    yield guarded("packed", lambda: _difference(pair.packed([1])[0], pair.packed([0, 1])[1]))
    if shape.moe_layers:
        yield guarded("routes", lambda: _routes(pair))


def guarded(name: str, check: Callable[[], tuple[bool, str]]) -> Finding:
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

    ask: Ask
    """The learner, as a run loads it."""
    original: PreTrainedModel
    """With transformers' own attention and head."""
    sequences: list[np.ndarray]
    """Random tokens, one array per length of `LENGTHS`."""

    @staticmethod
    def of(config: dict[str, Any], learner: Callable[[PreTrainedModel], Ask]) -> Pair:
        """Builds both from the config of a model of any size.

        Raises whatever transformers or the learner raises.
        """
        with torch.random.fork_rng(devices=[]), _one_thread():
            torch.manual_seed(0)
            small = small_config(config)
            _check_small(small)
            original = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            spread(original)
            ask = learner(original)
        random = np.random.default_rng(0)
        sequences = [random.integers(1, min(VOCABULARY, _vocabulary(small)), n) for n in LENGTHS]
        return Pair(ask, original, sequences)

    def batch(self, which: list[int], routing: RoutingTrace | None = None) -> PackedBatch:
        """These sequences in one packed batch, every token but the first marked."""
        sequences = [(self.sequences[i], 1) for i in which]
        # All of them in one pass: whether neighbours in a pass matter is what is checked.
        [[batch]] = from_sequences(sequences, replicas=1, token_budget=sum(LENGTHS))
        return batch.with_(routing=routing)

    def packed(self, which: list[int]) -> list[torch.Tensor]:
        """The learner's log-probs [length - 1] of each sequence, laid end to end in this order."""
        return self.by_sequence(self.batch(which))

    def by_sequence(self, batch: PackedBatch) -> list[torch.Tensor]:
        """The learner's log-probs of a batch, one tensor per sequence, in the order of the call."""
        out = self.ask(batch, False).logprobs
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


def _eager(original: PreTrainedModel) -> Ask:
    """The policy of the eager and the DeepSpeed learner from a folder with these weights, by the loader
    that every run uses: packed attention, the learner's head, in training mode.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "miniature"
        save_miniature(original, folder)
        policy = load_policy(folder, "fp32")
    device = torch.device("cpu")
    return lambda batch, record: hf_logprobs(policy, policy.hf, batch, device, record)


def save_miniature(original: PreTrainedModel, folder: Path) -> None:
    """Writes a miniature as a model folder."""
    original.save_pretrained(folder)
    (folder / "tokenizer.json").touch()  # a model folder has one; nothing here reads it


def small_config(config: dict[str, Any], keep: Sequence[str] = ()) -> PretrainedConfig:
    """The miniature's config as transformers reads it from a file, which is how it reads every model's.

    keep: sizes that stay as the model has them, where it has them.
    """
    kept = {key: size for key, size in text_config(config).items() if key in keep}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(miniature(config) | kept))
        return AutoConfig.from_pretrained(folder)


def _check_small(config: PretrainedConfig) -> None:
    """ValueError where the miniature is still large: the config has a size that `miniature` does not know."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"it would have {parameters:,} parameters")


def _vocabulary(config: PretrainedConfig) -> int:
    return int(config.get_text_config().vocab_size)


def spread(model: PreTrainedModel) -> None:
    """Weights wide enough that every layer moves the logits. Transformers' 0.02 would hide a fault.

    An embedding that is the head too stays as narrow as a head, since logits of tens of nats would be rounded
    too coarsely to compare.
    """
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        expert = _routed(name)
        if parameter.dim() > 1 and (
            expert or name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight"))
        ):
            fan_in = parameter.shape[-1]
            wide = "embed" in name and (head is None or parameter is not head.weight)
            nn.init.normal_(parameter, 0.0, 1.0 if wide else fan_in**-0.5)
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
    """The learner against itself, so that noise is named as such, and then against transformers' forward."""
    first, again = pair.packed([1])[0], pair.packed([1])[0]
    repeats, measured = _difference(first, again)
    if not repeats:
        return False, (
            "the model draws random numbers in training (set its dropout and router noise to 0 in "
            f"config.json): in two passes over the same tokens {measured}"
        )
    return _difference(pair.reference(1), first)


def _routes(pair: Pair) -> tuple[bool, str]:
    """Recorded experts, replayed, give the same log-probs; other experts give others."""
    batch = pair.batch([0, 1])
    native = pair.by_sequence(batch)
    recorded = pair.ask(batch, True).routing
    assert recorded is not None  # a learner records what it is told to
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


def streams(folder: Path, weights: Iterable[NamedTensor]) -> tuple[bool, str]:
    """Whether `weights` are the tensors that a learner of `folder` has to bring, bit for bit.

    Raises WeightSyncError for a tensor that is missing, or has another name or shape.
    """
    source, streamed = ModelFolder(folder), dict(weights)
    source.check_shapes({name: tuple(t.shape) for name, t in streamed.items()}, "the learner's stream")
    source.check_whole(streamed, "the learner's stream")
    other = [name for name, tensor in streamed.items() if not torch.equal(tensor, source.read(name))]
    if other:
        return False, f"{other[0]} leaves the learner with other values ({len(other)} such)"
    return True, f"{len(streamed)} tensors of a miniature, bit for bit"
