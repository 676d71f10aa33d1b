"""Laws of the character tokenizer, through the files that transformers and vLLM read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gspo_dist.coldstart.tokenizer import (
    CHARACTERS,
    EOS_ID,
    PAD_ID,
    UNK_ID,
    VOCABULARY,
    build_tokenizer,
    encode,
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_sixty_four_entries_without_repetition(loaded):
    assert len(VOCABULARY) == len(set(VOCABULARY)) == len(loaded) == 64
    assert [loaded.convert_ids_to_tokens(i) for i in range(64)] == list(VOCABULARY)


def test_special_tokens_are_where_the_model_config_says(loaded):
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (PAD_ID, EOS_ID, UNK_ID)
    assert loaded.bos_token_id is None
    assert loaded.chat_template is None


@settings(deadline=None)
@given(text=st.text(alphabet=CHARACTERS, min_size=1, max_size=40))
def test_text_survives_the_round_trip(loaded, text):
    ids = loaded(text)["input_ids"]
    assert ids == encode(text)
    assert loaded.decode(ids) == text


def test_special_tokens_vanish_from_text_and_unknown_characters_are_marked(loaded):
    assert loaded.decode([*encode("1#1"), EOS_ID, PAD_ID], skip_special_tokens=True) == "1#1"
    assert loaded("1\nA")["input_ids"] == [4, UNK_ID, UNK_ID]
