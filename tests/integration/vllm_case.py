"""Drives real vLLM engines in a process of their own; prints one JSON object. Run by the integration tests.

python vllm_case.py CASE FOLDER     (CASE: a function below; FOLDER: scratch for models)
"""

import copy
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gspo_dist.config import RolloutConfig
from gspo_dist.learners.hf_model import load_policy
from gspo_dist.trainer.audit import learner_logprobs
from gspo_dist.types import Prompt, SamplingSpec
from gspo_dist.weights.names import hf_named_weights, stored_tensors
from gspo_dist.weights.send import make_transport, send_weights
from gspo_dist.weights.stream import buckets
from gspo_dist.weights.verify import WeightSyncError, check_probe, verify_receipt


def make_model(folder, *, seed=0, tie=False, dense=(), layers=2, expert_rows=32):
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=expert_rows,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=list(dense),
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        eos_token_id=1,
        initializer_range=0.1,
    )
    model = Qwen3MoeForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder):
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(500)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1").save_pretrained(folder)


def make_engine(folder, *, record_routing=False, batch_invariant=False, **changes):
    from gspo_dist.rollout.vllm.engine import VllmEngine

    settings = {
        "precision": "fp32",
        "max_prompt_tokens": 128,
        "max_completion_tokens": 64,
        "enforce_eager": True,
        "kv_cache_gib": 0.1,
    }
    return VllmEngine(
        RolloutConfig(**{**settings, **changes}),
        folder,
        threads=1,
        record_routing=record_routing,
        batch_invariant=batch_invariant,
    )


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Prompt(f"p{i}", tuple(rng.integers(2, 500, n).tolist()), "") for i, n in enumerate(lengths)]


@torch.no_grad()
def hf_logprobs(model, ids, temperature=1.0):
    """[len - 1] log-probs of every token after the first."""
    ids = torch.as_tensor(np.asarray(ids))
    table = (model(ids[None]).logits[0].float() / temperature).log_softmax(-1)
    return table[:-1].gather(1, ids[1:, None])[:, 0].numpy()


@torch.no_grad()
def hf_routes(model, ids):
    """[len, layers, 2] expert ids, sorted."""
    out = model(torch.as_tensor(np.asarray(ids))[None], output_router_logits=True)
    return np.stack([r.topk(2, -1).indices.sort(-1).values.numpy() for r in out.router_logits], axis=1)


def sampling_gap(model, prompt, completion, temperature):
    """Largest |engine - HF| log-prob of a completion's tokens."""
    row = [*prompt.token_ids, *completion.token_ids.tolist()]
    wanted = hf_logprobs(model, row, temperature)[len(prompt.token_ids) - 1 :]
    return float(np.abs(completion.logprobs - wanted).max())


def same(a, b):
    return all(
        x.token_ids.tolist() == y.token_ids.tolist() and np.abs(x.logprobs - y.logprobs).max() < 1e-5
        for ga, gb in zip(a, b, strict=True)
        for x, y in zip(ga, gb, strict=True)
    )


def generation(folder):
    """Sampling with routes recorded at temperature 0.7; prompts over several cache blocks, repeated."""
    model = make_model(folder, dense=(1,), layers=3)
    start = time.perf_counter()
    engine = make_engine(folder, record_routing=True, temperature=0.7)
    started = time.perf_counter() - start
    asked = prompts([5, 33, 100, 64])
    spec = SamplingSpec(n=4, max_tokens=24, temperature=0.7, seed=11, record_routing=True)
    groups = engine.generate(asked, spec, [0, 1, 2, 3])
    again = engine.generate(asked, spec, [0, 1, 2, 3])  # every whole block now comes from the prefix cache
    alone = engine.generate(asked[2:3], spec, [2])
    gaps, wrong, unknown_last = [], 0, True
    for run in (groups, again):
        for prompt, group in zip(asked, run, strict=True):
            for c in group:
                gaps.append(sampling_gap(model, prompt, c, 0.7))
                routes = hf_routes(model, [*prompt.token_ids, *c.token_ids.tolist()])
                wrong += int((np.sort(c.routing.expert_ids, axis=-1)[:-1] != routes[:-1]).sum())
                unknown_last &= c.routing.known.tolist() == [True] * (len(routes) - 1) + [False]
    scored = engine.logprobs_of([np.array(p.token_ids) for p in asked])
    greedy = engine.generate(asked[:1], SamplingSpec(1, 6, temperature=0.0), [0])[0][0]
    row = list(asked[0].token_ids)
    for _ in range(len(greedy)):
        with torch.no_grad():
            row.append(int(model(torch.tensor(row)[None]).logits[0, -1].argmax()))
    nucleus = engine.generate(asked[:1], SamplingSpec(64, 1, temperature=1.0, top_p=0.3, seed=1), [0])[0]
    with torch.no_grad():
        p = model(torch.tensor(asked[0].token_ids)[None]).logits[0, -1].softmax(-1)
    ranked = p.sort(descending=True)
    kept = ranked.indices[: int((ranked.values.cumsum(0) - ranked.values < 0.3).sum())]
    stops = engine.generate(
        asked, SamplingSpec(8, 40, seed=2, stop_token_ids=tuple(range(2, 100))), [0, 1, 2, 3]
    )
    info = engine.info()
    result = {
        "started": started,
        "gap": max(gaps),
        "wrong_routes": wrong,
        "unknown_last": bool(unknown_last),
        "repeatable": same(groups, again),
        "alone": same(groups[2:3], alone),
        "different": len({tuple(c.token_ids.tolist()) for g in groups for c in g}),
        "shape": list(groups[0][0].routing.expert_ids.shape[1:]),
        "info": [info.num_experts, info.moe_layers, info.top_k],
        "score_gap": max(
            float(np.abs(s - hf_logprobs(model, q.token_ids, 0.7)).max())
            for s, q in zip(scored, asked, strict=True)
        ),
        "greedy": greedy.token_ids.tolist() == row[5:],
        "nucleus": {int(c.token_ids[0]) for c in nucleus} <= set(kept.tolist()),
        "nucleus_mass": float(
            max(abs(np.exp(c.logprobs[0]) - p[int(c.token_ids[0])] / p[kept].sum()) for c in nucleus)
        ),
        "text": groups[0][0].text == " ".join(f"t{t}" for t in groups[0][0].token_ids if t != 1),
        "ends": all(
            (c.finish_reason == "stop") == (int(c.token_ids[-1]) < 100)
            and not any(int(t) < 100 and t != 0 for t in c.token_ids[:-1])
            for g in stops
            for c in g
        ),
        "dtypes": [str(groups[0][0].logprobs.dtype), str(groups[0][0].policy_versions.dtype)],
    }
    errors = {}
    for key, bad in {
        "long": lambda: engine.generate(prompts([170]), spec, [0]),
        "ids": lambda: engine.generate(asked, spec, [0]),
        "logprobs_of": lambda: engine.logprobs_of([np.arange(192)]),
        "sleep": engine.sleep,
        "bucket": lambda: engine.update_weights({}),
        "finish": lambda: engine.finish_weight_update(1),
    }.items():
        try:
            bad()
        except (ValueError, WeightSyncError) as e:
            errors[key] = str(e)
    engine.close()
    return {**result, "errors": errors}


def contract(folder):
    """The laws of every engine's verbs; two engines that know two policies."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.unit.rollout.contract import Contract

    first = make_model(folder, layers=3)
    second = copy.deepcopy(first)
    shake(second, 0.05)
    policies = [first, second]
    settings = {"record_routing": True, "max_prompt_tokens": 64, "max_completion_tokens": 20}
    # One has places for three of eight completions, so the others wait.
    engines = [make_engine(folder, **settings), make_engine(folder, max_num_seqs=3, **settings)]

    def is_empty(engine):
        sampler = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.sampler
        tables = (len(sampler.rows), len(sampler.places), *sampler.tokens.shape, *sampler.versions.shape)
        return len(engine.flights) == 0 and tables == (0, 0, 1, 1, 1, 1)

    Contract(
        engines,
        lambda engine, policy, version: publish(engine, policies[policy], version, bucket_bytes=1 << 14),
        lambda policy, ids: hf_logprobs(policies[policy], ids),
        lambda policy, ids: hf_routes(policies[policy], ids),
        is_empty,
    ).check_all()
    for engine in engines:
        engine.close()
    return {"kept": True}


def distribution(folder):
    """20,000 first tokens against the model's probabilities: a chi-square over tokens with enough mass."""
    from scipy import stats

    model = make_model(folder, seed=3)
    engine = make_engine(folder)
    prompt = prompts([4])[0]
    counts = np.zeros(500)
    for i in range(20):
        group = engine.generate([prompt], SamplingSpec(n=1000, max_tokens=1, seed=5), [i])[0]
        counts += np.bincount([int(c.token_ids[0]) for c in group], minlength=500)
    with torch.no_grad():
        p = model(torch.tensor(prompt.token_ids)[None]).logits[0, -1].double().softmax(-1).numpy()
    big = p * 20_000 >= 10
    seen, wanted = np.append(counts[big], counts[~big].sum()), np.append(p[big], p[~big].sum()) * 20_000
    engine.close()
    return {"pvalue": float(stats.chisquare(seen, wanted).pvalue), "cells": len(seen)}


def preemption(folder):
    """A KV cache too small for the batch: requests are preempted and run again, and nobody can tell."""
    model = make_model(folder, seed=4)
    asked = prompts([60] * 8, seed=1)
    spec = SamplingSpec(n=4, max_tokens=60, seed=9, record_routing=True, stop_token_ids=())
    small = make_engine(folder, record_routing=True, kv_cache_gib=32 * 32 * 1024 / 2**30)
    groups = small.generate(asked, spec, list(range(8)))
    gap = max(sampling_gap(model, p, c, 1.0) for p, g in zip(asked, groups, strict=True) for c in g)
    wrong = 0
    for p, g in zip(asked, groups, strict=True):
        for c in g:
            routes = hf_routes(model, [*p.token_ids, *c.token_ids.tolist()])
            wrong += int((np.sort(c.routing.expert_ids, axis=-1)[:-1] != routes[:-1]).sum())
    alone = [small.generate([p], spec, [i])[0] for i, p in enumerate(asked)]
    cache = small.llm.llm_engine.vllm_config.cache_config
    out = {
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "gap": gap,
        "wrong_routes": wrong,
        "alone": same(groups, alone),
    }
    small.close()
    return out


def publish(engine, weights, version, bucket_bytes=1 << 16, transport=None, stacked=True):
    """`weights`: a model, or the named tensors themselves. version None: half of it, and it stays open."""
    if isinstance(weights, torch.nn.Module):
        weights = hf_named_weights(weights, slice_bytes=bucket_bytes, stacked=stacked)
    transport = transport or make_transport("shm")
    with ThreadPoolExecutor(1) as meeting:  # gloo's two sides wait for each other
        met = meeting.submit(transport.connect)
        engine.init_weight_sync(transport.init_info(0))
        met.result()
    start = time.perf_counter()
    engine.start_weight_update()
    stream = buckets(weights, bucket_bytes)
    if version is None:
        parts = list(stream)
        assert len(parts) > 3
        return send_weights(iter(parts[: len(parts) // 2]), transport, engine.update_weights)
    report = send_weights(stream, transport, engine.update_weights)
    receipt = engine.finish_weight_update(version)
    seconds = time.perf_counter() - start
    verify_receipt(report.checksums, receipt, version)
    return report, receipt, seconds


WAYS = {
    "tensors": {"stacked": False},
    "parts": {"bucket_bytes": 1 << 14},  # no layer's experts fit one bucket
    "gloo": {"bucket_bytes": 1 << 18},
}
"""How the publications of `sync` travel, in turn."""


def sync(folder, tie=False, dense=()):
    """Publishes changed weights in each way; after it, log-probs, sampled log-probs and routes are HF's."""
    model = make_model(folder, tie=tie, dense=dense, layers=3)
    engine = make_engine(folder, record_routing=True)
    asked = prompts([7, 70])
    ids = [np.array(p.token_ids) for p in asked]
    spec = SamplingSpec(n=2, max_tokens=8, seed=1, record_routing=True)
    engine.generate(asked, spec, [0, 1])  # fills the prefix cache with the first weights
    steps, last = [], engine.logprobs_of(ids)
    for version, (way, options) in enumerate(WAYS.items(), start=1):
        if way == "gloo":
            options = {
                **options,
                "transport": make_transport("gloo", address="127.0.0.1", engines=["engine"]),
            }
        with torch.no_grad():
            g = torch.Generator().manual_seed(version)
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
        report, receipt, seconds = publish(engine, model, version, **options)
        scored = engine.logprobs_of(ids)
        groups = engine.generate(asked, spec, [0, 1])
        wrong = 0
        for p, group in zip(asked, groups, strict=True):
            for c in group:
                routes = hf_routes(model, [*p.token_ids, *c.token_ids.tolist()])
                wrong += int((np.sort(c.routing.expert_ids, axis=-1)[:-1] != routes[:-1]).sum())
        steps.append(
            {
                "gap": max(
                    float(np.abs(s - hf_logprobs(model, i)).max()) for s, i in zip(scored, ids, strict=True)
                ),
                "moved": max(float(np.abs(s - o).max()) for s, o in zip(scored, last, strict=True)),
                "sampled_gap": max(
                    sampling_gap(model, p, c, 1.0) for p, q in zip(asked, groups, strict=True) for c in q
                ),
                "wrong_routes": wrong,
                "versions": sorted({int(v) for q in groups for c in q for v in c.policy_versions}),
                "tensors": [report.tensors, receipt.tensors],
                "sums": len(receipt.checksums),
                "bytes": [report.bytes, receipt.bytes],
                "seconds": seconds,
                "proven": engine.llm.collective_rpc("gspo_sync_report")[0]["proven"],
            }
        )
        last = scored
    files = [p.name for p in Path("/dev/shm").glob(f"gspo-*-{os.getpid()}-*")]
    engine.close()
    return {"steps": steps, "files": files}


def tied(folder):
    return sync(folder, tie=True)


def dense_layer(folder):
    return sync(folder, dense=(1,))


FAMILIES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {
        "head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    "deepseek_v3": {
        # As published files have them. transformers needs neither. vLLM would leave out the router's bias,
        # and take a softmax of its scores.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    "qwen3": {"head_dim": 32},
}


def make_family(folder, family, **changes):
    """A small model of the family with random weights, read back from its folder in float32."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **changes})
    )
    shake(model, 0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def shake(model, size, seed=0):
    """Moves every tensor that a folder holds, buffers of routers included."""
    g = torch.Generator().manual_seed(seed)
    for _, tensor in stored_tensors(model):
        tensor.add_(size * torch.randn(tensor.shape, generator=g))


def other_family(folder, family):
    """Two syncs into an engine of another family: after each, its log-probs are those of HF.

    equal: whether they are those of an exact learner to the bit; tried with Mixtral.
    """
    model = make_family(folder, family)
    exact = family == "mixtral"
    learner = load_policy(folder, "fp32", consistency="exact") if exact else None
    engine = make_engine(folder, batch_invariant=exact)
    ids = [np.array(p.token_ids) for p in prompts([7, 70])]
    gaps, moved, equal = [], [], []
    last = engine.logprobs_of(ids)
    start = max(float(np.abs(s - hf_logprobs(model, i)).max()) for s, i in zip(last, ids, strict=True))
    for version in (1, 2):
        shake(model, 0.03, seed=version)
        report, receipt, _ = publish(engine, model, version)
        now = engine.logprobs_of(ids)
        gaps.append(
            max(float(np.abs(s - hf_logprobs(model, i)).max()) for s, i in zip(now, ids, strict=True))
        )
        moved.append(max(float(np.abs(s - o).max()) for s, o in zip(now, last, strict=True)))
        if learner is not None:
            learner.hf.load_state_dict(model.state_dict())
            equal += [np.array_equal(s, learner_logprobs(learner, i)) for s, i in zip(now, ids, strict=True)]
        last = now
    engine.close()
    tensors = [report.tensors, receipt.tensors]
    return {"start": start, "gaps": gaps, "moved": moved, "equal": equal, "tensors": tensors}


def mixtral(folder):
    return other_family(folder, "mixtral")


def granitemoe(folder):
    return other_family(folder, "granitemoe")


def glm4_moe(folder):
    return other_family(folder, "glm4_moe")


def deepseek_v3(folder):
    return other_family(folder, "deepseek_v3")


def untold_head(folder):
    """A config says tied beside a head of its own: the engine computes with the head, before and after."""
    make_family(folder, "qwen3")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = make_engine(folder)
    ids = [np.array(p.token_ids) for p in prompts([7, 70])]

    def gap():
        told = engine.logprobs_of(ids)
        return max(float(np.abs(s - hf_logprobs(model, i)).max()) for s, i in zip(told, ids, strict=True))

    gaps = [gap()]
    for version in (1, 2):
        shake(model, 0.03, seed=version)
        publish(engine, model, version)
        gaps.append(gap())
    engine.close()
    return {"gaps": gaps}


def wrong_names(folder):
    """Weights under names or shapes that the folder does not have, and one that does not come, are named."""
    model = make_family(folder, "mixtral")
    says = []
    stream = dict(hf_named_weights(model))
    head = stream["lm_head.weight"]
    for spoiled in (
        {"model.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(96, 128)},
        {"lm_head.weight": head[:-1]},
        {name: tensor for name, tensor in stream.items() if name != "lm_head.weight"},
    ):
        engine = make_engine(folder)
        try:
            publish(engine, spoiled.items(), 1)
            says.append("")
        except WeightSyncError as e:
            says.append(str(e))
        engine.close()
    return {"says": says}


def corruption(folder):
    """Without the expert repack the checksums still agree; only the log-prob probe sees it."""
    model = make_model(folder)
    engine = make_engine(folder)
    ids = [np.array(p.token_ids) for p in prompts([40, 60])]
    wanted = [hf_logprobs(model, i) for i in ids]
    receiver = engine.llm.llm_engine.model_executor.driver_worker.worker.weight_transfer_engine
    receiver.repack_experts = False
    publish(engine, model, 1)
    try:
        check_probe(engine.logprobs_of(ids), wanted, 1e-4, policy_version=1)
        caught = ""
    except WeightSyncError as e:
        caught = str(e)
    receiver.repack_experts = True
    publish(engine, model, 2)
    mended = check_probe(engine.logprobs_of(ids), wanted, 1e-4, policy_version=2)

    # A receiver whose memory flips one bit after the sender summed the bytes.
    transport = make_transport("shm")
    stage = transport.stage

    def flipping(bucket):
        staged = stage(bucket)
        with open(staged.update_info["path"], "r+b") as f:
            byte = f.read(1)
            f.seek(0)
            f.write(bytes([byte[0] ^ 1]))
        return staged

    transport.stage = flipping
    try:
        publish(engine, model, 3, bucket_bytes=1 << 30, transport=transport)
        flipped = ""
    except WeightSyncError as e:
        flipped = str(e)
    engine.close()
    return {"caught": caught, "mended": mended[1], "flipped": flipped}


def swapped(tensors, a, b):
    """The tensors with what stands under one part of a name put under the other, both ways."""
    there = {name: name.replace(a, b) if a in name else name.replace(b, a) for name in tensors}
    return {name: tensors[there[name]] for name in tensors}


def sharp_bf16(folder):
    """bf16 on both sides and peaked logits: the head's precision, and what the probe makes of wrong syncs."""
    from gspo_dist.config import LearnerConfig, WeightSyncConfig
    from gspo_dist.learners.eager import EagerLearner
    from gspo_dist.learners.group import LocalLearnerGroup
    from gspo_dist.rollout.pool import LocalRolloutPool
    from gspo_dist.trainer.publisher import WeightPublisher, probe_sequences
    from gspo_dist.weights.tolerance import ProbeTolerance

    model = make_model(folder, layers=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    model.bfloat16().save_pretrained(folder)
    engine = make_engine(folder, precision="bf16", max_completion_tokens=96)
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

    def head_error():
        """Largest |difference| of the engine's logits from the exact product of its bf16 numbers."""
        hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad():
            wanted = hidden.double() @ learner.policy.hf.get_output_embeddings().weight.double().T
            found = runner.logits_processor(runner.lm_head, hidden)
        return [float((found.double() - wanted).abs().max()), str(found.dtype), float(wanted.abs().max())]

    learner = EagerLearner(
        LearnerConfig(backend="eager", precision="bf16", token_budget=4096), folder, total_steps=1
    )
    asked = prompts([20, 30, 40, 50])
    groups = engine.generate(asked, SamplingSpec(n=1, max_tokens=96, seed=3), [0, 1, 2, 3])
    probe = probe_sequences([(p, g[0]) for p, g in zip(asked, groups, strict=True)])
    good = dict(hf_named_weights(learner.policy.hf))

    def publication(tensors=good, begins_equal=False, means=()):
        """A publication of these tensors as the learner's; what it measured, or what stopped it."""
        learner.weights = lambda bucket_bytes, **_: buckets(tensors.items(), bucket_bytes)
        tolerance = ProbeTolerance("bf16", None)
        tolerance.means = list(means)
        publisher = WeightPublisher(
            WeightSyncConfig(transport="shm"),
            LocalLearnerGroup(learner),
            LocalRolloutPool(engine),
            replicas=1,
            token_budget=4096,
            max_model_len=224,
            tolerance=tolerance,
            begins_equal=begins_equal,
        )
        try:
            return publisher.publish(probe)["sync/probe_mean_abs"]
        except WeightSyncError as e:
            return str(e)
        finally:
            publisher.learner.transport.close()

    out = {"heads": [head_error()], "healthy": [publication(begins_equal=True)]}
    out["heads"].append(head_error())  # a reload keeps it
    runner.logits_processor.head_dtype = torch.bfloat16
    out["bf16_head"] = [head_error(), publication()]
    runner.logits_processor.head_dtype = torch.float32
    own = out["healthy"]
    last = "layers.3.mlp.experts.5."
    faults = {
        "expert_zero": {n: torch.zeros_like(t) if last in n else t for n, t in good.items()},
        "experts_swapped": swapped(good, "layers.3.mlp.experts.5.", "layers.3.mlp.experts.6."),
        "last_layers_swapped": swapped(good, "layers.2.", "layers.3."),
    }
    out["first"] = {}
    for name, tensors in faults.items():
        out["first"][name] = publication(tensors, begins_equal=True)
        out["healthy"].append(publication(means=own))  # the engine gets the right weights back
    out["later"] = {
        f"{a}{a + 1}": publication(swapped(good, f"layers.{a}.", f"layers.{a + 1}."), means=own)
        for a in range(3)
    }
    out["healthy"].append(publication(means=own))
    # A loader that passes over one expert, as vLLM's do with names that they do not know.
    load = runner.load_weights
    runner.load_weights = lambda weights: load([(n, t) for n, t in weights if last not in n])
    out["first"]["expert_not_loaded"] = publication(begins_equal=True)
    engine.close()
    return out


def half_update(folder):
    """A transfer that dies in the middle: the engine refuses to sample from the mixture."""
    model = make_model(folder)
    engine = make_engine(folder)
    transport = make_transport("shm")
    engine.init_weight_sync(transport.init_info(0))
    engine.start_weight_update()
    says = []
    staged = transport.stage(list(hf_named_weights(model))[:1])
    engine.update_weights(staged.update_info)
    transport.release(staged)
    for attempt in (
        lambda: engine.logprobs_of([np.arange(5)]),
        lambda: engine.update_weights(staged.update_info),
        lambda: engine.logprobs_of([np.arange(5)]),
        lambda: engine.finish_weight_update(1),
    ):
        try:
            attempt()
            says.append("")
        except (WeightSyncError, ValueError) as e:
            says.append(f"{type(e).__name__}: {e}")
    return {"says": says}


if __name__ == "__main__":
    result = globals()[sys.argv[1]](Path(sys.argv[2]))
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)
