"""Which tokens the files of a checkpoint list, with their ids: read and checked once, here.

Families and programs put an added token in one of four places, or in several: `added_tokens` of
tokenizer.json, `added_tokens_decoder` of tokenizer_config.json, `added_tokens.json`, and
special_tokens_map.json, which names texts alone. All of them count, since text must spell none of
the special ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import controls, huggingface, published_sentencepiece
from rlbf_jax.tokenizers.added import AddedToken
from rlbf_jax.tokenizers.files import (
    ADDED_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    JSON_FILE,
    MAP_FILE,
    MODEL_FILE,
    Files,
)

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
MOST_IDS = 2**24
"""Far more than any vocabulary has: tables of ids and embeddings are made for as many as the
largest."""


def spellings(files: Files) -> dict[int, str]:
    """Every piece of the vocabulary by its id, without added tokens.

    Raises InputError for an id that is no whole number from 0 to `MOST_IDS`.
    """
    if JSON_FILE not in files.content:
        where = f"{files.where}/{MODEL_FILE}"
        document = published_sentencepiece.parse(files.content[MODEL_FILE], where)
        return {i: piece.piece for i, piece in enumerate(document.pieces)}
    where = f"{files.where}/{JSON_FILE}: model.vocab"
    vocab = files.entries(JSON_FILE, "model").get("vocab") or {}
    if isinstance(vocab, dict):
        return {checked_id(i, f"{where}: {piece!a}"): piece for piece, i in vocab.items()}
    if not isinstance(vocab, list) or not all(map(_is_scored, vocab)):
        raise InputError(f"{where}: expected pieces and their ids, or a list of [piece, score]")
    return {i: entry[0] for i, entry in enumerate(vocab)}


def listed(files: Files) -> list[AddedToken]:
    """Every added, special or user-defined token of the folder's files.

    Raises InputError for an entry that is no token, or two ids of one token.
    """
    if JSON_FILE in files.content:
        where = f"{files.where}/{JSON_FILE}: added_tokens"
        entries = files.listed(JSON_FILE, "added_tokens")
        listed_here = huggingface.added_tokens(entries, where, whole=True)
    else:
        where = f"{files.where}/{MODEL_FILE}"
        document = published_sentencepiece.parse(files.content[MODEL_FILE], where)
        listed_here = published_sentencepiece.listed_tokens(document)
    found = {checked_id(token.id, f"{where}: {token.content!a}"): token for token in listed_here}
    for token in _decoder_tokens(files):
        special = token.special or found.get(token.id, token).special
        found[token.id] = dataclasses.replace(found.get(token.id, token), special=special)
    known = {token.content: token.id for token in found.values()}
    for content, i in _more_tokens(files):
        if known.get(content, i) != i:
            raise InputError(
                f"{files.where}/{ADDED_FILE}: {content!a} has the id {i}, elsewhere "
                f"{known[content]}; copy the files of one checkpoint"
            )
        found.setdefault(i, AddedToken(i, content))
        known[content] = i
    named = special_texts(files)
    for i, piece in spellings(files).items():
        if piece in named and piece not in known:
            found[i] = AddedToken(i, piece, special=True)
    return [
        dataclasses.replace(token, special=token.special or token.content in named)
        for token in found.values()
    ]


def roles(files: Files) -> dict[str, str]:
    """`bos_token` and its like with their text; configuration before special tokens map."""
    merged = _named(files)
    return {role: text for role in ROLES if (text := controls.content_of(merged.get(role)))}


def special_texts(files: Files) -> set[str]:
    """The texts of all tokens that the configuration names as special."""
    found, merged = set(roles(files).values()), _named(files)
    for field in _LISTS:
        group = merged.get(field, [])
        if not isinstance(group, list | dict):
            raise InputError(
                f"{files.where}: {field} is a {type(group).__name__}, expected a list of tokens"
            )
        entries = group.values() if isinstance(group, dict) else group
        found.update(text for entry in entries if (text := controls.content_of(entry)))
    return found


def stop_ids(files: Files) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json: none, one id, or several."""
    value = files.json(GENERATION_FILE).get("eos_token_id")
    found = [] if value is None else value if isinstance(value, list) else [value]
    where = f"{files.where}/{GENERATION_FILE}: eos_token_id"
    return tuple(dict.fromkeys(checked_id(i, where) for i in found))


def checked_id(value: Any, where: str) -> int:
    """The value, which must be a whole number that an id can be. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_IDS:
        raise InputError(f"{where} has the id {value!r:.40}, expected one from 0 to {MOST_IDS - 1}")
    return value


def check_rows(texts: Mapping[int, str], rows: int, where: str) -> None:
    """Raises InputError for an id that neither the embedding has a row for, nor follows on the
    others.

    Args:
      texts: every id with its text.
      rows: of the checkpoint's embedding; 0 where that is not known.
    """
    last = max(texts, default=-1)
    if rows and last >= max(rows, len(texts)):
        raise InputError(
            f"{where}: token {texts[last]!a} has the id {last}, but the model has {rows} rows and "
            f"the tokenizer {len(texts)} tokens; copy the files of one checkpoint"
        )


def _is_scored(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def _decoder_tokens(files: Files) -> list[AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json: id -> token."""
    where = f"{files.where}/{CONFIG_FILE}: added_tokens_decoder"
    found = []
    for key, entry in files.entries(CONFIG_FILE, "added_tokens_decoder").items():
        i = checked_id(int(key) if key.isdecimal() and len(key) < 20 else key, where)
        if not isinstance(entry, dict):
            raise InputError(f"{where}: {key} is a {type(entry).__name__}, expected an object")
        found += huggingface.added_tokens([entry | {"id": i}], where)
    return found


def _more_tokens(files: Files) -> list[tuple[str, int]]:
    """What added_tokens.json lists."""
    where = f"{files.where}/{ADDED_FILE}"
    items = files.json(ADDED_FILE).items()
    return [(text, checked_id(i, f"{where}: {text!a}")) for text, i in items]


def _named(files: Files) -> dict[str, Any]:
    """Fields of the special tokens map and of the configuration, which goes before; null ones mean
    that nothing is there."""
    both = (files.json(MAP_FILE), files.json(CONFIG_FILE))
    return {k: v for fields in both for k, v in fields.items() if v is not None}
