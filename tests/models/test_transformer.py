"""The decoder against a numpy twin that goes head by head and query by query."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.directives import NEVER
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.layers import dense_halves
from rlbf_jax.models.transformer import Decoder, ModelConfig, ValueHead, unrolled

TIME, VOCAB = 12, 19
BASE = ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    width=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=10,
    rope_theta=50.0,
)
DEEP = dataclasses.replace(
    BASE,
    num_layers=4,
    windows=(3, None),
    attention_softcap=2.0,
    final_softcap=5.0,
    activation="gelu",
)
FORWARD = jax.jit(transformer.forward, static_argnums=0)
UNEMBED = jax.jit(transformer.unembed, static_argnums=0)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@functools.cache
def random_params(config, seed=0):
    """Parameters all of whose entries matter: norms that are not 1, outputs as loud as inputs."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        around = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(around + rng.normal(0, 1.5 * config.width**-0.5, leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def rows(batch=2):
    """Tokens, and a visibility of two packed segments where ids die and positions go back."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (batch, TIME)).astype(np.int32)
    segment = np.where(np.arange(TIME) < 5, 1, 2)[None].repeat(batch, 0).astype(np.int32)
    position = rng.integers(0, TIME, (batch, TIME)).astype(np.int32)
    time = np.arange(TIME)
    died = np.where(
        rng.random((batch, TIME)) < 0.4, time + rng.integers(1, 5, (batch, TIME)), NEVER
    ).astype(np.int32)
    return tokens, Visibility(position, segment, died)


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def turn(x, position, theta):
    """Rotary embedding of one head [T, H] as a product of complex numbers."""
    half = x.shape[-1] // 2
    angle = position[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def attention_twin(c, p, h, position, segment, died, window):
    groups, total = c.num_heads // c.num_kv_heads, np.zeros((len(h), c.width))
    for n in range(c.num_heads):
        weights = p["qkv"][:, n // groups]
        query = turn(h @ weights[:, n % groups], position, c.rope_theta)
        key, value = (
            turn(h @ weights[:, groups], position, c.rope_theta),
            h @ weights[:, groups + 1],
        )
        for i in range(len(h)):
            seen = [
                j
                for j in range(i + 1)
                if j == i
                or (
                    segment[i] == segment[j]
                    and i < died[j]
                    and (window is None or int(position[i]) - int(position[j]) < window)
                )
            ]
            scores = key[seen] @ query[i] / np.sqrt(c.head_dim)
            if c.attention_softcap is not None:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            shares = np.exp(scores) / np.exp(scores).sum()
            total[i] += shares @ value[seen] @ p["out"][n]
    return total


def twin(c, params, tokens, visibility):
    """[B, T, D] hidden states and [B, T, V] logits, float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hiddens = []
    for row, ids in enumerate(tokens):
        masks = [np.asarray(x[row]) for x in visibility]
        x = params["embedding"][ids] * np.sqrt(c.width)
        for number in range(c.num_layers):
            repeat, place = divmod(number, len(c.windows))
            p = params[f"blocks_{repeat}"][f"layers_{place}"]
            h = norm(x, p["attention_norm"]["scale"], c.norm_eps)
            x = x + attention_twin(c, p, h, *masks, c.windows[place])
            h = norm(x, p["mlp_norm"]["scale"], c.norm_eps)
            x = (
                x
                + (ACTIVATIONS[c.activation](h @ p["gate_up"][:, 0]) * (h @ p["gate_up"][:, 1]))
                @ p["down"]
            )
        hiddens.append(norm(x, params["final_norm"]["scale"], c.norm_eps))
    hidden = np.stack(hiddens)
    logits = hidden @ params["embedding" if c.tied_embeddings else "unembedding"].T
    return hidden, logits if c.final_softcap is None else c.final_softcap * np.tanh(
        logits / c.final_softcap
    )


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        DEEP,
        dataclasses.replace(
            BASE, num_kv_heads=1, tied_embeddings=False, windows=(2,), activation="relu2"
        ),
        dataclasses.replace(BASE, num_kv_heads=4, norm_eps=0.1, attention_softcap=1.0),
    ],
)
def test_forward_equals_the_twin(config):
    params, (tokens, visibility) = random_params(config), rows()
    hidden, pairs = FORWARD(config, params, tokens, visibility)
    expected, logits = twin(config, params, tokens, visibility)
    np.testing.assert_allclose(hidden, expected, atol=2e-4)
    np.testing.assert_allclose(UNEMBED(config, params, hidden), logits, atol=1e-3)
    assert len(pairs) == config.num_layers
    assert {x.shape for pair in pairs for x in pair} == {
        (2, config.num_kv_heads, TIME, config.head_dim)
    }


def test_no_segments_and_no_deaths_are_one_causal_row():
    params, (tokens, _) = random_params(BASE), rows()
    position = np.arange(TIME, dtype=np.int32)[None].repeat(2, 0)
    plain, _ = FORWARD(BASE, params, tokens, Visibility(position))
    told = Visibility(position, np.ones_like(position), np.full_like(position, NEVER))
    np.testing.assert_allclose(plain, twin(BASE, params, tokens, told)[0], atol=2e-4)
    other = tokens.copy()
    other[:, 7] = (other[:, 7] + 1) % VOCAB
    changed, _ = FORWARD(BASE, params, other, Visibility(position))
    np.testing.assert_array_equal(plain[:, :7], changed[:, :7])
    assert (np.abs(np.asarray(plain - changed))[:, 7:].max(-1) > 1e-4).all()


def stacked(config, params):
    """Parameters of unrolled layers as the scanned model wants them."""
    blocks = [params[f"blocks_{r}"] for r in range(config.num_layers // len(config.windows))]
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    return rest | {"stack": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def test_scanned_layers_equal_unrolled_ones():
    scanned = dataclasses.replace(DEEP, scan_layers=True)
    params, (tokens, visibility) = random_params(scanned), rows()
    config, flat = unrolled(scanned, params)
    assert config == DEEP
    jax.tree.map(np.testing.assert_array_equal, stacked(config, flat), params)
    assert jax.tree.structure(flat) == jax.tree.structure(random_params(DEEP))
    hidden, pairs = FORWARD(scanned, params, tokens, visibility)
    expected, other = FORWARD(config, flat, tokens, visibility)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), pairs, other)
    again = unrolled(config, flat)
    assert again[0] is config and again[1] is flat


def test_scanned_layers_start_differently_from_each_other():
    config = dataclasses.replace(BASE, scan_layers=True)
    stack = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))["stack"]
    weights = stack["layers_0"]["qkv"]
    assert weights.shape[0] == 2 and not np.array_equal(weights[0], weights[1])
    assert np.std(weights) == pytest.approx(BASE.width**-0.5, rel=0.1)


def test_packed_segments_are_as_if_alone():
    params, (tokens, _) = random_params(DEEP), rows()
    position = np.concatenate([np.arange(5), np.arange(7)]).astype(np.int32)[None].repeat(2, 0)
    segment = np.asarray([1] * 5 + [2] * 7, np.int32)[None].repeat(2, 0)
    packed, _ = FORWARD(DEEP, params, tokens, Visibility(position, segment))
    for here in (slice(0, 5), slice(5, 12)):
        alone, _ = FORWARD(DEEP, params, tokens[:, here], Visibility(position[:, here]))
        np.testing.assert_allclose(packed[:, here], alone, atol=1e-5)
    other = tokens.copy()
    other[:, :5] = (other[:, :5] + 1) % VOCAB
    changed, _ = FORWARD(DEEP, params, other, Visibility(position, segment))
    np.testing.assert_array_equal(packed[:, 5:], changed[:, 5:])
    assert not np.allclose(packed[:, :5], changed[:, :5])


def test_bfloat16_is_near_float32():
    half = dataclasses.replace(DEEP, dtype="bfloat16")
    params, (tokens, visibility) = random_params(DEEP), rows()
    hidden, pairs = FORWARD(half, params, tokens, visibility)
    assert hidden.dtype == jnp.bfloat16 and {x.dtype for pair in pairs for x in pair} == {
        jnp.dtype("bfloat16")
    }
    logits = UNEMBED(half, params, hidden)
    assert logits.dtype == jnp.float32
    expected = UNEMBED(DEEP, params, FORWARD(DEEP, params, tokens, visibility)[0])
    # 8 bits of precision through 4 layers.
    error = np.abs(np.asarray(logits - expected))
    assert 1e-4 < error.mean() < 0.05 * np.std(expected)
    small = dataclasses.replace(half, param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(random_params(small))} == {jnp.dtype("bfloat16")}


def test_tied_and_untied_tables():
    untied = dataclasses.replace(BASE, tied_embeddings=False)
    tied_params, params = random_params(BASE), random_params(untied)
    assert set(params) - set(tied_params) == {"unembedding"}
    hidden = jax.random.normal(jax.random.key(0), (2, 3, BASE.width))
    for config, p, name in ((BASE, tied_params, "embedding"), (untied, params, "unembedding")):
        assert transformer.unembedding(config, p) is p[name]
        np.testing.assert_allclose(UNEMBED(config, p, hidden), hidden @ p[name].T, atol=1e-5)
        np.testing.assert_array_equal(Decoder(config).apply({"params": p}, method="table"), p[name])


def test_unembed_takes_any_leading_shape():
    params = random_params(BASE)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, BASE.width))
    whole = UNEMBED(BASE, params, hidden)
    assert whole.shape == (2, 3, VOCAB)
    np.testing.assert_allclose(UNEMBED(BASE, params, hidden[1, 2]), whole[1, 2], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(num_heads=4, num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
        (dict(head_dim=5), "head_dim 5 is odd"),
        (dict(windows=()), "expected one entry or more"),
        (dict(windows=(0,)), "expected one entry or more, each 1 or more, or None"),
        (
            dict(learned_positions=True),
            "max_positions is None, expected the number of learned positions",
        ),
        (
            dict(rope_scaling="llama3", rope_low_freq_factor=4.0),
            "rope_low_freq_factor 4.0 is not below",
        ),
    ],
)
def test_configurations_that_cannot_be(fields, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(BASE, **fields)


def test_windows_repeat():
    assert DEEP.window_of_layer == (3, None, 3, None)
    assert BASE.window_of_layer == (None, None)


def test_a_value_head_starts_at_zero_and_reads_both_inputs():
    head, hidden, features = ValueHead(8), jnp.ones((2, 3, 5), jnp.bfloat16), jnp.ones((2, 3, 4))
    params = head.init(jax.random.key(0), hidden, features)
    values = head.apply(params, hidden, features)
    assert values.shape == (2, 3) and values.dtype == jnp.float32 and not values.any()
    params = jax.tree.map(lambda x: x + 0.5, params)
    base = head.apply(params, hidden, features)
    assert (head.apply(params, hidden * 2, features) != base).all()
    assert (head.apply(params, hidden, features * 2) != base).all()


def test_the_toy_model_is_what_it_was_before_there_were_families():
    """Parameters, their random start and logits of two toy models,
    as an earlier version of the decoder had them.

    They were equal bit for bit where they were made; other processors round sums in another order.
    """
    path = pathlib.Path(__file__).resolve().parent.parent / "reference" / "toy_decoder.npz"
    with np.load(path) as file:
        known = dict(file)
    shape = dict(vocab_size=48, width=24, num_heads=3, head_dim=8, mlp_width=40)
    windowed = dict(
        num_layers=4, windows=(3, None), tied_embeddings=False, attention_softcap=4.0,
        final_softcap=6.0, activation="gelu", num_kv_heads=1, scan_layers=True, remat="block",
    )  # fmt: skip
    for name, fields in (("plain", {}), ("windowed", windowed)):
        config = ModelConfig(**shape, **fields)
        params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(3))
        leaves = {
            f"{name}.param." + "/".join(k.key for k in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        assert set(leaves) == {key for key in known if key.startswith(f"{name}.param.")}
        for key, leaf in leaves.items():
            some = np.asarray(leaf).reshape(-1)[:5] if leaf.ndim > 1 else np.asarray(leaf)[:2]
            np.testing.assert_allclose(some, known[key], rtol=1e-6)
        position = np.arange(9, dtype=np.int32)[None].repeat(2, 0)
        hidden, _ = FORWARD(config, params, known["tokens"], Visibility(position))
        np.testing.assert_allclose(
            UNEMBED(config, params, hidden), known[f"{name}.logits"], atol=2e-6
        )


def test_layers_beyond_the_last_whole_block():
    """Scanned and unrolled, whole rows and id by id: the remainder takes the first windows."""
    config = dataclasses.replace(BASE, num_layers=5, windows=(3, None))
    assert config.window_of_layer == (3, None, 3, None, 3) and (
        config.repeats,
        config.remainder,
    ) == (2, 1)
    scanned = dataclasses.replace(config, scan_layers=True)
    params, (tokens, visibility) = random_params(scanned), rows()
    assert set(params) == {"embedding", "final_norm", "stack", "blocks_2"}
    again, flat = unrolled(scanned, params)
    assert again == config and jax.tree.structure(flat) == jax.tree.structure(random_params(config))
    hidden, pairs = FORWARD(scanned, params, tokens, visibility)
    np.testing.assert_allclose(hidden, FORWARD(config, flat, tokens, visibility)[0], atol=1e-5)
    np.testing.assert_allclose(hidden, twin(config, flat, tokens, visibility)[0], atol=2e-4)
    assert len(pairs) == 5
    # A pattern longer than the model is cut.
    short = dataclasses.replace(BASE, num_layers=1, windows=(3, None), scan_layers=True)
    assert set(random_params(short)) == {"embedding", "final_norm", "blocks_0"}


@pytest.mark.parametrize(
    ("positions", "needed", "bucket", "width"),
    [
        (None, 5, 32, 32), (None, 33, 32, 64), (None, 1020, 100, 1024), (None, 1025, 32, 2048),
        (45, 40, 32, 45), (45, 12, 32, 32), (20, 5, 32, 20), (45, 46, 32, 46),
        (1030, 1000, 32, 1024), (1500, 1400, 32, 2048), (1500, 2100, 32, 2100),
    ],
)  # fmt: skip
def test_padding_stays_within_what_the_model_reads(positions, needed, bucket, width):
    config = dataclasses.replace(
        BASE, learned_positions=positions is not None, max_positions=positions
    )
    assert transformer.padded_width(config, needed, bucket) == width
    if (
        positions is not None
    ):  # what is needed fits, so what it is padded to is read; what does not fit is refused
        assert (width <= transformer.widest_row(config)) == (needed <= positions)


def test_rows_longer_than_the_learned_positions_are_refused():
    config = dataclasses.replace(BASE, learned_positions=True, max_positions=TIME - 1)
    tokens, visibility = rows()
    with pytest.raises(
        ValueError, match=f"rows of {TIME} ids; this model has {TIME - 1} positions"
    ):
        transformer.forward(config, random_params(config), tokens, visibility)


# Halves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(1, 1), (3, 2), (1, 8), (3, 3), (4, 16)])
def test_halves_are_two_products_however_many_rows_there_are(rows):
    """Both ways of computing them, and their gradients."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*rows, 8)).astype(np.float32)
    weight = rng.normal(size=(8, 2, 5)).astype(np.float32)
    back = rng.normal(size=(2, *rows, 5)).astype(np.float32)

    def total(x, weight):
        halves = dense_halves(x, weight)
        return sum(jnp.sum(half * b) for half, b in zip(halves, back, strict=True)), halves

    (_, found), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(
        jnp.asarray(x), jnp.asarray(weight)
    )
    for half, name in enumerate(("gate", "up")):
        np.testing.assert_allclose(found[half], x @ weight[:, half], atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        gradients[0], sum(back[c] @ weight[:, c].T for c in range(2)), atol=1e-4
    )
    flat = x.reshape(-1, 8)
    for half in range(2):
        np.testing.assert_allclose(
            gradients[1][:, half], flat.T @ back[half].reshape(-1, 5), atol=1e-4
        )


def test_few_rows_take_one_product_and_many_take_two():
    weight = jnp.zeros((8, 2, 5))

    def products(rows: int) -> int:
        jaxpr = jax.make_jaxpr(dense_halves)(jnp.zeros((rows, 1, 8)), weight)
        return str(jaxpr).count("dot_general[")

    assert [products(rows) for rows in (1, 8, 9, 64)] == [1, 1, 2, 2]
