"""The megatron-core learner, for the HF models of `architecture.SUPPORTED`.

It cuts a model by tensor, pipeline, expert and context parallelism. It runs on GPUs with Transformer Engine,
and on CPUs with gloo.
"""

from __future__ import annotations

import importlib.util
import sys

FOR_GPUS = ("transformer_engine", "apex")
"""Packages whose kernels need a GPU, and which megatron-core takes wherever they are installed."""


def hide_gpu_packages() -> None:
    """Lets a process without a GPU have torch's operators, as on a host without these packages.

    Among such processes are the ranks of `cluster.device=cpu` and the self-check on a host with GPUs.
    megatron-core 0.16.1 chooses its Adam, norms and products when it is imported, by what can be imported.
    Transformer Engine 2.11 can be without a GPU, and its FusedAdam then fails in its constructor.
    """
    there = [name for name in FOR_GPUS if name in sys.modules or importlib.util.find_spec(name) is not None]
    if not there:
        return
    import torch  # here, because a plan on a host without these packages needs none

    if torch.cuda.is_available():
        return
    for name in there:
        # None makes an import an ImportError. A part that was imported already would be found by its name.
        for known in [name, *(loaded for loaded in sys.modules if loaded.startswith(f"{name}."))]:
            sys.modules[known] = None  # type: ignore[assignment]


hide_gpu_packages()  # before any module of this folder imports megatron-core
