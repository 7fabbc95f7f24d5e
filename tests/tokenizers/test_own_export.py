"""A run's own vocabulary as tokenizer.json: the same ids as SentencePiece gives,
by the `tokenizers` library."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.data.worlds.toy_world import ToyWorld, ToyWorldConfig
from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import (
    FamilyTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from rlbf_jax.tokenizers.own_export import published_files

SPELLED = ["<pad>", "<s>", "</s>", "<unk>", "[USER]", "[MODEL]"]
"""What other programs parse unless they are told not to."""
CONTROLS = [
    "[BACKTRACK_BY_3]",
    " [BACKTRACK_BY_3]",
    "[CATEGORY_insult]",
    " [RESET]",
    "<0x41>",
    "\u2581[RESET]",
]


@pytest.fixture(scope="module")
def ours() -> SentencePieceTokenizer:
    rng, world = np.random.default_rng(0), ToyWorld(ToyWorldConfig())
    documents = [world.document(rng) for _ in range(300)]
    texts = [text for d in documents for text in (d.prompt.text, d.response)] + [
        "banana aaaa ababab haha  two  spaces"
    ]
    return train_tokenizer(texts, 700, world.categories, 40)


@pytest.fixture(scope="module")
def library(ours):
    """The `tokenizers` library with special-token parsing off."""
    made = tokenizers.Tokenizer.from_str(published_files(ours).content["tokenizer.json"].decode())
    made.encode_special_tokens = True
    return made


@pytest.fixture(scope="module")
def exported(ours) -> FamilyTokenizer:
    return FamilyTokenizer(published_files(ours))


def ids_of(library, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


def test_random_texts_get_the_same_ids(ours, library):
    draw = random.Random(0)
    pieces = [ours.decode([i]) for i in range(260, ours.num_pieces)] + SPELLED + CONTROLS
    alphabets = [
        "ab",
        "an ",
        "".join(sorted({c for p in pieces for c in p})),
        "\u2581\u2585 a\t\n\0",
        "é字😀 ﬁÅ\u200b",
    ]
    for index in range(3000):
        if index % 3 == 0:
            text = "".join(draw.choices(pieces, k=draw.randint(0, 8)))
        elif index % 3 == 1:
            text = "".join(draw.choices(draw.choice(alphabets), k=draw.randint(0, 40)))
        else:
            text = draw.choice(pieces)[: draw.randint(1, 3)] * draw.randint(1, 12) + draw.choice(
                pieces
            )
        ids = ours.encode(text)
        assert ids_of(library, text) == ids, ascii(text)
        assert library.decode(ids, skip_special_tokens=False) == text


@given(st.text())
def test_any_text_gets_the_same_ids(ours, library, exported, text):
    assert ids_of(library, text) == ours.encode(text) == exported.encode(text)
    assert exported.encode_prompt(text) == ours.encode_prompt(text)
    assert exported.decode(ours.encode(text)) == text


@pytest.mark.parametrize("text", [*SPELLED, *CONTROLS, "".join(SPELLED + CONTROLS)])
def test_spellings_stay_text(ours, library, exported, text):
    for ids in (ids_of(library, text), exported.encode(text)):
        assert ids == ours.encode(text) and max(ids) < ours.num_pieces and min(ids) > 3
    assert exported.encode_prompt(text) == ours.encode_prompt(text)
    default = tokenizers.Tokenizer.from_str(library.to_str())
    default.encode_special_tokens = False
    found = ids_of(default, text)
    assert (
        max(found) < ours.controls.first_id
    )  # control tokens are out of reach under default loading too
    assert (found == ours.encode(text)) == (not any(s in text for s in SPELLED))


def test_ids_of_other_rules_are_exported(ours, tmp_path):
    kinds = ("backtrack", "reset", "replace")
    more = SentencePieceTokenizer(ours.model, ours.controls.categories, ours.controls.x_max, kinds)
    exported = FamilyTokenizer(published_files(more))
    assert exported.controls.rule("replace") == more.controls.rule("replace")
    assert exported.controls.names() == more.controls.names()
    assert exported.new_ids == more.controls.ids
    exported.save(tmp_path)
    assert load_tokenizer(tmp_path).controls == exported.controls
    for text in ("[FLAG_INSULT]", " [REPLACE]"):
        assert not set(exported.encode(text)) & set(more.controls.ids)


def test_the_rest_is_the_same(ours, exported, tmp_path):
    assert exported.controls == ours.controls
    assert (exported.pad_id, exported.bos_id, exported.eos_ids) == (
        ours.pad_id,
        ours.bos_id,
        ours.eos_ids,
    )
    assert exported.vocab_size == ours.vocab_size
    assert [exported.piece_bytes(i) for i in range(3, ours.vocab_size)][1:] == [
        ours.piece_bytes(i) for i in range(4, ours.vocab_size)
    ]
    exported.save(tmp_path)
    assert load_tokenizer(tmp_path).digest() == exported.digest()
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["model_input_names"] == ["input_ids", "attention_mask"]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Yes."}]
    assert exported.encode_chat(chat, add_generation_prompt=False) == [
        *ours.encode_prompt("Hi"), *ours.encode(" Yes."), ours.eos_id
    ]  # fmt: skip
    with pytest.raises(InputError, match="this model knows the roles user and assistant"):
        exported.encode_chat([{"role": "system", "content": "Be brief."}])
