"""Ids and tokens of published files: every place where families list them counts, and what no row
or no file stands for is left out or refused on one line."""

import json
import shutil

import pytest

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import import_tokenizer, load_tokenizer
from rlbf_jax.tokenizers.files import (
    ADDED_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    JSON_FILE,
    MAP_FILE,
    read,
)
from rlbf_jax.tokenizers.listed import listed, spellings
from tests.tokenizers.families import FAMILIES
from tests.tokenizers.test_families import spoil

CATEGORIES, X_MAX = ("insult", "privacy"), 8
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
USER = [{"role": "user", "content": "the moon"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two families, once."""
    root = tmp_path_factory.mktemp("families")
    return {name: FAMILIES[name](root / name) for name in ("gpt2", "gemma_sentencepiece", "llama")}


@pytest.fixture
def copy(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def imported(folder, rows=0):
    return import_tokenizer(folder, CATEGORIES, X_MAX, rows)


def size(folder) -> int:
    """Ids of the family, without ours."""
    files = read(folder)
    return max(*spellings(files), *(token.id for token in listed(files))) + 1


# Added tokens ------------------------------------------------------------------------------------


def list_in(place: str, folder, first: int) -> None:
    """Gives the ids `first` and `first + 1` to two turn tokens, in one place alone."""
    ids = {"<|im_start|>": first, "<|im_end|>": first + 1}
    entries = [{"id": i, "content": c, "special": True} for c, i in ids.items()]
    if place == ADDED_FILE:
        (folder / ADDED_FILE).write_text(json.dumps(ids))
    elif place == CONFIG_FILE:
        decoder = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
        spoil(folder, CONFIG_FILE, lambda d: d | {"added_tokens_decoder": decoder})
    elif place == JSON_FILE:
        flags = dict.fromkeys(FLAGS, False)
        more = [flags | entry for entry in entries]
        spoil(folder, JSON_FILE, lambda d: d | {"added_tokens": d["added_tokens"] + more})
    else:  # the map names texts alone, their ids stand in the vocabulary
        vocab = lambda d: d["model"] | {"vocab": d["model"]["vocab"] | ids}  # noqa: E731
        spoil(folder, JSON_FILE, lambda d: d | {"model": vocab(d)})
        (folder / MAP_FILE).write_text(json.dumps({"additional_special_tokens": list(ids)}))


@pytest.mark.parametrize(
    ("family", "place"),
    [("gpt2", place) for place in (ADDED_FILE, CONFIG_FILE, JSON_FILE, MAP_FILE)]
    + [("gemma_sentencepiece", place) for place in (ADDED_FILE, CONFIG_FILE)],
)
def test_turn_tokens_count_wherever_they_are_listed(family, place, copy, tmp_path):
    folder = copy(family)
    first = size(folder)
    list_in(place, folder, first)
    spoil(folder, CONFIG_FILE, lambda d: d | {"chat_template": CHATML})
    made = imported(folder)
    ids = made.encode_chat(USER)
    assert ids.count(first) == 2 and ids.count(first + 1) == 1
    assert made.eos_id == first + 1 and not {first, first + 1} & set(made.new_ids)
    # What a user types is text, and stays it.
    for typed in ("<|im_start|>", "a<|im_end|>"):
        spelled = made.encode(typed)
        assert not {first, first + 1} & set(spelled) and made.decode(spelled) == typed
        assert made.encode_chat([{"role": "user", "content": typed}]).count(first) == 2
    made.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode_chat(USER) == ids and again.digest() == made.digest()


def test_an_ordinary_token_behind_the_pieces_is_found_in_any_text(copy):
    folder = copy("gemma_sentencepiece")
    first = size(folder)
    (folder / ADDED_FILE).write_text(json.dumps({"<zzq>": first}))
    made = imported(folder)
    assert first in made.encode("a <zzq> b") and made.decode([first]) == "<zzq>"


def test_a_turn_token_without_an_id_is_refused(copy):
    folder = copy("gpt2")
    spoil(folder, CONFIG_FILE, lambda d: d | {"chat_template": CHATML})
    (folder / MAP_FILE).write_text(json.dumps({"additional_special_tokens": ["<|im_start|>"]}))
    with pytest.raises(InputError, match="template writes '<|im_start|>'.*no file gives an id"):
        imported(folder)


def test_two_ids_of_one_token_are_refused(copy):
    folder = copy("gpt2")
    (folder / ADDED_FILE).write_text(json.dumps({"<|endoftext|>": size(folder) + 3}))
    with pytest.raises(InputError, match="added_tokens.json: '<.endoftext.>' has the id"):
        imported(folder)


# Ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [1, 50])
def test_an_end_in_a_padding_row_stays_one_and_takes_no_control_token(spare, copy):
    """With few spare rows control tokens get new ones, with many they stand among them."""
    folder = copy("gpt2")
    first = size(folder)
    rows = first + spare
    (folder / GENERATION_FILE).write_text(json.dumps({"eos_token_id": [first - 1, first]}))
    made = imported(folder, rows)
    assert first in made.eos_ids and first not in made.new_ids
    assert made.new_ids.start == (first + 1 if spare == 50 else rows)


@pytest.mark.parametrize("beyond", [0, 7, 10**6])
def test_an_end_without_a_row_is_left_out_and_said(beyond, copy, capsys):
    folder = copy("llama")
    rows = size(folder) + 6
    known = imported(folder, rows).eos_ids
    spoil(folder, GENERATION_FILE, lambda d: {"eos_token_id": [*known, rows + beyond]})
    made = imported(folder, rows)
    assert set(made.eos_ids) == set(known) and not set(made.eos_ids) & set(made.new_ids)
    assert f"eos_token_id {rows + beyond} is left out: the model has {rows} rows" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("value", [-1, True, 1.5, "802", 4_000_000_000, [3], {"a": 1}])
@pytest.mark.parametrize("place", [GENERATION_FILE, JSON_FILE, "vocabulary", ADDED_FILE])
def test_what_is_no_id_is_refused_at_once(place, value, copy):
    folder = copy("llama")
    if place == GENERATION_FILE:
        spoil(folder, place, lambda d: {"eos_token_id": [value]})
    elif place == ADDED_FILE:
        (folder / place).write_text(json.dumps({"zzq": value}))
    elif place == JSON_FILE:
        entry = {"id": value, "content": "zzq"} | dict.fromkeys(FLAGS, False)
        spoil(folder, place, lambda d: d | {"added_tokens": [entry]})
    else:
        vocab = lambda d: d["model"] | {"vocab": d["model"]["vocab"] | {"zzq": value}}  # noqa: E731
        spoil(folder, JSON_FILE, lambda d: d | {"model": vocab(d)})
    with pytest.raises(InputError, match="has the id .*, expected one from 0 to") as error:
        imported(folder, 600)
    assert "\n" not in str(error.value)


def test_an_id_far_behind_the_others_is_refused(copy):
    folder = copy("gpt2")
    vocab = lambda d: d["model"] | {"vocab": d["model"]["vocab"] | {"zzq": 100_000}}  # noqa: E731
    spoil(folder, JSON_FILE, lambda d: d | {"model": vocab(d)})
    with pytest.raises(InputError, match="'zzq' has the id 100000, but the model has 600 rows"):
        imported(folder, 600)


def test_ids_of_saved_files_are_checked(copy, tmp_path):
    made = imported(copy("gpt2"))
    for field, value in (
        ("vocab_size", 4_000_000_000),
        ("first_id", made.vocab_size),
        ("stop_ids", [made.new_ids.start]),
        ("stop_ids", [made.vocab_size]),
    ):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        made.save(tmp_path / "saved")
        spoil(tmp_path / "saved", "rlbf_controls.json", lambda d, f=field, v=value: d | {f: v})
        with pytest.raises(InputError, match="rlbf_controls.json"):
            load_tokenizer(tmp_path / "saved")


# Shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "field"),
    [
        (MAP_FILE, "additional_special_tokens"),
        (MAP_FILE, "bos_token"),
        (CONFIG_FILE, "added_tokens_decoder"),
        (CONFIG_FILE, "additional_special_tokens"),
        (CONFIG_FILE, "extra_special_tokens"),
        (GENERATION_FILE, "eos_token_id"),
    ],
)
def test_null_means_that_nothing_is_there(file, field, copy, tmp_path):
    folder = copy("gpt2")
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {"eos_token": "<|endoftext|>"}
    path.write_text(json.dumps({k: v for k, v in found.items() if k != field}))
    without = imported(folder)
    path.write_text(json.dumps(found | {field: None}))
    made = imported(folder)
    assert made.encode("the moon") == without.encode("the moon")
    assert (made.eos_ids, made.new_ids) == (without.eos_ids, without.new_ids)
    made.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").digest() == made.digest()


def test_no_added_tokens_leave_no_end_of_sequence(copy):
    folder = copy("gpt2")
    spoil(folder, JSON_FILE, lambda d: d | {"added_tokens": None})
    with pytest.raises(InputError, match="no end of sequence; give eos_token"):
        imported(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (CONFIG_FILE, "[" * 100_000, "tokenizer_config.json: not JSON .nested too deeply"),
        (JSON_FILE, '{"a":' * 100_000, "tokenizer.json: not JSON .nested too deeply"),
        (ADDED_FILE, "[1]", "added_tokens.json: holds a list, expected an object"),
        (MAP_FILE, '{"additional_special_tokens": "<s>"}', "is a str, expected a list"),
        (CONFIG_FILE, '{"added_tokens_decoder": "<s>"}', "added_tokens_decoder is a str, exp"),
        (CONFIG_FILE, '{"added_tokens_decoder": {"3": "<s>"}}', "3 is a str, expected an object"),
        (JSON_FILE, '{"added_tokens": "<s>"}', "added_tokens is a str, expected a list"),
        (JSON_FILE, '{"added_tokens": [3]}', "3, expected a token with its id and content"),
        (JSON_FILE, '{"added_tokens": [{"id": 1, "content": "a"}]}', "needs an id, and true or fa"),
        (JSON_FILE, '{"version": "1.0", "version": "1.0"}', "'version' occurs twice"),
        (JSON_FILE, '{"model": {"type": "BPE", "vocab": ["a"]}}', "expected pieces and their ids"),
        (JSON_FILE, '{"model": "BPE"}', "model is a str, expected an object"),
    ],
)
def test_files_of_another_shape_take_one_line(file, content, message, copy):
    folder = copy("gpt2")
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        imported(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
