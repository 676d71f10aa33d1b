"""Expert choices of a mixture-of-experts model as data: ids [tokens, moe_layers, top_k]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # reward processes know these records too, and most of them never need torch
    import torch


def id_dtype(num_experts: int) -> np.dtype:
    """The smallest unsigned integer type that holds every expert id: uint8 up to 256 experts, else uint16."""
    if not 1 <= num_experts <= 65536:
        raise ValueError(f"num_experts must be in 1..65536: got {num_experts}")
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def trace_bytes(tokens: int, moe_layers: int, top_k: int, num_experts: int) -> int:
    """Bytes of the expert ids of `tokens` tokens, without the one byte per token of `known`.

    Qwen3-30B-A3B has 48 layers of top-8 out of 128 experts, so a token takes 384 bytes. 1,024 rollouts of
    32,768 tokens hold 1,024 * 32,768 * 384 = 12.9 GB. The int64 ids of torch.topk would be 8 times that.
    """
    return tokens * moe_layers * top_k * id_dtype(num_experts).itemsize


@dataclass(frozen=True)
class ReplayBytes:
    """Bytes that a routing-replay mode costs over one rollout batch whose tokens are trained once each."""

    recorded: int
    """Written where the choice is made."""
    host_held: int
    """Held in host memory between recording and the last mini-batch."""
    wire: int
    """Sent between processes: from engine or learner to trainer, and from trainer to learner."""
    device_copies: int
    """Copied between device and host, both ways."""


def replay_bytes(mode: str, batch_bytes: int, *, recompute_old_logprobs: bool) -> ReplayBytes:
    """The cost of mode none, r2 or r3 for a batch whose expert ids take `batch_bytes` (see `trace_bytes`).

    Both modes record once, cross to the host once, travel to the trainer and back to a learner, and cross to
    the device for the update. R3 crosses once more if the learner recomputes old log-probs, because that pass
    is replayed too. R2 needs that pass: it records there.

    Example: 384 bytes per token and recomputed old log-probs. R2 copies 2 * 384 = 768 bytes per token between
    device and host, R3 3 * 384 = 1,152. This counts one learner rank per sequence. Its context, tensor and
    pipeline parallel twins each receive the packed batch over the wire again.

    Raises ValueError for an unknown mode, and for r2 without the pass in which it records.
    """
    if mode == "none":
        return ReplayBytes(0, 0, 0, 0)
    if mode == "r2" and not recompute_old_logprobs:
        raise ValueError(
            "routing_replay=r2 records in the pass over old log-probs: it needs old_logprobs=recompute"
        )
    if mode not in ("r2", "r3"):
        raise ValueError(f"routing_replay must be one of none, r2, r3: got {mode!r}")
    crossings = 3 if mode == "r3" and recompute_old_logprobs else 2
    wire = 3 if crossings == 3 else 2
    return ReplayBytes(batch_bytes, batch_bytes, wire * batch_bytes, crossings * batch_bytes)


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token used in each MoE layer, row by input token (T tokens, L MoE layers, K top-k).

    Example: a prompt of 3 tokens and a completion of 2 give 5 rows. The engine ran tokens 0 to 3: it sampled
    token 4 and stopped. So known = [T T T T F], and row 4 holds zeros.
    """

    expert_ids: np.ndarray
    """[T, L, K] uint8, or uint16 above 256 experts. Rows that are not known hold no route."""
    known: np.ndarray
    """[T] bool, False where nobody recorded the row.

    The last sampled token never entered the engine, and a prefix-cache hit may have lost its routes. A replay
    routes such rows natively.
    """
    num_experts: int
    """Experts per layer: ids lie below it."""

    def __post_init__(self) -> None:
        if self.expert_ids.ndim != 3 or self.expert_ids.dtype != id_dtype(self.num_experts):
            raise ValueError(
                f"routing trace must be [tokens, moe_layers, top_k] {id_dtype(self.num_experts)} for "
                f"{self.num_experts} experts: got {list(self.expert_ids.shape)} {self.expert_ids.dtype}"
            )
        if self.known.shape != self.expert_ids.shape[:1] or self.known.dtype != np.bool_:
            raise ValueError(
                f"routing trace's known must be [tokens] bool for {len(self.expert_ids)} tokens: "
                f"got {list(self.known.shape)} {self.known.dtype}"
            )

    def __len__(self) -> int:
        return len(self.expert_ids)

    @property
    def num_layers(self) -> int:
        """MoE layers, L."""
        return self.expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        """Experts per token, K."""
        return self.expert_ids.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes on the host, ids and marks together."""
        return self.expert_ids.nbytes + self.known.nbytes

    @property
    def unknown_rows(self) -> int:
        """Tokens that nobody recorded: a replay routes them natively."""
        return len(self.known) - int(np.count_nonzero(self.known))

    def layers(self, columns: Sequence[int]) -> RoutingTrace:
        """The same tokens in some of the MoE layers, such as those of one pipeline stage.

        `columns` counts MoE layers only: where layer 1 of 4 is dense, column 1 is layer 2.
        """
        return RoutingTrace(self.expert_ids[:, list(columns)], self.known, self.num_experts)

    def __getitem__(self, rows: slice | np.ndarray) -> RoutingTrace:
        """Some of the tokens: a slice, or an array of row numbers or marks."""
        return RoutingTrace(self.expert_ids[rows], self.known[rows], self.num_experts)

    @property
    def known_prefix(self) -> int:
        """Rows from the first on that are known, up to the first that is not."""
        return len(self.known) if self.known.all() else int(self.known.argmin())

    def continued(self, ids: np.ndarray, total_tokens: int) -> RoutingTrace:
        """The trace of a sequence that went on: `ids` are the rows after the known ones, as recorded later.

        Rows that are known already stay, because each is the route of its own moment. Example: a trace of 5
        rows of which 4 are known, continued by 3 rows for 8 tokens, has 7 known rows and a last one that is
        not. ValueError for more rows than tokens.
        """
        known = self.expert_ids[: self.known_prefix]
        return RoutingTrace.from_engine(np.concatenate([known, ids]), total_tokens, self.num_experts)

    @staticmethod
    def from_engine(ids: np.ndarray, total_tokens: int, num_experts: int) -> RoutingTrace:
        """The engine's rows, which are the first of `total_tokens`, with the missing tail marked unknown.

        Example: ids of 4 rows for 5 tokens give known = [T T T T F]. ValueError for more rows than tokens.
        """
        if len(ids) > total_tokens:
            raise ValueError(f"routing trace has {len(ids)} rows for a sequence of {total_tokens} tokens")
        full = np.zeros((total_tokens, *ids.shape[1:]), dtype=id_dtype(num_experts))
        full[: len(ids)] = ids
        known = np.zeros(total_tokens, dtype=np.bool_)
        known[: len(ids)] = True
        return RoutingTrace(full, known, num_experts)

    @staticmethod
    def concat(traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """Traces of several sequences end to end, in the order of a packed batch.

        Example: traces of 5 and 3 tokens give 8 rows, and row 6 is token 1 of the second. ValueError unless
        all are of one model.
        """
        shapes = {(t.num_layers, t.top_k, t.num_experts) for t in traces}
        if len(shapes) != 1:
            raise ValueError(
                f"traces of one batch must agree in (moe_layers, top_k, num_experts): got {sorted(shapes)}"
            )
        return RoutingTrace(
            np.concatenate([t.expert_ids for t in traces]),
            np.concatenate([t.known for t in traces]),
            traces[0].num_experts,
        )


@dataclass(frozen=True, eq=False)
class RouterScores:
    """The experts that a policy used, and what its routers thought of them."""

    expert_ids: torch.Tensor
    """int32 [T, L, K]."""
    logprobs: torch.Tensor
    """float32 [T, L, K], in nats."""

    @property
    def nbytes(self) -> int:
        """What they hold: 8 bytes for every token, layer and expert."""
        return self.expert_ids.nbytes + self.logprobs.nbytes
