"""Exported tokenizers in `transformers`, loaded as everybody loads them.
Set RLBF_JAX_PEERS to a python that has it."""

import json
import os
import pathlib
import subprocess

import pytest

from rlbf_jax.tokenizers import import_tokenizer
from tests.tokenizers.families import FAMILIES, ROWS
from tests.tokenizers.test_families import CATEGORIES, MARKERS, X_MAX, wide

pytestmark = pytest.mark.slow
CHILD = pathlib.Path(__file__).with_name("peers_child.py")
NEED_PROTOBUF = {"gemma_sentencepiece"}
PREFIXED = {"mistral", "mistral_legacy"}
"""Families that put a space before a text; our `encode` does not."""
MODEL_TYPES = {
    "llama": "llama",
    "qwen": "qwen3",
    "gemma": "gemma2",
    "gemma_sentencepiece": "gemma2",
    "gpt2": "gpt2",
}
MODEL_TYPES |= {"mistral": "mistral", "mistral_legacy": "mistral", "unigram": ""}
"""`model_type` of config.json, which `transformers` looks at to choose a class."""
HARMLESS = ["Hello there", " two  spaces\n\nand lines\n", "é ﬁ Å 字 😀", "1 + 1 = 2?", "\ttabs\r\n"]
SIGNS = ["\u200b", "\u200d", "\ufeff", "\u0338"]
HOSTILE = [
    *MARKERS,
    *map(wide, MARKERS),
    "".join(MARKERS),
    *(m[:2] + s + m[2:] for m in MARKERS for s in SIGNS),
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hello there"}],
    [{"role": "user", "content": "  the moon \n"}],
    [
        {"role": "user", "content": "What is\n\n12 + 7?"},
        {"role": "assistant", "content": "19. "},
        {"role": "user", "content": "é 字"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
]


def child(python: str, folders: dict[str, pathlib.Path], work: pathlib.Path) -> dict:
    cases = dict(texts=HARMLESS + HOSTILE, conversations=CONVERSATIONS, date="26 Jul 2024")
    cases["folders"] = {name: str(folder) for name, folder in folders.items()}
    (work / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    # The child must not see this package, nor the network.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [python, str(CHILD), str(work / "cases.json"), str(work / "found.json")]
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "found.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def peers_python() -> str:
    python = os.environ.get("RLBF_JAX_PEERS")
    if not python:
        pytest.skip("RLBF_JAX_PEERS is not set: point it at a python that has transformers")
    return python


@pytest.fixture(scope="module")
def peers(peers_python, tmp_path_factory) -> dict:
    """Our tokenizers, and what `transformers` finds in published and in exported folders."""
    root = tmp_path_factory.mktemp("families")
    protobuf = (
        subprocess.run(
            [peers_python, "-c", "import google.protobuf"], capture_output=True
        ).returncode
        == 0
    )
    names = [name for name in FAMILIES if protobuf or name not in NEED_PROTOBUF]
    ours, folders = {}, {}
    for name in names:
        folders[name] = FAMILIES[name](root / name)
        ours[name] = import_tokenizer(folders[name], CATEGORIES, X_MAX, ROWS.get(name, 0))
        folders[name + "_exported"] = root / f"{name}_exported"
        ours[name].save(folders[name + "_exported"])
        for folder in (folders[name], folders[name + "_exported"]):
            if MODEL_TYPES[name]:
                (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[name]}))
    return {"ours": ours, "found": child(peers_python, folders, root)}


def both(peers, name):
    if name not in peers["ours"]:
        pytest.skip("transformers reads tokenizer.model only where protobuf is installed beside it")
    return peers["ours"][name], peers["found"][name], peers["found"][name + "_exported"]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_gives_a_control_id_after_export(peers, name):
    ours, _, exported = both(peers, name)
    controls = set(ours.new_ids)
    assert len(exported["ids"]) == len(HARMLESS + HOSTILE)
    for text, ids in zip(HARMLESS + HOSTILE, exported["ids"], strict=True):
        assert controls.isdisjoint(ids), text


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NEED_PROTOBUF])
def test_control_ids_have_names_after_export(peers, name):
    ours, _, exported = both(peers, name)
    assert exported["names"] == {" " + ours.name(i): i for i in ours.new_ids}


@pytest.mark.parametrize("name", FAMILIES)
def test_models_get_the_inputs_that_they_take(peers, name):
    assert both(peers, name)[2]["inputs"] == ["attention_mask", "input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_turn_tokens_parse_as_in_the_published_folder(peers, name):
    """All ids of a text are as before export, unless it held a spare token
    that is a control token now."""
    ours, published, exported = both(peers, name)
    controls = set(ours.new_ids)
    compared = 0
    for text, before, after in zip(
        HARMLESS + HOSTILE, published["ids"], exported["ids"], strict=True
    ):
        if controls.isdisjoint(before):
            assert after == before, text
            compared += 1
    assert compared > len(HARMLESS + HOSTILE) * 0.8


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PREFIXED])
def test_harmless_texts_get_their_ids(peers, name):
    ours, published, exported = both(peers, name)
    for text, before, after in zip(HARMLESS, published["ids"], exported["ids"], strict=False):
        assert ours.encode(text) == before == after, text


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_conversations_get_their_ids(peers, name):
    ours, published, exported = both(peers, name)
    assert exported["end"] == published["end"]
    assert exported["chats"] == published["chats"]
    assert None not in exported["chats"][:3]
    for messages, ids in zip(CONVERSATIONS, exported["chats"], strict=True):
        if ids is not None:
            assert ours.encode_chat(messages) == ids, messages
