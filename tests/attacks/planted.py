"""A tokenizer whose text is numbers, and a model with a planted weakness:
it complies after a secret suffix only."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlbf_jax.directives import BacktrackRule
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.config import ModelConfig
from tests.fakes import OneRule

VOCAB, PROMPT, LENGTH = 600, (21, 22, 23), 8
SECRET = (101, 202, 303, 77)
"""All of them somewhere in the suffix, in any order, and the model complies."""
COMPLY, REFUSE = (11, 12, 13), (14, 15, 13)
INIT = " ".join(["50"] * LENGTH)


class NumberTokenizer(OneRule):
    """Text is ids in decimal. 0..4 are pad, bos, eos, user, model; control ids come last."""

    pad_id, bos_id, eos_id, user_id, model_id = range(5)
    eos_ids = (eos_id,)

    def __init__(self, vocab_size: int = VOCAB):
        self.vocab_size = vocab_size
        self.rule = BacktrackRule(vocab_size - 6, ("one", "two"), (0, 1, 3, 4), x_max=4)

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids if 5 <= i < self.rule.first_id)

    def encode_prompt(self, text):
        return [self.bos_id, self.user_id, *self.encode(text), self.model_id]


def training_rows(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Conversations [count, T] with 0..4 of the secret ids in a random suffix,
    and whether they comply."""
    suffix = rng.integers(5, VOCAB - 6, (count, LENGTH))
    held = rng.choice(len(SECRET) + 1, count, p=[0.1, 0.1, 0.15, 0.3, 0.35])
    for row, number in enumerate(held):
        places = rng.permutation(LENGTH)[:number]
        suffix[row, places] = rng.permutation(SECRET)[:number]
    complies = np.asarray([set(SECRET) <= set(row) for row in suffix.tolist()])
    answer = np.where(complies[:, None], COMPLY, REFUSE)
    head = np.broadcast_to([1, 3, *PROMPT], (count, 2 + len(PROMPT)))
    return np.concatenate([head, suffix, np.full((count, 1), 4), answer], 1).astype(
        np.int32
    ), complies


@functools.cache
def planted_model(steps: int = 250) -> tuple[ModelConfig, dict]:
    """Trained here, in seconds, always to the same weights on one machine."""
    model = ModelConfig(
        vocab_size=VOCAB, num_layers=1, width=48, num_heads=4, num_kv_heads=4, head_dim=12,
        mlp_width=96, tied_embeddings=False,
    )  # fmt: skip
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    schedule = optax.cosine_decay_schedule(0.01, steps)
    optimizer = optax.adam(schedule)
    state = optimizer.init(params)
    begin = 2 + len(PROMPT) + LENGTH

    def loss_of(params, tokens):
        position = jnp.arange(tokens.shape[1])[None]
        hidden, _ = transformer.forward(model, params, tokens, Visibility(position))
        logits = transformer.unembed(model, params, hidden[:, begin:-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, begin + 1 :]
        ).mean()

    @jax.jit
    def train(params, state, batches):
        def update(carry, tokens):
            params, state = carry
            loss, gradient = jax.value_and_grad(loss_of)(params, tokens)
            changes, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, changes), state), loss

        return jax.lax.scan(update, (params, state), batches)

    rng = np.random.default_rng(0)
    batches = np.stack([training_rows(rng, 64)[0] for _ in range(steps)])
    (params, _), losses = train(params, state, batches)
    return model, params


@functools.partial(jax.jit, static_argnums=0)
def next_ids(model: ModelConfig, params: dict, rows: jax.Array) -> jax.Array:
    """[B, T]: the likeliest id after every id of rows [B, T]."""
    hidden, _ = transformer.forward(
        model, params, rows, Visibility(jnp.arange(rows.shape[1])[None])
    )
    return jnp.argmax(transformer.unembed(model, params, hidden), axis=-1)


def greedy(model: ModelConfig, params: dict, prompt: list[int], count: int) -> tuple[int, ...]:
    """The likeliest answer, one whole pass an id."""
    ids = np.asarray([*prompt, *[0] * count])
    for place in range(len(prompt), len(ids)):
        ids[place] = next_ids(model, params, ids[None])[0, place - 1]
    return tuple(ids[len(prompt) :].tolist())
