"""Where GCG's candidates come from: which ids an attacker may use, which are promising, random
draws, and the check that a suffix survives being written as text.

`draw_*` are the only random functions; `replace` applies draws,
so that recorded ones can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import Tokenizer

Positions = Literal["uniform", "stratified"]


def allowed_ids(tokenizer: Tokenizer, vocab_size: int, non_ascii: bool = False) -> np.ndarray:
    """[V] bool: what an attacker may put into a prompt.

    Never: ids that no text makes (control, template and special ids,
      rows of the model beyond the tokenizer). Only with
    `non_ascii`: ids whose text is not printable ASCII, which pieces of a character are not either.
    """
    allowed = np.zeros(vocab_size, bool)
    guarded = set(getattr(tokenizer, "guarded_ids", ())) | {
        *tokenizer.eos_ids,
        tokenizer.bos_id,
        tokenizer.pad_id,
    }
    guarded |= {*tokenizer.controls.never, *tokenizer.controls.ids}
    for token in range(min(vocab_size, tokenizer.vocab_size)):
        text = "" if token in guarded else tokenizer.decode([token])
        allowed[token] = bool(text) and (non_ascii or (text.isascii() and text.isprintable()))
    return allowed


def check_topk(topk: int, allowed: np.ndarray) -> int:
    """`topk`, or as many ids as are allowed: with more, forbidden ids would be among the best.
    Raises InputError if none is."""
    if not allowed.any():
        raise InputError(
            "no id of this vocabulary is allowed in a suffix; set allow_non_ascii, or give "
            "allowed ids"
        )
    return min(topk, int(allowed.sum()))


def best_ids(gradient: Array, allowed: Array, topk: int) -> Array:
    """[n, topk] int32: per position the allowed ids of most negative gradient, best first.

    `gradient` is [n, V]."""
    return jax.lax.top_k(jnp.where(allowed, -gradient, -jnp.inf), topk)[1]


def draw_positions(key: Array, kind: Positions, width: int, length: int, n_replace: int) -> Array:
    """[S, n_replace] int32, distinct within a row.

    `uniform`: as nanoGCG, at random without replacement. `stratified`: as llm-attacks, the first
    position of candidate s is s n / S, so that every position gets as many candidates;
    the others at random.
    """
    noise = jax.random.uniform(key, (width, length))
    if kind == "stratified":
        first = jnp.arange(width) * length // width
        noise = noise.at[jnp.arange(width), first].set(-1.0)
    return jnp.argsort(noise, axis=1)[:, :n_replace].astype(jnp.int32)


def draw_ranks(key: Array, width: int, n_replace: int, topk: int) -> Array:
    """[S, n_replace] int32, uniform over 0..topk - 1."""
    return jax.random.randint(key, (width, n_replace), 0, topk, jnp.int32)


def replace(suffix: Array, best: Array, positions: Array, ranks: Array) -> Array:
    """Candidates [S, n]: `suffix` [n] with best[position, rank] put at the drawn positions."""
    values = best[positions, ranks]
    rows = jnp.arange(positions.shape[0])[:, None]
    return (
        jnp.broadcast_to(suffix, (positions.shape[0], suffix.shape[0]))
        .at[rows, positions]
        .set(values)
    )


# Text -------------------------------------------------------------------------------------------

Compose = Callable[[str], str]
"""Text of a suffix -> the user's message that holds it."""


def split_prompt(
    tokenizer: Tokenizer, compose: Compose, suffix: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Ids of the conversation before and after the suffix.
    Raises InputError if the suffix does not survive as text."""
    ids, wanted = tokenizer.encode_prompt(compose(tokenizer.decode(suffix))), list(suffix)
    places = [i for i in range(len(ids) - len(wanted) + 1) if ids[i : i + len(wanted)] == wanted]
    if not places:
        raise InputError(
            f"the initial suffix {tokenizer.decode(suffix)!a} has other ids within its "
            "conversation; choose another "
            "`init`, one that begins with a space where the vocabulary's words do"
        )
    # Prompts may repeat the suffix; only the searched one moves with it.
    begin = places[-1]
    return ids[:begin], ids[begin + len(wanted) :]


def survives(
    tokenizer: Tokenizer,
    compose: Compose,
    before: Sequence[int],
    after: Sequence[int],
    suffixes: np.ndarray,
) -> np.ndarray:
    """[S] bool: the whole conversation, written as text and encoded,
    has the ids that were optimized."""
    head, rest = list(before), list(after)
    kept = np.zeros(len(suffixes), bool)
    for row, suffix in enumerate(suffixes.tolist()):
        kept[row] = (
            tokenizer.encode_prompt(compose(tokenizer.decode(suffix))) == head + suffix + rest
        )
    return kept
