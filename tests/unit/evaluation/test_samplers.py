"""Who answers: a run's engine by its protocol, and a real local server of the OpenAI protocol."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.evaluation.problem import Problem
from gspo_dist.evaluation.samplers import Ask, EndpointSampler, EngineSampler, SuitePrompts
from gspo_dist.rollout.engine import Growth, Progress
from gspo_dist.sandbox.http import HttpError
from gspo_dist.types import SamplingSpec
from tests.unit.evaluation.small import suite
from tests.unit.trainer.small import rollout


class Pool:
    """Finishes one completion per call of `advance`."""

    def __init__(self) -> None:
        self.work, self.withdrawn, self.seen = [], 0, []

    def submit(self, work):
        self.work, self.seen = list(work), list(work)

    def advance(self, ticks=None, seconds=None):
        assert seconds
        item = self.work.pop(0)
        done = replace(rollout(0, tokens=[1] * (item.sample + 1)).completion, text=f"t{item.key}")
        return {"engine-0": Progress(1, 1, {item.key: done}, Growth.of({}))}

    def withdraw(self):
        self.withdrawn += 1
        left, self.work = self.work, []
        return left


def digits(count=2, samples=2):
    own = suite(count, samples)
    problems = tuple(
        Problem(p.problem_id, ({"role": "user", "content": "1+1=" * (i + 1)},), "2")
        for i, p in enumerate(own.problems)
    )
    return replace(own, problems=problems)


def prompts(limit=64, too_long="stop"):
    return SuitePrompts(
        build_tokenizer(),
        max_prompt_tokens=limit,
        max_completion_tokens=16,
        template_args={},
        too_long=too_long,
    )


def asks(own):
    return [Ask(i, p, s) for s in range(own.samples) for i, p in enumerate(own.problems)]


def test_engines_get_every_completion_as_work_of_its_own():
    own, pool = digits(), Pool()
    spec = SamplingSpec(n=8, max_tokens=16, seed=5, stop_token_ids=(3,), record_routing=True)
    sampler = EngineSampler(pool, prompts(), spec, name="m", first_id=1000)
    found = [answer for answers in sampler.answers(own, asks(own)) for answer in answers]
    assert [(a.ask.place, a.ask.sample, a.text, a.tokens) for a in found] == [
        (0, 0, "t(1000, 0)", 1),
        (1, 0, "t(1001, 0)", 1),
        (0, 1, "t(1000, 1)", 2),
        (1, 1, "t(1001, 1)", 2),
    ]
    item = pool.seen[0]
    assert item.spec == SamplingSpec(
        n=1, max_tokens=16, temperature=0.5, top_p=0.9, seed=5, stop_token_ids=(3,)
    )
    assert item.prompt.text == "1+1="
    assert pool.withdrawn == 1
    list(
        EngineSampler(pool, prompts(), spec, name="m", first_id=0).answers(
            replace(own, max_tokens=4), asks(own)
        )
    )
    assert pool.seen[0].spec.max_tokens == 4


def test_who_leaves_early_leaves_empty_engines():
    own, pool = digits(), Pool()
    answers = EngineSampler(pool, prompts(), SamplingSpec(1, 16), name="m", first_id=0).answers(
        own, asks(own)
    )
    next(answers)
    answers.close()
    assert (pool.work, pool.withdrawn) == ([], 1)


def test_work_that_no_engine_took_is_withdrawn_too():
    """Else the next collect of a run would find it, and take it for its own."""
    pool = Pool()

    def submit(work):
        pool.work = list(work)
        raise RuntimeError("every engine is dead")

    pool.submit = submit
    sampler = EngineSampler(pool, prompts(), SamplingSpec(1, 16), name="m", first_id=0)
    with pytest.raises(RuntimeError, match="every engine is dead"):
        list(sampler.answers(digits(), asks(digits())))
    assert (pool.work, pool.withdrawn) == ([], 1)


def test_prompts_that_are_too_long_stop_or_count_as_wrong():
    own = digits()
    with pytest.raises(ValueError, match=r"own: 1 of 2 prompts are over rollout\.max_prompt_tokens = 5"):
        prompts(limit=5).check([own])
    prompts(limit=5, too_long="skip").check([own])
    sampler = EngineSampler(Pool(), prompts(5, "skip"), SamplingSpec(1, 16), name="m", first_id=0)
    found = [answer for answers in sampler.answers(own, asks(own)) for answer in answers]
    assert [(a.ask.place, a.finish_reason) for a in found] == [
        (1, "prompt too long"),
        (1, "prompt too long"),
        (0, "stop"),
        (0, "stop"),
    ]
    with pytest.raises(ValueError, match=r"own\.max_tokens must be at most rollout.max_completion_tokens"):
        prompts().check([replace(own, max_tokens=17)])


@pytest.fixture
def server():
    """An endpoint that says what it was asked, and fails as often as `fails` says."""
    state = {"seen": [], "fails": 0}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["seen"].append((self.path, self.headers.get("Authorization"), message))
            status = 200
            if state["fails"] > 0:
                state["fails"] -= 1
                status = 503
            choice = {"message": {"content": message["messages"][-1]["content"]}, "finish_reason": "length"}
            data = json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    own = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=own.serve_forever)
    thread.start()
    state["url"] = f"http://127.0.0.1:{own.server_port}/v1/"
    yield state
    own.shutdown()
    thread.join()
    own.server_close()


def test_an_endpoint_is_asked_for_each_completion(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    server["fails"] = 1
    own = suite(2, 2)
    sampler = EndpointSampler(server["url"], "m7", max_tokens=9, seed=3, concurrency=1)
    found = [answer for answers in sampler.answers(own, asks(own)) for answer in answers]
    assert {(a.ask.place, a.ask.sample, a.text, a.tokens, a.finish_reason) for a in found} == {
        (place, sample, f"question {place}", 7, "length") for place in (0, 1) for sample in (0, 1)
    }
    assert len(server["seen"]) == 5  # one was tried again
    path, key, message = server["seen"][-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    seeds = {m["seed"] for _, _, m in server["seen"]}
    assert len(seeds) == 4  # siblings are no copies
    assert {k: message[k] for k in ("model", "max_tokens", "temperature", "top_p")} == {
        "model": "m7",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
    }


def test_an_endpoint_that_is_down_is_no_wrong_answer(server):
    server["fails"] = 100
    sampler = EndpointSampler(server["url"], "m", max_tokens=9, seed=3, attempts=1)
    with pytest.raises(HttpError, match="gave no usable answer"):
        list(sampler.answers(suite(1, 1), asks(suite(1, 1))))
