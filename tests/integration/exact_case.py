"""Audits a real engine against learners. Prints one JSON object.

python exact_case.py audits FOLDER      exact, plain and maimed learners, bf16 (FOLDER: scratch for a model)
python exact_case.py threads FOLDER     engine and learner with two threads, fp32, long prompts
python exact_case.py crowded FOLDER     groups whose prompt is cached, in a KV cache too small for them, bf16
python exact_case.py families FOLDER    a family with much of its own, bf16, temperature 0.7
"""

import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from vllm_case import make_model, prompts, write_tokenizer

from gspo_dist.config import RolloutConfig
from gspo_dist.learners.exact import operators
from gspo_dist.learners.hf_model import load_policy
from gspo_dist.rollout.vllm.engine import VllmEngine, prepare_process
from gspo_dist.trainer.audit import compare
from gspo_dist.types import SamplingSpec

ONE_EACH = SamplingSpec(n=1, max_tokens=32, seed=1)


def start(folder, precision, threads, lengths, spec=ONE_EACH, **settings):
    """(exact learner, engine, what compares a learner with what the engine has sampled)."""
    make_model(folder)
    prepare_process("cpu", threads, precision)
    policy = load_policy(folder, precision, fp32_head=precision == "fp32", consistency="exact")
    limits = {"max_prompt_tokens": 128, "max_completion_tokens": 32, "kv_cache_gib": 0.1} | settings
    config = RolloutConfig(precision=precision, enforce_eager=True, **limits)
    engine = VllmEngine(config, folder, threads=threads, batch_invariant=True, fp32_head=precision == "fp32")
    asked = prompts(lengths)
    groups = engine.generate(asked, spec, range(len(asked)))
    sampled = [completion for group in groups for completion in group]
    asked = [prompt for prompt in asked for _ in range(spec.n)]

    def audit(learner):
        found = compare(engine, learner, asked, sampled)
        where = found.difference and found.difference.operator
        return {"tokens": found.tokens, "equal": found.equal, "where": where, "prefilled": found.prefilled}

    return policy, engine, audit


SIZES = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = {
    # Scales of embedding, attention, branches and logits, a tied head, shared experts as one product.
    "granitemoeshared": {
        "num_local_experts": 8,
        "shared_intermediate_size": 64,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
}


def family(kind, folder):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind]})
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and "inv_freq" not in name:
            torch.nn.init.normal_(tensor, 1.0 if "norm" in name else 0.0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    policies = {
        consistency: load_policy(folder, "bf16", temperature=0.7, fp32_head=False, consistency=consistency)
        for consistency in ("off", "exact")
    }
    settings = {"precision": "bf16", "temperature": 0.7, "enforce_eager": True, "kv_cache_gib": 0.1}
    config = RolloutConfig(max_prompt_tokens=64, max_completion_tokens=32, **settings)
    engine = VllmEngine(config, folder, threads=1, batch_invariant=True, fp32_head=False)
    asked = prompts([5, 33, 50, 20])
    spec = SamplingSpec(n=1, max_tokens=32, seed=1, temperature=0.7)
    # The last one alone: one row in every product of its decoding.
    groups = [*engine.generate(asked[:3], spec, [0, 1, 2]), *engine.generate(asked[3:], spec, [3])]
    sampled = [group[0] for group in groups]
    found = {name: compare(engine, policy, asked, sampled) for name, policy in policies.items()}
    return {
        "tokens": found["exact"].tokens,
        "off": found["off"].equal,
        "exact": found["exact"].equal,
        "said": str(found["exact"]),
    }


def families(folder):
    """Each in a process of its own, with vLLM imported once."""
    prepare_process("cpu", 1, "bf16")
    importlib.import_module("vllm.entrypoints.llm")
    context, result = multiprocessing.get_context("fork"), {}
    for kind in FAMILIES:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=lambda k, t: t.send(family(k, folder / k)), args=(kind, there))
        process.start()
        there.close()
        result[kind] = here.recv()
        process.kill()
        process.join()
    return result


def threads(folder):
    # Three at once: two threads cannot share them evenly, and would cut the histories over 64 tokens instead.
    policy, engine, audit = start(folder, "fp32", 2, [90, 100, 110])
    result = audit(policy)
    engine.close()
    return result


def crowded(folder):
    spec = SamplingSpec(n=4, max_tokens=64, seed=1, stop_token_ids=())
    limits = {"max_prompt_tokens": 160, "max_completion_tokens": 64}
    # A token takes 512 bytes: keys and values of 2 heads of 32 in 2 layers, 2 bytes each.
    policy, engine, audit = start(
        folder, "bf16", 1, [150] * 8, spec, kv_cache_gib=1024 * 512 / 2**30, **limits
    )
    cache = engine.llm.llm_engine.vllm_config.cache_config
    result = audit(policy) | {
        "caches_prompts": engine.prefix_caching,
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
    }
    engine.close()
    return result


def audits(folder):
    policy, engine, audit = start(folder, "bf16", 1, [5, 33, 50, 20])
    result = {"exact": audit(policy), "plain": audit(load_policy(folder, "bf16", fp32_head=False))}
    real = operators.weights_at
    operators.weights_at = lambda *args: real(*args) * (1 + 2**-6)  # more than bf16 rounds away
    result["experts"] = audit(policy)
    operators.weights_at = real
    norm = policy.hf.base_model.layers[1].post_attention_layernorm
    del norm.forward  # transformers' own, which rounds the sum first
    result["norm"] = audit(policy)
    engine.close()
    return result


if __name__ == "__main__":
    case = {"audits": audits, "crowded": crowded, "families": families, "threads": threads}[sys.argv[1]]
    print("RESULT " + json.dumps(case(Path(sys.argv[2]))), flush=True)
    os._exit(0)
