"""Cheap checks before any process starts."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gspo_dist.config import (
    ClusterConfig,
    CorrectionConfig,
    GuardConfig,
    ObjectiveConfig,
    RolloutConfig,
    RunConfig,
    SelectionConfig,
)
from gspo_dist.learners import determinism
from gspo_dist.trainer.setup.build import check_run
from gspo_dist.trainer.setup.checks import (
    check_backend,
    check_model,
    check_passed_on,
    check_vocabulary,
    installed,
    load_tokenizer,
    name_age,
    name_selection,
    resolve_device,
    resolve_transport,
)
from gspo_dist.types import Prompt
from tests.unit.trainer.small import config


def changed(c: RunConfig, **sections) -> RunConfig:
    return replace(c, **{name: replace(getattr(c, name), **values) for name, values in sections.items()})


@pytest.mark.parametrize(
    ("device", "engine", "cluster", "expected"),
    [
        ("cuda", "vllm", {}, "nccl"),
        ("cpu", "vllm", {}, "auto"),
        ("cuda", "reference", {}, "auto"),
        ("cuda", "vllm", {"in_process": True}, "shm"),
        ("cuda", "vllm", {"colocated": True}, "auto"),
    ],
)
def test_auto_transport(model, reward_file, tmp_path, device, engine, cluster, expected):
    c = config(model, reward_file, tmp_path)
    c = changed(c, rollout={"engine": engine})
    # the cross-checks of a whole configuration are config's own; here only the choice is of interest
    object.__setattr__(c, "cluster", replace(c.cluster, **({"in_process": False} | cluster)))
    assert resolve_transport(c, device) == expected


def test_nccl_is_refused_where_it_cannot_work(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "rollout.weight_sync.transport=nccl")
    with pytest.raises(ValueError, match=r"transport=nccl needs .* got device cpu, .*; use auto, gloo or"):
        resolve_transport(c, "cpu")


def test_gloo_needs_processes_and_no_gpu(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "rollout.weight_sync.transport=gloo")
    with pytest.raises(
        ValueError, match=r"processes of their own: got cluster\.in_process=true; use auto or"
    ):
        resolve_transport(c, "cpu")
    object.__setattr__(c, "cluster", replace(c.cluster, in_process=False))
    assert [resolve_transport(c, device) for device in ("cpu", "cuda")] == ["gloo", "gloo"]


def test_the_models_context_holds_prompt_and_completion(model, reward_file, tmp_path):
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    fits = f"rollout.max_completion_tokens={context - 16}"
    budget = f"learner.token_budget={context + 8}"
    assert check_model(config(model, reward_file, tmp_path, fits, budget), str(model)) == 2
    over = f"rollout.max_completion_tokens={context - 15}"
    with pytest.raises(ValueError, match=f"must fit the model's context: got {context + 1} for {context}"):
        check_model(config(model, reward_file, tmp_path, over, budget), str(model))
    # What a length schedule ends with lies below max_completion_tokens, so it cannot pass the context either.
    long = f"rollout.length_schedule=[[1, 4], [2, {context}]]"
    with pytest.raises(ValueError, match=f"got {context} tokens from step 2 on and {context - 16}; raise"):
        config(model, reward_file, tmp_path, fits, budget, long)
    raised, room = f"rollout.max_completion_tokens={context}", f"learner.token_budget={context + 64}"
    longer = config(model, reward_file, tmp_path, raised, room, long)
    with pytest.raises(ValueError, match="must fit the model's context: got"):
        check_model(longer, str(model))


@pytest.mark.parametrize(("device", "cluster"), [("cuda", {"colocated": True}), ("cpu", {})])
def test_nccl_needs_gpus_and_sides_that_share_none(model, reward_file, tmp_path, device, cluster):
    """Either alone is enough to refuse it: GPUs that are shared, and processes without GPUs."""
    c = config(model, reward_file, tmp_path, "rollout.weight_sync.transport=nccl")
    c = changed(c, rollout={"engine": "vllm"})
    object.__setattr__(c, "cluster", replace(c.cluster, in_process=False, **cluster))
    with pytest.raises(ValueError, match=f"needs learner and engines on different GPUs: got device {device}"):
        resolve_transport(c, device)


def test_an_exact_run_is_refused_on_gpus_unless_it_asks_for_them(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path)
    exact = replace(c.learner, consistency="exact")
    object.__setattr__(c, "learner", exact)
    check_backend(c, "cpu", str(model))
    with pytest.raises(ValueError, match=r"consistency=exact is refused with .* got device cuda"):
        check_backend(c, "cuda", str(model))


def test_experts_must_divide_over_the_ranks(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path)
    c = changed(c, cluster={"in_process": False})
    learner = replace(c.learner, backend="deepspeed", world_size=3)
    learner = replace(learner, deepspeed=replace(learner.deepspeed, expert_parallel=3))
    object.__setattr__(c, "learner", learner)
    with pytest.raises(ValueError, match=r"expert_parallel must divide num_experts: got 3 and 8; try 1"):
        check_backend(c, "cpu", str(model))


def test_a_deterministic_run_is_refused_what_cannot_be_repeated(model, reward_file, tmp_path, monkeypatch):
    for name in determinism.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    c = config(model, reward_file, tmp_path, "learner.deterministic=true")
    check_backend(c, "cuda", str(model))
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    check_backend(config(model, reward_file, tmp_path), "cuda", str(model))
    with pytest.raises(ValueError, match=r"needs NCCL_ALGO to be one of Ring, .*: got 'Tree'"):
        check_backend(c, "cuda", str(model))
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    own = "+cluster.env.NVTE_ALLOW_NONDETERMINISTIC_ALGO='1'"
    with pytest.raises(ValueError, match=r"needs NVTE_ALLOW_NONDETERMINISTIC_ALGO to be one of 0: got '1'"):
        check_backend(
            config(model, reward_file, tmp_path, "learner.deterministic=true", own), "cpu", str(model)
        )
    asked = []
    monkeypatch.setattr(determinism, "check", lambda shape, device: asked.append((shape.layers, device)))
    check_backend(c, "cuda", str(model))
    assert asked == [(2, "cuda")]


@pytest.fixture
def dense(model, tmp_path):
    """The model's folder, said to have no experts."""
    dense = tmp_path / "dense"
    dense.mkdir()
    hf = json.loads((model / "config.json").read_text())
    hf |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 16}
    for key in [k for k in hf if "expert" in k or k.startswith(("moe", "router"))]:
        del hf[key]
    (dense / "config.json").write_text(json.dumps(hf))
    for path in model.iterdir():
        if path.name != "config.json":
            (dense / path.name).symlink_to(path)
    return dense


def test_replay_needs_experts(model, dense, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path / "run", "objective=grpo_r3")
    with pytest.raises(
        ValueError, match=r"routing_replay=r3 needs a mixture-of-experts model: Qwen3ForCausalLM"
    ):
        check_model(c, str(dense))


def test_a_gpu_that_is_not_there_is_refused():
    assert resolve_device(ClusterConfig(in_process=True)) == "cpu"
    with pytest.raises(ValueError, match=r"cluster\.device=cuda needs a GPU: torch sees none on this host"):
        resolve_device(ClusterConfig(in_process=True, device="cuda"))


def test_a_cluster_is_asked_where_one_is_joined_and_else_this_host(monkeypatch):
    def start(cluster):
        raise AssertionError("a run of its own starts Ray later")

    monkeypatch.setattr("gspo_dist.actors.session.start_ray", start)
    assert resolve_device(ClusterConfig()) == "cpu"
    assert resolve_device(ClusterConfig(address="auto", in_process=True)) == "cpu"


def test_a_distribution_is_installed_by_its_name():
    assert installed("torch") is True
    assert installed("gspo-dist-has-no-such-part") is False


@pytest.mark.parametrize(("gpus", "auto"), [(0, "cpu"), (1, "cuda"), (8, "cuda")])
def test_the_device_of_a_joined_cluster_is_what_ray_reports(monkeypatch, gpus, auto):
    """Its head, where the command runs, may have no GPU."""
    joined = []
    waited = []
    monkeypatch.setattr("gspo_dist.actors.session.start_ray", joined.append)
    monkeypatch.setattr("gspo_dist.actors.session.await_nodes", lambda c, gpus: waited.append((c, gpus)))
    monkeypatch.setattr("gspo_dist.actors.session.cluster_gpus", lambda: gpus)
    cluster = ClusterConfig(address="auto")
    assert resolve_device(cluster) == auto
    assert joined == [cluster]
    assert waited == [(cluster, False)]  # the CPU build of torch: no GPU host is to come
    if not gpus:
        with pytest.raises(ValueError, match="Ray reports none in the cluster; use cpu or auto"):
            resolve_device(replace(cluster, device="cuda"))


def test_nccl_is_taken_where_it_is_asked_for_and_can_work(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "rollout.weight_sync.transport=nccl")
    c = changed(c, rollout={"engine": "vllm"})
    object.__setattr__(c, "cluster", replace(c.cluster, in_process=False))
    assert resolve_transport(c, "cuda") == "nccl"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_megatrons_knobs_are_checked_for_the_device_and_its_layers_on_a_gpu(
    model, reward_file, tmp_path, monkeypatch, device
):
    asked = []
    layout = "gspo_dist.learners.megatron.layout"
    monkeypatch.setattr(f"{layout}.check_knobs", lambda knobs, gpu: asked.append(("knobs", gpu)))
    monkeypatch.setattr(f"{layout}.check_transformer_engine", lambda: asked.append(("layers",)))
    c = config(model, reward_file, tmp_path)
    object.__setattr__(c, "learner", replace(c.learner, backend="megatron"))
    check_backend(c, device, str(model))
    assert asked == ([("knobs", False)] if device == "cpu" else [("knobs", True), ("layers",)])


def test_a_megatron_layout_must_fit_the_model(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path, "model.self_check=false")
    learner = replace(c.learner, backend="megatron", world_size=3)
    learner = replace(learner, megatron=replace(learner.megatron, pipeline_parallel=3))
    object.__setattr__(c, "learner", learner)
    with pytest.raises(ValueError, match="pipeline_parallel"):  # of two layers
        check_model(c, str(model))


@pytest.mark.parametrize("asked", [True, False])
def test_the_model_is_checked_with_numbers_unless_that_is_declined(
    model, reward_file, tmp_path, monkeypatch, asked
):
    seen = []
    monkeypatch.setattr(
        "gspo_dist.learners.self_check.check_model_numerically", lambda folder, config: seen.append(folder)
    )
    check_model(config(model, reward_file, tmp_path, f"model.self_check={str(asked).lower()}"), str(model))
    assert seen == ([str(model)] if asked else [])


@pytest.mark.parametrize("backend", ["eager", "deepspeed"])
def test_layers_that_packing_would_mix_are_refused_before_anything_starts(
    model, reward_file, tmp_path, backend
):
    """A window: the packed attention has none, so tokens would see further than the model means."""
    windowed = tmp_path / "windowed"
    windowed.mkdir()
    hf = json.loads((model / "config.json").read_text())
    hf |= {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    hf |= {"layer_types": ["sliding_attention"] * hf["num_hidden_layers"]}
    (windowed / "config.json").write_text(json.dumps(hf))
    c = config(model, reward_file, tmp_path / "run")
    object.__setattr__(c, "learner", replace(c.learner, backend=backend))
    with pytest.raises(ValueError, match="layers of kind sliding_attention"):
        check_backend(c, "cpu", str(windowed))


def test_a_dense_model_without_replay_passes_and_has_no_moe_layers(model, dense, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path / "run", "model.self_check=false")
    assert check_model(c, str(dense)) == 0


def test_an_objective_on_what_routers_do_needs_routers(model, dense, reward_file, tmp_path):
    chosen = ("objective=rspo", "objective.old_logprobs=recompute", "model.self_check=false")
    c = config(model, reward_file, tmp_path / "run", *chosen)
    object.__setattr__(c, "objective", replace(c.objective, routing_replay="none"))
    with pytest.raises(ValueError, match=r"^objective rspo needs .*: Qwen3ForCausalLM has no experts; use"):
        check_model(c, str(dense))
    assert check_model(c, str(model)) == 2


def test_a_torn_folder_is_told_before_anything_is_read_of_the_model(model, reward_file, tmp_path):
    c = config(model, reward_file, tmp_path / "run", "model.self_check=false")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    for path in model.glob("*.safetensors*"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=rf"must hold a tokenizer \(tokenizer\.json\): none in {tmp_path}"):
        check_model(c, str(tmp_path))


def test_a_token_that_the_model_has_no_embedding_for_is_refused_with_its_record():
    """A tokenizer of another model, or with tokens added: the embedding would be read past its end."""
    prompts = [Prompt("data.jsonl:1", (3, 98), ""), Prompt("data.jsonl:2", (99, 1), "")]
    check_vocabulary(prompts, 100, "models/mine")
    with pytest.raises(
        ValueError, match=r"^data\.jsonl:2: .* token 99, and the model knows tokens 0 to 98: .*models/mine"
    ):
        check_vocabulary(prompts, 99, "models/mine")


def test_a_torn_tokenizer_is_told_with_its_folder(model, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ValueError, match=rf"^model\.path {tmp_path} must hold a tokenizer.*copy tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("said", "cause"), [("torn\nhere", "torn"), ("", ""), ("x" * 300, "x" * 300), ("x" * 301, "x" * 300)]
)
def test_the_cause_is_the_first_line_and_no_longer_than_a_screen(monkeypatch, said, cause):
    from transformers import AutoTokenizer

    def breaks(folder):
        raise OSError(said)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", breaks)
    with pytest.raises(ValueError, match=f": OSError: {cause}; copy tokenizer.json"):
        load_tokenizer("folder")


@pytest.mark.parametrize(
    ("device", "cuda", "vllm", "waits"),
    [
        ("auto", "13.0", True, True),
        ("auto", "13.0", False, False),  # torch's CUDA build on a CPU host, with the CPU lock
        ("auto", None, True, False),
        ("cuda", None, False, True),
        ("cpu", "13.0", True, False),
    ],
)
def test_gpu_hosts_are_waited_for_where_the_environment_was_made_for_them(
    monkeypatch, device, cuda, vllm, waits
):
    """The head's CPU hosts are there first; taking the CPU then would train a large model on it."""
    waited = []
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("gspo_dist.trainer.setup.checks.installed", lambda name: name == "vllm" and vllm)
    monkeypatch.setattr("gspo_dist.actors.session.start_ray", lambda c: False)
    monkeypatch.setattr("gspo_dist.actors.session.await_nodes", lambda c, gpus: waited.append(gpus))
    monkeypatch.setattr("gspo_dist.actors.session.cluster_gpus", lambda: 8)
    resolve_device(ClusterConfig(address="auto", device=device))
    assert waited == [waits]


@pytest.mark.parametrize(
    ("backend", "section", "passed", "message"),
    [
        ("deepspeed", "deepspeed", {"config": {"zero_optimisation": {}}}, "did you mean 'zero_optimization'"),
        ("megatron", "megatron", {"ddp": {"bucket_sise": 1}}, "did you mean 'bucket_size'"),
    ],
)
def test_a_misspelt_key_of_a_backend_is_told_before_a_model_is_looked_for(
    model, reward_file, tmp_path, backend, section, passed, message
):
    """Other backends' keys are not read."""
    c = config(model, reward_file, tmp_path)
    learner = replace(c.learner, **{section: replace(getattr(c.learner, section), **passed)})
    check_passed_on(learner)
    object.__setattr__(c, "learner", replace(learner, backend=backend))
    object.__setattr__(c, "model", replace(c.model, path=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match=message):
        check_run(c)


def test_a_run_ahead_says_what_its_settings_mean_on_older_tokens(caplog):
    """Each of five settings has a note of its own, and a step that begins nothing ahead says nothing."""
    c = RunConfig(objective=ObjectiveConfig(name="grpo"))
    recomputed = {"old_logprobs": "recompute", "routing_replay": "r3", "guard": GuardConfig(action="off")}
    decoupled = recomputed | {"correction": CorrectionConfig(name="geometric_truncate")}
    of_engines = {"old_logprobs": "rollout", "routing_replay": "none", "guard": GuardConfig(action="warn")}
    for objective, notes in (
        (recomputed, ["the ratio ignores the age", "routes of their own moment"]),
        (decoupled, ["the decoupled objective", "routes of their own moment"]),
        (of_engines, ["the clip sees the age", "the guard rests on fresh tokens"]),
        (of_engines | {"name": "reinforce", "guard": GuardConfig(action="off")}, []),
    ):
        chosen = SimpleNamespace(
            rollout=replace(c.rollout, steps_ahead=2), objective=replace(c.objective, **objective)
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            name_age(chosen)
        said = [message.split(": ")[:2] for message in caplog.messages]
        assert said == [["rollout.steps_ahead=2", note] for note in notes]
        chosen.rollout = c.rollout
        name_age(chosen)
        assert len(caplog.messages) == len(notes)


def test_a_run_says_which_rollouts_train(caplog):
    c = RunConfig(rollout=RolloutConfig(prompts_per_step=4))
    selection = SelectionConfig(degenerate="refill", mask_truncated=True)
    with caplog.at_level(logging.WARNING):
        name_selection(c)
        assert caplog.messages == []
        name_selection(replace(c, objective=replace(c.objective, selection=selection)))
    first, second = caplog.messages
    assert first.startswith(
        "objective.selection (gspo): dynamic sampling: 8 groups are asked for, the first 4"
    )
    assert second == "objective.selection (gspo): completions cut off at the token limit are not trained on"
