"""The learner's GPU operators without a GPU: vLLM's own Triton kernels in Triton's interpreter, in float32.

python gpu_case.py FOLDER      (FOLDER: scratch for models; needs TRITON_INTERPRET=1). Prints one JSON object.

vLLM's CPU build lacks three CUDA kernels, which stand here as torch: they sort, choose and add.
"""

import json
import os
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[4]))

from gspo_dist.learners.exact import gpu
from gspo_dist.learners.hf_model import load_policy
from gspo_dist.rollout.vllm.engine import prepare_process
from tests.unit.learners.exact.test_install import gradients, last_alone, logprobs, save


def align(ids, experts, block, sorted_ids, expert_ids, padded, expert_map=None):
    """Tokens by expert, each expert's filled up to whole blocks with an id that is none."""
    flat, at = ids.flatten(), 0
    sorted_ids.fill_(len(flat))
    for expert in range(experts):
        mine = (flat == expert).nonzero().flatten()
        blocks = -(-len(mine) // block)
        sorted_ids[at * block : at * block + len(mine)] = mine.int()
        expert_ids[at : at + blocks] = expert
        at += blocks
    padded.fill_(at * block)


def choose(weights, ids, places, logits, renormalise, is_padding=None):
    found = logits.float().softmax(-1).topk(weights.shape[1], dim=-1)
    total = found.values.sum(-1, keepdim=True) if renormalise else 1.0
    weights.copy_(found.values / total)
    ids.copy_(found.indices)


def stand_in():
    """Gives vLLM, which takes no Triton without its driver, the interpreter, and what its CPU build lacks."""
    prepare_process("cuda", 1, "fp32", batch_invariant=True)
    import vllm.triton_utils

    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language
    vllm.triton_utils.HAS_TRITON = True
    import vllm._custom_ops as ops
    from vllm.model_executor.determinism import batch_invariant

    ops.moe_align_block_size, ops.topk_softmax = align, choose
    ops.moe_sum = lambda parts, out: out.copy_(parts.sum(1))
    batch_invariant.num_compute_units = lambda device=0: 2
    gpu.use_invariant_kernels = lambda: None  # it replaces CUDA's softmax, of which there is none


def differences(folder, kind, **changes):
    """Kernels against torch: largest |difference| of log-probs, the gradients' relative one, whether every
    bit is the same, whether a pass without gradients has the bits of one with, and whether a sequence has
    those in company that it has alone.
    """
    save(kind, folder, **changes)
    plain, exact = load_policy(folder, "fp32"), load_policy(folder, "fp32")
    gpu.make_exact(exact.hf)
    ours, theirs = logprobs(exact).detach(), logprobs(plain).detach()
    wanted, got = gradients(plain), gradients(exact)
    with torch.no_grad():
        quiet, alone = logprobs(exact), last_alone(exact)
    return {
        "logprobs": float((ours - theirs).abs().max()),
        "same": torch.equal(ours, theirs),
        "alone": torch.equal(alone, ours[-len(alone) :]),
        "quiet": torch.equal(ours, quiet),
        "gradient": float((got - wanted).norm() / wanted.norm()),
    }


if __name__ == "__main__":
    stand_in()
    scratch = Path(sys.argv[1])
    # A dense layer, then one of experts.
    found = differences(scratch / "moe", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[0])
    try:
        differences(scratch / "other", "glm", pad_token_id=0)
    except ValueError as error:
        found["refused"] = str(error)
    print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)
