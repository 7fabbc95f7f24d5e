"""Where control ids go in a published vocabulary, what their embedding rows start as,
and how files say so.

A control id must have a row and no spelling. Published files can give a token a row, but any
*added* token can be spelled by whoever types its content. So control tokens stand in the model's
own vocabulary, under a name with a space in it (" [BACKTRACK_BY_3]"): byte-level and SentencePiece
models never see a space (it is spelled in another way before they look) and no merge leads there.
They have a name and a row, and no text reaches them, under default loading too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers.added import AddedToken

RESERVED = re.compile(
    r"<unused_?\d+>|<\|reserved_special_token_\d+\|>|<reserved_\d+>|\[control_\d+\]|<SPECIAL_\d+>|<\|reserved_\d+\|>"
)
"""Names under which families keep spare rows (Gemma, Llama 3, Mistral and others)."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the control ids of a tokenizer stand."""

    first_id: int
    """The first category; retractions and `[RESET]` follow."""
    count: int
    source: str
    """`reserved` (tokens the family keeps spare), `padding` (rows beyond the tokenizer)
    or `appended` (new rows)."""
    vocab_size: int
    """Rows that the embedding needs."""

    @property
    def ids(self) -> range:
        return range(self.first_id, self.first_id + self.count)


def place(
    spellings: Mapping[int, str], rows: int, count: int, taken: Collection[int] = ()
) -> Placement:
    """Looks for `count` neighboring ids: among reserved tokens, then padding rows,
    then behind everything.

    Of reserved tokens the last long enough run is taken, and its end:
    fine-tunes by others begin at the front.

    Args:
        spellings: every id of the tokenizer with its text.
        rows: rows of the checkpoint's embedding; 0 if that is not known.
        taken: ids with a role (padding, end of turn), whatever they are called.
    """
    end = max(spellings, default=-1) + 1
    size = max(rows, end)
    best = _last_run(
        range(size), count, lambda i: i not in taken and RESERVED.fullmatch(spellings.get(i, ""))
    )
    if best is not None:
        return Placement(best, count, "reserved", size)
    first = next((i for i in range(end, size) if not _meets(range(i, i + count), taken)), size)
    if size - first >= count:
        return Placement(first, count, "padding", size)
    return Placement(size, count, "appended", size + count)


def _last_run(ids: range, count: int, is_free: Callable[[int], Any]) -> int | None:
    """Where the last `count` neighbors that are all free begin."""
    run, best = 0, None
    for i in ids:
        run = run + 1 if is_free(i) else 0
        if run >= count:
            best = i + 1 - count
    return best


def _meets(ids: range, taken: Collection[int]) -> bool:
    return any(i in ids for i in taken)


def new_rows(
    embedding: np.ndarray,
    count: int,
    seed: int | Sequence[int],
    spread: float = 0.1,
    skip: Collection[int] = (),
    chunk: int = 8192,
) -> np.ndarray:
    """Rows for new ids: the mean of the old rows plus noise of `spread` old standard
    deviations, column by column.

    Args:
        embedding: [V, D] old rows.
        seed: the same seed gives the same rows.
        skip: rows that were never trained (`FamilyTokenizer.untrained_ids`),
          which stay out of mean and deviation.
        chunk: rows that are converted to float64 at a time.

    Returns:
        [count, D] in the embedding's dtype.
    """
    size, width = embedding.shape
    keep = np.ones(size, bool)
    keep[[i for i in skip if i < size]] = False
    if not keep.any():
        raise ValueError(f"all {size} old rows are skipped; the mean of no rows is not defined")

    def rows() -> Iterator[np.ndarray]:
        for start in range(0, size, chunk):
            yield np.asarray(embedding[start : start + chunk]).astype(np.float64)[
                keep[start : start + chunk]
            ]

    mean = sum((block.sum(0) for block in rows()), np.zeros(width)) / keep.sum()
    variance = sum((((block - mean) ** 2).sum(0) for block in rows()), np.zeros(width)) / keep.sum()
    noise = np.random.default_rng(seed).standard_normal((count, width))
    return (mean + spread * np.sqrt(variance) * noise).astype(embedding.dtype)


def with_names(document: Mapping[str, Any], names: Mapping[int, str], where: str) -> dict[str, Any]:
    """A tokenizer.json with control ids in its vocabulary, under names that no text reaches.

    Added tokens are written into the vocabulary too:
    when the library reads the file it numbers an added token by the vocabulary, or else behind it,
    and would give other ids after the vocabulary has grown.

    Raises:
        InputError: no vocabulary, or a Unigram one (a list without gaps)
          that cannot hold these ids.
    """
    model = dict(document.get("model") or {})
    if "vocab" not in model:
        raise InputError(
            f"{where}: model.vocab is missing; copy the file from the checkpoint again"
        )
    added = [entry for entry in document.get("added_tokens") or [] if entry["id"] not in names]
    if isinstance(model["vocab"], dict):
        vocab = {piece: i for piece, i in model["vocab"].items() if i not in names}
        vocab |= {entry["content"]: entry["id"] for entry in added if entry["content"] not in vocab}
        model["vocab"] = vocab | {name: i for i, name in names.items()}
    else:
        pieces = list(model["vocab"])
        if any(entry["id"] >= len(pieces) for entry in added):
            raise InputError(
                f"{where}: added tokens stand behind a Unigram vocabulary; control tokens cannot "
                "be added"
            )
        pieces += [[f" [UNUSED_{i}]", 0.0] for i in range(len(pieces), max(names) + 1)]
        for i, name in names.items():
            pieces[i] = [name, pieces[i][1]]
        model["vocab"] = pieces
    return {**document, "added_tokens": added, "model": model}


def with_tokens(document: Mapping[str, Any], tokens: Sequence[AddedToken]) -> dict[str, Any]:
    """A tokenizer.json with the added tokens that only other files list, as programs that read all
    of them would add."""
    entries = list(document.get("added_tokens") or [])
    known = {entry["id"] for entry in entries}
    more = [dataclasses.asdict(token) for token in tokens if token.id not in known]
    return {**document, "added_tokens": entries + more}


def without_spellings(
    config: Mapping[str, Any], gone: Sequence[AddedToken], ids: Collection[int]
) -> dict[str, Any]:
    """A tokenizer_config.json (or special_tokens_map.json, or added_tokens.json) that does not list
    the ids that became control ids."""
    contents = {token.content for token in gone}
    # Of added_tokens.json the texts are the fields.
    made = {k: v for k, v in config.items() if k not in contents}
    if isinstance(made.get("added_tokens_decoder"), dict):
        made["added_tokens_decoder"] = {
            k: v for k, v in made["added_tokens_decoder"].items() if int(k) not in ids
        }
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(made.get(key), list):
            made[key] = [entry for entry in made[key] if content_of(entry) not in contents]
    return made


def content_of(entry: Any) -> str | None:
    """The text of a token in a configuration, which is a string or an object with `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry
