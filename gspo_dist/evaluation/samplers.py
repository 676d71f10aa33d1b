"""Who answers the problems of a suite: a run's engines, or a served OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from gspo_dist.data.chat import render
from gspo_dist.data.records import Record
from gspo_dist.evaluation.problem import Problem, Suite
from gspo_dist.rollout.pool import RolloutPool
from gspo_dist.sandbox.http import HttpError, post_json
from gspo_dist.types import Prompt, SamplingSpec, Work

SLICE_S = 2.0
"""Seconds that the engines sample between two looks at what is finished."""
API_KEY = "OPENAI_API_KEY"
"""Environment variable with the key of an endpoint that asks for one."""


class Ask(NamedTuple):
    """One completion to get."""

    place: int
    """The problem's place in its suite."""
    problem: Problem
    sample: int


class Answer(NamedTuple):
    """One completion."""

    ask: Ask
    text: str
    tokens: int
    finish_reason: str
    """stop | length | ...; `prompt too long` where it was not asked."""


class Sampler(Protocol):
    """Answers asks."""

    name: str
    """What answers, for the result: a model's folder, or an address and a model's name."""

    def answers(self, suite: Suite, asks: Sequence[Ask]) -> Iterator[list[Answer]]:
        """The answers as they come, perhaps none at a time. Leaving the iterator ends what is under way.

        The same ask gets the same answer where the sampler can promise it.
        """
        ...


class SuitePrompts:
    """Problems as a model's tokens."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        template_args: Mapping[str, Any],
        too_long: str = "stop",
    ) -> None:
        """too_long: stop or skip, what is done about a prompt over `max_prompt_tokens`."""
        self.tokenizer, self.template_args, self.too_long = tokenizer, template_args, too_long
        self.max_prompt_tokens, self.max_completion_tokens = max_prompt_tokens, max_completion_tokens

    def of(self, suite: Suite, problem: Problem) -> Prompt:
        """The problem's tokens: by the chat template, or as one text for a tokenizer without one."""
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        where = f"suite {suite.name}, problem {problem.problem_id}"
        record = Record(where, list(problem.messages) if chat else problem.text, problem.problem_id)
        text, token_ids = render(
            record,
            self.tokenizer,
            chat_template=chat,
            system_prompt=None,
            template_args=self.template_args if chat else None,
        )
        return Prompt(where, token_ids, text)

    def fits(self, prompt: Prompt) -> bool:
        return len(prompt.token_ids) <= self.max_prompt_tokens

    def check(self, suites: Sequence[Suite]) -> None:
        """Raises ValueError for a prompt or a completion that the engines could not take."""
        longest = self.max_completion_tokens
        for suite in suites:
            if suite.max_tokens is not None and suite.max_tokens > longest:
                raise ValueError(
                    f"evaluation.options.{suite.name}.max_tokens must be at most "
                    f"rollout.max_completion_tokens: got {suite.max_tokens} and {longest}; raise the latter"
                )
            lengths = [len(self.of(suite, problem).token_ids) for problem in suite.problems]
            over = [length for length in lengths if length > self.max_prompt_tokens]
            if over and self.too_long == "stop":
                raise ValueError(
                    f"suite {suite.name}: {len(over)} of {len(lengths)} prompts are over "
                    f"rollout.max_prompt_tokens = {self.max_prompt_tokens}, the longest with {max(over)} "
                    "tokens; raise it, or set data.too_long=skip, which counts them as wrong"
                )


class EngineSampler:
    """A run's engines. The random numbers of an answer depend on seed, problem and sample alone."""

    def __init__(
        self, pool: RolloutPool, prompts: SuitePrompts, spec: SamplingSpec, *, name: str, first_id: int
    ) -> None:
        """spec: seed, stop tokens and longest completion of the run. first_id: where request ids start."""
        self.pool, self.prompts, self.spec, self.name, self.first_id = pool, prompts, spec, name, first_id

    def answers(self, suite: Suite, asks: Sequence[Ask]) -> Iterator[list[Answer]]:
        spec = replace(
            self.spec,
            n=1,  # each completion is asked for by itself
            max_tokens=suite.max_tokens or self.spec.max_tokens,
            temperature=suite.temperature,
            top_p=suite.top_p,
            record_routing=False,
            candidates=0,
        )
        prompts = {ask.place: self.prompts.of(suite, ask.problem) for ask in asks}
        refused = [ask for ask in asks if not self.prompts.fits(prompts[ask.place])]
        if refused:
            yield [Answer(ask, "", 0, "prompt too long") for ask in refused]
        work = {
            (self.first_id + ask.place, ask.sample): ask
            for ask in asks
            if self.prompts.fits(prompts[ask.place])
        }
        try:
            self.pool.submit([Work(*key, prompts[ask.place], spec) for key, ask in work.items()])
            while work:
                finished = [p.finished for p in self.pool.advance(seconds=SLICE_S).values()]
                yield [
                    Answer(work.pop(key), done.text, len(done), done.finish_reason)
                    for own in finished
                    for key, done in own.items()
                ]
        finally:
            self.pool.withdraw()


class EndpointSampler:
    """An OpenAI-compatible endpoint: POST URL/chat/completions for each completion, many at a time."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        max_tokens: int,
        seed: int,
        concurrency: int = 32,
        request_s: float = 3600.0,
        attempts: int = 5,
    ) -> None:
        self.url, self.model, self.max_tokens, self.seed = url.rstrip("/"), model, max_tokens, seed
        self.concurrency, self.request_s, self.attempts = concurrency, request_s, attempts
        key = os.environ.get(API_KEY)
        self.headers = {"Authorization": f"Bearer {key}"} if key else None
        self.name = f"{model} at {self.url}"

    def answers(self, suite: Suite, asks: Sequence[Ask]) -> Iterator[list[Answer]]:
        threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        try:
            for done in as_completed([threads.submit(self.answer, suite, ask) for ask in asks]):
                yield [done.result()]
        finally:
            threads.shutdown(cancel_futures=True)

    def answer(self, suite: Suite, ask: Ask) -> Answer:
        """One completion. Raises HttpError where the endpoint gives none after all attempts."""
        message = {
            "model": self.model,
            "messages": [dict(one) for one in ask.problem.messages],
            "max_tokens": suite.max_tokens or self.max_tokens,
            "temperature": suite.temperature,
            "top_p": suite.top_p,
            # One seed for each completion: siblings must not be copies of one another.
            "seed": (self.seed * 1_000_003 + ask.place * 1009 + ask.sample) % 2**31,
        }
        address = f"{self.url}/chat/completions"
        found = post_json(address, message, self.request_s, self.attempts, self.headers)
        try:
            choice = found["choices"][0]
            text = str(choice["message"]["content"] or "")
            tokens = int((found.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError) as error:
            raise HttpError(f"{address} must answer with choices: got {str(found)[:200]}") from error
        return Answer(ask, text, tokens, str(choice.get("finish_reason") or ""))
