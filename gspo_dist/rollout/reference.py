"""The reference engine: an HF model in float32 on the CPU, which recomputes every prefix for every token.

It is for tests and small models, where it lets the whole loop run under pytest without vLLM. It loads the whole
model in float32 (a model of 30B parameters would take 122 GB) and its time grows with the square of the length,
so it is no engine for a real run, and a dry run does not start it. Like a real engine it takes weight syncs
through shared memory, returns the log-probs of the distribution that it samples from, and records routes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gspo_dist.config import RolloutConfig
from gspo_dist.rollout.engine import EngineInfo, SyncReceipt
from gspo_dist.rollout.seeds import request_key, sample_keys, uniforms
from gspo_dist.routing.trace import RoutingTrace, id_dtype
from gspo_dist.types import Completion, Prompt, SamplingSpec
from gspo_dist.weights.checksum import host_checksum
from gspo_dist.weights.shm import map_bucket
from gspo_dist.weights.stream import NamedTensor, hf_named_weights
from gspo_dist.weights.verify import WeightSyncError


class Policy(Protocol):
    """What the reference engine samples from."""

    vocab_size: int
    num_experts: int
    moe_layers: int
    top_k: int
    eos_ids: frozenset[int]

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Next-token logits [n, V] after rows [n, T] of token ids, all of one length."""
        ...

    def all_logits(self, row: np.ndarray) -> np.ndarray:
        """Logits [T, V] at every position of one row [T]."""
        ...

    def routes(self, row: np.ndarray) -> np.ndarray:
        """Expert ids [T, L, K] of one row [T]."""
        ...

    def load(self, weights: Sequence[NamedTensor]) -> None: ...

    def text(self, token_ids: np.ndarray) -> str: ...


class HFPolicy:
    """An HF causal LM in float32, recomputed from scratch for every token (tiny models only)."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.places = dict(hf_named_weights(self.hf))
        config = self.hf.config
        eos = config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        tokenizer_eos = self.tokenizer.eos_token_id
        self.eos_ids = frozenset(eos + ([] if tokenizer_eos is None else [tokenizer_eos]))
        self.vocab_size = int(config.vocab_size)
        self.routers = [m for m in self.hf.modules() if type(m).__name__.endswith("TopKRouter")]
        self.moe_layers = len(self.routers)
        self.num_experts = int(getattr(config, "num_experts", 0) or 0) if self.routers else 0
        self.top_k = int(getattr(config, "num_experts_per_tok", 0) or 0) if self.routers else 0

    @torch.no_grad()
    def logits(self, rows: np.ndarray) -> np.ndarray:
        return self.hf(torch.from_numpy(rows), use_cache=False, logits_to_keep=1).logits[:, -1].numpy()

    @torch.no_grad()
    def all_logits(self, row: np.ndarray) -> np.ndarray:
        return self.hf(torch.from_numpy(row)[None], use_cache=False).logits[0].numpy()

    def routes(self, row: np.ndarray) -> np.ndarray:
        chosen: list[torch.Tensor] = []
        hooks = [r.register_forward_hook(lambda m, args, out: chosen.append(out[2])) for r in self.routers]
        try:
            self.all_logits(row)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(chosen, dim=1).numpy()

    @torch.no_grad()
    def load(self, weights: Sequence[NamedTensor]) -> None:
        for name, tensor in weights:
            if name not in self.places:
                raise WeightSyncError(f"the model has no weight {name}")
            self.places[name].copy_(tensor)

    def text(self, token_ids: np.ndarray) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """[..., V] float64 log-probs after the temperature (0 counts as 1: greedy log-probs are untempered)."""
    x = logits.astype(np.float64) / (temperature or 1.0)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def truncate(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    """Nucleus: keeps the most likely tokens [n, V] until their mass reaches top_p, renormalised."""
    if top_p >= 1.0:
        return logprobs
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ranked = np.take_along_axis(np.exp(logprobs), order, axis=-1)
    cut = ranked.cumsum(axis=-1) - ranked >= top_p
    out = logprobs.copy()
    np.put_along_axis(
        out, order, np.where(cut, -np.inf, np.take_along_axis(logprobs, order, axis=-1)), axis=-1
    )
    return out - np.log(np.exp(out).sum(axis=-1, keepdims=True))


class ReferenceEngine:
    """Implements `RolloutEngine` in plain Python over a `Policy`, in a run an `HFPolicy`."""

    def __init__(
        self,
        config: RolloutConfig,
        policy: Policy,
        *,
        name: str = "reference",
        device: str = "cpu",
        record_routing: bool = False,
        sleep_mode: bool = False,
        transport: str = "shm",
    ) -> None:
        if device != "cpu" or transport != "shm" or sleep_mode:
            raise ValueError(
                "the reference engine runs on a CPU with the shm transport and never sleeps: "
                f"got device {device}, transport {transport}, sleep_mode {sleep_mode}"
            )
        self.config, self.name, self.record_routing = config, name, record_routing
        self.policy = policy
        self.policy_version = 0
        self.check = True
        self.checksums: dict[str, int] | None = None
        self.bytes = self.tensors = 0

    def info(self) -> EngineInfo:
        p = self.policy
        return EngineInfo(
            name=self.name,
            device="cpu",
            max_model_len=self.config.max_model_len,
            vocab_size=p.vocab_size,
            num_experts=p.num_experts,
            moe_layers=p.moe_layers,
            top_k=p.top_k,
            can_record_routing=self.record_routing,
            workers=1,
        )

    def generate(
        self, prompts: Sequence[Prompt], spec: SamplingSpec, request_ids: Sequence[int]
    ) -> list[list[Completion]]:
        self._require_idle()
        if len(request_ids) != len(prompts):
            raise ValueError(
                f"generate needs one request id a prompt: got {len(request_ids)} for {len(prompts)}"
            )
        if spec.record_routing and not self.record_routing:
            raise ValueError(
                f"{self.name} was not started to record routing, but the sampling spec asks for it"
            )
        for prompt in prompts:
            if not prompt.token_ids or len(prompt.token_ids) + spec.max_tokens > self.config.max_model_len:
                raise ValueError(
                    f"prompt {prompt.prompt_id!r} must have at least one token and fit the context with its "
                    f"completion: got {len(prompt.token_ids)} + {spec.max_tokens} tokens for a context of "
                    f"{self.config.max_model_len}"
                )
        return [
            self._sample(prompt, spec, request_key(spec.seed, request_id))
            for prompt, request_id in zip(prompts, request_ids, strict=True)
        ]

    def _sample(self, prompt: Prompt, spec: SamplingSpec, key: int) -> list[Completion]:
        """A group side by side: rows [n, T] have one length, since finished ones are sampled on and cut
        later.
        """
        stop = self.policy.eos_ids | set(spec.stop_token_ids)
        keys = sample_keys(key, np.arange(spec.n))
        rows = np.tile(np.array(prompt.token_ids, dtype=np.int64), (spec.n, 1))
        logprobs = np.zeros((spec.n, spec.max_tokens), dtype=np.float32)
        length = np.full(spec.n, spec.max_tokens)
        ended = np.zeros(spec.n, dtype=np.bool_)
        for t in range(spec.max_tokens):
            table = truncate(log_softmax(self.policy.logits(rows), spec.temperature), spec.top_p)
            if spec.temperature == 0.0:
                token = table.argmax(axis=-1)
            else:
                cumulative = np.exp(table).cumsum(axis=-1)
                target = uniforms(keys, np.full(spec.n, t))[:, None] * cumulative[:, -1:]
                token = np.minimum((cumulative <= target).sum(axis=-1), self.policy.vocab_size - 1)
            logprobs[:, t] = np.take_along_axis(table, token[:, None], axis=-1)[:, 0]
            rows = np.concatenate([rows, token[:, None]], axis=1)
            now = ~ended & np.isin(token, list(stop))
            length[now] = t + 1
            ended |= now
            if ended.all():
                break
        start = len(prompt.token_ids)
        return [
            self._completion(
                prompt, rows[i, : start + length[i]], logprobs[i, : length[i]], bool(ended[i]), spec
            )
            for i in range(spec.n)
        ]

    def _completion(
        self, prompt: Prompt, row: np.ndarray, logprobs: np.ndarray, ended: bool, spec: SamplingSpec
    ) -> Completion:
        ids, n = row[len(prompt.token_ids) :], len(logprobs)
        trace = None
        if spec.record_routing:
            experts = self.policy.routes(row[:-1]).astype(id_dtype(self.policy.num_experts))
            trace = RoutingTrace.from_engine(experts, len(row), self.policy.num_experts)
        return Completion(
            token_ids=ids,
            loss_mask=np.ones(n, dtype=np.bool_),
            logprobs=logprobs.astype(np.float32),
            policy_versions=np.full(n, self.policy_version, dtype=np.int32),
            finish_reason="stop" if ended else "length",
            text=self.policy.text(ids),
            routing=trace,
        )

    def logprobs_of(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._require_idle()
        scored = []
        for ids in sequences:
            ids = np.asarray(ids, dtype=np.int64)
            table = log_softmax(self.policy.all_logits(ids)[:-1], self.config.temperature)
            scored.append(np.take_along_axis(table, ids[1:, None], axis=-1)[:, 0].astype(np.float32))
        return scored

    def _require_idle(self) -> None:
        if self.checksums is not None:
            raise WeightSyncError(
                f"{self.name} is in the middle of a weight update: call finish_weight_update first"
            )

    def init_weight_sync(self, init_info: Mapping[str, Any]) -> None:
        self.check = bool(init_info.get("check", True))

    def start_weight_update(self) -> None:
        self._require_idle()
        self.checksums, self.bytes, self.tensors = {}, 0, 0

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        if self.checksums is None:
            raise WeightSyncError(
                f"{self.name} got a weight bucket outside an update: call start_weight_update first"
            )
        tensors = map_bucket(update_info)
        if self.check:
            self.checksums.update({name: host_checksum(tensor) for name, tensor in tensors})
        self.bytes += sum(t.nbytes for _, t in tensors)
        self.tensors += len(tensors)
        self.policy.load(tensors)

    def finish_weight_update(self, policy_version: int) -> SyncReceipt:
        if self.checksums is None:
            raise WeightSyncError(f"{self.name} has no weight update to finish")
        arrived, self.checksums = self.checksums, None
        self.policy_version = policy_version
        return SyncReceipt(policy_version, arrived, self.tensors, self.bytes, 0.0)

    def sleep(self) -> None:
        raise ValueError(f"{self.name} cannot sleep: it holds no device memory")

    def wake_up(self, weights_only: bool = False) -> None:
        raise ValueError(f"{self.name} cannot wake up: it never sleeps")

    def close(self) -> None:
        """Nothing to free."""
