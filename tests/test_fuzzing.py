"""Files and answers that are damaged in any way: a result or one line, never a traceback, never a
hang, never success where the reference library refuses.

Slow lane: 20,000 inputs, all from fixed seeds. A failure names the kind and the seed, and
`damaged(KIND, SEED)` makes the input again.
"""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers

from rlbf_jax.data.sources.files import read_rows
from rlbf_jax.data.sources.labelled import LabelledColumns, read_labelled
from rlbf_jax.endpoints.replies import NoCompletion, completion
from rlbf_jax.errors import UserError
from rlbf_jax.models.published_config import config_from_hf
from rlbf_jax.models.weights.tensors import open_tensors
from rlbf_jax.storage import parse_object
from rlbf_jax.tokenizers import import_tokenizer
from tests.tokenizers.families import FAMILIES

LONGEST_S = 10
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 1.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30),
    *("", "x", " ", "\0", "\ud800", "<s>", "[RESET]", "é" * 50, [], {}, [[]], [{}], {"a": {}}),
    [1, "a", None],
)


# Damage ------------------------------------------------------------------------------------------


def places(document: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values inside a document."""
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in items:
            yield (*path, key)
            yield from places(value, (*path, key))


def mutated(document: Any, rng: random.Random) -> Any:
    """One to three values replaced, removed, renamed, repeated or exchanged."""
    made = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        paths = list(places(made))
        if not paths:
            return rng.choice(ODD)
        *parents, last = rng.choice(paths)
        part = made
        for key in parents:
            part = part[key]
        act = rng.randrange(5)
        if act == 0:
            del part[last]
        elif act == 1 and isinstance(part, dict):
            part[rng.choice(("", "id", "content", "type", str(last) + "x"))] = part.pop(last)
        elif act == 2 and isinstance(part, list):
            part.insert(rng.randrange(len(part) + 1), part[last])
        elif act == 3:
            other = made
            for key in rng.choice(paths):
                if not isinstance(other, dict | list) or (
                    key not in other if isinstance(other, dict) else key >= len(other)
                ):
                    break
                other = other[key]
            part[last] = copy.deepcopy(other)
        else:
            part[last] = copy.deepcopy(rng.choice(ODD))
    return made


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated, or the end cut off."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(made) + 1), rng.randint(1, 8)
        act = rng.randrange(4)
        if act == 0:
            made[at : at + size] = rng.randbytes(size)
        elif act == 1:
            del made[at : at + size]
        elif act == 2:
            made[at:at] = made[at : at + 8 * size]
        elif rng.random() < 0.3:
            del made[at:]
    return bytes(made)


def as_file(document: Any, rng: random.Random) -> bytes:
    """A damaged document: as JSON of another shape, or in its bytes, or nested without end."""
    if rng.random() < 0.02:
        return rng.choice((b"[", b'{"a":')) * 100_000
    if rng.random() < 0.25:
        return spoiled(json.dumps(document).encode(), rng)
    return json.dumps(mutated(document, rng)).encode()


# Kinds -------------------------------------------------------------------------------------------

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
ROWS = [
    {"prompt": "What of the moon?", "response": "It shines.", "label": 0.2, "spans": [[0, 2]]},
    {"prompt": "And now?", "response": "Hills.", "label": 1, "spans": []},
    {"prompt": "Why?", "response": "So.", "label": 0, "spans": None},
]
REPLY = {
    "id": "x",
    "choices": [
        {
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "yes", "refusal": None},
            "logprobs": {"content": [{"token": "yes", "logprob": -0.1, "top_logprobs": []}]},
        }
    ],
    "usage": {"total_tokens": 7},
}


def rows_file(rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.5:
        lines = [as_file(row, rng) if rng.random() < 0.5 else json.dumps(row).encode()
                 for row in ROWS]  # fmt: skip
        return "rows.jsonl", b"\n".join(lines)
    cells = [list(map(str, row.values())) for row in ROWS]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in [list(ROWS[0]), *cells])
    return "rows.csv", spoiled(text.encode(), rng)


def header_file(rng: random.Random) -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
    }
    text = as_file(header, rng)
    content = len(text).to_bytes(8, "little") + text + bytes(34)
    return spoiled(content, rng) if rng.random() < 0.2 else content


class Tokenizer:
    """A family's folder in which one file is damaged."""

    def __init__(self, root: pathlib.Path):
        self.folders = {name: FAMILIES[name](root / name) for name in ("gpt2", "llama", "qwen")}
        self.work = root / "work"

    def __call__(self, file: str, rng: random.Random) -> bytes | None:
        """Damages the file and reads the folder; the damaged tokenizer.json, where it was read."""
        source = self.folders[rng.choice(list(self.folders))]
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(source, self.work)
        path = self.work / file
        document = json.loads(path.read_text()) if path.exists() else {"eos_token_id": [3, 5]}
        content = as_file(document, rng)
        path.write_bytes(content)
        import_tokenizer(self.work, ("insult",), 4, 600)
        return content if file == "tokenizer.json" else None


def library_reads_tokenizer(content: bytes) -> bool:
    """Null lists of added tokens apart, which mean that there are none."""
    document = json.loads(content)
    if document.get("added_tokens") is None:
        document["added_tokens"] = []
    with contextlib.suppress(BaseException):
        tokenizers.Tokenizer.from_str(json.dumps(document))
        return True
    return False


def library_reads_tensors(path: pathlib.Path) -> bool:
    library = pytest.importorskip("safetensors.numpy")
    try:
        library.load_file(path)
    except KeyError:  # of a dtype that numpy has not: the header is sound
        return True
    except Exception:
        return False
    return True


# Bounds ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises TimeoutError after `LONGEST_S` seconds."""

    def late(*_):
        raise TimeoutError(f"still busy after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survives(kind: str, count: int, read: Callable[[random.Random], Any]) -> int:
    """How many of `count` damaged inputs were read; all others must end in one line."""
    sound = 0
    for seed in range(count):
        try:
            with bounded():
                read(random.Random(f"{kind} {seed}"))
            sound += 1
        except (UserError, NoCompletion) as error:
            assert "\n" not in str(error).strip() and len(str(error)) < 5000, (kind, seed)
        except BaseException as error:
            pytest.fail(f"{kind} {seed}: {type(error).__name__}: {error}"[:2000])
    return sound


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tmp_path_factory.mktemp("tokenizers"))


def test_configurations():
    def read(rng):
        config_from_hf(parse_object(as_file(CONFIG, rng), "config.json", "copy it again"))

    assert 100 < survives("config", 4000, read) < 4000


@pytest.mark.parametrize(
    ("file", "count"),
    [("tokenizer.json", 3000), ("tokenizer_config.json", 2500), ("generation_config.json", 1500),
     ("special_tokens_map.json", 500), ("added_tokens.json", 500)],
)  # fmt: skip
def test_tokenizers(file, count, tokenizer):
    def read(rng):
        content = tokenizer(file, rng)
        assert content is None or library_reads_tokenizer(content), "the library refuses it"

    assert 20 < survives(file, count, read) < count


def test_headers_of_weights(tmp_path):
    path = tmp_path / "a.safetensors"

    def read(rng):
        path.write_bytes(header_file(rng))
        for tensor in open_tensors(path).values():
            tensor.read()
        assert library_reads_tensors(path), "the library refuses it"

    assert 20 < survives("header", 3000, read) < 3000


def test_rows_of_files(tmp_path):
    def read(rng):
        name, content = rows_file(rng)
        path = tmp_path / name
        path.write_bytes(content)
        quarantine = tmp_path / "bad.jsonl" if rng.random() < 0.3 else None
        if rng.random() < 0.5:
            rows = read_rows(path, quarantine=quarantine)
            assert rows and all(row.prompt.strip() and row.response.strip() for row in rows)
            return
        columns = LabelledColumns("response", span_column="spans")
        found = read_labelled(path, columns, quarantine)
        assert len(found.texts) == len(found.labels) == len(found.spans)
        assert found.labels.dtype == np.bool_

    assert 100 < survives("rows", 2500, read) < 2500


def test_answers_of_endpoints():
    def read(rng):
        answer, _ = completion(as_file(REPLY, rng), "application/json", "sk-secret-key")
        assert isinstance(answer, str) and isinstance(answer.cut, bool)
        answer.encode()

    assert 100 < survives("reply", 2500, read) < 2500
