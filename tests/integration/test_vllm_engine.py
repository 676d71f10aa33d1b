"""A real vLLM engine against the same model in HF, float32: sampling, log-probs, routes, repeatability."""

import pytest

from tests.integration.run_vllm_case import run_case


@pytest.fixture(scope="module")
def generation(tmp_path_factory):
    return run_case("generation", tmp_path_factory.mktemp("generation"))


def test_logprobs_are_the_tempered_models(generation):
    assert generation["gap"] < 1e-5
    assert generation["dtypes"] == ["float32", "int32"]


def test_score_is_the_tempered_model(generation):
    assert generation["score_gap"] < 1e-5


def test_routes_are_hf_routes_with_and_without_prefix_cache_hits_and_skip_dense_layers(generation):
    """32 completions over 3 layers of which layer 1 is dense: not one expert id differs."""
    assert generation["wrong_routes"] == 0
    assert generation["unknown_last"]
    assert generation["shape"] == [2, 2]
    assert generation["info"] == [8, 2, 2]


def test_completions_repeat_and_do_not_depend_on_company_or_cache(generation):
    assert generation["repeatable"]
    assert generation["alone"]
    assert generation["different"] == 16


def test_greedy_nucleus_stop_tokens_and_text(generation):
    assert generation["greedy"]
    assert generation["nucleus"]
    assert generation["ends"]
    assert generation["text"]
    assert generation["nucleus_mass"] < 1e-5


def test_errors_name_the_prompt_and_the_way_out(generation):
    errors = generation["errors"]
    assert "'p0'" in errors["long"]
    assert "170 + 24" in errors["long"]
    assert "max_prompt_tokens" in errors["long"]
    assert "one request id per prompt: got 1 for 4" in errors["ids"]
    assert "2 to 191 tokens for log-probs: got 192" in errors["logprobs_of"]
    assert "cluster.colocated" in errors["sleep"]
    assert "start_weight_update first" in errors["bucket"]
    assert "none started" in errors["finish"]


def test_vllm_keeps_the_contract_of_every_engine(tmp_path):
    """tests/unit/rollout/contract.py: slices, withdrawals, updates in the middle."""
    assert run_case("contract", tmp_path)["kept"]


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    return run_case("turns", tmp_path_factory.mktemp("turns"), script="turns_case.py")


@pytest.mark.parametrize("kind", ["slow", "mcp", "crowded"])
def test_episodes_of_several_turns_are_hfs(turns, kind):
    """Laws 22 and 25 on a real engine: log-probs, routes, and which tokens are whose."""
    episodes = turns[kind]
    assert episodes["failed"] == []
    assert episodes["gap"] < 1e-5
    assert episodes["wrong_routes"] == 0
    assert episodes["unsaid"] == 0


def test_a_slow_tool_holds_no_engine(turns):
    """One tool answers only after the engine has gone on.

    An engine that waited for it would never do the ten ticks that open its gate. The tool would miss its
    deadline, and its episode would have failed.
    """
    slow = turns["slow"]
    assert slow["was_held"]
    assert slow["held_ticks"] >= 10
    assert slow["held_tokens"] >= 10
    assert len(slow["turns"]) == 12
    assert slow["turns"].count(4) >= 6  # most of them have more than three turns


def test_an_mcp_servers_answers_are_appended(turns):
    served = turns["mcp"]
    assert served["turns"].count(3) >= 3
    assert len(served["answers"]) >= 9
    assert all(answer == wanted and not wrong for answer, wanted, wrong in served["answers"])


def test_preempted_turns_keep_the_routes_of_what_the_environment_said(turns):
    """A KV cache that holds five of twelve episodes: what was read is thrown away and read again."""
    crowded = turns["crowded"]
    assert crowded["environment_tokens_lost"] >= 10
    assert crowded["preemptions_alone"] == 0
    assert crowded["environment_tokens"] >= 30
    assert crowded["same_tokens"]
    assert crowded["logprob_gap"] < 1e-5
    assert crowded["differing_routes"] == 0


def test_sampling_follows_the_models_distribution(tmp_path):
    result = run_case("distribution", tmp_path)
    assert result["cells"] > 50
    assert result["pvalue"] > 1e-3


def test_preemption_changes_nothing(tmp_path):
    """32 completions that need 3,840 tokens of KV cache, in a cache a fraction of that."""
    result = run_case("preemption", tmp_path)
    assert result["kv_tokens"] < 3840 / 2
    assert result["gap"] < 1e-5
    assert result["wrong_routes"] == 0
    assert result["alone"]
