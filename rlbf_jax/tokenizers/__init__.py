"""Text <-> ids: our own SentencePiece vocabularies and those of published checkpoints,
behind one protocol.

No text makes a control, template or special id; only chat templates and our builders place such
ids. Modules: `protocol`, `byte_text` (offsets, streaming), `own` (trained here, lossless); for
checkpoints `family` on top of `files`, `listed` (which tokens they list) and `folder` (rewritten
with control tokens), `chat` (templates), `added` (what may be spelled where), `controls` (ids and
rows of control tokens), `huggingface` and `published_sentencepiece` (vocabularies), `checks`
(against other programs, at import).
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence

from rlbf_jax.directives import DEFAULT_KINDS, Controls
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.tokenizers import files as _files
from rlbf_jax.tokenizers import folder as _folder
from rlbf_jax.tokenizers import own as _own
from rlbf_jax.tokenizers import source as _source
from rlbf_jax.tokenizers.byte_text import StreamDecoder
from rlbf_jax.tokenizers.chat import ChatTemplate
from rlbf_jax.tokenizers.checks import check_import
from rlbf_jax.tokenizers.controls import new_rows
from rlbf_jax.tokenizers.family import FamilyTokenizer
from rlbf_jax.tokenizers.own import SentencePieceTokenizer, train_tokenizer
from rlbf_jax.tokenizers.protocol import Tokenizer, check_categories

__all__ = [
    "ChatTemplate",
    "FamilyTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "import_tokenizer",
    "load_tokenizer",
    "new_rows",
    "train_tokenizer",
]


_SHAPES = (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError)
"""What a value of another type or size raises, where it is first used."""


def load_tokenizer(folder: str | pathlib.Path) -> SentencePieceTokenizer | FamilyTokenizer:
    """Reads what `save` of either tokenizer wrote.
    Raises ValueError that names the missing or broken file."""
    folder = pathlib.Path(folder)
    if (folder / _files.META_FILE).is_file():
        with _as_written(folder):
            return FamilyTokenizer(_files.read(folder))
    for name in (_own.MODEL_FILE, _own.META_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} holds no {name}; `save` of a tokenizer writes {_own.MODEL_FILE} and "
                f"{_own.META_FILE}"
            )
    try:
        meta = json.loads((folder / _own.META_FILE).read_text(encoding="utf-8"))
        return SentencePieceTokenizer(
            (folder / _own.MODEL_FILE).read_bytes(),
            meta["categories"],
            meta["x_max"],
            meta.get("kinds", DEFAULT_KINDS),
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,  # RecursionError is one
    ) as error:  # of JSON, of SentencePiece, or ours
        raise ValueError(
            f"{folder}: not a saved tokenizer ({type(error).__name__}: {error})"
        ) from error


def import_tokenizer(
    folder: str | pathlib.Path,
    categories: Sequence[str],
    x_max: int,
    rows: int = 0,
    template: str = _files.DEFAULT,
    date: str = _folder.DATE.isoformat(),
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
) -> FamilyTokenizer:
    """The tokenizer of a published checkpoint folder, with control tokens.

    Args:
        folder: a GGUF file, or a folder with tokenizer.json or tokenizer.model, and
            tokenizer_config.json, special_tokens_map.json, generation_config.json,
            chat_template.jinja where there are such.
        categories: kinds of violation, in the order of their ids.
        x_max: largest X of `[BACKTRACK_BY_X]`.
        rows: rows of the checkpoint's embedding (`vocab_size` of its config.json); those beyond the
            tokenizer may become control ids, and the rest of them is never legal to sample. 0: as
            many as the tokenizer has ids.
        template: which chat template, where the folder has several named ones.
        date: ISO date for templates that ask for today's.
        kinds: which edit rules there are control ids for; see `directives.Controls`.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    check_categories(categories, x_max)
    wanted = Controls(0, tuple(categories), x_max, tuple(kinds))
    with _as_written(folder):
        files = _folder.with_controls(_source.read(folder, template), wanted, rows, template, date)
        tokenizer = FamilyTokenizer(files)
        if _files.JSON_FILE in files.content:
            check_import(tokenizer, files.json(_files.JSON_FILE), f"{folder}/{_files.JSON_FILE}")
        return tokenizer


@contextlib.contextmanager
def _as_written(folder: str | pathlib.Path) -> Iterator[None]:
    """Files come from anywhere: whatever shape they have, what is wrong with them is one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except BaseException as error:
        # The tokenizers library raises bare Exceptions, and its panics are none.
        of_library = type(error) is Exception or type(error).__name__ == "PanicException"
        if of_library or isinstance(error, _SHAPES):
            raise InputError(
                f"{folder}: the tokenizer files are not as programs write them "
                f"({type(error).__name__}: {error}); copy them from the checkpoint again"
            ) from error
        raise
