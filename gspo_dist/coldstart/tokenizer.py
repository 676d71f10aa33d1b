"""A character tokenizer of exactly 64 entries, in the Hugging Face format that transformers and vLLM load."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = string.digits + "+-*/=,;:.#?!()[]<>|&%$_'" + " " + string.ascii_lowercase
VOCABULARY = (PAD, EOS, UNK, *CHARACTERS)
"""64 entries, so that 2, 4 or 8 tensor-parallel ranks share the embedding without padding rows."""

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
TOKEN_IDS = {token: i for i, token in enumerate(VOCABULARY)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character. It has no chat template and adds nothing before or after a text."""
    backend = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m)."), behavior="isolated")
    # WordLevel's default decoder joins tokens with spaces; Fuse joins them with nothing.
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def encode(text: str) -> list[int]:
    """Token ids of a text of the vocabulary's characters (what the tokenizer gives, without its overhead)."""
    return [TOKEN_IDS[c] for c in text]
