"""experiment=smollm at toy size: a dense Llama is upcycled, trained, replayed and exported in one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gspo_dist.cli.compose import run_config
from gspo_dist.coldstart.upcycle import Upcycling, upcycle
from gspo_dist.config import RunConfig
from tests.unit.trainer.small import go

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWARD = '''
def low(prompt, completion, *, pattern):
    """Something to learn in every group, from a policy that knows nothing."""
    return float(sum(token < 128 for token in completion.token_ids)) / len(completion)
'''


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """Two layers of four experts; bytes as tokens, so that any question can be read."""
    base = tmp_path_factory.mktemp("smollm")
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({b: i for i, b in enumerate([*bytes_, "<end>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = CHAT
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = AutoConfig.for_model("llama", **sizes, **heads, eos_token_id=256, pad_token_id=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(base / "dense")
    tokenizer.save_pretrained(base / "dense")
    upcycle(base / "dense", base / "moe", Upcycling(experts=4))
    return base / "moe"


def run(moe: Path, folder: Path, *extra: str) -> RunConfig:
    """The experiment as it stands, but for sizes, engine, and a reward that a random policy can earn."""
    folder.mkdir()
    (folder / "reward.py").write_text(REWARD)
    return run_config(
        [
            "experiment=smollm",
            "model=local",
            f"model.path={moe}",
            f"run_dir={folder / 'run'}",
            "reward=function",
            f"reward.function='{folder / 'reward.py'}:low'",
            "cluster=in_process",
            "rollout=reference",
            "logger=quiet",
            "steps=2",
            "learner.precision=fp32",
            "rollout.precision=fp32",
            "learner.optimizer.lr=0.003",
            "rollout.prompts_per_step=2",
            "rollout.group_size=4",
            "rollout.max_prompt_tokens=160",
            "rollout.max_completion_tokens=6",
            "rollout.weight_sync.probe_every=1",
            "rollout.weight_sync.probe_tolerance=1e-4",
            "data.options.size=40",
            "data.options.heldout_size=4",
            "evaluation.every=0",
            "evaluation.prompts=4",
            "checkpoint.save_last=false",
            "checkpoint.hf_every=2",
            *extra,
        ]
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["gspo", "grpo_r2", "gspo_r3"])
def test_an_upcycled_model_is_trained_synced_replayed_and_exported(moe, tmp_path, objective):
    config = run(moe, tmp_path / objective, f"objective={objective}")
    _, rows = go(config)
    steps = [row for row in rows if row["step"] > 0]
    assert len(steps) == 2
    assert all(row["sync/probe_mean_abs"] < 1e-4 for row in steps if "sync/probe_mean_abs" in row)
    assert all(np.isfinite(row["learner/grad_norm"]) and row["learner/grad_norm"] > 0 for row in steps)
    sample = json.loads((Path(config.run_dir) / "samples.jsonl").read_text().splitlines()[0])
    assert "<system>Give only the final answer.<user>State the final answer" in json.dumps(sample)
    if objective == "gspo":
        (out,) = (Path(config.run_dir) / "hf").iterdir()
        before, after = weights(moe), weights(out)
        assert before.keys() == after.keys()
        same = [n for n in before if torch.equal(before[n], after[n])]
        assert same == []  # experts, routers and embedding alike have moved
        assert AutoConfig.from_pretrained(out).tie_word_embeddings is True


def test_the_experiment_is_the_one_of_the_report():
    config = run_config(["experiment=smollm"])
    assert (config.model.recipe, config.data.train, config.data.chat_template) == (
        "smollm",
        "reasoning_gym:chain_sum",
        True,
    )
    assert config.data.heldout == config.data.train
