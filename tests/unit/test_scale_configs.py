"""The comparison on Qwen3-30B-A3B: every arm on every layout composes, divides, fits, and uses all GPUs.

Numbers below are worked out by hand from the model card's sizes (48 layers, hidden 2048, 32 / 4 heads of
128, 128 experts of 768, vocabulary 151,936), in parameters:
    attention 48 x (2048 (4096 + 2 x 512) + 4096 x 2048) = 905,969,664
    tables 2 x 151,936 x 2048 = 622,329,856
    norms 48 x (2 x 2048 + 2 x 128) + 2048 = 210,944
    routers 48 x 2048 x 128 = 12,582,912
    experts 48 x 128 x 3 x 2048 x 768 = 28,991,029,248, so 3,623,878,656 per rank at expert_parallel 8
"""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from gspo_dist.cli.compose import conf_dir, run_config
from gspo_dist.config.mapping import to_mapping
from gspo_dist.learners.megatron.architecture import from_hf
from gspo_dist.learners.megatron.layout import check_layout
from gspo_dist.models.shape import find_model
from gspo_dist.planner import find_gpu, plan, read_run
from gspo_dist.planner.placement import where
from gspo_dist.studies.study import load_study

ARMS = ["gspo", "grpo", "grpo_r2", "grpo_r3"]
STUDY_ARMS = ["gspo", "gspo_recompute", "gspo_r3", "grpo", "grpo_r2", "grpo_r3"]
NODES = [2, 4, 8]
PATHS = ["model.path=/shared/model", "data.train=/shared/train.jsonl", "data.heldout=/shared/heldout.jsonl"]
CONFIG_JSON = {  # the published config.json, what decides shapes
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "attention_bias": False,
}
EXPERTS_A_RANK = 3_623_878_656


@functools.cache
def arm(name: str, nodes: int):
    return run_config([f"experiment=qwen3_30b_a3b/{name}", f"layout=qwen3_30b_a3b_{nodes}x8", *PATHS])


def planned(config, nodes: int):
    learner, engine, _ = read_run(config)
    return learner, engine, plan(config, find_model("Qwen3-30B-A3B"), find_gpu("H100"), nodes, 8)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_fits_every_layout_and_leaves_no_gpu_idle(name, nodes):
    config = arm(name, nodes)
    layout = check_layout(config.learner.megatron, from_hf(CONFIG_JSON), config.learner.world_size)
    assert layout.data * layout.tensor == config.learner.world_size == nodes * 4
    assert layout.expert <= 8  # tokens of a MoE layer stay within a node
    learner, engine, result = planned(config, nodes)
    assert result.problems == ()
    assert learner.world_size + engine.engines * engine.tensor_parallel == nodes * 8
    half = "node {}" if nodes == 2 else "nodes {}"
    first, second = {2: ("1", "2"), 4: ("1-2", "3-4"), 8: ("1-4", "5-8")}[nodes]
    assert where(learner, engine, nodes, 8) == [
        f"learner: {nodes * 4} ranks of 1 GPU on {half.format(first)}",
        f"engines: {nodes} engines of 4 GPUs, on {half.format(second)}",
        "free: 0 GPUs",
    ]
    assert result.learner.free > 20 << 30  # skewed experts and fragments need room: a quarter of the GPU
    assert (config.cluster.address, config.plan.nodes) == ("auto", nodes)


@pytest.mark.parametrize(
    ("nodes", "dense", "optimizer"),
    [
        # dense: (905,969,664 + 622,329,856) / tensor_parallel + 210,944 + 12,582,912
        # optimizer: 12 bytes x (dense / data-parallel ranks + experts / expert-data-parallel ranks)
        (2, 776_943_616, 12 * (776_943_616 // 4 + EXPERTS_A_RANK)),  # in host memory
        (4, 776_943_616, 12 * (776_943_616 // 8 + EXPERTS_A_RANK // 2)),
        (8, 1_541_093_376, 12 * (1_541_093_376 // 32 + EXPERTS_A_RANK // 4)),
    ],
)
def test_learner_states_are_those_worked_out_by_hand(nodes, dense, optimizer):
    _, _, result = planned(arm("gspo", nodes), nodes)
    assert result.learner.bytes_of("weights") == 2 * (dense + EXPERTS_A_RANK)
    assert result.learner.bytes_of("gradients") == 4 * (dense + EXPERTS_A_RANK)
    if nodes == 2:
        assert result.learner.bytes_of("optimizer") == 0
        assert result.host.bytes_of("offloaded optimizer") == 8 * optimizer
        assert (
            result.host.bytes_of("offloaded gradients") == 8 * optimizer // 3
        )  # 4 bytes where states take 12
    else:
        assert result.learner.bytes_of("optimizer") == optimizer


@pytest.mark.parametrize("nodes", NODES)
def test_an_engine_gpu_is_filled_as_worked_out_by_hand(nodes):
    _, engine, result = planned(arm("grpo_r3", nodes), nodes)
    assert engine.tensor_parallel == 4
    # all but norms and routers is cut in four; bf16
    whole = 210_944 + 12_582_912
    assert result.engine.table.bytes_of("weights") == 2 * ((30_532_122_624 - whole) // 4 + whole)
    # one of four heads of keys and values: 2 x 48 layers x 128 x 2 bytes a token
    assert result.engine.table.bytes_of("kv_cache") == result.engine.kv_tokens * 24_576
    assert result.engine.concurrency > 200  # sequences of 10,240 tokens decoded at once
    # R3: 48 layers x 8 experts x 1 byte for each of 4096 rollouts of 10,240 tokens
    assert result.host.bytes_of("routing") == 4096 * 10_240 * 385


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_fits_four_nodes_of_which_all_gpus_learn_and_sample(name):
    """By hand: two engines of 4 GPUs a node, and 8 ranks that move 2 bytes of every weight, and of states 12
    over 4 replicas of an expert and 32 of all else."""
    config = run_config([f"experiment=qwen3_30b_a3b/{name}", "layout=qwen3_30b_a3b_4x8_colocated", *PATHS])
    check_layout(config.learner.megatron, from_hf(CONFIG_JSON), config.learner.world_size)
    learner, engine, result = planned(config, 4)
    assert (result.problems, result.step.gpus) == ((), 32)
    assert (
        where(learner, engine, 4, 8)[1] == "engines: 8 engines of 4 GPUs, on the GPUs of the first 32 ranks"
    )
    dense = 1_541_093_376
    assert result.host.bytes_of("parked weights") == 8 * 2 * (dense + EXPERTS_A_RANK)
    states = 8 * 12 * (dense / 32 + EXPERTS_A_RANK / 4)
    assert result.host.bytes_of("parked optimizer") == pytest.approx(states, abs=100)
    assert result.host.bytes_of("sleeping engines") == 8 * result.engine.table.bytes_of("weights")
    assert result.learner.free > 20 << 30


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_fits_four_nodes_with_the_deepspeed_learner(name):
    """ZeRO 2: gradients are shared like the states, 12 bytes over 2 replicas of an expert, 16 of all else."""
    config = run_config([f"experiment=qwen3_30b_a3b/{name}", "layout=qwen3_30b_a3b_4x8_deepspeed", *PATHS])
    learner, engine, result = planned(config, 4)
    assert (learner.backend, learner.zero_stage, result.problems) == ("deepspeed", 2, ())
    assert where(learner, engine, 4, 8) == where(*planned(arm(name, 4), 4)[:2], 4, 8)
    dense = 1_541_093_376
    assert result.learner.bytes_of("weights") == 2 * (dense + EXPERTS_A_RANK)
    states = 12 * (dense / 16 + EXPERTS_A_RANK / 2)
    assert result.learner.bytes_of("optimizer") == pytest.approx(states, abs=100)
    assert result.learner.free > 20 << 30


@pytest.mark.parametrize("nodes", NODES)
def test_a_layout_changes_where_a_run_runs_and_nothing_else(nodes):
    placed = {
        "learner.world_size",
        "learner.token_budget",
        "learner.megatron.tensor_parallel",
        "learner.megatron.optimizer_cpu_offload",
        "rollout.engines",
        "plan.nodes",
    }

    def flat(node, prefix=""):
        for key, value in node.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    ours, base = dict(flat(to_mapping(arm("gspo", nodes)))), dict(flat(to_mapping(arm("gspo", 4))))
    assert {key for key in base if ours[key] != base[key]} <= placed


def test_the_arms_are_the_papers():
    configs = {name: arm(name, 4) for name in ARMS}
    for config in configs.values():
        assert config.mini_batches == 4
        assert (config.learner.precision, config.rollout.precision) == ("bf16", "bf16")
        assert config.learner.megatron.router_dtype == "fp32"
        assert config.learner.fp32_head
        assert (config.evaluation.samples, config.evaluation.temperature) == (32, 1.0)
        assert (config.data.train, config.data.heldout) == ("/shared/train.jsonl", "/shared/heldout.jsonl")
        assert config.objective.kl_coef == 0.0
        assert config.reward.function == "math"
    assert configs["gspo"].objective.params == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert (configs["gspo"].objective.old_logprobs, configs["gspo"].objective.routing_replay) == (
        "rollout",
        "none",
    )
    for name, replay in (("grpo", "none"), ("grpo_r2", "r2"), ("grpo_r3", "r3")):
        assert configs[name].objective.params == {"clip_low": 0.2, "clip_high": 0.27}
        assert (configs[name].objective.old_logprobs, configs[name].objective.routing_replay) == (
            "recompute",
            replay,
        )


def read_yaml(path):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


def test_a_study_runs_the_arms_that_the_experiments_name():
    study = load_study(["study=qwen3_30b_a3b", "layout=qwen3_30b_a3b_8x8", *PATHS], conf_dir(), read_yaml)
    assert list(study.arms) == STUDY_ARMS
    assert study.parallel == 1
    assert study.reference == "grpo"
    for name in STUDY_ARMS:
        of_study = to_mapping(run_config(study.run_overrides(name, 0)))
        assert of_study["logger"]["wandb"]["project"] == "gspo_dist"
        assert of_study["logger"]["wandb"]["group"] == "qwen3_30b_a3b"
        assert of_study["logger"]["wandb"]["tags"] == ["qwen3_30b_a3b", name]
        if name in ARMS:
            alone = to_mapping(arm(name, 8))
            own = ("run_dir", "logger")
            assert {k: v for k, v in of_study.items() if k not in own} == {
                k: v for k, v in alone.items() if k not in own
            }


def test_a_run_without_its_paths_stops_before_anything_starts():
    from gspo_dist.data.records import read_file
    from gspo_dist.learners.hf_folder import check_model_folder

    config = run_config(["experiment=qwen3_30b_a3b/gspo"])
    with pytest.raises(ValueError, match=r"give-model\.path"):
        check_model_folder(config.model.path)
    for path in (config.data.train, config.data.heldout):
        with pytest.raises(ValueError, match="data file must exist: give-data"):
            read_file(path, config.data.prompt_key, config.data.answer_key)


@pytest.mark.slow
def test_a_dry_run_shows_every_arm_without_a_gpu_and_without_torch(tmp_path):
    program = (
        "import sys; from gspo_dist.cli.main import main\n"
        "main(['compare', 'study=qwen3_30b_a3b', 'layout=qwen3_30b_a3b_2x8', '--dry-run'])\n"
        "print('heavy:', sorted({'torch', 'ray', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("\n== ")
    assert [part.split("\n")[0] for part in shown[1:]] == STUDY_ARMS
    for part in shown[1:]:
        assert "on 2 x 8 H100-80GB" in part
        assert "\nfits\n" in part
        assert "offloaded optimizer" in part
        assert "kv_cache" in part
    assert done.stdout.endswith("heavy: []\n")
    assert list(tmp_path.iterdir()) == []
