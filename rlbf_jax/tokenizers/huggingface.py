"""The vocabulary of a `tokenizer.json` (library `tokenizers`),
for text in which nothing is special.

The library finds added tokens before its model sees a text, and a Unigram model also finds special
tokens that stand in its vocabulary. So the file is loaded without its added tokens (`added.Matcher`
finds them where they may be found), and ids that the model itself should not have made are broken
up. Texts are continuations: the space that some families put before a text ("dummy prefix") is
added only where a caller asks for it, so that pieces of a text concatenate.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers.added import AddedToken

SPACE = "\u2581"
"""SentencePiece's spelling of a space."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte
    (arXiv gives none; `bytes_to_unicode` of its release), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTES = byte_alphabet()
NEVER_TYPED = frozenset(
    {0xC0, 0xC1, *range(0xF5, 0x100)}  # in no UTF-8
    | {0xF1, 0xF2}  # planes 4 to 11, which have no characters
    | {byte for byte in range(0x20) if chr(byte) not in "\t\n\v\f\r"}
    | {0x7F}
)
"""Bytes that a vocabulary may have no pieces for (SmolLM's lacks 21 of them): text is read without
the characters that need one."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a tokenizer.json says, apart from its model's pieces."""

    kind: str
    """`bytes` (byte-level pieces) or `spaces`
    (a space is spelled U+2581, unknown characters go by `<0xNN>`)."""
    prefix: str
    """Where the family puts a space before plain text:
    `never`, `first` (at the beginning) or `always`."""
    forced_prefix: bool
    """Whether that space is added even before text that begins with one."""


class HuggingFaceVocabulary:
    """Plain text <-> ids by the model of a tokenizer.json.

    Args:
        document: the parsed file.
        guarded: ids that no text may give.
        where: file, for messages.

    Raises:
        InputError: a kind of model, pre-tokenizer or decoder that loses text,
          or no pieces for all 256 bytes.
    """

    def __init__(self, document: Mapping[str, Any], guarded: frozenset[int], where: str):
        self._guarded, self._where = guarded, where
        model = document.get("model") or {}
        if model.get("type") not in ("BPE", "Unigram"):
            raise InputError(
                f"{where}: model.type is {model.get('type')!r}; BPE and Unigram are supported"
            )
        self.parts = _parts(document, where)
        bare = dict(document, added_tokens=[], post_processor=None, truncation=None, padding=None)
        bare["model"] = dict(model, dropout=None) if model["type"] == "BPE" else model
        bare["normalizer"] = _without_prefix(document.get("normalizer"))
        bare["pre_tokenizer"] = _without_prefix(document.get("pre_tokenizer"))
        try:
            empty = {"type": "BPE", "vocab": {}, "merges": []}
            self._normalizer = tokenizers.Tokenizer.from_str(
                json.dumps(bare | {"model": empty})
            ).normalizer
            self._model = tokenizers.Tokenizer.from_str(json.dumps(bare | {"normalizer": None}))
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{where}: the tokenizers library cannot read it ({error})") from error
        vocab = model["vocab"]
        self.pieces = {
            i: piece
            for piece, i in (vocab.items() if isinstance(vocab, dict) else _numbered(vocab))
        }
        self._unspelled = self._check_lossless(set(self.pieces.values()))

    def normalize(self, text: str) -> str:
        """The text as the vocabulary spells it, without characters that it cannot spell, see
        `NEVER_TYPED`."""
        text = self._normalizer.normalize_str(text) if self._normalizer else text
        if not self._unspelled or text.isascii() and text.isprintable():
            return text
        return "".join(c for c in text if self._unspelled.isdisjoint(c.encode()))

    def shown(self, normalized: str) -> str:
        """What `decode` gives for a normalized text: the family's declared normalization."""
        return normalized.replace(SPACE, " ") if self.parts.kind == "spaces" else normalized

    def encode(self, normalized: str, prefix: bool = False) -> list[int]:
        """Ids of a normalized stretch of text, none of them guarded."""
        mark = SPACE if self.parts.kind == "spaces" else " "
        if prefix and (self.parts.forced_prefix or not normalized.startswith((mark, " "))):
            normalized = mark + normalized
        ids: list[int] = []
        todo = [normalized]
        while todo:
            text = todo.pop()
            encoding = self._model.encode(text, add_special_tokens=False)
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            cuts = [
                self._cut(start, end) for i, (start, end) in spans if self._bad(i, text[start:end])
            ]
            if cuts:
                bounds = [0, *cuts, len(text)]
                todo += reversed([text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)])
            else:
                ids += encoding.ids
        return ids

    def bytes_of(self, token: int) -> bytes:
        """What a piece of the model adds to the UTF-8 text."""
        piece = self.pieces[token]
        if self.parts.kind == "bytes":
            known = all(character in _BYTES for character in piece)
            return bytes(_BYTES[character] for character in piece) if known else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def _bad(self, token: int, spelling: str) -> bool:
        """Whether an id was spelled out by the text: a guarded one, or "<0x41>",
        which Unigram models find in text."""
        return token in self._guarded or (
            spelling[:3] == "<0x" and spelling == self.pieces.get(token)
        )

    def _cut(self, start: int, end: int) -> int:
        if end - start < 2:
            raise InputError(
                f"{self._where}: a single character of the text is a special token; it cannot be "
                "encoded"
            )
        return (start + end) // 2

    def _check_lossless(self, pieces: set[str]) -> frozenset[int]:
        """Bytes without a piece. Raises InputError where text that people type needs one."""
        if self.parts.kind == "bytes":
            missing = [byte for character, byte in _BYTES.items() if character not in pieces]
        else:
            missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in pieces]
        if not NEVER_TYPED.issuperset(missing):
            missing = [byte for byte in missing if byte not in NEVER_TYPED]
            raise InputError(
                f"{self._where}: the vocabulary has no piece for {len(missing)} of the 256 bytes "
                "(first "
                f"0x{missing[0]:02X}), so some text would be lost; tokenizers with byte-level or "
                "byte-fallback "
                "vocabularies are supported"
            )
        return frozenset(missing)


def added_tokens(entries: Sequence[Any], where: str, whole: bool = False) -> list[AddedToken]:
    """Entries as `added_tokens` has them, in order. Missing and null flags mean false, unless they
    are to be `whole`, as the library wants them in tokenizer.json.

    Raises InputError for an entry without an id and a text, or a flag that is no truth value.
    """
    flags = {field.name for field in dataclasses.fields(AddedToken)} - {"id", "content"}
    made = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise InputError(f"{where}: {entry!r:.80}, expected a token with its id and content")
        told = {flag: entry[flag] for flag in flags if entry.get(flag) is not None}
        are_flags = all(isinstance(value, bool) for value in told.values())
        if "id" not in entry or not are_flags or (whole and len(told) < len(flags)):
            raise InputError(
                f"{where}: {entry['content']!a} needs an id, and true or false for {sorted(flags)}"
            )
        made.append(AddedToken(entry["id"], entry["content"], **told))
    return made


def opening(document: Mapping[str, Any]) -> list[int]:
    """Ids that the file's post-processor puts before a text, such as the beginning of sequence."""
    full = tokenizers.Tokenizer.from_str(json.dumps(document))
    with_special, without = full.encode("a").ids, full.encode("a", add_special_tokens=False).ids
    for start in range(len(with_special)):
        if with_special[start : start + len(without)] == without:
            return with_special[:start]
    return []


def _numbered(vocab: list) -> list[tuple[str, int]]:
    return [(entry[0], i) for i, entry in enumerate(vocab)]


def _flat(component: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The members of a normalizer, pre-tokenizer or decoder, sequences unrolled."""
    if not component:
        return []
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in component:
            return [member for inner in component[key] for member in _flat(inner)]
    return [component]


def _scheme(metaspace: Mapping[str, Any]) -> str:
    """`prepend_scheme`, or what files from before it said."""
    return metaspace.get("prepend_scheme") or (
        "always" if metaspace.get("add_prefix_space", True) else "never"
    )


def _parts(document: Mapping[str, Any], where: str) -> Parts:
    prefix, forced = "never", False
    for member in _flat(document.get("normalizer")):
        if member["type"] == "Prepend":
            prefix, forced = "always", True
        elif member["type"] in ("Strip", "StripAccents", "Lowercase", "BertNormalizer"):
            raise InputError(
                f"{where}: normalizer {member['type']} loses text; such tokenizers are not "
                "supported"
            )
    for member in _flat(document.get("pre_tokenizer")):
        kind = member["type"]
        if kind == "Metaspace":
            prefix = _scheme(member) if prefix == "never" else prefix
        elif kind == "ByteLevel":
            prefix = "always" if member.get("add_prefix_space") else prefix
        elif kind not in ("Split", "Digits", "Punctuation") or member.get("behavior") == "Removed":
            raise InputError(f"{where}: pre_tokenizer {kind} is not supported, it may lose text")
    decoders = {member["type"] for member in _flat(document.get("decoder"))}
    if "ByteLevel" in decoders:
        return Parts("bytes", prefix, forced)
    if decoders & {"Metaspace", "ByteFallback"} and decoders <= {
        "Metaspace",
        "ByteFallback",
        "Replace",
        "Fuse",
        "Strip",
    }:
        return Parts("spaces", prefix, forced)
    raise InputError(
        f"{where}: decoder {sorted(decoders)}: expected ByteLevel, or Metaspace or Replace with "
        "ByteFallback"
    )


def _without_prefix(component: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The same component, with nothing put before a text."""
    if not component:
        return None
    made = dict(component)
    for key in ("normalizers", "pretokenizers"):
        if key in made:
            made[key] = [inner for member in made[key] if (inner := _without_prefix(member))]
    if made["type"] == "Prepend":
        return None
    if made["type"] == "Metaspace":
        made = {k: v for k, v in made.items() if k != "add_prefix_space"} | {
            "prepend_scheme": "never"
        }
    elif made["type"] == "ByteLevel":
        made["add_prefix_space"] = False
    return made
