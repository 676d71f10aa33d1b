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
    keyed.begin(slots, max_tokens)
    keyed.apply_logits_processors = lambda logits, meta, bonus: logits
    return keyed


def test_a_token_is_the_first_whose_cumulative_probability_passes_its_uniform() -> None:
    """Two samples of request key 77 at positions 0 and 3, against the sum written out."""
    runner = Runner(["0_a", "1_a"], {"0_a": {EXTRA: (77, 0, 2)}, "1_a": {EXTRA: (77, 0, 2)}}, [0, 3])
    keyed = sampler_of(runner, 2, 5)
    logits = torch.randn(2, 11, generator=torch.Generator().manual_seed(0))
    out = keyed(logits.clone(), metadata(2, temperature=0.7))
    keys = sample_keys(77, np.arange(2))
    wanted = []
    for row, key, position in zip(logits.double() / 0.7, keys, (0, 3), strict=True):
        u, passed = float(uniforms(np.array([key]), np.array([position]))[0]), 0.0
        for token, p in enumerate(row.softmax(-1).tolist()):
            passed += p
            if passed > u:
                wanted.append(token)
                break
    assert out.sampled_token_ids.tolist() == [[t] for t in wanted]
    tokens, logprobs = keyed.take()
    assert tokens[[0, 1], [0, 3]].tolist() == wanted
    table = (logits.double() / 0.7).log_softmax(-1)
    assert logprobs[[0, 1], [0, 3]] == pytest.approx(
        [float(table[i, t]) for i, t in enumerate(wanted)], abs=1e-6
    )
    assert int((tokens != 0).sum() + (logprobs != 0).sum()) <= 4  # every other place is left alone


def test_rows_find_their_slots_in_whatever_order_they_stand() -> None:
    """Slot 4 and 3 samples of one request; its rows change places, and a stranger takes the last slot."""
    requests = {f"{i}_b": {EXTRA: (5, 4, 3)} for i in range(3)} | {"s": None, "one": {EXTRA: (6, 2, 1)}}
    runner = Runner(["2_b", "s", "0_b", "one"], requests, [1, 1, 1, 1])
    keyed = sampler_of(runner, 7, 3)
    keyed.look_up()
    assert keyed.slots.tolist() == [6, 7, 4, 2]
    expected = [
        *sample_keys(5, np.array([2])),
        0,
        *sample_keys(5, np.array([0])),
        *sample_keys(6, np.array([0])),
    ]
    assert keyed.keys.tolist() == [int(k) for k in expected]
    runner.input_batch.req_ids = ["1_b", "2_b"]
    keyed.look_up()
    assert keyed.slots.tolist() == [5, 6]
    runner.requests = {}  # places are remembered for the length of a batch
    runner.input_batch.req_ids = ["2_b", "1_b"]
    keyed.look_up()
    assert keyed.slots.tolist() == [6, 5]


def test_greedy_rows_take_the_largest_and_their_log_probs_are_untempered() -> None:
    runner = Runner(["a"], {"a": {EXTRA: (1, 0, 1)}}, [0])
    keyed = sampler_of(runner, 1, 1)
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    out = keyed(logits.clone(), metadata(1, temperature=0.0, greedy=True))
    assert out.sampled_token_ids.tolist() == [[1]]
    assert keyed.take()[1][0, 0] == pytest.approx(float(logits.log_softmax(-1)[0, 1]), abs=1e-6)


def test_a_greedy_row_among_random_ones_is_greedy() -> None:
    names = {"a": {EXTRA: (1, 0, 1)}, "b": {EXTRA: (2, 1, 1)}}
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
    runner = Runner(["a", "b"], {"a": {EXTRA: (1, 0, 1)}, "b": {EXTRA: (1, 1, 1)}}, [-3, 2])
    assert sampler_of(runner, 2, 4).positions().tolist() == [0, 2]


def test_taking_frees_the_buffers() -> None:
    keyed = sampler_of(Runner([], {}, []), 3, 2)
    tokens, logprobs = keyed.take()
    assert tokens.shape == logprobs.shape == (3, 2)
    assert keyed.tokens.shape == (1, 1)
