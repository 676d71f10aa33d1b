"""A model as judge: vLLM's own OpenAI server, a process of its own, with a model whose replies are known."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from gspo_dist.config import RewardConfig
from gspo_dist.rewards.pool import LocalRewardPool
from gspo_dist.types import Completion, Prompt

WORDS = [
    "<eos>",
    "<unk>",
    "right",
    "yes",
    "[[1]]",
    "wrong",
    "no",
    "[[0]]",
    "half",
    "[[0.5]]",
    "perhaps",
    "hm",
]
NEXT = {
    "right": "yes", "yes": "[[1]]", "wrong": "no", "no": "[[0]]", "half": "[[0.5]]", "perhaps": "hm",
    "[[1]]": "<eos>", "[[0]]": "<eos>", "[[0.5]]": "<eos>", "hm": "<eos>", "<unk>": "<eos>", "<eos>": "<eos>",
}  # fmt: skip


def write_judge(folder: Path) -> None:
    """A Qwen3 whose layers add nothing: the last word alone says the next one, as NEXT has it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=32, num_hidden_layers=1, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    layer, words = model.model.layers[0], {word: i for i, word in enumerate(WORDS)}
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), 64))
        model.lm_head.weight.zero_()
        for word, after in NEXT.items():
            model.lm_head.weight[words[after], words[word]] = 1.0
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def served(folder: Path, scratch: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """vLLM's server with the model of the folder, once it is up, and its address."""
    port, log = free_port(), scratch / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}"),
        *("--served-model-name=judge", "--host=127.0.0.1", f"--port={port}", "--dtype=float32"),
        *("--max-model-len=64", "--max-num-seqs=8", "--enforce-eager"),
        *("--kv-cache-memory-bytes=4000000", "--gpu-memory-utilization=0.05"),
    ]
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker in the process of the engine: one start less
        "TMPDIR": str(scratch),  # for sockets, which a server that is killed leaves behind
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | env, start_new_session=True
        )
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        started = psutil.Process(server.pid).children(recursive=True)
        yield server, f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            started = psutil.Process(server.pid).children(recursive=True)
            server.kill()
            server.wait()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                # multiprocessing's tracker ends by itself, after it has removed what killed ones have left.
                if "resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()
        _, alive = psutil.wait_procs(started, timeout=30)
        assert not alive


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def pool_of(url: str, **others) -> LocalRewardPool:
    options = {"url": url, "model": "judge", "template": "{question} {completion}", "max_tokens": 8}
    error_reward = others.pop("error_reward", None)
    return LocalRewardPool(
        RewardConfig(function="judge", options=options | others, error_reward=error_reward)
    )


def item(number: int, text: str):
    ones = np.ones(1)
    return number, Prompt(f"p{number}", (1,), "It is"), Completion(ones, ones, ones, ones, "stop", text)


SAID = {  # what is judged -> the reward, and whether the judge's reply had no verdict
    "right": (1.0, 0.0),
    "wrong": (0.0, 0.0),
    "half": (0.5, 0.0),
    "perhaps": (0.0, 1.0),
    "I am right": (1.0, 0.0),
    "<think>right</think> wrong": (0.0, 0.0),
    "who knows": (0.0, 1.0),
}


def test_a_served_model_judges_and_is_missed_when_it_hangs_or_dies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    write_judge(folder)
    asked = [item(number, text) for number, text in enumerate(SAID)] * 4  # more than it takes at a time
    # A short path: that of a socket has at most 107 characters.
    with served(folder, tmp_path_factory.mktemp("s")) as (server, url), contextlib.ExitStack() as closing:
        patient = pool_of(url)
        closing.callback(patient.close)
        hasty = pool_of(url, request_s=0.5, attempts=1, error_reward=-0.25)
        closing.callback(hasty.close)
        patient.start()
        hasty.start()
        verdicts = [(verdict.reward, verdict.parts["unreadable"]) for verdict in patient.judge(asked)]
        assert verdicts == [*SAID.values()] * 4

        missed = (-0.25, {"error": 1.0})
        server.send_signal(signal.SIGSTOP)
        assert [(v.reward, v.parts) for v in hasty.judge(asked[:2])] == [missed] * 2
        server.send_signal(signal.SIGCONT)
        assert [v.reward for v in patient.judge(asked[:2])] == [1.0, 0.0]

        server.kill()
        server.wait()
        assert [(v.reward, v.parts) for v in hasty.judge(asked[:2])] == [missed] * 2
