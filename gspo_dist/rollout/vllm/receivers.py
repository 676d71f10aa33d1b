"""The engine's side of a weight sync, inside vLLM's workers: receive a bucket, sum it, load
it, repair, prove.

Written for vllm 0.30.0. Each receiver is a vLLM weight-transfer engine. Loading goes through vLLM's layerwise
reload: weights wait until a layer is whole, are processed as at first load, and are then copied into the
tensors in use.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_process_group
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.checksum import Checksum, device_checksum, host_checksum
from gspo_dist.weights.nccl import require_nccl
from gspo_dist.weights.shm import map_bucket
from gspo_dist.weights.stream import NamedTensor
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


class CheckedReceiver(WeightTransferEngine):
    """What the transports share. A subclass says how the tensors of a bucket come in (`incoming`)."""

    checksum: Checksum
    """The transport's, the same on both sides."""
    check = True
    """Whether to compute checksums."""
    repack_experts = True
    """False only in the test that shows what `repack_cpu_experts` prevents."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arrivals = Arrivals()

    def incoming(self, update_info: Any) -> Iterable[NamedTensor]:
        """The tensors of one bucket as they arrived."""
        raise NotImplementedError

    def start_weight_update(self) -> None:
        self.arrivals = Arrivals()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Any) -> None:
        self.model.load_weights(list(self.noted(self.incoming(update_info))))

    def noted(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """Passes tensors on and writes down what arrived, before the model touches it."""
        got = self.arrivals
        for name, tensor in tensors:
            if name in got.shapes:
                raise WeightSyncError(f"{name} arrived twice in one update")
            if self.check:
                start = time.perf_counter()
                got.checksums[name] = type(self).checksum(tensor)
                got.seconds_checking += time.perf_counter() - start
            got.dtypes[name], got.shapes[name] = tensor.dtype, tuple(tensor.shape)
            got.bytes += tensor.nbytes
            yield name, tensor

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            if self.repack_experts:
                repack_cpu_experts(self.model)
            repack_cpu_tied_head(self.model)
        if self.check:
            start = time.perf_counter()
            self.prove_loaded()
            self.arrivals.seconds_checking += time.perf_counter() - start

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
            if type(self).checksum(parameter.data[: shape[0]]) != got.checksums[name]:
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
        """Nothing to free."""


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


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """What `ShmTransport.init_info` sends."""

    check: bool = True
    """Whether to compute checksums."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """What `ShmTransport.stage` says of a bucket."""

    path: str
    """Its file."""
    host: str
    """The host on which the file lies, for messages."""
    layout: dict[str, Any]
    """`BucketLayout.to_dict`."""


class ShmReceiver(CheckedReceiver):
    """Maps the buckets that `ShmTransport` writes."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    checksum = staticmethod(host_checksum)

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        self.check = init_info.check

    def incoming(self, update_info: ShmUpdateInfo) -> Iterable[NamedTensor]:
        return map_bucket({"path": update_info.path, "host": update_info.host, "layout": update_info.layout})

    def prove_loaded(self) -> None:
        # The checksum of this transport is of host memory, where a GPU's parameters do not lie.
        if self.device.type == "cpu":
            super().prove_loaded()


@dataclass(kw_only=True)
class NcclInitInfo(NCCLWeightTransferInitInfo):
    """What `NcclTransport.init_info` sends: the fields of vLLM's own rendezvous, and one more."""

    check: bool = True
    """Whether to compute checksums."""


@dataclass
class NcclUpdateInfo(WeightTransferUpdateInfo):
    """What `NcclTransport.stage` says of the bucket that the next broadcast carries."""

    layout: dict[str, Any]
    """`BucketLayout.to_dict`."""


class NcclReceiver(CheckedReceiver):
    """Takes part in the broadcasts of `NcclTransport`."""

    init_info_cls = NcclInitInfo
    update_info_cls = NcclUpdateInfo
    checksum = staticmethod(device_checksum)

    def init_transfer_engine(self, init_info: NcclInitInfo) -> None:
        self.check = init_info.check
        self.group = worker_init_process_group(init_info, self.parallel_config)
        require_nccl(self.group)

    def incoming(self, update_info: NcclUpdateInfo) -> Iterable[NamedTensor]:
        layout = BucketLayout.from_dict(update_info.layout)
        flat = torch.empty(max(layout.nbytes, 1), dtype=torch.uint8, device=self.device)
        self.group.broadcast(flat, src=0, stream=torch.cuda.current_stream())
        return list(layout.views(flat))

    def shutdown(self) -> None:
        self.group = None
