"""What an audit of a run compares: the newest checkpoint, with engine and learner as the run has them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo_dist.config.mapping import to_mapping
from gspo_dist.learners.exact.audit import Difference
from gspo_dist.learners.hf_model import load_policy
from gspo_dist.rollout.engine import EngineInfo
from gspo_dist.trainer import audit
from gspo_dist.trainer.audit import Audit
from gspo_dist.types import Completion, Prompt
from tests.unit.trainer.setup.test_factories import info
from tests.unit.trainer.small import config


@pytest.fixture
def run(model, reward_file, tmp_path):
    """Writes a run's folder for a configuration with these parts changed."""

    def write(*overrides, **parts):
        c = config(model, reward_file, tmp_path / "run", "rollout.temperature=0.7", "seed=9", *overrides)
        c = replace(c, **{name: replace(getattr(c, name), **told) for name, told in parts.items()})
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.json").write_text(json.dumps(to_mapping(c)))
        return tmp_path / "run"

    return write


class Engine:
    """Records what it is made of and asked for."""

    made: tuple = ()
    closed = 0

    def __init__(self, *args, **told) -> None:
        Engine.made = args, told

    def info(self) -> EngineInfo:
        return info()

    def generate(self, prompts, spec, ids):
        Engine.asked = [p.prompt_id for p in prompts], spec, list(ids)
        return [[p.prompt_id] for p in prompts]

    def close(self) -> None:
        Engine.closed += 1


@pytest.fixture
def compared(monkeypatch):
    """What `compare` and the policy were told."""
    seen: list = []
    monkeypatch.setattr("gspo_dist.rollout.vllm.engine.VllmEngine", Engine)
    monkeypatch.setattr(audit, "load_policy", lambda folder, *args, **told: seen.append((folder, args, told)))

    def compare(engine, policy, prompts, completions):
        assert (type(engine), policy) == (Engine, None)  # the double gives no policy
        return completions

    monkeypatch.setattr(audit, "compare", compare)
    monkeypatch.setattr(Engine, "closed", 0)
    return seen


VLLM = {"engine": "vllm", "enforce_eager": True}


@pytest.mark.parametrize("consistency", ["off", "exact"])
def test_engine_and_learner_are_those_of_the_run(run, compared, model, consistency):
    folder = run(rollout=VLLM, learner={"consistency": consistency, "precision": "fp32", "fp32_head": False})
    assert audit.audit_run(folder, 3) == Engine.asked[0]
    ((path, args, told),) = compared
    assert (path, args) == (Path(model), ("fp32",))  # no checkpoint yet: the model that the run starts from
    assert told == {"temperature": 0.7, "fp32_head": False, "consistency": consistency}
    (settings, source), engine = Engine.made
    assert (settings.engine, source) == ("vllm", str(model))
    assert engine["batch_invariant"] == (consistency == "exact")
    assert engine["fp32_head"]  # as every head of an fp32 run
    asked, spec, ids = Engine.asked
    assert (len(asked), ids) == (3, [0, 1, 2])
    assert (spec.n, spec.temperature, spec.seed) == (1, 0.7, 9)
    assert Engine.closed == 1


def test_the_engine_of_an_audit_gives_log_probs_and_nothing_else(run, compared):
    """Not the routes and candidates that the run asks for. Alone on its device, it never has to sleep."""
    folder = run("objective=score_centering", "flips.every=1", rollout=VLLM, cluster={"colocated": True})
    audit.audit_run(folder, 1)
    assert [Engine.made[1][name] for name in ("sleep_mode", "record_routing")] == [False, False]
    _, spec, _ = Engine.asked
    assert (spec.record_routing, spec.candidates) == (False, 0)


def test_a_checkpoint_is_audited_rather_than_the_model_it_came_from(run, compared, monkeypatch):
    folder = run(rollout=VLLM)
    monkeypatch.setattr(audit.CheckpointStore, "newest", lambda store: SimpleNamespace(step=4))
    written = []
    monkeypatch.setattr(audit, "export_run", lambda run, to, probe: written.append((run, to, probe)))
    monkeypatch.setattr(audit, "load_tokenizer", lambda folder: SimpleNamespace(eos_token_id=1))
    monkeypatch.setattr(audit, "load_prompts", lambda *args, **told: [Prompt("a", (3, 4), "")])
    audit.audit_run(folder, 2)
    ((source, target, probe),) = written
    assert (source, probe) == (folder, False)  # the audit compares more than a probe does
    assert str(compared[0][0]) == Engine.made[0][1] == str(target)
    assert not target.exists()  # a copy of its own, gone with the audit


def test_a_run_without_vllm_is_refused(run):
    with pytest.raises(ValueError, match=r"gspo audit compares vLLM with the learner: got .* 'reference'"):
        audit.audit_run(run(), 1)


def test_the_learners_log_probs_are_those_of_every_token_but_the_first(model):
    """Against HF's own forward, of a policy that divides its logits by a temperature."""
    sequence = np.array([4, 11, 7, 5, 9])
    policy = load_policy(model, "fp32", temperature=0.5)
    ours = audit.learner_logprobs(policy, sequence)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = hf(torch.from_numpy(sequence)[None]).logits[0, :-1] / 0.5
    theirs = logits.log_softmax(-1).gather(1, torch.from_numpy(sequence[1:, None]))[:, 0]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


def test_the_first_sequence_that_differs_is_looked_into(monkeypatch):
    """Three tokens of two completions; the learner's number for the last one is another."""
    columns = np.ones(2, bool), np.array([-1.0, -2.0], np.float32), np.zeros(2, np.int32)
    sampled = [
        Completion(np.array([5, 6]), *columns, "stop", ""),
        Completion(np.array([7, 8]), *columns, "stop", ""),
    ]
    ours = {5: [-1.0, -2.0], 7: [-1.0, -2.5]}
    read, caught, other = [], {}, {}

    def learner_logprobs(policy, sequence):
        other["layer 0 attention"] = torch.tensor([[0.0, 0.0]] * 3 + [[0.0, 0.5]])
        return np.array([0.0, *ours[int(sequence[2])]], np.float32)

    monkeypatch.setattr(audit, "learner_logprobs", learner_logprobs)

    def logprobs_of(sequences):
        read.extend(s.tolist() for s in sequences)
        caught["layer 0 attention"] = torch.zeros(6, 2)  # it runs what fills its last block too
        return [np.array([0.0, -1.0, -2.0], np.float32)]

    def catching(found):
        """What ran before the block is not in it."""
        found.clear()
        return nullcontext(found)

    monkeypatch.setattr(audit, "catching_engine", lambda model: catching(caught))
    monkeypatch.setattr(audit, "catching_learner", lambda hf: catching(other))
    found = audit.compare(
        SimpleNamespace(model=None, logprobs_of=logprobs_of),
        SimpleNamespace(hf=None),
        [Prompt("a", (3, 4), ""), Prompt("b", (3, 4), "")],
        sampled,
    )
    assert (found.tokens, found.equal, found.largest, found.prefilled) == (4, 3, 0.5, True)
    assert str(found.difference) == "layer 0 attention: 1 outputs differ, first of token 3, by up to 0.5"
    assert read == [[3, 4, 7, 8]]


def test_where_every_bit_agrees_nothing_is_looked_into(monkeypatch):
    same = np.array([-1.0, -2.0], np.float32)
    sampled = Completion(np.array([5, 6]), np.ones(2, bool), same, np.zeros(2, np.int32), "stop", "")
    monkeypatch.setattr(audit, "learner_logprobs", lambda policy, sequence: np.array([0.0, *same]))
    assert audit.compare(None, None, [Prompt("a", (3, 4), "")], [sampled]) == Audit(2, 2, 0.0, True, None)


WHERE = Difference("layer 2 attention", 3, 5, 0.25)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Audit(9, 9, 0.0, True, None), "9 of 9 tokens have the same log-prob on both sides"),
        (
            Audit(9, 7, 0.0321, True, WHERE),
            "7 of 9 tokens have the same log-prob on both sides, the others differ by up to 0.0321 nats\n"
            "the first operator that differs: layer 2 attention: 5 outputs differ, first of token 3, by up "
            "to 0.25",
        ),
        (
            Audit(9, 7, 0.5, False, None),
            "7 of 9 tokens have the same log-prob on both sides, the others differ by up to 0.5 nats; the "
            "engine itself gives other log-probs when it reads the sequence at once, so that its kernels "
            "depend on how many tokens run\nthe first operator that differs: no operator differs before the "
            "head: it is the head or the sampler",
        ),
    ],
)
def test_what_an_audit_says(found, said):
    assert str(found) == said
