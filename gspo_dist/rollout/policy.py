"""What the reference engine samples from: the protocol, and an HF model on the CPU behind it.

The whole model is in float32: one of 30B parameters would take 122 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from gspo_dist.routing.huggingface import KINDS, record
from gspo_dist.weights.bucket import BucketLayout
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames, stored_tensors
from gspo_dist.weights.stacks import unstack
from gspo_dist.weights.stream import NamedTensor


class Policy(Protocol):
    """What the reference engine samples from.

    n rows, T tokens, V vocabulary, L MoE layers, K experts per token.
    """

    vocab_size: int
    """V."""
    num_experts: int
    """Routed experts per layer; 0 for a dense model."""
    moe_layers: int
    """L."""
    top_k: int
    """K."""
    eos_ids: frozenset[int]
    """Tokens that end a completion."""

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Next-token logits [n, V] after rows [n, T] of token ids, all of one length."""
        ...

    def all_logits(self, row: np.ndarray) -> np.ndarray:
        """Logits [T, V] at every position of one row [T]."""
        ...

    def routes(self, row: np.ndarray) -> np.ndarray:
        """Expert ids [T, L, K] of one row [T]."""
        ...

    def check_bucket(self, layout: BucketLayout, engine: str) -> None:
        """WeightSyncError, with the engine's name: a tensor of the bucket has no place."""
        ...

    def load(self, weights: Sequence[NamedTensor]) -> None:
        """Copies the tensors to their places."""
        ...

    def check_whole(self, arrived: Iterable[str], engine: str) -> None:
        """WeightSyncError, with the engine's name: a tensor that the policy needs has not arrived."""
        ...

    def text(self, token_ids: np.ndarray) -> str:
        """The tokens as text, special tokens left out."""
        ...


class HFPolicy:
    """An HF causal LM in float32. ValueError: a weight file of the folder is torn or missing."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.folder = ModelFolder(folder)
        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.places = places(self.hf)
        config = self.hf.config
        eos = config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        tokenizer_eos = self.tokenizer.eos_token_id
        self.eos_ids = frozenset(eos + ([] if tokenizer_eos is None else [tokenizer_eos]))
        self.vocab_size = int(config.vocab_size)
        self.routers = [m for m in self.hf.modules() if type(m).__name__ in KINDS]
        self.moe_layers = len(self.routers)
        self.num_experts = int(self.routers[0].num_experts) if self.routers else 0
        self.top_k = int(self.routers[0].top_k) if self.routers else 0

    @torch.no_grad()
    def logits(self, rows: np.ndarray) -> np.ndarray:
        return self.hf(torch.from_numpy(rows), use_cache=False, logits_to_keep=1).logits[:, -1].numpy()

    @torch.no_grad()
    def all_logits(self, row: np.ndarray) -> np.ndarray:
        return self.hf(torch.from_numpy(row)[None], use_cache=False).logits[0].numpy()

    def routes(self, row: np.ndarray) -> np.ndarray:
        with record(self.hf) as recorder:
            self.all_logits(row)
        return recorder.trace().expert_ids

    def check_bucket(self, layout: BucketLayout, engine: str) -> None:
        self.folder.check_shapes(layout.members(), engine)

    @torch.no_grad()
    def load(self, weights: Sequence[NamedTensor]) -> None:
        for name, tensor in unstack(weights):
            stored, index = self.places[name]
            stored.view(-1)[index] = tensor.to(stored.dtype)

    def check_whole(self, arrived: Iterable[str], engine: str) -> None:
        self.folder.check_whole(arrived, engine)

    def text(self, token_ids: np.ndarray) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def places(hf: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name in the folder -> the tensor in memory, and where its elements lie there (indices into it, flat).

    transformers knows the way from memory to the folder for whole tensors. Sent along it, the numbers 0, 1,
    2, ... say where every element came from. Example: of a fused gate_up_proj [2, 4, 3] the tensor
    experts.1.up_proj.weight [2, 3] is at the indices [[18, 19, 20], [21, 22, 23]].
    """
    names, found = FileNames(hf), {}
    tensors = dict(stored_tensors(hf))
    for group in names.groups:
        if len(group) > 1:
            raise ValueError(
                f"the reference engine cannot update {group[0]}, which the folder joins with {group[1]}: "
                "use rollout=vllm"
            )
        stored = tensors[group[0]]
        numbers = torch.arange(stored.numel()).view(stored.shape)
        for name, index in names.split(group[0], numbers):
            found[name] = (stored, index)
    return found
