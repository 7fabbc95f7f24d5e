"""A tiny Llama-like checkpoint in published form, and what harnesses ask of it. Weights are
numpy's, by their names."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.models.weights.write import write_checkpoint
from rlbf_jax.tokenizers import train_tokenizer
from tests.reference.family_cases import weight
from tests.tokenizers import families

ROWS = 440
"""Of the embedding: a few more than the tokenizer has ids."""
FIRST_SPECIAL = 383
"""Ids from here on are special or have no piece; their logits are 0, so that greedy decoding never
chooses one."""
MAX_LENGTH = 48
"""So that some texts are too long."""
CONFIG = styled(
    ModelConfig(
        family="llama", vocab_size=ROWS, num_layers=2, width=32, num_heads=4, num_kv_heads=2,
        head_dim=8, mlp_width=40, max_positions=256, tied_embeddings=False,
    )
)  # fmt: skip
LONG = "The moon shines over quiet hills and a river runs past old stones. " * 6

PAIRS = [
    ("The moon shines over", " quiet hills"),
    ("", "The river runs"),
    ("Birds sing ", "songs of summer"),
    ("A river runs past old", " s"),
    ("A river runs past old", " 7"),
    ("A river runs past old", " system"),
    ("System:\n", "the user and the assistant 12 7"),
    ("été 字 😀 and", " ñandú"),
    (LONG, " hills and stones"),
    ("Question: 12 + 7?\nAnswer:", " 19\n\nQuestion:"),
    ("The", " moon" * 30),
]
"""(context, continuation)."""
TEXTS = ["", "The moon.", "Old stones  and\nbirds é 字.", LONG]
"""For rolling log-likelihoods."""
CONTEXTS = [
    ("The moon shines over", {"until": ["x", "\n\n"], "max_gen_toks": 20, "do_sample": False}),
    ("Birds sing songs of summer", {"until": [], "max_gen_toks": 12}),
    (LONG, {"until": ["zzz"], "max_gen_toks": 16}),
]
"""For greedy generations."""


def params() -> dict:
    """float32, so large that logits have some spread."""
    shapes = jax.eval_shape(functools.partial(transformer.init, CONFIG), jax.random.key(0))

    def made(path, leaf):
        name = "/".join(str(key.key) for key in path)
        values = weight(name, leaf.shape)
        if name == "unembedding":
            values[FIRST_SPECIAL:] = 0
        return values + np.float32(1) if len(leaf.shape) == 1 else values * np.float32(2)

    return jax.tree_util.tree_map_with_path(made, shapes)


def write(folder: pathlib.Path) -> pathlib.Path:
    """The checkpoint with its tokenizer, as `transformers` and we read it."""
    families.llama(folder)
    write_checkpoint(folder, CONFIG, params(), {}, 10**9)
    return folder


def write_yes_model(folder: pathlib.Path, text: str) -> None:
    """A checkpoint with a tokenizer of `text` that says yes, whatever it is asked."""
    tokenizer = train_tokenizer(["yes"] * 90 + [text] * 5, 300, ("rude",), 8)
    tokenizer.save(folder)
    weights = jax.tree.map(np.zeros_like, params())
    weights["embedding"][tokenizer.encode_prompt("x")[-1]] = 1.0  # after which an answer begins
    weights["final_norm"]["scale"][:] = 1.0
    (yes,) = tokenizer.encode("yes")
    weights["unembedding"][yes] = 1.0
    write_checkpoint(folder, dataclasses.replace(CONFIG, max_positions=4096), weights)
