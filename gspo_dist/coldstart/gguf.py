"""A GGUF file as a plain HF folder in bf16: `python -m gspo_dist.coldstart.gguf FILE FOLDER`.

It needs the packages gguf and accelerate, which nothing else here does (coldstart/pretrained.py).
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(file: Path, target: Path) -> None:
    """Writes weights, config, generation config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # transformers 5.19 keeps the file's quantisation in the config, and refuses to save the model for it.
    # A model made anew from the cleaned config takes the same, dequantised weights.
    config = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    model = type(loaded)(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
