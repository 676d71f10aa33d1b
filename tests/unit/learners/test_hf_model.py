"""The packed policy against HF: each sequence alone, padded by nobody, log-softmaxed by torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gspo_dist.learners.hf_model import PolicyModel, load_policy

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
KINDS = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
        },
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
}
LENGTHS = (5, 1, 11, 7)


def save(kind: str, folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    cls, config, extra = KINDS[kind]
    cls(config(**SIZES | extra | changes)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def sequences(seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=g) for n in LENGTHS]


def packed(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of `PolicyModel.forward`, asking for every token that something predicts."""
    lengths = torch.tensor([len(p) for p in parts])
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {
        "token_ids": torch.cat(parts),
        "position_ids": positions,
        "cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        "index": positions.nonzero().flatten(),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_logprobs_equal_hf_one_sequence_at_a_time(
    kind: str, temperature: float, tmp_path: Path
) -> None:
    folder = save(kind, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logprobs, entropy = [], []
    with torch.no_grad():
        for ids in sequences():
            table = torch.log_softmax(hf(input_ids=ids[None]).logits[0, :-1].double() / temperature, -1)
            logprobs.append(table.gather(1, ids[1:, None]).flatten())
            entropy.append(-(table.exp() * table).sum(-1))
        policy = load_policy(folder, "fp32", temperature=temperature)
        got, got_entropy = policy(**packed(sequences()))
    torch.testing.assert_close(got.double(), torch.cat(logprobs), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got_entropy.double(), torch.cat(entropy), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_sequence_sees_another(kind: str, tmp_path: Path) -> None:
    policy = load_policy(save(kind, tmp_path), "fp32")
    mine, others = sequences(0), sequences(1)
    mixed = [mine[0], others[1], mine[2], others[3]]
    with torch.no_grad():
        before, _ = policy(**packed(mine))
        after, _ = policy(**packed(mixed))
    at = packed(mine)["index"]
    same = (at < 5) | ((at >= 6) & (at < 17))
    torch.testing.assert_close(after[same], before[same], rtol=0, atol=1e-6)
    assert not torch.allclose(after[~same], before[~same], atol=1e-2)


def test_order_of_packing_does_not_matter(tmp_path: Path) -> None:
    policy = load_policy(save("qwen3_moe", tmp_path), "fp32")
    parts = sequences()
    with torch.no_grad():
        forth, _ = policy(**packed(parts))
        back, _ = policy(**packed(parts[::-1]))
    pieces = forth.split([len(p) - 1 for p in parts])
    torch.testing.assert_close(back, torch.cat(pieces[::-1]), rtol=0, atol=1e-6)


def test_gradients_of_packed_logprobs_equal_hf(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path)
    weights = torch.linspace(-1, 1, sum(LENGTHS) - len(LENGTHS), dtype=torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    taken = []
    for ids in sequences():
        table = torch.log_softmax(hf(input_ids=ids[None]).logits[0, :-1], -1)
        taken.append(table.gather(1, ids[1:, None]).flatten())
    (torch.cat(taken) * weights).sum().backward()
    policy = load_policy(folder, "fp32")
    logprobs, _ = policy(**packed(sequences()))
    (logprobs * weights.float()).sum().backward()
    want = dict(hf.named_parameters())
    for name, parameter in policy.hf.named_parameters():
        error = (parameter.grad.double() - want[name].grad).norm()
        assert error <= 1e-5 * want[name].grad.norm(), name


def test_no_wanted_token_still_gives_a_graph_with_zero_gradients(tmp_path: Path) -> None:
    policy = load_policy(save("qwen3_moe", tmp_path), "fp32")
    inputs = packed(sequences()) | {"index": torch.zeros(0, dtype=torch.int64)}
    logprobs, _ = policy(**inputs)
    logprobs.sum().backward()
    grads = [p.grad for p in policy.parameters()]
    assert logprobs.shape == (0,)
    assert all(g is not None and not g.any() for g in grads)


def test_checkpointed_activations_change_no_gradient(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path)
    grads = []
    for checkpointed in (False, True):
        policy = load_policy(folder, "fp32", activation_checkpointing=checkpointed)
        policy(**packed(sequences()))[0].sum().backward()
        grads.append([p.grad for p in policy.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_the_packed_attention_refuses_a_call_without_its_layout(tmp_path: Path) -> None:
    policy = load_policy(save("qwen3", tmp_path), "fp32")
    with pytest.raises(ValueError, match="needs the packed layout"):
        policy.hf.model(input_ids=torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("granite", {"logits_scaling": 3.0}), ("cohere", {"logit_scale": 0.25}), ("nanochat", {})],
)
def test_what_a_model_does_to_its_logits_is_done(
    kind: str, changes: dict[str, object], temperature: float, tmp_path: Path
) -> None:
    """Granite divides them, Cohere multiplies them, NanoChat caps them at 15."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | {"pad_token_id": None} | changes)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        hf.get_output_embeddings().weight.mul_(20)  # far enough out for the cap to bend
    hf.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    policy = load_policy(tmp_path, "fp32", temperature=temperature)
    taken = []
    for ids in sequences():
        table = torch.log_softmax(hf(input_ids=ids[None]).logits[0, :-1] / temperature, -1)
        taken.append(table.gather(1, ids[1:, None]).flatten())
    want, (got, _) = torch.cat(taken), policy(**packed(sequences()))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, len(want))
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    mine = dict(policy.hf.named_parameters())
    for name, parameter in hf.named_parameters():
        error = (mine[name].grad - parameter.grad).norm()
        assert error <= 1e-5 * parameter.grad.norm(), name


def test_the_head_keeps_its_names_and_the_tying(tmp_path: Path) -> None:
    folder = save("qwen3", tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = [name for name, _ in hf.named_parameters()]
    policy = load_policy(folder, "fp32")
    assert [name for name, _ in policy.hf.named_parameters()] == names
    assert policy.hf.state_dict().keys() == hf.state_dict().keys()
    assert policy.hf.lm_head.weight is policy.hf.get_input_embeddings().weight


def test_a_model_without_a_linear_head_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(ValueError, match="linear LM head: got Identity"):
        PolicyModel(model)
