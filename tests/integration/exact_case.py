"""Audits a real engine against learners: exact, plain, and maimed ones. Prints one JSON object.

python exact_case.py FOLDER     (FOLDER: scratch for a model)
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


def audits(folder):
    make_model(folder)
    prepare_process("cpu", 1, "bf16")
    policy = load_policy(folder, "bf16", fp32_head=False, consistency="exact")
    config = RolloutConfig(
        precision="bf16", max_prompt_tokens=64, max_completion_tokens=32, enforce_eager=True, kv_cache_gib=0.1
    )
    engine = VllmEngine(config, folder, threads=1, batch_invariant=True, fp32_head=False)
    asked = prompts([5, 33, 50, 20])
    groups = engine.generate(asked, SamplingSpec(n=1, max_tokens=32, seed=1), range(4))
    sampled = [group[0] for group in groups]

    def audit(learner):
        found = compare(engine, learner, asked, sampled)
        where = found.difference and found.difference.operator
        return {"tokens": found.tokens, "equal": found.equal, "where": where, "prefilled": found.prefilled}

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
    print("RESULT " + json.dumps(audits(Path(sys.argv[1]))), flush=True)
    os._exit(0)
