"""The tokenizer in a GGUF file, as the files of a checkpoint folder.

gpt2    byte-level BPE: pieces, merges, and the name of a way to cut text before it (`pre`)
llama   SentencePiece: pieces, scores, types

Types of pieces are llama.cpp's (`gguf.TokenType`).
"""

from __future__ import annotations

from typing import Any

from sentencepiece import sentencepiece_model_pb2

from rlbf_jax.errors import InputError
from rlbf_jax.gguf_file import GgufFile
from rlbf_jax.tokenizers.files import (
    CONFIG_FILE,
    DEFAULT,
    GENERATION_FILE,
    JSON_FILE,
    MODEL_FILE,
    dump,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEMPLATE = "tokenizer.chat_template"
_PROTO: Any = sentencepiece_model_pb2  # generated: no types

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_WHOLE = _BYTE_LEVEL | {"use_regex": True}
"""GPT-2's own cuts, by the pre-tokenizer itself."""
_CUT = _BYTE_LEVEL | {"use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(numbers: str) -> list[dict[str, Any]]:
    regex = {"Regex": _WORDS % numbers}
    return [{"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}, _CUT]


PRE: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None, bool]] = {
    "gpt-2": ([_WHOLE], None, False),
    "smollm": ([_DIGITS, _WHOLE], None, False),
    "starcoder": ([_DIGITS, _WHOLE], None, False),
    "refact": ([_DIGITS, _WHOLE], None, False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), None, True),
    "qwen2": (_split(r"\p{N}"), {"type": "NFC"}, False),
    "deepseek-r1-qwen": (_split(r"\p{N}"), {"type": "NFC"}, False),
}
"""`tokenizer.ggml.pre` -> (pre-tokenizers, normalizer, whether whole pieces go before merges), as
the published tokenizer.json of those families have them."""


def files_of_gguf(file: GgufFile) -> dict[str, bytes]:
    """Tokenizer files by name.

    Raises InputError for a kind of tokenizer, or a way to cut text, that is not known.
    """
    kind = file.needs("tokenizer.ggml.model")
    pieces = file.needs("tokenizer.ggml.tokens")
    types = file.field("tokenizer.ggml.token_type") or [NORMAL] * len(pieces)
    if len(types) != len(pieces):
        raise InputError(f"{file.path}: {len(types)} types of {len(pieces)} tokens")
    if kind == "gpt2":
        model = {JSON_FILE: dump(_byte_level(file, pieces, types))}
    elif kind == "llama":
        model = {MODEL_FILE: _sentencepiece(file, pieces, types)}
    else:
        raise InputError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}, expected gpt2 (byte-level BPE) or "
            "llama (SentencePiece)"
        )
    found = model | {CONFIG_FILE: dump(_config(file, pieces))}
    ends = [file.token_id(role) for role in ("eos", "eot", "eom")]
    if ids := list(dict.fromkeys(end for end in ends if end is not None)):
        found[GENERATION_FILE] = dump({"eos_token_id": ids[0] if len(ids) == 1 else ids})
    return found


# Byte-level BPE -----------------------------------------------------------------------------------


def _byte_level(file: GgufFile, pieces: list[str], types: list[int]) -> dict[str, Any]:
    """tokenizer.json."""
    name = file.field("tokenizer.ggml.pre", "gpt-2")
    if name not in PRE:
        raise InputError(
            f"{file.path}: tokenizer.ggml.pre is {name!r}, expected one of {', '.join(PRE)}; other "
            "ways to cut text are not known, and ids would differ"
        )
    cuts, normalizer, whole_first = PRE[name]
    added = [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for i, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": _opening(file, pieces),
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": whole_first,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [merge.split(" ", 1) for merge in file.needs("tokenizer.ggml.merges")],
        },
    }


def _opening(file: GgufFile, pieces: list[str]) -> dict[str, Any]:
    """What is put before a text: the beginning of sequence, where the file says so."""
    begin = file.token_id("bos")
    if not file.field("tokenizer.ggml.add_bos_token", False) or begin is None:
        return _BYTE_LEVEL
    text = pieces[begin]
    part = {"SpecialToken": {"id": text, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [part, sequence],
        "pair": [part, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [begin], "tokens": [text]}},
    }


# SentencePiece ------------------------------------------------------------------------------------


def _sentencepiece(file: GgufFile, pieces: list[str], types: list[int]) -> bytes:
    """tokenizer.model."""
    scores = file.field("tokenizer.ggml.scores") or [0.0] * len(pieces)
    if len(scores) != len(pieces):
        raise InputError(f"{file.path}: {len(scores)} scores of {len(pieces)} tokens")
    document = _PROTO.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        document.pieces.add(piece=piece, score=float(score), type=int(kind))
    document.trainer_spec.model_type = _PROTO.TrainerSpec.ModelType.BPE
    document.trainer_spec.byte_fallback = True
    document.trainer_spec.vocab_size = len(pieces)
    for name in ("bos", "eos", "unknown", "padding"):
        value = file.token_id(name)
        field = {"unknown": "unk_id", "padding": "pad_id"}.get(name, f"{name}_id")
        setattr(document.trainer_spec, field, -1 if value is None else value)
    normalizer = document.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(file.field("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(
        file.field("tokenizer.ggml.remove_extra_whitespaces", False)
    )
    return document.SerializeToString(deterministic=True)


# Configuration ------------------------------------------------------------------------------------


def _config(file: GgufFile, pieces: list[str]) -> dict[str, Any]:
    """tokenizer_config.json."""
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    roles = {
        theirs: pieces[value]
        for ours, theirs in names.items()
        if (value := file.token_id(ours)) is not None
    }
    flags = {
        name: bool(value)
        for name in ("add_bos_token", "add_eos_token")
        if (value := file.field(f"tokenizer.ggml.{name}")) is not None
    }
    return roles | flags | _templates(file)


def _templates(file: GgufFile) -> dict[str, Any]:
    """`chat_template`: the one there is, or several with their names."""
    named = {
        name.removeprefix(f"{TEMPLATE}."): text
        for name, text in file.fields.items()
        if name.startswith(f"{TEMPLATE}.")
    }
    default = file.field(TEMPLATE)
    if not named:
        return {} if default is None else {"chat_template": default}
    named = ({} if default is None else {DEFAULT: default}) | named
    return {"chat_template": [{"name": n, "template": text} for n, text in named.items()]}
