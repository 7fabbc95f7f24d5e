"""Text <-> ids: a lossless SentencePiece vocabulary with template and control ids laid beyond it.

Order of ids: pad 0, bos 1, eos 2, unk 3, the 256 byte pieces and the sub-words of SentencePiece;
then `[USER]` and `[MODEL]`; then the control ids (`directives.Controls`): by default categories and
backtracks, then `[RESET]`. Everything after the SentencePiece pieces has no spelling, hence no text
can produce it: "[BACKTRACK_BY_3]" in a prompt is plain characters.

Sub-words never cross a space (a word's first piece begins with it) and merges are BPE, so for texts
a and b of which b begins with a space, encode(a) + encode(b) == encode(a + b).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from rlbf_jax.directives import DEFAULT_KINDS, Controls
from rlbf_jax.storage import write_whole
from rlbf_jax.tokenizers import byte_text
from rlbf_jax.tokenizers.protocol import check_categories, check_text

PAD, BOS, EOS, UNK = 0, 1, 2, 3
MODEL_FILE, META_FILE = "tokenizer.model", "tokenizer.json"
_SPACE = "\u2581"
_RESERVED = re.compile("[\x00\t\n\r\u2581\u2585]")
"""Never in training text: line ends, SentencePiece's own space, unknown and boundary marks.
They encode as bytes."""
_CHUNK = 1000
"""Characters a training sentence may have;
the BPE trainer's positions within a word are 16 bits wide."""


class SentencePieceTokenizer(byte_text.BytePieces):
    """A SentencePiece model (serialized proto) with the control ids
    of this project behind its pieces.

    Args:
        model: serialized SentencePiece model with pad 0, bos 1, eos 2, unk 3, byte fallback and
          identity normalization.
        categories: kinds of violation, in the order of their ids.
        x_max: largest X of `[BACKTRACK_BY_X]`.
        kinds: which edit rules there are control ids for; see `directives.Controls`.
    """

    def __init__(
        self,
        model: bytes,
        categories: Sequence[str],
        x_max: int,
        kinds: Sequence[str] = DEFAULT_KINDS,
    ):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        p = self._processor
        found = (p.pad_id(), p.bos_id(), p.eos_id(), p.unk_id())
        if found != (PAD, BOS, EOS, UNK):
            raise ValueError(
                "a model with (pad, bos, eos, unk) = (0, 1, 2, 3) is expected, this one has "
                f"{found}"
            )
        check_categories(categories, x_max)
        self._num_pieces = p.get_piece_size()
        self._bytes = [piece_bytes_of(p, i) for i in range(self._num_pieces)]
        self._mark = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if UNK in self._mark:
            raise ValueError(
                "this model has no byte pieces; train it with byte_fallback, as train_tokenizer "
                "does"
            )
        self.user_id, self.model_id = self._num_pieces, self._num_pieces + 1
        self._controls = controls_behind(self._num_pieces, categories, x_max, kinds)
        self._vocab_size = self._controls.end_id
        self._names = self._controls.names()
        self._bytes += [b""] * (self._vocab_size - self._num_pieces)

    def __repr__(self) -> str:
        return (
            f"SentencePieceTokenizer({self._num_pieces} pieces, {self._vocab_size} ids, digest "
            f"{self.digest()[:12]})"
        )

    @property
    def pad_id(self) -> int:
        return PAD

    @property
    def bos_id(self) -> int:
        return BOS

    @property
    def eos_id(self) -> int:
        return EOS

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (EOS,)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def model(self) -> bytes:
        """Serialized SentencePiece model."""
        return self._model

    @property
    def num_pieces(self) -> int:
        """Ids of SentencePiece: those below are all that a text can produce."""
        return self._num_pieces

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises InputError for lone surrogates, which no UTF-8 text can hold."""
        check_text(text)
        # U+2581 is SentencePiece's spelling of a space,
        # so a real one must go around it, by its bytes.
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE)):
            if index:
                ids += self._mark
            if part:
                ids += self._processor.encode(part)
        return ids

    @property
    def opening(self) -> tuple[int, ...]:
        return (BOS,)

    def encode_prompt(self, text: str) -> list[int]:
        return [BOS, self.user_id, *self.encode(text), self.model_id]

    def name(self, token: int) -> str:
        token = self._checked(token)
        if token < self._num_pieces:
            return self._processor.id_to_piece(token)
        if token in self._names:
            return self._names[token]
        return "[USER]" if token == self.user_id else "[MODEL]"

    def digest(self) -> str:
        return hashlib.sha256(self._model + b"\0" + self._meta().encode()).hexdigest()

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes `tokenizer.model`, which SentencePiece reads, and `tokenizer.json`."""
        folder = pathlib.Path(folder)
        write_whole(folder / MODEL_FILE, self._model)
        write_whole(folder / META_FILE, self._meta() + "\n")

    def _meta(self) -> str:
        meta: dict[str, object] = {
            "kind": "sentencepiece",
            "categories": list(self._controls.categories),
            "x_max": self._controls.x_max,
        }
        if self._controls.kinds != DEFAULT_KINDS:
            meta["kinds"] = list(self._controls.kinds)
        return json.dumps(meta, indent=1)


def controls_behind(
    pieces: int, categories: Sequence[str], x_max: int, kinds: Sequence[str]
) -> Controls:
    """Control ids of a vocabulary of so many pieces: two template ids stand between."""
    user, model = pieces, pieces + 1
    never = (PAD, BOS, UNK, user, model)
    controls = Controls(pieces + 2, tuple(categories), x_max, tuple(kinds), never)
    return dataclasses.replace(controls, vocab_size=controls.end_id)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    categories: Sequence[str],
    x_max: int,
    character_coverage: float = 1.0,
    kinds: Sequence[str] = DEFAULT_KINDS,
) -> SentencePieceTokenizer:
    """Trains a lossless BPE vocabulary, in memory and deterministically (one thread).

    Args:
        texts: training text of any length, with any characters.
        vocab_size: SentencePiece pieces in all: 4 special ids, 256 bytes, the alphabet, sub-words.
            The two template ids and the control ids come on top (see
            `SentencePieceTokenizer.vocab_size`).
        categories: kinds of violation, unique.
        x_max: largest X of `[BACKTRACK_BY_X]`.
        character_coverage: share of the text's characters that get a piece; rarer ones go by their
            bytes. Lower it (0.9995) where rare signs would fill the vocabulary.
        kinds: which edit rules there are control ids for; see `directives.Controls`.

    Raises:
        ValueError: no text, or a vocabulary that the texts cannot fill
          or whose alphabet does not fit; names the bound.
    """
    check_categories(categories, x_max)
    sentences = list(_sentences(texts))
    if not sentences:
        raise ValueError("there is no text to train a tokenizer on")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=character_coverage,
            max_sentence_length=8 * _CHUNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_bounds(str(error), vocab_size)) from error
    return SentencePieceTokenizer(writer.getvalue(), categories, x_max, kinds)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines without reserved characters, in chunks that break before a space where there is one."""
    for text in texts:
        for line in _RESERVED.split(text):
            start = 0
            while len(line) - start > _CHUNK:
                cut = line.rfind(" ", start + 1, start + _CHUNK)
                cut = cut if cut > 0 else start + _CHUNK
                yield line[start:cut]
                start = cut
            if start < len(line):
                yield line[start:]


def _bounds(message: str, vocab_size: int) -> str:
    too_high = re.search(r"too high \(\d+\).*<= (\d+)", message)
    if too_high:
        return (
            f"vocab_size {vocab_size} is too large for these texts: at most {too_high[1]}; lower "
            "it or add text"
        )
    too_low = re.search(r"smaller than required_chars\.? (\d+) vs (\d+)", message)
    if too_low:
        return (
            f"vocab_size {vocab_size} is too small for these texts: at least {too_low[2]} for "
            "bytes and alphabet; "
            "raise it or lower character_coverage"
        )
    return f"SentencePiece could not train a vocabulary of {vocab_size} pieces: {message}"


def piece_bytes_of(processor: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
    if processor.is_unknown(token):
        return "\ufffd".encode()
    if processor.is_control(token):
        return b""
    piece = processor.id_to_piece(token)
    if processor.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()
