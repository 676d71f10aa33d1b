"""Completions in the making inside one vLLM engine: begun or continued, stepped in slices, taken out again.

Each is a vLLM request of its own whose prompt is the prompt and what was sampled before. What the sampler
keeps beside it (sampler.py) is read when a slice ends. The engine is stepped by hand (vllm 0.30.0, engine
core in this process), so nothing runs between two calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gspo_dist.candidates import Candidates
from gspo_dist.rollout.engine import EngineInfo, Growth, Progress
from gspo_dist.rollout.seeds import work_keys
from gspo_dist.routing.trace import RoutingTrace
from gspo_dist.types import Completion, Work, WorkKey

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


@dataclass
class Flight:
    """A completion in the making, as vLLM's request for the rest of it."""

    work: Work
    """As it was submitted."""
    slot: int
    """Its row of the sampler's buffers."""
    internal_id: str
    """vLLM's own name of the request."""
    reported: int
    """Tokens of the completion that were there at the submit, or that a slice has told of."""


class Flights:
    """What one engine has in the making."""

    def __init__(self, llm: LLM, info: EngineInfo, moe_layers: Sequence[int]) -> None:
        """moe_layers: numbers of the layers with routed experts, whose routes are kept."""
        self.llm, self.info, self.moe_layers = llm, info, list(moe_layers)
        self.tokenizer = llm.get_tokenizer()
        self._flights: dict[str, Flight] = {}
        """Name of the request -> the completion, in the order of `submit`."""
        self._free_slots: list[int] = []
        self._slots = self._requests = 0

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def keys(self) -> set[WorkKey]:
        return {flight.work.key for flight in self._flights.values()}

    def submit(self, work: Sequence[Work]) -> None:
        if not work:
            return
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        slots = self._take_slots(
            len(work),
            max(item.spec.max_tokens for item in work),
            max(item.spec.candidates for item in work),
        )
        for item, key, slot in zip(work, work_keys(work), slots, strict=True):
            spec = item.spec
            params = SamplingParams(
                max_tokens=item.left,
                temperature=spec.temperature,
                top_p=spec.top_p,
                stop_token_ids=list(spec.stop_token_ids) or None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={"gspo": (int(key), slot, len(item.so_far))},
                # Routes are kept from the moment of sampling: a prefix that is read again brings no new ones.
                routed_experts_prompt_start=item.known_routes(),
            )
            self._requests += 1
            name = f"work-{self._requests}"
            internal_id = self.llm.llm_engine.add_request(name, {"prompt_token_ids": item.tokens()}, params)
            self._flights[name] = Flight(item, slot, internal_id, len(item.so_far))

    def _take_slots(self, count: int, max_tokens: int, candidates: int) -> list[int]:
        """Rows of the sampler's buffers for `count` more completions; the buffers grow where they must."""
        missing = count - len(self._free_slots)
        if missing > 0:
            self._free_slots += range(self._slots, self._slots + missing)
            self._slots += missing
        self.llm.collective_rpc("gspo_room", args=(self._slots, max_tokens, candidates))
        taken, self._free_slots = self._free_slots[:count], self._free_slots[count:]
        return taken

    def advance(self, ticks: int | None = None, seconds: float | None = None) -> Progress:
        """A tick is one step of vLLM's scheduler: prefills and decodes together."""
        engine = self.llm.llm_engine
        until = None if seconds is None else time.monotonic() + seconds
        done = 0
        outputs: list[RequestOutput] = []
        while engine.has_unfinished_requests() and (ticks is None or done < ticks):
            if until is not None and time.monotonic() >= until:
                break
            outputs += engine.step()
            done += 1
        ended = {output.request_id: output for output in outputs}
        spans = {
            name: (flight.reported, self._length(flight))
            for name, flight in self._flights.items()
            if name not in ended
        }
        spans |= {
            name: (start := len(self._flights[name].work.so_far), start + len(output.outputs[0].token_ids))
            for name, output in ended.items()
        }
        parts = self._read(spans)
        tokens = sum(end - self._flights[name].reported for name, (_, end) in spans.items())
        finished = self._finish(ended, parts)
        growth = Growth.of({flight.work.key: parts[name] for name, flight in self._flights.items()})
        for name, flight in self._flights.items():
            flight.reported = spans[name][1]
        return Progress(done, tokens, finished, growth)

    def _length(self, flight: Flight) -> int:
        """Tokens that an unfinished completion has, those of earlier requests included."""
        state = self.llm.llm_engine.output_processor.request_states[flight.internal_id]
        return len(flight.work.so_far) + state.detokenizer.num_output_tokens()

    def _read(self, spans: Mapping[str, tuple[int, int]]) -> dict[str, Completion]:
        """Tokens start to end of each completion, out of the sampler's buffers."""
        if not spans:
            return {}
        counts = [end - start for start, end in spans.values()]
        slots = np.repeat([self._flights[name].slot for name in spans], counts)
        places = np.concatenate([np.zeros(0, np.int64), *(np.arange(*span) for span in spans.values())])
        at = slots.astype(np.int64), places
        ids, logprobs, versions = self.llm.collective_rpc("gspo_read", args=at)[0]
        cuts = np.cumsum(counts)[:-1]
        columns = (np.split(column, cuts) for column in (ids.astype(np.int64), logprobs, versions))
        candidates = self._read_candidates(spans, at, cuts)
        return {
            name: Completion(
                *(own, np.ones(len(own), np.bool_), own_logprobs, own_versions, "", ""),
                candidates=candidates.get(name),
            )
            for name, own, own_logprobs, own_versions in zip(spans, *columns, strict=True)
        }

    def _read_candidates(
        self, names: Iterable[str], at: tuple[np.ndarray, np.ndarray], cuts: np.ndarray
    ) -> dict[str, Candidates]:
        """The candidates of those completions whose work asks for them, each as many as it asks for."""
        wanted = {name: self._flights[name].work.spec.candidates for name in names}
        if not any(wanted.values()):
            return {}
        found = self.llm.collective_rpc("gspo_read_candidates", args=at)[0]
        ids, logprobs = (np.split(column, cuts) for column in found)
        return {
            name: Candidates(own_ids[:, :k], own_logprobs[:, :k])
            for (name, k), own_ids, own_logprobs in zip(wanted.items(), ids, logprobs, strict=True)
            if k
        }

    def _finish(
        self, ended: Mapping[str, RequestOutput], parts: Mapping[str, Completion]
    ) -> dict[WorkKey, Completion]:
        """The whole completions of requests that ended; nothing is left of them here."""
        if not ended:  # transformers 5 decodes an empty batch as one empty text
            return {}
        whole: dict[WorkKey, Completion] = {}
        for name, output in ended.items():
            item, more, sample = self._flights[name].work, parts[name], output.outputs[0]
            if more.token_ids.tolist() != list(sample.token_ids):
                raise RuntimeError(
                    f"{self.info.name}: sampler and scheduler disagree on the tokens of "
                    f"{item.prompt.prompt_id!r}"
                )
            more = replace(more, finish_reason=str(sample.finish_reason))
            if item.spec.record_routing:
                more = replace(more, routing=self._trace(item, sample.routed_experts, len(more)))
            whole[item.key] = item.so_far.extend(more)
        texts = self.tokenizer.batch_decode([c.token_ids for c in whole.values()], skip_special_tokens=True)
        self._land(ended)
        return {key: replace(c, text=text) for (key, c), text in zip(whole.items(), texts, strict=True)}

    def _land(self, names: Iterable[str]) -> None:
        """Frees what the flights held. The sampler's tables are emptied with the last one."""
        for name in list(names):
            self._free_slots.append(self._flights.pop(name).slot)
        if not self._flights:
            self._free_slots, self._slots = [], 0
            self.llm.collective_rpc("gspo_clear")

    def withdraw(self) -> list[Work]:
        if not self._flights:
            return []
        engine = self.llm.llm_engine
        spans = {name: (len(f.work.so_far), self._length(f)) for name, f in self._flights.items()}
        states = [engine.output_processor.request_states[f.internal_id] for f in self._flights.values()]
        routes = [state.routed_experts_chunks for state in states]
        engine.abort_request(list(self._flights))
        engine.step()  # the scheduler tells the workers what to forget
        left = []
        for (name, more), chunks in zip(self._read(spans).items(), routes, strict=True):
            item = self._flights[name].work
            if item.spec.record_routing and len(more):
                more = replace(more, routing=self._trace(item, np.concatenate(chunks), len(more)))
            left.append(item.extended(more) if len(more) else item)
        self._land(spans)
        return left

    def _trace(self, item: Work, rows: np.ndarray | None, sampled: int) -> RoutingTrace:
        """vLLM's ids [rows, all layers, top_k] of the tokens that had no routes yet, as a trace over the MoE
        layers of the whole sequence. The last token has no row.

        Example: a prompt of 3 and a completion of 2 tokens come as 4 rows, of which a model with a dense
        layer 0 and two MoE layers keeps the columns 1 and 2. The trace has 5 rows, the last unknown.
        """
        total = len(item.prompt.token_ids) + len(item.so_far) + sampled
        wanted = total - 1 - item.known_routes()
        if rows is None or len(rows) != wanted:
            raise RuntimeError(
                f"{self.info.name} returned routes for {0 if rows is None else len(rows)} of the "
                f"{wanted} tokens it ran of prompt {item.prompt.prompt_id!r}"
            )
        experts = rows[:, self.moe_layers]
        if item.so_far.routing is None:
            return RoutingTrace.from_engine(experts, total, self.info.num_experts)
        return item.so_far.routing.continued(experts, total)
