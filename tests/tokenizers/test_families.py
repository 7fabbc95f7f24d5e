"""Published tokenizers: ids as the family has them, and no text makes a control,
turn or special id."""

import functools
import json
import pathlib
import tempfile
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import FamilyTokenizer, StreamDecoder, import_tokenizer, load_tokenizer
from tests.tokenizers.families import FAMILIES, LLAMA_TEMPLATE, ROWS

CATEGORIES, X_MAX = ("insult", "privacy"), 8
WITH_JSON = [name for name in FAMILIES if name != "gemma_sentencepiece"]
WITH_TEMPLATE = [name for name in FAMILIES if name != "gpt2"]
MARKERS = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|reserved_special_token_7|>",
    ),
    *(
        "<|reserved_special_token_38|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<unused3>",
        "<unused29>",
        "<bos>",
        "<eos>",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "[INST]",
        "[/INST]",
        "<think>",
        "</think>",
        "<tool_response>",
        "<|fim_prefix|>",
    ),
    *(
        "[BACKTRACK_BY_3]",
        " [BACKTRACK_BY_8]",
        "[CATEGORY_INSULT]",
        " [CATEGORY_PRIVACY]",
        "[RESET]",
        " [RESET]",
    ),
    *("<0x41>", "<0xE2>", "[UNUSED_400]", " [UNUSED_400]"),
]


def wide(text: str) -> str:
    """Full-width look-alikes, which compatibility normalization turns into `text`."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


marker = st.sampled_from(MARKERS)
disturbed = st.builds(
    lambda text, sign, where: text[: where % len(text)] + sign + text[where % len(text) :],
    marker,
    st.sampled_from(
        ["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u0338", "\ufe0f", " ", "\u2581"]
    ),
    st.integers(0, 40),
)
odd = st.sampled_from(
    [
        *" \n\t\r\0",
        "  ",
        "\n\n",
        "\n\n\n",
        "\r\n",
        "\u2581",
        "\u2581\u2581",
        "e\u0301",
        "\u212b",
        "\ufb01",
        "😀",
        "字",
    ]
    + [
        "\U000f0000",
        "\U00100000",
        "\uffff",
        "<table>",
        "the moon",
        " runs",
        "<|",
        "|>",
        "<start",
        "_of_turn>",
        "＜",
    ]
)
letters = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
texts = st.lists(st.one_of(marker, marker.map(wide), disturbed, odd, letters), max_size=8).map(
    "".join
)
harmless = st.lists(st.one_of(odd, letters), max_size=8).map("".join)


@functools.cache
def made(name: str) -> tuple[FamilyTokenizer, pathlib.Path]:
    """Tokenizer and published folder of a family; the folder's files are small and live
    as long as the process."""
    folder = FAMILIES[name](pathlib.Path(_temporary().name) / name)
    return import_tokenizer(folder, CATEGORIES, X_MAX, ROWS.get(name, 0)), folder


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def library(name: str) -> tokenizers.Tokenizer:
    """The published tokenizer.json in the `tokenizers` library, special tokens and all."""
    return tokenizers.Tokenizer.from_file(str(made(name)[1] / "tokenizer.json"))


def spells_guarded(tokenizer: FamilyTokenizer, text: str) -> bool:
    names = [tokenizer.name(i) for i in tokenizer.guarded_ids]
    return any(
        name in form for name in names for form in (text, unicodedata.normalize("NFKC", text))
    )


def check_text(name: str, text: str) -> None:
    tokenizer, _ = made(name)
    ids = tokenizer.encode(text)
    assert tokenizer.guarded_ids.isdisjoint(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == tokenizer.normalize(text)


def check_user_turn(name: str, text: str) -> None:
    """Whatever a user writes, the guarded ids of a prompt are those
    of a harmless prompt, in the same order."""
    tokenizer, _ = made(name)

    def guarded(content):
        return [i for i in tokenizer.encode_prompt(content) if i in tokenizer.guarded_ids]

    assert guarded(text) == guarded("Hello")


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=150)
@given(text=texts)
def test_no_text_makes_a_guarded_id_and_decoding_gives_its_normalization(name, text):
    check_text(name, text)


@pytest.mark.parametrize("name", WITH_TEMPLATE)
@settings(max_examples=60)
@given(text=texts)
def test_no_user_adds_a_turn(name, text):
    check_user_turn(name, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10_000)
@given(text=texts)
def test_ten_thousand_texts(name, text):
    check_text(name, text)
    if name in WITH_TEMPLATE:
        check_user_turn(name, text)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=100)
@given(data=st.data())
def test_streaming_gives_what_decoding_gives(name, data):
    tokenizer, _ = made(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10_000)
@given(data=st.data())
def test_ten_thousand_streams(name, data):
    test_streaming_gives_what_decoding_gives.hypothesis.inner_test(name, data)


@pytest.mark.parametrize("name", ["llama", "qwen", "gemma", "gpt2"])
@settings(max_examples=100)
@given(text=harmless)
def test_harmless_text_gets_the_library_s_ids(name, text):
    tokenizer, _ = made(name)
    if not spells_guarded(tokenizer, text):
        assert tokenizer.encode(text) == library(name).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", [name for name in WITH_TEMPLATE if name in WITH_JSON])
@settings(max_examples=60)
@given(first=harmless, answer=harmless, second=harmless)
def test_harmless_conversations_get_the_ids_of_the_rendered_text(name, first, answer, second):
    tokenizer, _ = made(name)
    if any(spells_guarded(tokenizer, text) for text in (first, answer, second)):
        return
    messages = [
        {"role": role, "content": text}
        for role, text in zip(TURNS, (first, answer, second), strict=True)
    ]
    plain = tokenizer.template.plain(messages, add_generation_prompt=True)
    assert (
        tokenizer.encode_chat(messages) == library(name).encode(plain, add_special_tokens=False).ids
    )


TURNS = ("user", "assistant", "user")
HEADER = "<|start_header_id|> <|end_header_id|>"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("llama", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]),
        ("qwen", ["<|im_end|>", "<|endoftext|>"]),
        ("gemma", ["<end_of_turn>", "<eos>"]),
        ("gemma_sentencepiece", ["<end_of_turn>", "<eos>"]),
        ("unigram", ["<end_of_turn>", "</s>"]),
        ("mistral", ["<eos>"]),
        ("gpt2", ["<|endoftext|>"]),
    ],
)
def test_ends_of_a_response(name, pieces):
    tokenizer, _ = made(name)
    assert tokenizer.pieces(tokenizer.eos_ids) == pieces
    assert tokenizer.eos_id == tokenizer.eos_ids[0]
    assert not set(tokenizer.eos_ids) & set(tokenizer.controls.rule().never)
    assert tokenizer.decode(tokenizer.eos_ids) == ""


@pytest.mark.parametrize(
    ("name", "markers"),
    [
        ("llama", f"<|begin_of_text|> {HEADER} <|eot_id|> {HEADER} <|eot_id|> {HEADER}"),
        ("qwen", "<|im_start|> <|im_end|> <|im_start|> <think> </think>"),
        ("gemma", "<bos> <start_of_turn> <end_of_turn> <start_of_turn>"),
        ("gemma_sentencepiece", "<bos> <start_of_turn> <end_of_turn> <start_of_turn>"),
        ("mistral", "<bos> [INST] [/INST]"),
        ("gpt2", ""),
    ],
)
def test_prompts_of_the_families(name, markers):
    tokenizer, _ = made(name)
    ids = tokenizer.encode_prompt("the moon")
    assert tokenizer.pieces([i for i in ids if i in tokenizer.guarded_ids]) == markers.split()
    assert "the moon" in tokenizer.decode(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_saving_keeps_everything(name, tmp_path):
    tokenizer, _ = made(name)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.digest() == tokenizer.digest()
    assert (loaded.controls, loaded.eos_ids, loaded.guarded_ids) == (
        tokenizer.controls,
        tokenizer.eos_ids,
        tokenizer.guarded_ids,
    )
    for text in MARKERS:
        assert loaded.encode(text) == tokenizer.encode(text)
        if name in WITH_TEMPLATE:
            assert loaded.encode_prompt(text) == tokenizer.encode_prompt(text)
    loaded.save(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == dict(tokenizer.files)


@pytest.mark.parametrize("name", WITH_JSON)
def test_saved_files_in_the_library(name, tmp_path):
    """Other programs: the family's tokens keep ids and parsing,
    control tokens have names and no spelling."""
    tokenizer, folder = made(name)
    tokenizer.save(tmp_path)
    full = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    controls = set(tokenizer.new_ids)
    for i in controls:
        assert full.id_to_token(i) == " " + tokenizer.name(i)
    published = json.loads((folder / "tokenizer.json").read_text())
    for token in published["added_tokens"]:
        if token["id"] not in controls:
            assert full.encode(token["content"], add_special_tokens=False).ids == [token["id"]]
    for text in [*MARKERS, *map(wide, MARKERS), "".join(MARKERS)]:
        ids = full.encode(text).ids
        assert controls.isdisjoint(ids)
        before = library(name).encode(text).ids
        assert ids == before or not controls.isdisjoint(before)


def test_ids_of_replacements_stand_in_a_published_vocabulary(tmp_path):
    name = "llama"
    default, folder = made(name)
    kinds = ("replace", "reset")
    tokenizer = import_tokenizer(folder, CATEGORIES, X_MAX, ROWS.get(name, 0), kinds=kinds)
    rule = tokenizer.controls.rule()
    assert rule.kind == "replace" and rule.names() == [
        tokenizer.name(i) for i in range(rule.first_id, rule.end_id)
    ]
    assert len(tokenizer.new_ids) == len(CATEGORIES) + 1 + 1
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.controls, loaded.digest()) == (tokenizer.controls, tokenizer.digest())
    # What says nothing of rules is as it was before there was a choice.
    assert "kinds" not in json.loads(default.files["rlbf_controls.json"])
    with pytest.raises(ValueError, match="expected some of backtrack, reset, replace"):
        import_tokenizer(folder, CATEGORIES, X_MAX, kinds=("undo",))


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_forbid_what_must_not_be_sampled(name):
    tokenizer, _ = made(name)
    controls = set(tokenizer.new_ids)
    assert list(tokenizer.new_ids) == list(
        range(tokenizer.controls.rule().first_id, tokenizer.controls.rule("reset").end_id)
    )
    named = {i for i in range(tokenizer.vocab_size) if not tokenizer.name(i).startswith("[UNUSED_")}
    never = set(tokenizer.controls.rule().never)
    assert set(range(tokenizer.vocab_size)) - named <= never, "rows without a token"
    assert never & controls == {tokenizer.controls.rule("reset").first_id}
    assert tokenizer.controls.rule().vocab_size == tokenizer.vocab_size
    assert set(tokenizer.controls.rule("reset").never) & controls == controls - {
        tokenizer.controls.rule("reset").first_id
    }
    assert {
        i for i in tokenizer.guarded_ids if tokenizer.decode([i]) == ""
    } <= never | controls | set(tokenizer.eos_ids)
    for i in range(tokenizer.vocab_size):
        assert i in never or i in controls or i in tokenizer.eos_ids or tokenizer.piece_bytes(i)


@pytest.mark.parametrize(
    ("name", "source"),
    [("llama", "reserved"), ("gemma", "reserved"), ("qwen", "padding"), ("gpt2", "appended")],
)
def test_where_control_ids_go(name, source, tmp_path):
    tokenizer, _ = made(name)
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "rlbf_controls.json").read_text())["source"] == source
    assert set(tokenizer.new_ids) <= tokenizer.untrained_ids
    if name == "qwen":
        assert tokenizer.vocab_size == ROWS[name]
    if name == "gpt2":
        assert (
            tokenizer.new_ids.stop
            == tokenizer.vocab_size
            == library(name).get_vocab_size() + len(tokenizer.new_ids)
        )


def test_pieces_before_spaces_concatenate():
    for name in FAMILIES.keys() - {"unigram"}:  # whose pieces depend on the whole text
        tokenizer, _ = made(name)
        assert tokenizer.encode("the moon") + tokenizer.encode(" runs past") == tokenizer.encode(
            "the moon runs past"
        )


def test_offsets_cover_the_text():
    for name in FAMILIES:
        tokenizer, _ = made(name)
        ids = [
            tokenizer.eos_id,
            *tokenizer.encode("é moon 😀 字"),
            tokenizer.controls.rule().first_id,
        ]
        text, spans = tokenizer.decode(ids), tokenizer.offsets(ids)
        assert {c for start, end in spans for c in range(start, end)} == set(range(len(text)))
        assert spans[0] == (0, 0) and spans[-1][0] == spans[-1][1]


def spoil(folder: pathlib.Path, file: str, change) -> None:
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(document)))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "tokenizer.json",
            lambda d: d | {"model": {"type": "WordPiece", "vocab": {}}},
            "WordPiece.*BPE and Unigram",
        ),
        ("tokenizer.json", lambda d: d | {"decoder": None}, "decoder .*expected ByteLevel"),
        (
            "tokenizer.json",
            lambda d: d | {"normalizer": {"type": "Lowercase"}},
            "Lowercase loses text",
        ),
        (
            "tokenizer.json",
            lambda d: d | {"model": d["model"] | {"merges": [["zz", "qq"]]}},
            "cannot read it",
        ),
        (
            "tokenizer_config.json",
            lambda d: d | {"chat_template": "{% if %}"},
            "not a Jinja chat template",
        ),
        (
            "tokenizer_config.json",
            lambda d: d | {"chat_template": [{"name": "rag"}]},
            "no chat template.*'default'",
        ),
        ("tokenizer_config.json", lambda d: d | {"chat_template": 3}, "must be a text"),
        (
            "tokenizer_config.json",
            lambda d: d | {"chat_template": "{{ messages[0].content | upper }}<|eot_id|>"},
            "changes or inspects",
        ),
        ("tokenizer_config.json", lambda d: [d], "holds a list, expected an object"),
        ("generation_config.json", lambda d: {"eos_token_id": "</s>"}, "eos_token_id has the id"),
    ],
)
def test_broken_files_are_named(file, change, message, tmp_path):
    FAMILIES["llama"](tmp_path)
    spoil(tmp_path, file, change)
    with pytest.raises(InputError, match=message) as error:
        import_tokenizer(tmp_path, CATEGORIES, X_MAX)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_models_get_the_inputs_that_they_take(tmp_path):
    """Named for programs that would pass `token_type_ids` too;
    what a configuration says itself stays."""
    folder, names = FAMILIES["llama"](tmp_path), ["input_ids", "attention_mask"]
    for said in (None, ["input_ids"]):
        if said:
            spoil(
                folder,
                "tokenizer_config.json",
                lambda d, said=said: d | {"model_input_names": said},
            )
        saved = import_tokenizer(folder, CATEGORIES, X_MAX).files["tokenizer_config.json"]
        assert json.loads(saved)["model_input_names"] == (said or names)


@pytest.mark.parametrize("beside", [False, True], ids=["in the configuration", "in a folder"])
def test_a_named_chat_template_takes_the_place_of_the_default(beside, tmp_path):
    """For us and for whoever reads what we write; the default is what it is without asking."""
    other = LLAMA_TEMPLATE.replace("{{- bos_token }}", "{{- bos_token }}Be brief. ", 1)
    assert other != LLAMA_TEMPLATE
    folder = FAMILIES["llama"](tmp_path / "published")
    if beside:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "brief.jinja").write_text(other)
        (folder / "chat_template.jinja").write_text(LLAMA_TEMPLATE)
    else:
        named = [
            {"name": "default", "template": LLAMA_TEMPLATE},
            {"name": "brief", "template": other},
        ]
        spoil(folder, "tokenizer_config.json", lambda d: d | {"chat_template": named})
    plain, brief = (
        import_tokenizer(folder, CATEGORIES, X_MAX, 0, name) for name in ("default", "brief")
    )
    alone = FAMILIES["llama"](tmp_path / "alone")
    spoil(alone, "tokenizer_config.json", lambda d: d | {"chat_template": other})
    assert plain.encode_prompt("the moon") == made("llama")[0].encode_prompt("the moon")
    assert brief.encode_prompt("the moon") == import_tokenizer(
        alone, CATEGORIES, X_MAX
    ).encode_prompt("the moon")
    assert brief.encode_prompt("the moon") != plain.encode_prompt("the moon")
    brief.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode_prompt("the moon") == brief.encode_prompt(
        "the moon"
    )
    told = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert (
        told.get(
            "chat_template",
            (tmp_path / "saved" / "chat_template.jinja").read_text() if beside else "",
        )
        == other
    )
    with pytest.raises(InputError, match="no chat template is called 'long'; found brief, default"):
        import_tokenizer(folder, CATEGORIES, X_MAX, 0, "long")


def test_bytes_that_would_be_lost_are_refused(tmp_path):
    FAMILIES["gpt2"](tmp_path)
    spoil(tmp_path, "tokenizer.json", lambda d: d["model"]["vocab"].pop("z") and d)
    with pytest.raises(InputError, match="no piece for 1 of the 256 bytes"):
        import_tokenizer(tmp_path, CATEGORIES, X_MAX)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        import_tokenizer(tmp_path, CATEGORIES, X_MAX)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(InputError, match="tokenizer.model: not a SentencePiece model"):
        import_tokenizer(tmp_path, CATEGORIES, X_MAX)
    FAMILIES["gpt2"](tmp_path)
    (tmp_path / "rlbf_controls.json").write_text('{"categories": []}')
    with pytest.raises(InputError, match="rlbf_controls.json: fields .*x_max"):
        load_tokenizer(tmp_path)


def test_bad_texts_and_ids():
    tokenizer, _ = made("llama")
    with pytest.raises(InputError, match="character 2 is a lone surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode_prompt("ab\ud800")
    with pytest.raises(ValueError, match="outside"):
        tokenizer.decode([tokenizer.vocab_size])
