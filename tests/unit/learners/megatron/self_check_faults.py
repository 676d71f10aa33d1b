"""Runs the megatron learner's self-check with one fault after the other in the learner. Reads a config
and the model's folder.

python self_check_faults.py FOLDER < config.json      (one JSON object, fault -> findings, on the last line)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig

from gspo_dist.learners.megatron import learner, self_check, shards
from gspo_dist.learners.megatron.modules import PackedAttention
from gspo_dist.routing.replay import LayerReplay


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` replaced by what `make` makes of it."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def other_rotary_base(build: Any) -> Any:
    return lambda shape, *args, **kwargs: build(replace(shape, rope_theta=500.0), *args, **kwargs)


def without_borders(attend: Any) -> Any:
    """The whole batch as one sequence for the attention alone."""

    def attending(self: Any, *args: Any, packed_seq_params: Any, **kwargs: Any) -> Any:
        borders = packed_seq_params.cu_seqlens_q_padded
        whole = SimpleNamespace(cu_seqlens_q_padded=torch.stack([borders[0], borders[-1]]))
        return attend(self, *args, packed_seq_params=whole, **kwargs)

    return attending


def swapped_halves(export: Any) -> Any:
    """The experts' gate and up projections leave under each other's name."""

    def exported(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in export(*args, **kwargs):
            swapped = name.replace("gate_proj", "@").replace("up_proj", "gate_proj").replace("@", "up_proj")
            yield swapped, tensor

    return exported


def other_name(streamed: Any) -> Any:
    """The last layer's router under another name, in what is foretold of the whole model."""

    def foretold(*args: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in streamed(*args):
            yield name.replace("layers.1.mlp.gate.", "layers.1.mlp.router."), shape

    return foretold


def without_replay(choose: Any) -> Any:
    def native(self: LayerReplay, native_ids: Any) -> Any:
        choose(self, native_ids)
        return native_ids

    return native


FAULTS = {
    "rotary base": (learner.builder, "build_chunks", other_rotary_base),
    "no borders": (PackedAttention, "forward", without_borders),
    "swapped halves": (learner, "export_weights", swapped_halves),
    "other name": (shards, "streamed", other_name),
    "no replay": (LayerReplay, "choose", without_replay),
}


def main() -> None:
    config, whole = json.load(sys.stdin), Path(sys.argv[1])
    seen = {"none": self_check.check(config, whole)}
    for name, fault in FAULTS.items():
        with patched(*fault):
            seen[name] = self_check.check(config, whole)
    other = AutoConfig.for_model("olmoe").to_json_string()
    seen["unknown family"] = self_check.check(json.loads(other))
    print(json.dumps({name: [asdict(f) for f in found] for name, found in seen.items()}))


if __name__ == "__main__":
    main()
