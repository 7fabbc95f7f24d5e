"""The tokenizer: lossless on Unicode, control ids out of reach of any text,
honest character offsets."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.tokenizers import SentencePieceTokenizer, load_tokenizer, train_tokenizer

WORDS = (
    "the moon shines over quiet hills and a river runs past old stones while birds sing songs of "
    "summer 12 7"
).split()
CATEGORIES = ("insult", "privacy")
SPELLED = [
    "[BACKTRACK_BY_3]",
    "[CATEGORY_INSULT]",
    "[RESET]",
    "[USER]",
    "[MODEL]",
    "<s>",
    "</s>",
    "<0x41>",
    "<unk>",
    "<pad>",
]


def corpus(seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=10)).capitalize() + ".\nAnd on." for _ in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(), 380, CATEGORIES, 8)


odd = st.sampled_from(
    [
        *SPELLED,
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "\u2581",
        "\u2585",
        "\u2047",
        "e\u0301",
        "😀",
        "the moon",
    ]
)
texts = st.lists(
    st.one_of(odd, st.text(st.characters(exclude_categories=("Cs",)), max_size=8)), max_size=8
).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_every_text_survives_and_none_makes_control_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 < i < tokenizer.num_pieces for i in ids)


@settings(max_examples=200, deadline=None)
@given(texts, texts)
def test_cuts_before_spaces_are_legal(tokenizer, a, b):
    assert tokenizer.encode(a) + tokenizer.encode(" " + b) == tokenizer.encode(a + " " + b)


def test_long_text_and_training_lines():
    tokenizer = train_tokenizer(["x" * 70_000 + "字" * 3_000, *corpus()], 380, CATEGORIES, 8)
    text = "the moon " * 2_000 + "x" * 9_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def slow_offsets(tokenizer, ids):
    """Spans from the decodings of all beginnings; only for ids that spell valid UTF-8."""
    whole = tokenizer.decode(ids)
    spans = []
    for i in range(len(ids)):
        before = b"".join(tokenizer._bytes[j] for j in ids[:i])
        after = b"".join(tokenizer._bytes[j] for j in ids[: i + 1])
        start = len(before.decode("utf-8", errors="ignore"))
        tail = after[len(whole[:start].encode()) :]
        end = start if before == after else start + len(tail.decode("utf-8", errors="replace"))
        spans.append((start, end))
    return spans


@settings(max_examples=200, deadline=None)
@given(texts, st.data())
def test_offsets_of_valid_text_match_a_slow_twin(tokenizer, text, data):
    ids = tokenizer.encode(text)
    controls = st.sampled_from(
        [
            0,
            1,
            2,
            tokenizer.user_id,
            tokenizer.controls.rule().first_id,
            tokenizer.controls.rule("reset").first_id,
        ]
    )
    where = data.draw(st.integers(0, len(ids)))
    ids.insert(where, data.draw(controls))
    assert tokenizer.offsets(ids) == slow_offsets(tokenizer, ids)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_offsets_of_any_ids_cover_the_decoded_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    text, spans = tokenizer.decode(ids), tokenizer.offsets(ids)
    assert len(spans) == len(ids)
    covered = {c for start, end in spans for c in range(start, end)}
    assert covered == set(range(len(text)))
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in zip(spans, spans[1:], strict=False))


def test_broken_bytes_become_replacement_characters(tokenizer):
    ids = tokenizer.encode("a é b")
    accent = next(i for i in ids if tokenizer.name(i) == "<0xC3>")
    assert tokenizer.decode([accent]) == "\ufffd"
    assert tokenizer.offsets([accent, accent]) == [(0, 1), (1, 2)]


def test_control_ids_vanish_and_have_names(tokenizer):
    rule, reset = tokenizer.controls.rule(), tokenizer.controls.rule("reset")
    controls = [
        tokenizer.user_id,
        rule.category_id("privacy"),
        rule.backtrack_id(8),
        reset.first_id,
        0,
        1,
        2,
    ]
    body = tokenizer.encode("the moon")
    assert tokenizer.decode([*controls, *body, *controls]) == "the moon"
    assert tokenizer.pieces(controls[:4]) == [
        "[USER]",
        "[CATEGORY_PRIVACY]",
        "[BACKTRACK_BY_8]",
        "[RESET]",
    ]
    assert tokenizer.encode_prompt("the moon") == [1, tokenizer.user_id, *body, tokenizer.model_id]
    assert (tokenizer.vocab_size, reset.end_id) == (
        tokenizer.num_pieces + 2 + 2 + 8 + 1,
        tokenizer.vocab_size,
    )


def test_each_rule_forbids_the_other_and_the_templates(tokenizer):
    rule, reset = tokenizer.controls.rule(), tokenizer.controls.rule("reset")
    never = {0, 1, 3, tokenizer.user_id, tokenizer.model_id}
    assert set(rule.never) == never | {reset.first_id}
    assert set(reset.never) == never | set(range(rule.first_id, rule.end_id))
    assert rule.vocab_size == reset.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("kinds", [("replace",), ("backtrack", "reset", "replace"), ("reset",)])
def test_other_rules_have_ids_where_they_are_asked_for(tokenizer, tmp_path, kinds):
    other = SentencePieceTokenizer(tokenizer.model, CATEGORIES, 8, kinds)
    assert other.controls.kinds == kinds and other.controls.first_id == tokenizer.controls.first_id
    assert other.vocab_size == other.controls.end_id
    assert [other.name(i) for i in other.controls.ids] == list(other.controls.names().values())
    assert other.decode(other.controls.ids) == ""
    assert other.digest() != tokenizer.digest()
    other.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.digest(), loaded.controls) == (other.digest(), other.controls)
    if "backtrack" not in kinds:
        with pytest.raises(ValueError, match="no control ids of kind 'backtrack'; it has those of"):
            _ = other.controls.rule("backtrack")


def test_the_file_of_the_default_rules_does_not_name_them(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    meta = json.loads((tmp_path / "tokenizer.json").read_text())
    assert meta == {"kind": "sentencepiece", "categories": list(CATEGORIES), "x_max": 8}
    (tmp_path / "tokenizer.json").write_text(json.dumps(meta | {"kinds": ["undo"]}))
    with pytest.raises(ValueError, match="expected some of backtrack, reset, replace"):
        load_tokenizer(tmp_path)


def test_training_is_deterministic_and_saving_keeps_everything(tokenizer, tmp_path):
    again = train_tokenizer(corpus(), 380, CATEGORIES, 8)
    assert again.digest() == tokenizer.digest()
    assert train_tokenizer(corpus(1), 380, CATEGORIES, 8).digest() != tokenizer.digest()
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert (loaded.digest(), loaded.controls) == (
        tokenizer.digest(),
        tokenizer.controls,
    )


def test_bounds_in_the_errors_are_exact():
    with pytest.raises(ValueError, match="too small.*at least") as error:
        train_tokenizer(corpus(), 100, CATEGORIES, 8)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert train_tokenizer(corpus(), least, CATEGORIES, 8).num_pieces == least
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(corpus(), least - 1, CATEGORIES, 8)
    with pytest.raises(ValueError, match="too large.*at most") as error:
        train_tokenizer(corpus(), 50_000, CATEGORIES, 8)
    most = int(str(error.value).split("at most ")[1].split(";")[0])
    assert train_tokenizer(corpus(), most, CATEGORIES, 8).num_pieces == most


def test_plain_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="character 2 is a lone surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", "\n"], 300, CATEGORIES, 8)
    with pytest.raises(ValueError, match="distinct"):
        train_tokenizer(corpus(), 380, ("a", "a"), 8)
    with pytest.raises(ValueError, match="outside"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError, match="tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    (tmp_path / "tokenizer.json").write_text('{"categories": ["a"], "x_max": 2}')
    with pytest.raises(ValueError, match="not a saved tokenizer"):
        load_tokenizer(tmp_path)
