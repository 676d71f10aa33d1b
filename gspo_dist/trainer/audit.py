"""`gspo audit RUN`: whether engine and learner give a run's model the same log-probs, and where they part."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch

from gspo_dist.checkpoint import CheckpointStore
from gspo_dist.coldstart.make import ensure_model
from gspo_dist.config import RunConfig
from gspo_dist.data.prompts import load_prompts
from gspo_dist.learners.exact.audit import (
    Difference,
    catching_engine,
    catching_learner,
    first_difference,
)
from gspo_dist.learners.hf_model import PolicyModel, load_policy
from gspo_dist.rollout.vllm.engine import VllmEngine
from gspo_dist.trainer.export import export_run, run_config_of
from gspo_dist.trainer.setup.checks import load_tokenizer
from gspo_dist.trainer.setup.factories import engine_factory, sampling_spec
from gspo_dist.types import Completion, Prompt


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    tokens: int
    """Completion tokens that were compared."""
    equal: int
    """Those with the same log-prob, bit for bit."""
    largest: float
    """Largest |difference| in nats."""
    prefilled: bool
    """Whether the engine gave the first sequence that differs the same log-probs when it read it at once."""
    difference: Difference | None
    """Where the two part on that sequence; None where nothing differs."""

    def __str__(self) -> str:
        said = f"{self.equal} of {self.tokens} tokens have the same log-prob on both sides"
        if self.equal == self.tokens:
            return said
        said += f", the others differ by up to {self.largest:.3g} nats"
        if not self.prefilled:
            said += (
                "; the engine itself gives other log-probs when it reads the sequence at once, so that its "
                "kernels depend on how many tokens run"
            )
        where = self.difference or "no operator differs before the head: it is the head or the sampler"
        return f"{said}\nthe first operator that differs: {where}"


def audit_run(run_dir: Path, sequences: int) -> Audit:
    """Samples from the newest checkpoint (the model it started from where there is none) and compares.

    Engine and learner are made as the run's configuration says, in this process. ValueError: no run folder,
    or a run whose engine is not vLLM.
    """
    config = run_config_of(run_dir)
    if config.rollout.engine != "vllm":
        raise ValueError(
            f"gspo audit compares vLLM with the learner: got rollout.engine {config.rollout.engine!r}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(ensure_model(config.model))
        if CheckpointStore(run_dir, config.checkpoint.keep).newest() is not None:
            folder = Path(scratch) / "model"
            export_run(run_dir, folder, probe=False)  # the audit itself compares the folder with the engine
        return audit_folder(folder, config, sequences)


def audit_folder(folder: Path, config: RunConfig, sequences: int) -> Audit:
    """The same for a model folder and a configuration."""
    tokenizer = load_tokenizer(str(folder))
    source = load_prompts(
        config.data, "train", tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens, seed=config.seed
    )
    prompts = list(islice(source, sequences))
    policy = load_policy(
        folder,
        config.learner.precision,
        temperature=config.rollout.temperature,
        fp32_head=config.learner.fp32_head,
        consistency=config.learner.consistency,
    )
    alone = replace(config, cluster=replace(config.cluster, colocated=False))  # it never has to sleep
    engine = engine_factory(alone, str(folder), "cpu", 0)(name="audit")
    try:
        spec = sampling_spec(config, tokenizer, engine.info())
        spec = replace(spec, n=1, record_routing=False, candidates=0)
        groups = engine.generate(prompts, spec, range(len(prompts)))
        return compare(cast(VllmEngine, engine), policy, prompts, [group[0] for group in groups])
    finally:
        engine.close()


def compare(
    engine: VllmEngine, policy: PolicyModel, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Audit:
    """Compares the recorded log-probs with the learner's, and audits the first sequence that differs."""
    tokens = equal = 0
    largest, prefilled, difference = 0.0, True, None
    for prompt, completion in zip(prompts, completions, strict=True):
        sequence = np.concatenate([prompt.token_ids, completion.token_ids])
        first = len(prompt.token_ids)
        ours = learner_logprobs(policy, sequence)[first - 1 :]
        same = ours == completion.logprobs
        tokens, equal = tokens + len(same), equal + int(same.sum())
        if same.all():
            continue
        largest = max(largest, float(np.abs(ours.astype(np.float64) - completion.logprobs).max()))
        if difference is None:
            with catching_engine(engine.model) as theirs:
                read = engine.logprobs_of([sequence])[0][first - 1 :]
            with catching_learner(policy.hf) as caught:
                learner_logprobs(policy, sequence)
            prefilled = bool((read == completion.logprobs).all())
            difference = first_difference({name: t[: len(sequence)] for name, t in theirs.items()}, caught)
    return Audit(tokens, equal, largest, prefilled, difference)


@torch.no_grad()
def learner_logprobs(policy: PolicyModel, sequence: np.ndarray) -> np.ndarray:
    """[len - 1] of every token but the first."""
    device = next(policy.parameters()).device
    ids = torch.from_numpy(sequence).long().to(device)
    logprobs, _ = policy(
        token_ids=ids,
        position_ids=torch.arange(len(ids), device=device),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
        index=torch.arange(1, len(ids), device=device),
    )
    return logprobs.cpu().numpy()
