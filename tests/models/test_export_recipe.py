"""The exported recipe says what `rlbf_jax.directives` says, without importing it;
no torch needed here."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlbf_jax.directives import (
    NEVER,
    BacktrackRule,
    EditRule,
    Limits,
    ReplaceRule,
    ResetRule,
    Semantics,
    layout,
    render,
)
from rlbf_jax.errors import UserError
from rlbf_jax.models.export import edits
from rlbf_jax.models.export.recipe import (
    TEMPLATES,
    ResponseLimits,
    exported_rule,
    read_recipe,
    write_recipe,
)

TIME, VOCAB = 24, 11
BACKTRACK = BacktrackRule(4, ("a", "b"), (0, 10, 99), x_max=3)
RULES: list[EditRule] = [
    BACKTRACK,
    BacktrackRule(4, (), (0,), x_max=2),
    ResetRule(4, (), (0,)),
    ResetRule(4, ("a",), ()),
    ReplaceRule(4, ("a", "b"), (0, 10)),
]
EVERY_RULE = pytest.mark.parametrize(
    "rule", RULES, ids=["backtrack", "no categories", "reset", "named reset", "replace"]
)
EOS = (1,)

IDS = st.lists(st.integers(0, VOCAB - 1), max_size=TIME)
LIMITS = st.builds(
    ResponseLimits,
    max_emitted=st.integers(0, TIME),
    budget=st.integers(0, 4),
    forbid_from=st.sampled_from([NEVER, 0, 3, 9]),
    forbid_to=st.sampled_from([NEVER, 5, 12]),
    grammar=st.booleans(),
)


def _states_and_legal_ids(rule, tokens, limits):
    """States before each of TIME ids and after the last, and which ids were legal then:
    [TIME, VOCAB] bool."""
    row = jnp.ones((1, TIME + 1), jnp.int32)
    before = layout(rule, tokens, row, row == 1, Semantics.KEEP).before
    return before, rule.legal_ids(rule.legal(before, limits), VOCAB)


STATES = jax.jit(_states_and_legal_ids, static_argnums=0)


def states_and_legal_ids(rule, response, limits: ResponseLimits):
    padded = np.asarray([[*response, *[2] * (TIME + 1 - len(response))]], np.int32)
    arrays = Limits(
        **{name: jnp.asarray(value) for name, value in dataclasses.asdict(limits).items()}
    )
    before, legal = STATES(rule, padded, arrays)
    return jax.tree.map(lambda x: np.asarray(x)[0], before), np.asarray(legal)[0]


def legal_ids(editor: edits.Editor) -> list[bool]:
    """The mask of the exported editor, id by id."""
    rule, legal = editor.rule, editor.legal()
    kinds = [
        legal.category
        if rule.first_id <= i < rule.first_retraction
        else legal.retraction
        if rule.first_retraction <= i < rule.end_id
        else legal.content
        for i in range(VOCAB)
    ]
    return [kind and i not in rule.never for i, kind in enumerate(kinds)]


@EVERY_RULE
@given(IDS, LIMITS)
@example([2, 3, 4, 8, 3, 5, 6, 4, 6, 7, 2, 4, 5, 9, 4], ResponseLimits(max_emitted=17, budget=9))
@example([2, 4, 6, 4, 6, 9, 4], ResponseLimits(max_emitted=20, budget=2, grammar=False))
@example([2, 3, 4, 6, 9], ResponseLimits(max_emitted=7, budget=2))
@example([2, 3, 4, 2, 3, 6, 9, 5, 2, 2, 6, 6, 4, 1, 5, 2], ResponseLimits(max_emitted=18))
@example([2, 4, 1, 4, 9, 5], ResponseLimits(max_emitted=8, budget=9, grammar=False))
def test_the_editor_is_the_rule_at_every_id_of_any_response(rule, response, limits):
    before, legal = states_and_legal_ids(rule, response, limits)
    editor = edits.Editor(exported_rule(rule, EOS, limits))
    for time in range(len(response) + 1):
        assert editor.emitted == before.emitted[time] == time
        assert len(editor.visible) == before.visible[time]
        assert (editor.pending is not None) == before.pending[time]
        assert editor.copied == before.copied[time]
        assert editor.directives == before.directives[time]
        assert editor.dropped == before.malformed[time]
        assert len(editor.edits) == before.retractions[time]
        assert legal_ids(editor) == legal[time].tolist()
        assert editor.visible == list(render(rule, response[:time]).visible)
        if time < len(response):
            editor.push(response[time])
    ours = render(rule, response)
    assert editor.malformed == ours.malformed
    assert [
        (e.index, e.category, NEVER if e.requested is None else e.requested, e.removed)
        for e in editor.edits
    ] == [(e.index, e.category, e.requested, e.removed) for e in ours.edits]


@EVERY_RULE
@given(IDS)
def test_events_rebuild_what_is_visible(rule, response):
    editor, shown = edits.Editor(exported_rule(rule, EOS, ResponseLimits())), []
    for token in response:
        match editor.push(token):
            case ("append", token):
                shown.append(token)
            case ("retract", count):
                assert 1 <= count <= len(shown)
                del shown[len(shown) - count :]
        assert shown == editor.visible
    assert shown == list(render(rule, response).visible)


def test_one_row_may_have_its_own_limit():
    rule = exported_rule(BACKTRACK, EOS, ResponseLimits(max_emitted=50))
    assert edits.Editor(rule).legal().category
    assert not edits.Editor(rule, max_emitted=2).legal().category


# Streams of text --------------------------------------------------------------------------------

BYTES = BacktrackRule(256, ("a",), x_max=4)
END = 300
"""Ids of this rule's responses: 0..255 are bytes, then the control ids; 300 ends."""


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def watch(response):
    """What a screen shows after each event."""
    screen = [""]
    rule = exported_rule(BYTES, (END,), ResponseLimits())
    for event, what in edits.text_events(rule, iter(response), decode_bytes):
        screen.append(
            screen[-1] + what if event == "append" else screen[-1][: len(screen[-1]) - what]
        )
    return screen


BYTE_IDS = st.text("aä€🙂", max_size=6).map(lambda text: list(text.encode()))
DIRECTIVES = st.sampled_from([[256, 257], [256, 260], [258], [256], [256, 256]])
RESPONSES = st.lists(
    BYTE_IDS | DIRECTIVES | st.lists(st.integers(0, 255), max_size=2), max_size=8
).map(lambda parts: [i for part in parts for i in part])


@given(RESPONSES)
@example([*"aä€🙂".encode(), 256, 258, *b"b"])
def test_text_events_end_in_the_decoded_visible_ids(response):
    expected = decode_bytes(list(render(BYTES, response).visible))
    assert watch(response)[-1] == expected
    assert watch([*response, END, 97, 97])[-1] == expected


def test_text_events_by_hand():
    rule = exported_rule(BYTES, (END,), ResponseLimits())
    response = [*b"ok bad", 256, 259, *"gut ä".encode()]
    assert list(edits.text_events(rule, response, decode_bytes))[6:] == [
        ("retract", 3),
        *[("append", c) for c in "gut ä"],
    ]


def test_text_events_of_a_replacement_never_show_the_copy():
    rule = exported_rule(ReplaceRule(256, ("a",)), (END,), ResponseLimits())
    response = [*b"ok bad", 256, *"bäd"[:2].encode(), 257, *b"gut", 256, *b"gu", END]
    assert list(edits.text_events(rule, response, decode_bytes))[6:] == [
        ("retract", 3),
        *[("append", c) for c in "gut"],
    ]


def test_text_events_hold_back_what_is_not_a_character_yet():
    assert watch("🙂".encode()) == ["", "🙂"]
    assert watch("🙂".encode()[:2]) == ["", "\ufffd"]


# Files ------------------------------------------------------------------------------------------

FILES = {
    "README.md",
    "custom_generate/edits.py",
    "custom_generate/generate.py",
    "custom_generate/rlbf_rule.json",
    "custom_generate/rule.py",
}


def contents(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_files_are_byte_stable(tmp_path):
    for name in ("first", "second"):
        write_recipe(tmp_path / name, BACKTRACK, EOS, ResponseLimits(max_emitted=99))
    written = contents(tmp_path / "first")
    assert set(written) == FILES
    assert written == contents(tmp_path / "second")
    write_recipe(tmp_path / "first", BACKTRACK, EOS, ResponseLimits(max_emitted=98))
    changed = {
        name for name, content in contents(tmp_path / "first").items() if content != written[name]
    }
    # A rule that changes must change a Python module:
    # by these transformers tells its cached copies apart.
    assert changed == {"README.md", "custom_generate/rlbf_rule.json", "custom_generate/rule.py"}


NAMES = st.lists(st.text(min_size=1, max_size=8), max_size=3, unique=True).map(tuple)
SIZES = st.none() | st.integers(110, 120)
RANDOM_RULES = st.one_of(
    st.builds(
        BacktrackRule,
        st.integers(10, 60),
        NAMES,
        st.just((0, 3)),
        x_max=st.integers(1, 40),
        vocab_size=SIZES,
    ),
    st.builds(ResetRule, st.integers(10, 60), NAMES, st.just(()), vocab_size=SIZES),
    st.builds(
        ReplaceRule, st.integers(10, 60), NAMES.filter(len), st.just((0, 3)), vocab_size=SIZES
    ),
)


@given(RANDOM_RULES, st.lists(st.integers(4, 9), min_size=1, max_size=2), LIMITS)
def test_the_rule_is_read_back(tmp_path_factory, rule, eos_ids, limits):
    folder = tmp_path_factory.mktemp("recipe")
    write_recipe(folder, rule, eos_ids, limits)
    assert read_recipe(folder) == (rule, tuple(eos_ids), limits)
    fields = json.loads((folder / "custom_generate" / "rlbf_rule.json").read_text(encoding="utf-8"))
    module: dict = {}
    exec(contents(folder)["custom_generate/rule.py"], module)
    assert module["RULE"] == fields
    assert fields["first_retraction"] == rule.first_retraction
    assert edits.rule_from(fields) == exported_rule(rule, eos_ids, limits)


@pytest.mark.parametrize(
    ("name", "allowed"), [("generate.py", {"torch", "transformers"}), ("edits.py", set())]
)
def test_the_recipe_stands_alone(tmp_path, name, allowed):
    write_recipe(tmp_path, BACKTRACK, EOS)
    source = (tmp_path / "custom_generate" / name).read_text(encoding="utf-8")
    compile(source, name, "exec")
    assert max(map(len, source.splitlines())) <= 120
    nodes = list(ast.walk(ast.parse(source)))
    packages = {
        alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    packages |= {
        str(n.module).split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0
    }
    assert packages - set(sys.stdlib_module_names) == allowed
    siblings = {
        f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom) and node.level
    }
    assert siblings <= {path.name for path in (tmp_path / "custom_generate").iterdir()}


def run_in_place(folder, place, name: str):
    """`generate` of a folder as transformers 4 runs it:
    copied to one place for all folders of a name, module kept."""
    for file in (folder / "custom_generate").glob("*.py"):
        shutil.copy(file, place / file.name)
    spec = importlib.util.spec_from_file_location(f"{name}.generate", place / "generate.py")
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module.generate


@pytest.fixture
def transformers_4(monkeypatch):
    """As much of torch and transformers 4 as the recipe needs to be read."""
    torch, peers, outputs = (
        types.ModuleType(name) for name in ("torch", "transformers", "transformers.utils")
    )
    torch.Tensor = list
    for name in (
        "LogitsProcessor",
        "LogitsProcessorList",
        "StoppingCriteria",
        "StoppingCriteriaList",
    ):
        setattr(peers, name, type(name, (), {}))
    peers.GenerationConfig = lambda: types.SimpleNamespace(max_length=20, max_new_tokens=None)
    outputs.ModelOutput = object
    for module in (torch, peers, outputs):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_recipes_of_folders_of_one_name_keep_their_rules(tmp_path, monkeypatch, transformers_4):
    (tmp_path / "place").mkdir()
    package = types.ModuleType("one_name")
    package.__path__ = [str(tmp_path / "place")]
    for name in ("", ".generate", ".edits", ".rule"):
        monkeypatch.setitem(sys.modules, "one_name" + name, package)
        if name:
            monkeypatch.delitem(sys.modules, "one_name" + name)
    found = []
    for budget in (3, 0, 3):
        write_recipe(
            tmp_path / f"{budget}" / "model", BACKTRACK, EOS, ResponseLimits(budget=budget)
        )
        found.append(run_in_place(tmp_path / f"{budget}" / "model", tmp_path / "place", "one_name"))
    assert [function.__kwdefaults__["_own_rule"]["limits"]["budget"] for function in found] == [
        3,
        0,
        3,
    ]
    # Lengths that nobody said are none: the prompt has 9 ids.
    most, rule = (
        found[0].__globals__["_most"],
        edits.rule_from(found[0].__kwdefaults__["_own_rule"]),
    )
    default, said = types.SimpleNamespace(max_length=20), types.SimpleNamespace(max_length=30)
    assert most(rule, None, [9], 9, [{}, None, default]) == [1024]
    assert most(rule, None, [9], 9, [{}, default, said]) == [21]
    assert most(rule, None, [9], 9, [{"max_length": 20}, said, said]) == [11]
    assert most(rule, 8, [7], 9, [{}, None, said]) == [8]
    with pytest.raises(
        ValueError, match="max_length = 9 leaves no room after 9 input ids; say max_new_tokens"
    ):
        most(rule, None, [9], 9, [{"max_length": 9}, None, None])


def code_blocks(readme: str) -> list[str]:
    blocks, lines = [], []
    for line in [*readme.splitlines(), "end"]:
        if line.startswith("    "):
            lines.append(line[4:])
        elif lines:
            blocks.append("\n".join(lines) + "\n")
            lines = []
    return blocks


def test_the_ten_lines_for_servers_run(tmp_path, monkeypatch):
    write_recipe(tmp_path, BYTES, (END,), ResponseLimits(max_emitted=40))
    blocks = code_blocks((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "README.md", "exec")
    asked = {}

    def create(**fields):
        asked.update(fields)
        response = [*b"so bad", 256, 259, *b"good", END]
        for ids in ([], response[:5], None, response[5:8], response[8:]):
            yield types.SimpleNamespace(choices=[types.SimpleNamespace(token_ids=ids)])
        yield types.SimpleNamespace(choices=[])

    client = types.SimpleNamespace(completions=types.SimpleNamespace(create=create))
    monkeypatch.setitem(
        sys.modules, "openai", types.SimpleNamespace(OpenAI=lambda base_url, api_key: client)
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "edits", raising=False)
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: decode_bytes(ids))
    scope = {
        "DIR": str(tmp_path),
        "URL": "",
        "KEY": "",
        "MODEL": "",
        "prompt_ids": [1, 2],
        "tokenizer": tokenizer,
    }
    exec(blocks[1], scope)
    monkeypatch.delitem(sys.modules, "edits")
    assert scope["shown"] == "so good"
    assert (asked["prompt"], asked["max_tokens"], asked["extra_body"]) == (
        [1, 2],
        40,
        {"return_token_ids": True},
    )


def test_files_of_the_first_rules_stay_what_they_are(tmp_path):
    """Folders that were exported before there was a third rule are read and written alike."""
    write_recipe(tmp_path, ResetRule(4, ("a",), (0,)), EOS, ResponseLimits(max_emitted=9))
    path = tmp_path / "custom_generate" / "rlbf_rule.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "format": 1,
        "semantics": "keep",
        "kind": "reset",
        "first_id": 4,
        "categories": ["a"],
        "first_retraction": 5,
        "x_max": 1,
        "never": [0],
        "eos_ids": [1],
        "limits": {
            "max_emitted": 9,
            "budget": 4,
            "forbid_from": NEVER,
            "forbid_to": NEVER,
            "grammar": True,
        },
    }


@EVERY_RULE
def test_the_readme_names_the_control_tokens(tmp_path, rule):
    write_recipe(tmp_path, rule, EOS)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    names = {"reset": "`[RESET]`", "backtrack": "`[BACKTRACK_BY_X]`", "replace": "`[REPLACE]`"}
    assert [kind for kind, name in names.items() if name in text] == [rule.kind]
    assert ("categor" in text.split("##")[0]) == bool(rule.categories)
    assert f"| retraction ids | {rule.first_retraction}..{rule.end_id - 1} |" in text


def test_templates_are_shipped():
    """Every template has an ending that setup.py declares as package data."""
    declared = (
        (TEMPLATES.parents[3] / "setup.py")
        .read_text(encoding="utf-8")
        .split('"rlbf_jax.models.export": ')[1]
    )
    patterns = ast.literal_eval(declared.split("]")[0] + "]")
    assert {p.name for p in TEMPLATES.iterdir()} == {
        p.name for glob in patterns for p in TEMPLATES.parent.glob(glob)
    }


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(semantics=Semantics.REWIND), "semantics is rewind"),
        (dict(eos_ids=()), "eos_ids is empty"),
        (dict(eos_ids=(1, 4)), r"eos_ids: \[4\] can never"),
        (dict(eos_ids=(10,)), r"eos_ids: \[10\] can never"),
        (dict(limits=ResponseLimits(budget=-1)), "limits.budget is -1"),
        (dict(rule=EditRule(4)), "EditRule has no recipe"),
    ],
)
def test_refused_recipes_leave_no_file(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        write_recipe(tmp_path, **({"rule": BACKTRACK, "eos_ids": EOS} | fields))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format=2), "format is 2"),
        (dict(semantics="rewind"), "semantics is 'rewind'"),
        (dict(kind="other"), "kind is 'other'"),
        (dict(kind="replace", categories=[]), "categories is empty, but under 'replace'"),
        (dict(first_retraction=7), "first_retraction is 7"),
        (dict(first_id=None), "first_id and x_max are None and 3"),
        (dict(categories=3), "wrong type"),
        (dict(limits={"budget": 1}), "wrong type"),
        (dict(vocab_size="40"), "vocab_size is '40'"),
    ],
)
def test_a_broken_rule_file_is_named(tmp_path, change, message):
    write_recipe(tmp_path, BACKTRACK, EOS)
    path = tmp_path / "custom_generate" / "rlbf_rule.json"
    fields = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UserError, match=f"rlbf_rule.json: .*{message}"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("name", ["kind", "never", "limits", "x_max", "first_retraction"])
def test_a_missing_field_is_named(tmp_path, name):
    write_recipe(tmp_path, BACKTRACK, EOS)
    path = tmp_path / "custom_generate" / "rlbf_rule.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields[name]
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(UserError, match=f"rlbf_rule.json: .*{name}"):
        read_recipe(tmp_path)


def test_a_missing_rule_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"rlbf_rule\.json: no such file"):
        read_recipe(tmp_path)
