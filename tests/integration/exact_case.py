"""Audits a real engine against learners. Prints one JSON object.

python exact_case.py audits FOLDER      exact, plain and maimed learners, bf16 (FOLDER: scratch for a model)
python exact_case.py threads FOLDER     engine and learner with two threads, fp32, long prompts
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from vllm_case import make_model, prompts

from gspo_dist.config import RolloutConfig
from gspo_dist.learners.exact import operators
from gspo_dist.learners.hf_model import load_policy
from gspo_dist.rollout.vllm.engine import VllmEngine, prepare_process
from gspo_dist.trainer.audit import compare
from gspo_dist.types import SamplingSpec


def start(folder, precision, threads, lengths):
    """(exact learner, engine, what compares a learner with what the engine has sampled)."""
    make_model(folder)
    prepare_process("cpu", threads, precision)
    policy = load_policy(folder, precision, fp32_head=precision == "fp32", consistency="exact")
    config = RolloutConfig(
        precision=precision,
        max_prompt_tokens=128,
        max_completion_tokens=32,
        enforce_eager=True,
        kv_cache_gib=0.1,
    )
    engine = VllmEngine(config, folder, threads=threads, batch_invariant=True, fp32_head=precision == "fp32")
    asked = prompts(lengths)
    groups = engine.generate(asked, SamplingSpec(n=1, max_tokens=32, seed=1), range(len(asked)))
    sampled = [group[0] for group in groups]

    def audit(learner):
        found = compare(engine, learner, asked, sampled)
        where = found.difference and found.difference.operator
        return {"tokens": found.tokens, "equal": found.equal, "where": where, "prefilled": found.prefilled}

    return policy, engine, audit


def threads(folder):
    # Three at once: two threads cannot share them evenly, and would cut the histories over 64 tokens instead.
    policy, engine, audit = start(folder, "fp32", 2, [90, 100, 110])
    result = audit(policy)
    engine.close()
    return result


def audits(folder):
    policy, engine, audit = start(folder, "bf16", 1, [5, 33, 50, 20])
    result = {"exact": audit(policy), "plain": audit(load_policy(folder, "bf16", fp32_head=False))}
    real = operators.weights_at
    operators.weights_at = lambda *args: real(*args) * (1 + 1e-6)
    result["experts"] = audit(policy)
    operators.weights_at = real
    norm = policy.hf.base_model.layers[1].post_attention_layernorm
    del norm.forward  # transformers' own, which rounds the sum first
    result["norm"] = audit(policy)
    engine.close()
    return result


if __name__ == "__main__":
    case = {"audits": audits, "threads": threads}[sys.argv[1]]
    print("RESULT " + json.dumps(case(Path(sys.argv[2]))), flush=True)
    os._exit(0)
