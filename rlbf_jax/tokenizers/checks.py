"""What is checked once, when a published tokenizer is imported,
against the `tokenizers` library itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers.family import FamilyTokenizer

HELLO, ANSWER = "Hello there, what is 12 + 7?\nTell me.", "It is 19, my friend."
CONVERSATIONS = (
    ({"role": "user", "content": HELLO},),
    (
        {"role": "user", "content": HELLO},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": HELLO},
    ),
)


def check_import(tokenizer: FamilyTokenizer, document: Mapping[str, Any], where: str) -> None:
    """Compares with what other programs make of the files.

    Args:
        document: tokenizer.json with control tokens.

    Raises:
        InputError: a harmless conversation gets other ids than the library gives for the plainly
            rendered text; or a text gives a control id under default loading.
    """
    full = tokenizers.Tokenizer.from_str(json.dumps(document))
    if tokenizer.template is not None:
        for messages in CONVERSATIONS:
            plain = tokenizer.template.plain(messages, add_generation_prompt=True)
            if tokenizer.encode_chat(messages) != full.encode(plain, add_special_tokens=False).ids:
                raise InputError(
                    f"{where}: a harmless conversation ({len(messages)} messages) gets other ids "
                    "here than in the "
                    "tokenizers library; this kind of tokenizer cannot be split into trusted and "
                    "untrusted text"
                )
    controls = set(tokenizer.new_ids)
    for i in sorted(controls):
        for spelling in (tokenizer.name(i), full.id_to_token(i) or ""):
            if not controls.isdisjoint(
                full.encode(f"a{spelling} {spelling}", add_special_tokens=False).ids
            ):
                raise InputError(
                    f"{where}: the text {spelling!r} would give a control id in other programs"
                )
