"""What of the sampler needs no engine: its buffers and its arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gspo_dist.rollout.seeds import sample_keys, uniforms
from gspo_dist.rollout.vllm import sampler
from gspo_dist.rollout.vllm.sampler import EXTRA, KeyedSampler


def test_the_sampler_can_sample_for_a_score_before_any_generation() -> None:
    """Its buffers are on the runner's device from the start: an engine's first work may be a probe."""
    keyed = KeyedSampler(SimpleNamespace(device=torch.device("meta")))
    assert keyed.tokens.device.type == keyed.logprobs.device.type == "meta"


@pytest.mark.parametrize("rows", [1, 5, 9, 10, 23])
def test_prompt_logprobs_in_blocks_are_the_tempered_log_softmax(rows, monkeypatch) -> None:
    monkeypatch.setattr(sampler, "PROMPT_ROWS", 5)
    keyed = KeyedSampler(SimpleNamespace(device=torch.device("cpu")))
    keyed.prompt_temperature = 0.7
    logits = torch.randn(rows, 17, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    wanted = (logits.double() / 0.7).log_softmax(-1)
    got = keyed.compute_logprobs(logits)
    assert got.dtype == torch.float32
    assert got.shape == logits.shape
    assert (got.double() - wanted).abs().max() < 1e-5


class Runner:
    """What the sampler reads of vLLM's model runner."""

    def __init__(self, rows, requests, positions, prompts=4):
        self.device = torch.device("cpu")
        self.requests = {
            name: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra))
            for name, extra in requests.items()
        }
        self.input_batch = SimpleNamespace(
            req_ids=rows,
            num_reqs=len(rows),
            num_prompt_tokens=np.full(len(rows) + 2, prompts),  # vLLM's arrays are longer than the batch
            num_tokens_no_spec=np.array([*(prompts + p for p in positions), 99, 99]),
        )


def metadata(n, temperature=1.0, greedy=False, **changes):
    """vLLM's metadata of a batch of n rows."""
    fields = {
        "max_num_logprobs": None,
        "logprob_token_ids": None,
        "all_greedy": greedy,
        "all_random": not greedy,
        "temperature": torch.full((n,), temperature),
        "top_k": None,
        "top_p": None,
        "logitsprocs": SimpleNamespace(argmax_invariant=[], non_argmax_invariant=[]),
        "no_penalties": True,
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "thinking_budget_state_holder": None,
    }
    return SimpleNamespace(**{**fields, **changes})


def sampler_of(runner, slots, max_tokens):
    keyed = KeyedSampler(runner)
    keyed.room(slots, max_tokens)
    keyed.apply_logits_processors = lambda logits, meta, bonus: logits
    return keyed


def test_a_token_is_the_first_whose_cumulative_probability_passes_its_uniform() -> None:
    """Places 0 and 3 of two completions, one of which came with 2 tokens, against the sum written out."""
    keys = sample_keys(77, np.arange(2))
    runner = Runner(
        ["a", "b"], {"a": {EXTRA: (int(keys[0]), 0, 0)}, "b": {EXTRA: (int(keys[1]), 1, 2)}}, [0, 1]
    )
    keyed = sampler_of(runner, 2, 5)
    logits = torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    keyed.policy_version = 9
    out = keyed(logits.clone(), metadata(2, temperature=0.7))
    wanted = []
    for row, key, position in zip(logits.double() / 0.7, keys, (0, 3), strict=True):
        u, passed = float(uniforms(np.array([key]), np.array([position]))[0]), 0.0
        for token, p in enumerate(row.softmax(-1).tolist()):
            passed += p
            if passed > u:
                wanted.append(token)
                break
    assert out.sampled_token_ids.tolist() == [[t] for t in wanted]
    tokens, logprobs, versions = keyed.read(np.array([0, 1]), np.array([0, 3]))
    assert tokens.tolist() == wanted
    table = (logits.double() / 0.7).log_softmax(-1)
    assert logprobs == pytest.approx([float(table[i, t]) for i, t in enumerate(wanted)], abs=1e-6)
    assert versions.tolist() == [9, 9]
    # Every other place is left alone.
    assert int((keyed.tokens != 0).sum() + (keyed.logprobs != 0).sum()) <= 4
    assert int((keyed.versions != 0).sum()) == 2


def test_rows_find_their_slots_in_whatever_order_they_stand() -> None:
    """Rows change places; what a stranger samples goes to the last row; places live as long as their rows."""
    requests = {"a": {EXTRA: (5, 4, 0)}, "b": {EXTRA: (6, 2, 7)}, "s": None}
    runner = Runner(["b", "s", "a"], requests, [1, 1, 1])
    keyed = sampler_of(runner, 7, 3)
    keyed.look_up()
    assert keyed.slots.tolist() == [2, -1, 4]
    assert keyed.keys.tolist() == [6, 0, 5]
    assert keyed.positions().tolist() == [8, 1, 1]
    runner.requests = {"c": SimpleNamespace(sampling_params=SimpleNamespace(extra_args={EXTRA: (9, 0, 0)}))}
    runner.input_batch.req_ids = ["a", "c"]  # a is remembered, b and s are forgotten
    runner.input_batch.num_reqs = 2
    keyed.look_up()
    assert keyed.slots.tolist() == [4, 0]
    assert list(keyed.places) == ["a", "c"]


def test_what_a_stranger_samples_touches_no_completion() -> None:
    runner = Runner(["s"], {"s": None}, [5])
    keyed = sampler_of(runner, 2, 3)
    keyed(torch.ones(1, 4), metadata(1))
    assert not keyed.logprobs[:-1].any()
    assert keyed.logprobs[-1, 2] == pytest.approx(-np.log(4))


def test_room_grows_and_keeps_what_is_there() -> None:
    keyed = sampler_of(Runner([], {}, []), 2, 2)
    keyed.tokens[:2] = torch.tensor([[1, 2], [3, 4]])
    keyed.versions[1, 1], keyed.logprobs[0, 1] = 8, -2.0
    keyed.room(1, 1)
    assert keyed.tokens.shape == (3, 2)
    keyed.room(5, 3)
    assert keyed.tokens.shape == keyed.logprobs.shape == keyed.versions.shape == (6, 3)
    assert keyed.tokens.tolist() == [[1, 2, 0], [3, 4, 0], *[[0, 0, 0]] * 4]
    told = keyed.read(np.array([0, 1]), np.array([1, 1]))
    assert [column.tolist() for column in told] == [[2, 4], [-2.0, 0.0], [0, 8]]
    keyed.clear()
    assert keyed.tokens.shape == (1, 1)


def test_the_likeliest_tokens_stand_beside_the_sampled_one() -> None:
    keyed = sampler_of(Runner(["a"], {"a": {EXTRA: (1, 1, 2)}}, [0]), 2, 3)
    keyed.room(2, 3, 2)
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    keyed(logits.clone(), metadata(1, temperature=0.5))
    ids, logprobs = keyed.read_candidates(np.array([1, 1, 0]), np.array([2, 0, 2]))
    assert ids.tolist() == [[1, 2], [0, 0], [0, 0]]
    table = (2 * logits[0]).log_softmax(0)
    assert logprobs[0] == pytest.approx([float(table[1]), float(table[2])], abs=1e-6)
    assert np.isneginf(logprobs[1:]).all()
    keyed.room(4, 3, 5)  # more than the vocabulary has, and more completions: what is there stays
    ids, again = keyed.read_candidates(np.array([1]), np.array([2]))
    assert again[0, :2].tolist() == logprobs[0].tolist()
    assert np.isneginf(again[0, 2:]).all()
    keyed(logits.clone(), metadata(1, temperature=0.5))
    assert keyed.read_candidates(np.array([1]), np.array([2]))[0].tolist() == [[1, 2, 0, 0, 0]]
    keyed.clear()
    assert keyed.candidate_ids.shape == (1, 1, 0)


def test_greedy_rows_take_the_largest_and_their_log_probs_are_untempered() -> None:
    runner = Runner(["a"], {"a": {EXTRA: (1, 0, 0)}}, [0])
    keyed = sampler_of(runner, 1, 1)
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    out = keyed(logits.clone(), metadata(1, temperature=0.0, greedy=True))
    assert out.sampled_token_ids.tolist() == [[1]]
    assert float(keyed.logprobs[0, 0]) == pytest.approx(float(logits.log_softmax(-1)[0, 1]), abs=1e-6)


def test_a_greedy_row_among_random_ones_is_greedy() -> None:
    names = {"a": {EXTRA: (1, 0, 0)}, "b": {EXTRA: (2, 1, 0)}}
    runner = Runner(["a", "b"], names, [0, 0])
    keyed = sampler_of(runner, 2, 1)
    meta = metadata(2, all_random=False)
    meta.temperature = torch.tensor([0.0, 1.0])
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 0.0, 50.0]])
    assert keyed(logits, meta).sampled_token_ids.tolist() == [[1], [2]]


def test_vllms_own_log_probs_are_refused() -> None:
    keyed = sampler_of(Runner(["a"], {"a": None}, [0]), 1, 1)
    with pytest.raises(ValueError, match=r"SamplingParams\.logprobs must be None"):
        keyed(torch.zeros(1, 3), metadata(1, max_num_logprobs=0))


def test_a_row_that_is_still_prefilled_draws_its_first_token() -> None:
    runner = Runner(["a", "b"], {"a": {EXTRA: (1, 0, 0)}, "b": {EXTRA: (1, 1, 0)}}, [-3, 2])
    keyed = sampler_of(runner, 2, 4)
    keyed.look_up()
    assert keyed.positions().tolist() == [0, 2]
