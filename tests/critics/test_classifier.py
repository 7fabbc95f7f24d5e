"""The classifier critic on silly stand-ins: features, training, calibration, spans, files."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.critics.base import Exchange
from rlbf_jax.critics.classifiers import classifier_training as training
from rlbf_jax.critics.classifiers import text_features as tf
from rlbf_jax.critics.classifiers.classifier import (
    NO_KNOWN_WORDS,
    NO_WORDS,
    ClassifierCritic,
    VerdictConfig,
    _by_occlusion,
    check_categories,
    load_critic,
    masked_logits,
)
from rlbf_jax.critics.classifiers.text_classifier import TextClassifier, load_classifier, sigmoid
from rlbf_jax.critics.lexicon import covering_ids
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.tokenizers import train_tokenizer

SMALL = tf.FeatureConfig(bits=12)
CONFIG = training.ClassifierTrainingConfig(features=SMALL, calibration_folds=3)
CALM = (
    "the gentle river near our village grows roses and quiet green pears "
    "for every visitor in spring"
).split()
TURNIP, POTION = "you silly turnip", "stir the purple goo"


def corpus(n: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Calm sentences, some with an insult, some with a recipe, some with both."""
    rng = np.random.default_rng(seed)
    texts, labels = [], rng.random((n, 2)) < 0.3
    for insult, recipe in labels:
        words = list(rng.choice(CALM, rng.integers(8, 20)))
        for present, phrase in ((insult, TURNIP), (recipe, POTION)):
            if present:
                words.insert(int(rng.integers(len(words))), phrase)
        texts.append(" ".join(words) + ".")
    return texts, labels


@pytest.fixture(scope="module")
def classifier() -> TextClassifier:
    return training.train_classifier(*corpus(200), ("insult", "potion"), CONFIG)


def critic_of(classifier: TextClassifier, **options) -> ClassifierCritic:
    return ClassifierCritic(classifier, VerdictConfig(**options))


# Features -----------------------------------------------------------------------------------------


def slow_features(text: str, config: tf.FeatureConfig) -> dict[int, float]:
    """The twin: counts n-grams one by one. CRC-32 is spelled out,
    so that no library decides what a bucket is."""

    def crc(data: bytes) -> int:
        register = 0xFFFFFFFF
        for byte in data:
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
        return register ^ 0xFFFFFFFF

    words = [w.lower() for w in re.findall(r"\w+(?:'\w+)*", text)]
    counts: collections.Counter[int] = collections.Counter()
    for n in range(config.word_ngrams[0], config.word_ngrams[1] + 1):
        for i in range(len(words) - n + 1):
            counts[crc(" ".join(words[i : i + n]).encode()) % 2**config.bits] += 1
    for word in words:
        for n in range(config.char_ngrams[0], config.char_ngrams[1] + 1):
            for i in range(len(word) + 2 - n + 1):
                counts[crc(f" {word} "[i : i + n].encode()) % 2**config.bits + 2**config.bits] += 1
    return {k: 1 + math.log(v) for k, v in sorted(counts.items())}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab'C .é-", max_size=30), max_size=4))
def test_features_are_those_of_the_twin(texts):
    rows = tf.sparse_rows(texts, SMALL)
    assert len(rows) == len(texts)
    for i, text in enumerate(texts):
        part = slice(rows.indptr[i], rows.indptr[i + 1])
        wanted = slow_features(text, SMALL)
        assert rows.ids[part].tolist() == list(wanted)
        np.testing.assert_allclose(rows.values[part], list(wanted.values()), rtol=1e-6)
        again = rows.take(np.array([i, i]))
        assert again.ids.tolist() == 2 * list(wanted)


def test_weighted_rows_have_blocks_of_length_one():
    rows = tf.sparse_rows(["a rose", "a rose a pear", "", "zzz"], SMALL)
    idf = tf.inverse_document_frequency(rows, SMALL, 2)
    x = tf.weighted(rows, idf, SMALL)
    assert np.isclose(idf[rows.ids].max(), math.log(5 / 3) + 1)
    for i, length in enumerate([1.0, 1.0, 0.0, 0.0]):
        part = slice(x.indptr[i], x.indptr[i + 1])
        for b in range(tf.BLOCKS):
            mine = x.values[part][x.ids[part] >> SMALL.bits == b]
            assert np.isclose((mine**2).sum(), length)


def test_case_and_full_width_letters_do_not_count():
    plain, odd = (
        tf.sparse_rows(["silly turnip"], SMALL),
        tf.sparse_rows(["SILLY ｔｕｒｎｉｐ"], SMALL),
    )
    assert plain.ids.tolist() == odd.ids.tolist()


@pytest.mark.parametrize("bad", [{"bits": 0}, {"word_ngrams": (2, 1)}, {"char_ngrams": (0, 3)}])
def test_feature_ranges_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tf.FeatureConfig(**bad)


# Training -----------------------------------------------------------------------------------------


def test_the_minimum_is_a_minimum():
    """Gradient and objective of the twin, dense and in float64, at the result and around it."""
    texts, labels = corpus(60)
    rows = tf.sparse_rows(texts, SMALL)
    config = dataclasses.replace(CONFIG, tolerance=1e-7, max_iterations=300)
    idf, weights, bias = training._fit(rows, labels, config)
    x = tf.weighted(rows, idf, SMALL)
    dense = np.zeros((60, SMALL.size))
    dense[x.owner, x.ids] = x.values

    def objective(w, b):
        z = dense @ w + b
        return config.inverse_l2 * (np.logaddexp(0, z) - labels * z).sum() + 0.5 * (w**2).sum()

    w, b = weights.astype(np.float64), bias.astype(np.float64)
    residual = sigmoid(dense @ w + b) - labels
    assert np.abs(config.inverse_l2 * dense.T @ residual + w).max() < 2e-2
    assert np.abs(residual.sum(0)).max() < 2e-3
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert objective(w + rng.normal(0, 0.02, w.shape), b + rng.normal(0, 0.02, 2)) > objective(
            w, b
        )


def test_padding_changes_nothing():
    owner, ids = np.array([0, 0, 1, 2], np.int32), np.array([0, 1, 1, 2], np.int32)
    values, targets = np.ones(4, np.float32), np.array([[1], [0], [1]], np.float32)
    run = jax.tree_util.Partial(training.minimize_log_loss, max_iterations=50)
    small = run(owner, ids, values, targets, np.ones(3, np.float32), 0.1, 1e-6, width=3)
    pad = lambda a, n, v: np.concatenate([a, np.full((n, *a.shape[1:]), v, a.dtype)])  # noqa: E731
    large = run(
        pad(owner, 3, 4), pad(ids, 3, 0), pad(values, 3, 0), pad(targets, 2, 1),
        pad(np.ones(3, np.float32), 2, 0), 0.1, 1e-6, width=5,
    )  # fmt: skip
    np.testing.assert_allclose(large[0][:3], small[0], atol=1e-4)
    np.testing.assert_allclose(large[0][3:], 0)
    np.testing.assert_allclose(large[1], small[1], atol=1e-4)


def test_platt_scaling_recovers_the_truth():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < sigmoid(0.6 * z - 1.0)
    assert training.platt_scaling(z, labels) == pytest.approx((0.6, -1.0), abs=0.06)
    # Separable logits: Platt's targets are (2 + 1) / (2 + 2) and 1 / (2 + 2),
    # which the sigmoid meets at +-log 3.
    found = training.platt_scaling(np.array([-1.0, -1, 1, 1]), np.array([False, False, True, True]))
    assert found == pytest.approx((math.log(3), 0), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 80), st.integers(2, 5), st.integers(0, 9))
def test_folds_are_even_and_keep_equal_texts_together(n, folds, seed):
    rng = np.random.default_rng(seed)
    texts = [f"text {i}" for i in rng.integers(0, n, n)]
    kind = {text: rng.random(2) < 0.4 for text in texts}
    labels = np.array([kind[text] for text in texts])
    fold = training.assign_folds(texts, labels, folds, seed)
    assert all(
        len({int(f) for f, t in zip(fold, texts, strict=True) if t == text}) == 1 for text in texts
    )
    distinct = {
        t: (int(f), tuple(row)) for t, f, row in zip(texts, fold, labels.tolist(), strict=True)
    }
    for row in set(distinct.values()):
        counts = [sum(v == (k, row[1]) for v in distinct.values()) for k in range(folds)]
        assert max(counts) - min(counts) <= 1
    assert (fold == training.assign_folds(texts, labels, folds, seed)).all()


def test_held_out_texts_are_told_apart():
    texts, labels = corpus(160)
    seen = np.zeros(160, int)
    for fold in training.cross_validate(texts, labels, ("insult", "potion"), CONFIG, folds=2):
        seen[fold.held_out] += 1
        p = fold.classifier.probabilities([texts[i] for i in fold.held_out])
        assert ((p > 0.5) == labels[fold.held_out]).mean() > 0.97
    assert (seen == 1).all()


def test_same_seed_same_classifier_another_seed_another(classifier):
    again = training.train_classifier(*corpus(200), ("insult", "potion"), CONFIG)
    assert again.digest == classifier.digest
    other = training.train_classifier(
        *corpus(200), ("insult", "potion"), dataclasses.replace(CONFIG, seed=1)
    )
    assert other.digest != classifier.digest


def test_a_category_without_enough_texts_is_refused():
    with pytest.raises(InputError, match="category 'rare': 2 distinct texts with it, at least 3"):
        training.train_classifier(
            [str(i) for i in range(9)], np.arange(9)[:, None] < 2, ("rare",), CONFIG
        )
    with pytest.raises(
        InputError, match="1 distinct texts with it"
    ):  # the same text again teaches nothing
        training.train_classifier(
            ["x"] * 5 + list("abcde"), np.arange(10)[:, None] < 5, ("rare",), CONFIG
        )


# Verdicts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spans", ["occlusion", "window"])
def test_spans_lie_on_the_violation(classifier, spans):
    critic = critic_of(classifier, spans=spans, window=4)
    text = (
        f"The quiet village grows pears for {TURNIP} and the gentle river near roses and then "
        f"{POTION} in spring."
    )
    verdict = critic.judge([Exchange("", text)])[0]
    assert (
        verdict.judged and not verdict.safe and verdict.coherent is None and verdict.useful is None
    )
    assert {span.category for span in verdict.spans} == {"insult", "potion"}
    for span in verdict.spans:
        phrase = {"insult": TURNIP, "potion": POTION}[span.category]
        start = text.index(phrase)
        assert span.start < start + len(phrase) and start < span.end
        assert span.end - span.start <= len(phrase) + (
            2 if spans == "occlusion" else 50
        )  # words of windows that overlap it
    ends = [0] + [span.end for span in verdict.spans]
    assert all(end <= span.start for end, span in zip(ends, verdict.spans, strict=False))


def test_occlusion_marks_words_by_their_share_of_the_largest_drop(classifier):
    words = f"roses {TURNIP} the quiet village you grow pears {POTION} by the river".split()
    heard = tf.occurrences(" ".join(words), SMALL)
    everything = masked_logits(classifier, heard, np.ones((1, len(words)), bool))[0]
    drops = [
        everything - masked_logits(classifier, heard, np.arange(len(words))[None] != i)[0]
        for i in range(len(words))
    ]
    counts = []
    for share in (0.0, 0.2, 0.9):
        marked = _by_occlusion(classifier, heard, VerdictConfig(share=share))
        for c in range(2):
            largest = max(drop[c] for drop in drops)
            assert marked[c].tolist() == [bool(0 < drop[c] >= share * largest) for drop in drops]
        counts.append(int(marked.sum()))
    assert counts[0] > counts[1] > counts[2] > 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([*CALM, *TURNIP.split(), *POTION.split(), "zzz", "!"]), max_size=25),
    st.data(),
)
def test_unsafe_means_a_score_at_the_threshold_and_a_span(classifier, words, data):
    options = {
        "spans": data.draw(st.sampled_from(["occlusion", "window"])),
        "window": data.draw(st.integers(1, 9)),
    }
    critic = critic_of(
        classifier, threshold=data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.9])), **options
    )
    text = " ".join(words)
    exchange = Exchange("", text)
    verdict, score = critic.judge([exchange])[0], critic.scores([exchange])[0].max()
    assert verdict.judged == (not np.isnan(score))
    if verdict.judged:
        assert verdict.safe == (score < critic.config.threshold)
        assert all(
            0 <= s.start < s.end <= len(text) and text[s.start : s.end].strip()
            for s in verdict.spans
        )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([*CALM, *TURNIP.split(), "zzz"]), min_size=1, max_size=12), st.data()
)
def test_masked_logits_are_those_of_the_remaining_words(classifier, words, data):
    """A window is its own text; with a hole, n-grams of two words across it do not exist."""
    heard = tf.occurrences(" ".join(words), SMALL)
    low = data.draw(st.integers(0, len(words) - 1))
    high = data.draw(st.integers(low + 1, len(words)))
    places = np.arange(len(words))
    kept = np.stack([np.ones(len(words), bool), (places >= low) & (places < high)])
    texts = [" ".join(words), " ".join(words[low:high])]
    wanted = classifier.logits(texts)
    nothing = classifier.bias * classifier.scale + classifier.offset
    wanted = np.where(np.isnan(wanted), nothing, wanted)
    np.testing.assert_allclose(masked_logits(classifier, heard, kept), wanted, atol=1e-5)


def test_long_texts_are_judged(classifier):
    text = " ".join([*CALM * 60, TURNIP, *CALM * 60])
    for spans in ("occlusion", "window"):
        verdict = critic_of(classifier, spans=spans, threshold=0.0).judge([Exchange("", text)])[0]
        insult = next(s for s in critic_of(classifier, spans=spans, threshold=0.0).spans(text))
        assert not verdict.safe and insult.end <= len(text)


def test_what_has_no_known_word_could_not_be_judged(classifier):
    verdicts = critic_of(classifier).judge([Exchange("", t) for t in ("", " .!", "Ωψ Ωψ", CALM[1])])
    assert [v.judged for v in verdicts] == [False, False, False, True]
    assert [v.reason for v in verdicts] == [NO_WORDS, NO_WORDS, NO_KNOWN_WORDS, ""]
    assert critic_of(classifier).judge([]) == []


def test_coherence_is_a_plug(classifier):
    critic = ClassifierCritic(
        classifier, coherence=lambda text, topic: (topic == "roses", "pears" in text)
    )
    verdict = critic.judge([Exchange("", "the pears", "roses"), Exchange("", "the roses", "pears")])
    assert [(v.coherent, v.useful) for v in verdict] == [(True, True), (False, False)]


def test_spans_map_to_ids(classifier):
    texts, _ = corpus(100)
    tokenizer = train_tokenizer(texts, 300, ["insult", "potion"], 8)
    text = f"the quiet village grows pears {TURNIP} and roses"
    ids = tokenizer.encode(text)
    (span,) = critic_of(classifier).spans(text)
    covered = covering_ids(tokenizer.offsets(ids), span)
    assert text[span.start : span.end].strip() in tokenizer.decode([ids[k] for k in covered])
    assert len(covered) < len(ids)


@pytest.mark.parametrize(
    "bad", [{"threshold": 1.1}, {"share": -0.1}, {"window": 0}, {"largest_gap": -1}]
)
def test_critic_ranges_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VerdictConfig(**bad)


def test_a_run_must_know_the_categories(classifier):
    check_categories(critic_of(classifier), ("potion", "insult", "gamble"))
    with pytest.raises(UserError, match="categories potion are none of the run's, insult, gamble"):
        check_categories(critic_of(classifier), ("insult", "gamble"))


# Files --------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(classifier, tmp_path):
    classifier.save(tmp_path)
    texts, _ = corpus(20, seed=5)
    loaded = load_classifier(tmp_path)
    np.testing.assert_array_equal(loaded.logits(texts), classifier.logits(texts))
    assert loaded.digest == classifier.digest
    assert load_critic(tmp_path, VerdictConfig()).name == critic_of(classifier).name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["classifier.json", "classifier.npz"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "classifier.json").unlink(), "classifier.json: No such file.*rlbf critic"),
        (lambda f: (f / "classifier.npz").unlink(), "classifier.npz: No such file"),
        (lambda f: (f / "classifier.json").write_text("{"), "classifier.json: not JSON"),
        (lambda f: (f / "classifier.json").write_text("[]"), "expected format"),
        (lambda f: (f / "classifier.npz").write_bytes(b"PK"), "classifier.npz: not the file that"),
        (lambda f: change(f, categories=["insult"]), "arrays that do not fit"),
        (lambda f: change(f, categories=None), "missing or of the wrong type"),
        (
            lambda f: change(f, features={"bits": 12}),
            "missing or of the wrong type.*char|word_ngrams",
        ),
        (
            lambda f: change(f, features={"bits": 3, "word_ngrams": [1, 2], "char_ngrams": [2, 5]}),
            "do not fit",
        ),
    ],
)
def test_damaged_folders_are_named(classifier, tmp_path, damage, message):
    classifier.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_classifier(tmp_path)
    assert "\n" not in str(error.value)


def change(folder, **fields):
    path = folder / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
