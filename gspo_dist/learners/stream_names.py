"""What a learner will stream, by name and shape, before it has read a weight; whether a folder holds that.

A stream that differs from the folder is refused by the engines, but only at the first publication, when the
run has started everything. Names do not depend on values, so they are known from the heads of the files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from gspo_dist.learners.hf_folder import check_loaded
from gspo_dist.weights.folder import ModelFolder
from gspo_dist.weights.names import FileNames
from gspo_dist.weights.verify import WeightSyncError

Shapes = dict[str, tuple[int, ...]]
"""Name in the folder -> shape."""


def of_loaded_model(source: ModelFolder) -> Shapes:
    """The stream of a model that transformers loaded from `source`: eager, and DeepSpeed with ZeRO 0 to 2.

    transformers keeps the rules by which it read this very folder, and the stream turns them round. So they
    are found here by its own loader, on tensors without memory.
    """
    return FileNames(loaded_model(source)).expected()


def loaded_model(source: ModelFolder) -> PreTrainedModel:
    """The model of a folder without memory for its weights, with the rules by which transformers read it."""
    model = blank_model(source)
    blank = {n: torch.empty(stored.shape, device="meta") for n, stored in source.tensors.items()}
    settings = LoadStateDictConfig(
        device_map={"": "meta"}, weight_mapping=get_model_conversion_mapping(model)
    )
    convert_and_load_state_dict_in_model(model, blank, settings)
    model.tie_weights()
    return model


def of_family(source: ModelFolder) -> Shapes:
    """The stream of a model built from its config, whatever its folder looks like: ZeRO 3 and AutoEP.

    Names are those that transformers gives the family when it saves one.
    """
    return FileNames(blank_model(source)).expected()


def of_config(config: PretrainedConfig) -> Shapes:
    """The stream of a model that is built from a config."""
    return FileNames(_blank(config)).expected()


def blank_model(source: ModelFolder) -> PreTrainedModel:
    """The model of a folder's config, without memory for its weights."""
    return _blank(_config(source))


def _config(source: ModelFolder) -> PretrainedConfig:
    """The folder's config, which says of head and embedding what its files say."""
    config: PretrainedConfig = copy.deepcopy(source.config)
    if source.has_untold_head:
        config.get_text_config().tie_word_embeddings = False
    return config


def _blank(config: PretrainedConfig) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def check_names(source: ModelFolder, streamed: Mapping[str, tuple[int, ...]]) -> tuple[bool, str]:
    """Compares a stream's names and shapes with the folder's; says how many there are.

    Raises ValueError or WeightSyncError for the first that differs. Where the model that transformers loads
    would stream the folder's tensors, the way out says so.
    """
    try:
        _compare(source, streamed)
    except (ValueError, WeightSyncError) as error:
        loaded = of_loaded_model(source)
        if streamed == loaded or not _same(source, loaded):
            raise
        raise ValueError(
            f"this learner would stream other tensors than {source.path} holds: {error}; "
            + ("set tie_word_embeddings=false in its config.json, or " if source.has_untold_head else "")
            + "use learner.backend=eager, or deepspeed with zero_stage up to 2 and expert_parallel=1"
        ) from error
    return True, f"{len(streamed)} tensors"


def _compare(source: ModelFolder, streamed: Mapping[str, tuple[int, ...]]) -> None:
    check_loaded(source.path, streamed.keys() - source.tensors.keys(), source.streamed - streamed.keys())
    source.check_shapes(streamed, "the learner's stream")


def _same(source: ModelFolder, streamed: Mapping[str, tuple[int, ...]]) -> bool:
    try:
        _compare(source, streamed)
    except (ValueError, WeightSyncError):
        return False
    return True
