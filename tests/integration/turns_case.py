"""Episodes with a real vLLM engine, in a process of their own. Prints one JSON object. Run by the integration
tests: python turns_case.py CASE FOLDER     (CASE: a function below; FOLDER: scratch for models)
"""

import json
import os
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm_case import hf_logprobs, hf_routes, make_engine, make_model, prompts

from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments.pool import LocalEnvironmentPool
from gspo_dist.rollout.engine import group_work
from gspo_dist.rollout.pool import LocalRolloutPool
from gspo_dist.rollout.turns import Bridge
from gspo_dist.trainer.clockwork import Clockwork
from gspo_dist.trainer.episodes import Episodes, play
from gspo_dist.trainer.pipeline import Collector
from gspo_dist.types import SamplingSpec

TOOL = '''
import os, pathlib, time
from gspo_dist.environments.protocol import Observation

class Tool:
    """The first call of all waits until the test opens the gate."""

    def __init__(self, folder):
        self.folder, self.turns = pathlib.Path(folder), 0

    def reset(self, prompt, seed):
        return f"t{200 + seed % 100} t3"

    def step(self, turn):
        self.turns += 1
        if self.turns == 1 and self._is_first():
            while not (self.folder / "open").exists():
                time.sleep(0.01)
        return Observation(f"t{300 + self.turns} t{400 + len(turn)}", reward=1.0, done=self.turns == 4)

    def _is_first(self):
        try:
            os.close(os.open(self.folder / "held", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True
'''

SERVER = """
from mcp.server.mcpserver import MCPServer

server = MCPServer("sums")

@server.tool()
def add(a: int, b: int) -> str:
    return f"t{a + b}"

server.run()
"""
BLOCKS = 14
"""Of 32 tokens, in the KV cache: an episode of 150 tokens needs five, and vLLM keeps one for itself."""
SPEC = SamplingSpec(3, 96, seed=7, record_routing=True, stop_token_ids=tuple(range(2, 100)))


def turns(folder):
    """One engine and three kinds of episodes: a slow tool, an MCP server's tools, more than fits."""
    model = make_model(folder)
    (folder / "tool.py").write_text(TOOL)
    (folder / "server.py").write_text(SERVER)
    knobs = {"factory": f"{folder}/tool.py:Tool", "options": {"folder": str(folder)}, "workers": 2}
    environment = EnvironmentConfig(**knobs, timeout_s=60.0)
    served = EnvironmentConfig(tools=(f"mcp:{sys.executable} {folder}/server.py",), max_turns=3)
    # Their processes import while the engine starts.
    tools, servers = LocalEnvironmentPool(environment), LocalEnvironmentPool(served)
    cache = BLOCKS * 32 * 1024 / 2**30
    settings = {"max_completion_tokens": 96, "prompts_per_step": 2, "group_size": 3, "steps_ahead": 1}
    engine = make_engine(folder, record_routing=True, kv_cache_gib=cache, **settings)
    tools.start()
    servers.start()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    episodes = Episodes(environment, tools, Bridge(tokenizer, limit=8))
    calls = Episodes(served, servers, Bridge(calling_tokenizer(), limit=8))
    result = {
        "slow": slow_tool(folder, model, engine, episodes),
        "mcp": mcp_server(model, engine, calls),
        "crowded": crowded(model, engine, episodes),
    }
    tools.close()
    servers.close()
    engine.close()
    return result


def slow_tool(folder, model, engine, episodes):
    """Two steps of episodes with K = 1, while one of them waits for its tool until engines have gone on."""
    pool = LocalRolloutPool(engine)
    advance, held = pool.advance, [0, 0]

    def watched(*asked):
        """Opens the gate when the engine has done ten ticks, and ten tokens, while a tool was waiting."""
        is_held = (folder / "held").exists() and not (folder / "open").exists()
        told = advance(*asked)
        if is_held:
            for progress in told.values():
                held[0], held[1] = held[0] + progress.ticks, held[1] + progress.tokens
            if min(held) >= 10:
                (folder / "open").touch()
        return told

    pool.advance = watched
    collector = Collector(
        engine.config, 2, pool, None, Cursor(), lambda step: SPEC, Clockwork(engine.config), episodes=episodes
    )
    rollouts = []
    for step in (1, 2):
        collector.sample(step)
        rollouts += collector.judged(step)
        collector.pause()
    found = against_hf(model, episodes, [(r.prompt, r.completion) for r in rollouts])
    was_held = (folder / "held").exists()
    return found | {"was_held": was_held, "held_ticks": held[0], "held_tokens": held[1]}


def mcp_server(model, engine, episodes):
    """Six episodes whose turns end with calls of an MCP server's tool."""
    asked = prompts((11, 40), seed=3)
    groups = play(LocalRolloutPool(engine), episodes, asked, replace(SPEC, max_tokens=64), [90, 91])
    pairs = [(prompt, c) for prompt, group in zip(asked, groups, strict=True) for c in group]
    answers = [
        # The last token of a turn that calls is the call, and its number the sum's first part.
        [turn.observation, f"t{int(c.token_ids[turn.end - 1]) + 300}", turn.parts.get("tool_errors")]
        for _, c in pairs
        for turn in c.turns
        if turn.parts.get("tool_calls")
    ]
    return against_hf(model, episodes, pairs) | {"answers": answers}


def crowded(model, engine, episodes):
    """Twelve episodes at a time in a cache that holds five, and then two at a time, which fit."""
    pool, asked, ids = LocalRolloutPool(engine), prompts(range(40, 52, 2), seed=5), list(range(50, 56))
    spec = replace(SPEC, n=2, stop_token_ids=tuple(range(2, 25)))
    lost = count_preemptions(engine)
    groups = turn_by_turn(pool, episodes, asked, spec, ids)
    while_crowded, lost[:] = list(lost), []
    alone = [
        turn_by_turn(pool, episodes, [prompt], spec, [i])[0] for prompt, i in zip(asked, ids, strict=True)
    ]
    same_tokens, gap, told, differ = True, 0.0, 0, 0
    for one, other in zip(chain(*groups), chain(*alone), strict=True):
        same_tokens &= np.array_equal(one.token_ids, other.token_ids)
        same_tokens &= np.array_equal(one.loss_mask, other.loss_mask)
        gap = max(gap, float(np.abs(one.logprobs - other.logprobs).max()))
        unsaid = np.flatnonzero(~one.loss_mask) - len(one)  # from the end: routes begin with the prompt's
        told += len(unsaid)
        routes = [np.sort(c.routing.expert_ids[unsaid], axis=-1) for c in (one, other)]
        differ += int((routes[0] != routes[1]).sum())
    pairs = [(prompt, c) for prompt, group in zip(asked, groups, strict=True) for c in group]
    return against_hf(model, episodes, pairs) | {
        "environment_tokens_lost": sum(while_crowded),
        "preemptions_alone": len(lost),
        "same_tokens": bool(same_tokens),
        "logprob_gap": gap,
        "environment_tokens": told,
        "differing_routes": differ,
    }


def turn_by_turn(pool, episodes, asked, spec, group_ids):
    """As `play`, but no turn begins before all others have ended: no clock decides who meets whom."""
    work, finished = group_work(asked, spec, group_ids), {}
    pool.submit(episodes.take(work))
    while len(finished) < len(work):
        for progress in pool.advance(ticks=1000).values():
            finished |= episodes.turned(progress.finished)
        moved = episodes.settle()
        finished |= moved.finished
        pool.submit(moved.ready)
    return [[finished[group, sample] for sample in range(spec.n)] for group in group_ids]


def count_preemptions(engine):
    """Grows with every request that the engine takes out to run it again later, by one number: how many
    tokens of an environment it had.
    """
    scheduler, lost = engine.llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def counted(request, *args, **kwargs):
        flight = next(f for f in engine.flights._flights.values() if f.internal_id == request.request_id)
        lost.append(int((~flight.work.so_far.loss_mask).sum()))
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return lost


def calling_tokenizer():
    """Tokens 2 to 99, which end a turn, are calls of a tool: a random policy makes many."""
    call = '<tool_call>{{"name":"add","arguments":{{"a":{i},"b":300}}}}</tool_call>'
    words = {call.format(i=i) if 2 <= i < 100 else f"t{i}": i for i in range(500)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t1")


def against_hf(model, episodes, pairs):
    """Log-probs and routes of whole episodes against HF's, and tokens that are not whose the turns say."""
    gaps, wrong, unsaid = [], 0, 0
    for prompt, c in pairs:
        row = [*prompt.token_ids, *c.token_ids.tolist()]
        wanted = hf_logprobs(model, row)[len(prompt.token_ids) - 1 :]
        gaps.append(np.abs((c.logprobs - wanted)[c.loss_mask]).max())
        wrong += int((np.sort(c.routing.expert_ids, axis=-1)[:-1] != hf_routes(model, row)[:-1]).sum())
        wrong += int((~c.routing.known[:-1]).sum())
        for turn in c.turns:
            told = turn.observation if turn.stop > turn.end else ""
            wanted_ids = episodes.bridge.tokenizer(told)["input_ids"]
            unsaid += c.token_ids[turn.end : turn.stop].tolist() != wanted_ids
            unsaid += bool(c.loss_mask[turn.end : turn.stop].any())
            unsaid += int((~c.loss_mask[turn.start : turn.end]).sum())
    return {
        "gap": float(max(gaps)),
        "wrong_routes": wrong,
        "unsaid": unsaid,
        "turns": [len(c.turns) - 1 for _, c in pairs],
        "failed": [turn.failed for _, c in pairs for turn in c.turns if turn.failed],
    }


class Cursor:
    """Prompts of 9, 16, 23, ... tokens."""

    taken = 0

    def next(self, count):
        self.taken += count
        return prompts(range(9, 9 + 7 * self.taken, 7))[-count:]

    def state_dict(self):
        return {"taken": self.taken}


if __name__ == "__main__":
    result = globals()[sys.argv[1]](Path(sys.argv[2]))
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)
