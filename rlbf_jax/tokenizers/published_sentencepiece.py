"""The vocabulary of a published SentencePiece `tokenizer.model`,
for text in which nothing is special.

Published models keep turn tokens as *user-defined* pieces, which SentencePiece finds in any text.
Here such pieces are retyped to *unused* in memory: they keep their ids and no text makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers.added import AddedToken
from rlbf_jax.tokenizers.huggingface import SPACE, Parts

_PROTO: Any = sentencepiece_model_pb2  # generated: no types
_TYPE = _PROTO.ModelProto.SentencePiece.Type


class PublishedSentencePiece:
    """Plain text <-> ids by a SentencePiece model with the normalization it was trained with.

    Args:
        model: serialized proto.
        guarded: ids that no text may give.
        where: file, for messages.

    Raises:
        InputError: not a SentencePiece model, or one without byte fallback.
    """

    def __init__(self, model: bytes, guarded: frozenset[int], where: str):
        document = parse(model, where)
        prefix = "first" if document.normalizer_spec.add_dummy_prefix else "never"
        self.parts = Parts("spaces", prefix, True)
        document.normalizer_spec.add_dummy_prefix = False
        for i in guarded:
            if i < len(document.pieces) and document.pieces[i].type == _TYPE.USER_DEFINED:
                document.pieces[i].type = _TYPE.UNUSED
        self.pieces = {i: piece.piece for i, piece in enumerate(document.pieces)}
        self._byte_ids = {i for i, piece in enumerate(document.pieces) if piece.type == _TYPE.BYTE}
        if len(self._byte_ids) != 256:
            raise InputError(
                f"{where}: {len(self._byte_ids)} of 256 byte pieces; a model with byte fallback "
                "is expected"
            )
        self._guarded, self._where = guarded, where
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=document.SerializeToString()
        )

    def normalize(self, text: str) -> str:
        """The text as it is; SentencePiece normalizes while it encodes."""
        return text

    def shown(self, normalized: str) -> str:
        """What `decode` gives for a text: the model's own normalization, U+2581 read as a space."""
        return self._processor.normalize(normalized).replace(SPACE, " ")

    def encode(self, normalized: str, prefix: bool = False) -> list[int]:
        """Ids of a stretch of text, none of them guarded."""
        ids = self._processor.encode(" " + normalized if prefix else normalized)
        if not self._guarded.isdisjoint(ids):
            raise InputError(
                f"{self._where}: the text makes a special token; the model cannot be used safely"
            )
        return ids

    def bytes_of(self, token: int) -> bytes:
        """What a piece adds to the UTF-8 text."""
        piece = self.pieces[token]
        return (
            bytes([int(piece[3:5], 16)])
            if token in self._byte_ids
            else piece.replace(SPACE, " ").encode()
        )


def parse(model: bytes, where: str) -> Any:
    """The proto of a serialized model. Raises InputError that names the file."""
    document = _PROTO.ModelProto()
    try:
        document.ParseFromString(model)
    except DecodeError as error:
        raise InputError(f"{where}: not a SentencePiece model ({error})") from error
    if not document.pieces:
        raise InputError(f"{where}: not a SentencePiece model (no pieces)")
    return document


def listed_tokens(document: Any) -> list[AddedToken]:
    """Control and unknown pieces (special) and user-defined ones, as added tokens."""
    kinds = {_TYPE.CONTROL: True, _TYPE.UNKNOWN: True, _TYPE.USER_DEFINED: False}
    return [
        AddedToken(i, piece.piece, special=kinds[piece.type])
        for i, piece in enumerate(document.pieces)
        if piece.type in kinds
    ]


def with_names(model: bytes, names: Mapping[int, str], where: str) -> bytes:
    """The model with pieces renamed and out of reach of any text;
    bytes as they were if none of them is in it."""
    document = parse(model, where)
    found = {i: name for i, name in names.items() if i < len(document.pieces)}
    if not found:
        return model
    for i, name in found.items():
        document.pieces[i].piece, document.pieces[i].type = name, _TYPE.UNUSED
    return document.SerializeToString(deterministic=True)
