"""The engine's side of a weight sync, inside vLLM's workers: receive, sum, load, repair, prove.

Written for vllm 0.30.0. The receiver is a vLLM weight-transfer engine. Loading goes through vLLM's layerwise
reload: weights wait until a layer is whole, are processed as at first load, and are then copied into the
tensors in use.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from gspo_dist.rollout.vllm.experts import StackLoader
from gspo_dist.weights.checksum import device_checksum
from gspo_dist.weights.shm import ShmSource
from gspo_dist.weights.source import make_source
from gspo_dist.weights.stream import NamedTensor
from gspo_dist.weights.transport import Source
from gspo_dist.weights.verify import WeightSyncError


@dataclass
class Arrivals:
    """What one update brought, and how much of it was found in the model afterwards."""

    checksums: dict[str, int] = field(default_factory=dict)
    """Checksum of every tensor, by name. Empty when checks are off."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """Dtype of every tensor, by name."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of every tensor, by name."""
    bytes: int = 0
    """Bytes of all tensors."""
    proven: int = 0
    """Parameters that were compared with what arrived, bit by bit, after loading."""
    seconds_checking: float = 0.0
    """Seconds that checksums and proofs took."""


@dataclass
class SyncInitInfo(WeightTransferInitInfo):
    """What `Transport.init_info` sends."""

    transport: str
    """shm, gloo or nccl."""
    check: bool = True
    """Whether to compute checksums."""
    meeting: dict[str, Any] | None = None
    """Where a collective transport meets."""
    first_rank: int = 1
    """The rank of the engine's first worker there."""


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """What `Transport.stage` says of a bucket."""

    layout: dict[str, Any]
    """`BucketLayout.to_dict`."""
    path: str = ""
    """The file of a bucket in shared memory."""
    host: str = ""
    """The host on which the file lies, for messages."""
    seconds: float = 0.0
    """Longest wait for a bucket that a broadcast brings. 0: the transport's own."""


class Receiver(WeightTransferEngine):
    """Takes buckets from a `Source`, whichever transport the learner chose."""

    init_info_cls = SyncInitInfo
    update_info_cls = BucketInfo
    check = True
    """Whether to compute checksums."""
    repack_experts = True
    """False only in the test that shows what `repack_cpu_experts` prevents."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arrivals = Arrivals()
        self.source: Source = ShmSource()
        self.waiting: list[NamedTensor] = []
        """The bucket that has arrived and is not loaded yet."""

    def init_transfer_engine(self, init_info: SyncInitInfo) -> None:
        """Meets the learner; a second call leaves the first meeting and meets anew."""
        self.source.close()
        self.check = init_info.check
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.source = make_source(asdict(init_info), worker)

    def start_weight_update(self) -> None:
        self.arrivals, self.waiting = Arrivals(), []
        initialize_layerwise_reload(self.model)
        self.stacks = StackLoader(self.model)

    def receive_weights(self, update_info: Any) -> None:
        arriving = self.source.begin(asdict(update_info))
        self._load()  # the bucket before, while this one arrives
        self.waiting = arriving()
        if not self.source.arrives_later:
            self._load()

    def _load(self) -> None:
        tensors, self.waiting = self.waiting, []
        rest = list(self.stacks.load(self.noted(tensors)))
        if rest:
            self.model.load_weights(rest)

    def noted(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Passes tensors on and writes down what arrived, before the model touches it."""
        got = self.arrivals
        for name, tensor in tensors:
            if name in got.shapes:
                raise WeightSyncError(f"{name} arrived twice in one update")
            if self.check:
                start = time.perf_counter()
                got.checksums[name] = self.source.checksum(tensor)
                got.seconds_checking += time.perf_counter() - start
            got.dtypes[name], got.shapes[name] = tensor.dtype, tuple(tensor.shape)
            got.bytes += tensor.nbytes
            yield name, tensor

    def finish_weight_update(self) -> None:
        self._load()
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            if self.repack_experts:
                repack_cpu_experts(self.model)
            repack_cpu_tied_head(self.model)
        # The checksum of shm and gloo is of host memory, where a GPU's parameters do not lie.
        if self.check and (self.device.type == "cpu" or self.source.checksum is device_checksum):
            start = time.perf_counter()
            self.prove_loaded()
            self.arrivals.seconds_checking += time.perf_counter() - start

    def abandon(self) -> None:
        """Brings the model out of vLLM's reload with what has arrived: its weights are of two versions."""
        self.waiting = []
        finalize_layerwise_reload(self.model, self.model_config)

    def prove_loaded(self) -> None:
        """Compares the parameters that the model keeps as they were sent (embeddings, norms, router).

        Fused, sharded, packed and cast parameters have no tensor of their own to compare with; the log-prob
        probe covers them. A padded vocabulary is compared over its real rows. WeightSyncError: a parameter
        differs from what arrived.
        """
        got = self.arrivals
        for name, parameter in self.model.named_parameters():
            shape = got.shapes.get(name)
            if shape is None or parameter.dtype != got.dtypes[name] or parameter.dim() != len(shape):
                continue
            if tuple(parameter.shape[1:]) != shape[1:] or parameter.shape[0] < shape[0]:
                continue
            if self.source.checksum(parameter.data[: shape[0]]) != got.checksums[name]:
                raise WeightSyncError(
                    f"{name} arrived whole, but the engine's parameter differs after loading"
                )
            got.proven += 1

    def report(self) -> dict[str, Any]:
        """What the last update brought, as plain data."""
        got = self.arrivals
        return {
            "checksums": got.checksums,
            "tensors": len(got.shapes),
            "bytes": got.bytes,
            "proven": got.proven,
            "seconds_checking": got.seconds_checking,
        }

    def shutdown(self) -> None:
        self.source.close()


def repack_cpu_experts(model: torch.nn.Module) -> None:
    """Packs the expert weights of every MoE layer for vLLM's CPU kernel.

    vllm 0.30.0 does so at first load only, since `_setup_kernel` of unquantized_fused_moe_method.py skips it
    when the kernel exists. A reload would leave the weights unpacked, and logits would be wrong in silence.
    """
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        repack = getattr(getattr(kernel, "fused_experts", None), "process_weights_after_loading", None)
        if repack is not None:
            repack(layer)


def repack_cpu_tied_head(model: torch.nn.Module) -> None:
    """Packs a head that is tied to the embedding from the new weight.

    vllm 0.30.0 computes with a packed copy of a CPU layer's weight. A tied head receives no weight of its
    own, so a reload never packs it again, and logits would keep the old head.
    """
    embeddings = {
        m.weight.data_ptr()
        for m in model.modules()
        if isinstance(m, VocabParallelEmbedding) and not is_head(m)
    }
    heads: list[Any] = [m for m in model.modules() if is_head(m)]
    for head in heads:
        if head.weight.data_ptr() in embeddings:
            head.quant_method.process_weights_after_loading(head)


def is_head(module: torch.nn.Module) -> bool:
    """True for the LM head, which vLLM makes a kind of vocabulary embedding."""
    return isinstance(module, ParallelLMHead)
