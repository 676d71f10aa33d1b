"""Makes megatron-core 0.16.1 run on a CPU with gloo, by replacing parts of torch.cuda and of torch.Tensor.

What: `install` replaces functions of `torch.cuda`, methods of `torch.Tensor` and `torch.nn.Module`, and names
inside megatron-core's modules. megatron-core assumes CUDA in these places even when it is asked for CPU
initialisation. Each stand-in below says where.

Where: they hold for the whole process, so a process that calls `install` should be a learner rank and nothing
else. Only `MegatronLearner` calls it.

When: once, when the first learner of the process is made. Where CUDA is present it does nothing.

Undone: never. What is made under them (streams, the tracker of random states) outlives a learner, so putting
the originals back would leave a mixture. They go with the process.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import types
from typing import Any, Self

import torch

from gspo_dist.learners.gradient_norm import total_norm

# Modules that name device="cuda" in a factory call, or print a dtype as "torch.cuda.FloatTensor". They make
# token counters (schedules), norms and found_inf flags (optimizer, clip_grads, utils), a warm-up tensor
# (param_and_grad_buffer), a loss tracker (moe_utils) and what ranks send each other in a
# load (exchange_utils).
NAMES_CUDA = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.exchange_utils",
)
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like", "ones_like")

_installed = False


class _NoStream:
    """A stream or an event on a machine without streams: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = synchronize = wait_event = record = wait = _nothing

    def record_event(self, *args: Any) -> _NoStream:
        return _NoStream()

    def query(self) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return None


class _TorchOnCpu(types.ModuleType):
    """`torch` as the modules of NAMES_CUDA see it.

    Factories read device="cuda" as the CPU, and all else is torch's own. It is a name in each of those
    modules and not a TorchFunctionMode, because a mode belongs to the thread that entered it.
    """

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in FACTORIES:
            return value

        def factory(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return value(*args, **kwargs)

        return factory


def on_cpu() -> bool:
    """True where the stand-ins apply: no CUDA device."""
    return not torch.cuda.is_available()


def install() -> None:
    """Puts every stand-in in place. Returns at once where CUDA is present. May be called again."""
    global _installed
    if _installed or not on_cpu():
        return
    _installed = True
    _stand_in_for_cuda()
    _stand_in_for_tensor_methods()
    _stand_in_for_megatron()


def _stand_in_for_cuda() -> None:
    cuda: Any = torch.cuda
    # Dispatchers, optimiser and communicators build side streams and events in their constructors.
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *a, **k: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    # Buffers (router bias, p2p receive, gradient buffers) are made on torch.cuda.current_device().
    cuda.current_device = lambda: torch.device("cpu")
    # Called after p2p exchanges and when groups are made or destroyed.
    cuda.synchronize = lambda *a, **k: None
    # Asked in backward hooks, for CUDA graphs.
    cuda.is_current_stream_capturing = lambda: False
    # The tracker of model-parallel random states stores and restores CUDA generators.
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def _stand_in_for_tensor_methods() -> None:
    cls: Any = torch.Tensor
    # Embedding and output weights of a tied model, rotary indices, checkpoint tensors: moved with .cuda().
    cls.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]  # as above
    # MoE dispatchers tie tensors to side streams.
    cls.record_stream = lambda self, *a: None
    # No driver, no pinned memory: rotary slices for context parallel ask for it by flag (a factory argument).
    cls.pin_memory = lambda self, *a, **k: self
    # The optimisers sort parameters by the printed type: 'torch.cuda.FloatTensor' or a refusal.
    plain_type = cls.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and not args and not kwargs:
            return plain_type(self).replace("torch.", "torch.cuda.", 1)
        return plain_type(self, dtype, *args, **kwargs)

    cls.type = cuda_type


def _stand_in_for_megatron() -> None:
    for name in NAMES_CUDA:
        module: Any = importlib.import_module(name)
        module.torch = _TorchOnCpu("torch")
    rng: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    # Without dropout no random number is drawn in a forward pass, and weights are loaded, not drawn. So the
    # tracker's forks, and the states that activation recomputation saves, protect nothing here.
    rng.CudaRNGStatesTracker.fork = lambda self, *a, **k: contextlib.nullcontext()
    rng._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda *a, **k: None
    # Set to a Transformer Engine wrapper when TE imports, and left callable when it does not.
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = None
    # Its own norm is torch's, which on a CPU is not exact enough for large tensors.
    clips: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    clips.l2_norm_impl = _l2_norm
    # A rank takes part in the sending of tensors that it does not need, in memory that it makes for them.
    sharded: Any = importlib.import_module("megatron.core.dist_checkpointing.mapping").ShardedTensor
    plain_init = sharded.init_data
    sharded.init_data = lambda self, device, *a, **k: plain_init(
        self, "cpu" if device == "cuda" else device, *a, **k
    )
    # megatron-core turns split sizes into host arrays only when they are CUDA tensors. all_to_all
    # wants host numbers.
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _split_sizes


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The sizes that the dispatcher asks for, on the host."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool, *args: Any
) -> tuple[torch.Tensor, None]:
    """As `multi_tensor_l2norm`: the norm of all tensors, and none of each."""
    return total_norm(itertools.chain(*tensor_lists)).reshape(1), None
