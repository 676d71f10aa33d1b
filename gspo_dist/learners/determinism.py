"""`learner.deterministic`: the same mini-batch gives the same gradient bit for bit, as often as it is asked.

On a GPU sums are what differs from run to run: kernels add by atomic operations in the order in which threads
come, cuBLAS splits a product by the workspace that it finds, and NCCL adds in the order of the algorithm that
it chose. Three libraries are told by environment, which they read when they start. torch refuses the
operations that it cannot repeat, by name, and takes slower ones for some of the rest.

gspo_dist's own kernels need no other form. The head's Triton kernels give each row to one program, which adds
its columns in their order: no atomics, and no tuning that could choose other tiles the next time.

What it promises: equal bits for the same data, layout, GPUs and versions of libraries. Another layout adds in
another order. Sampling is the engine's: see `rollout.batch_invariant`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from gspo_dist.models.shape import ModelShape

VARIABLES: dict[str, tuple[str, ...]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""Variable -> the values under which its library repeats itself, the first of them by default.

cuBLAS: torch's notes on reproducibility. Transformer Engine: its attention then has a backward pass without
atomics. NCCL: what Megatron-LM's guide to deterministic training takes; a ring's order is that of the hosts'
wires, and it has every collective. A list of algorithms, separated by commas, may name several.
"""


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The variables that a process needs from its start: those of `given` that are set, else the defaults."""
    return {name: given.get(name, allowed[0]) for name, allowed in VARIABLES.items()}


def check_environment(given: Mapping[str, str]) -> None:
    """Raises ValueError for a variable under which its library does not repeat itself."""
    for name, allowed in VARIABLES.items():
        value = given.get(name)
        if value is not None and not set(value.split(",")) <= set(allowed):
            raise ValueError(
                f"learner.deterministic needs {name} to be one of {', '.join(allowed)}: got {value!r} in the "
                "command's environment or cluster.env; unset it"
            )


def check(model: ModelShape, device: str) -> None:
    """Raises ValueError for a model whose kernels on a GPU add by atomic operations."""
    if device != "cpu" and model.layers_with_memory:
        kind = model.layer_kinds[model.layers_with_memory[0]]
        raise ValueError(
            f"learner.deterministic cannot repeat layers of kind {kind} on a GPU, whose kernels add "
            f"gradients by atomic operations: got {model.name}; set learner.deterministic=false"
        )


def turn_on() -> None:
    """Makes this process deterministic for good. Call it before it touches a GPU; calling it again is free.

    Raises RuntimeError where CUDA has started without the variables: libraries have read them by then.
    """
    import torch

    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and torch.cuda.is_initialized():
        raise RuntimeError(
            f"learner.deterministic came too late: CUDA started without {', '.join(missing)}; set them for "
            "the command"
        )
    os.environ |= environment(os.environ)
    torch.use_deterministic_algorithms(True)
    # torch would write nan into all memory that it hands out, a write more for every tensor. That finds who
    # reads what nobody wrote, and changes no result of those who do not.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
