"""Checkpoints in and out: the identity, the same bytes, memory,
and one clear line for every damage."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.errors import UserError
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import FAMILIES, same_model, styled
from rlbf_jax.models.transformer import unrolled
from rlbf_jax.models.weights import read as reading
from rlbf_jax.models.weights.mapping import placements
from rlbf_jax.models.weights.read import aligned_empty, find_tensors, read_checkpoint
from rlbf_jax.models.weights.tensors import TensorToWrite, open_tensors, write_tensors
from rlbf_jax.models.weights.write import write_checkpoint

SHAPE = dict(
    vocab_size=24,
    num_layers=3,
    width=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=12,
    max_positions=16,
)
WINDOWS = {"gemma2": (4, None), "gemma3": (4, None), "mistral": (4,)}


def tree_of(config, fill):
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    return jax.tree.map(fill, shapes)


@functools.cache
def model(family, dtype="float32"):
    """A model of a family whose every number is another."""
    shape = SHAPE | (dict(num_kv_heads=4, width=16) if family == "gpt2" else {})
    config = styled(ModelConfig(family=family, **shape, dtype=dtype, param_dtype=dtype))
    if family in WINDOWS:
        config = styled(
            ModelConfig(
                family=family, **shape, dtype=dtype, param_dtype=dtype, windows=WINDOWS[family]
            )
        )
    rng = np.random.default_rng(0)
    return config, tree_of(config, lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype))


def write(folder, family="llama", **options):
    config, params = model(family)
    write_checkpoint(folder, config, params, **options)
    return folder


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_import_after_export_is_the_identity(family, dtype, tmp_path):
    config, params = model(family, dtype)
    write_checkpoint(tmp_path / "one", config, params)
    read, again = read_checkpoint(tmp_path / "one")
    assert same_model(read, config) == [] and read.param_dtype == read.dtype == dtype
    assert_same(again, params)
    assert {x.dtype for x in jax.tree.leaves(again)} == {jnp.dtype(dtype)}
    write_checkpoint(tmp_path / "two", read, again)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_every_number_of_a_model_has_one_place():
    for family in FAMILIES:
        config, params = model(family)
        counts = tree_of(config, lambda x: np.zeros(x.shape, np.int8))
        flat = {
            tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(counts)
        }
        places = placements(config, list(flat))
        assert len({p.name for p in places}) == len(places)
        for place in places:
            part = place.part(flat[place.path])
            part += 1
            numbers = np.arange(part.size).reshape(place.shape)
            np.testing.assert_array_equal(place.to_theirs(place.to_ours(numbers)), numbers)
            assert place.to_ours(numbers).shape == part.shape
        assert all((x == 1).all() for x in flat.values()), family


def test_shards_hold_the_same_and_scanned_layers_too(tmp_path):
    config, params = model("gemma2")
    write_checkpoint(tmp_path / "shards", config, params, {"eos_token_id": 1}, shard_bytes=2000)
    files = sorted(f.name for f in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.size for t in open_tensors(tmp_path / "shards" / f).values()) for f in files]
    assert max(sizes) <= 2000
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"]
        == sum(sizes)
        == sum(x.nbytes for x in jax.tree.leaves(params))
    )
    assert json.loads((tmp_path / "shards" / "config.json").read_text())["eos_token_id"] == 1
    assert_same(read_checkpoint(tmp_path / "shards")[1], params)
    scanned, stacked = read_checkpoint(tmp_path / "shards", scan_layers=True)
    assert set(stacked) == {"embedding", "final_norm", "stack", "blocks_1"}
    plain, flat = unrolled(scanned, stacked)
    assert same_model(plain, config) == []
    assert_same(flat, params)
    write_checkpoint(tmp_path / "again", scanned, stacked, {"eos_token_id": 1}, shard_bytes=2000)
    for file in [*files, "config.json"]:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "shards" / file).read_bytes()


def test_numbers_of_another_type_are_converted(tmp_path):
    folder = write(tmp_path / "model")
    _, params = model("llama")
    config, half = read_checkpoint(folder, dtype="bfloat16")
    assert config.dtype == config.param_dtype == "bfloat16"
    assert_same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    tensors = find_tensors(folder)
    halves = [
        TensorToWrite(name, t.shape, np.dtype(np.float16), lambda t=t: t.read().astype(np.float16))
        for name, t in tensors.items()
    ]
    write_tensors(folder / "model.safetensors", halves)
    config, wide = read_checkpoint(folder)
    assert config.param_dtype == "float32"
    assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params))


def test_a_buffer_becomes_the_parameter_without_a_copy():
    """Without this, reading on CPU would hold every parameter twice for a moment."""
    buffer = aligned_empty((128, 1024), np.dtype(np.float32))
    buffer[:] = 1
    array = jax.device_put(buffer, jax.devices("cpu")[0], may_alias=True)
    assert buffer.ctypes.data % reading.ALIGNMENT == 0
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data
    # A donated update must not write into memory that numpy still knows.
    updated = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    np.testing.assert_array_equal(updated, 2.0)


def renamed(folder, change):
    """Rewrites the one file of a checkpoint with `change(name) -> name`."""
    tensors = find_tensors(folder)
    whole = {change(name): t.read() for name, t in tensors.items()}
    write_tensors(folder / "model.safetensors", tensors_of(whole))


def tensors_of(arrays):
    return [TensorToWrite(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()]


def test_other_writings_of_the_same_weights(tmp_path):
    """A bare decoder without the prefix, constants beside the parameters, a tied table twice."""
    for family, extra in (
        ("gpt2", "h.0.attn.bias"),
        ("llama", "layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        config, params = model(family)
        folder = write(tmp_path / family, family)
        prefix = "transformer." if family == "gpt2" else "model."
        renamed(folder, lambda name, prefix=prefix: name.removeprefix(prefix))
        head = {"lm_head.weight": np.asarray(params["embedding"])} if config.tied_embeddings else {}
        more = {extra: np.ones((2, 2), np.float32)} | head
        whole = {name: t.read() for name, t in find_tensors(folder).items()} | more
        write_tensors(folder / "model.safetensors", tensors_of(whole))
        assert_same(read_checkpoint(folder)[1], params)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sound") / "model", shard_bytes=2000)


def damage_cases():
    def edit_config(folder, **fields):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def cut(folder, size):
        path = folder / "model-00002-of-00005.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    def edit_index(folder, name, file):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][name] = file
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f}
        path.write_text(json.dumps(index))

    norm = "model.norm.weight"
    return [
        (
            lambda f: (f / "config.json").unlink(),
            "config.json: No such file or directory; expected the folder of a Hu",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (
            lambda f: (f / "config.json").write_text("[]"),
            "config.json: holds a list, expected an object",
        ),
        (lambda f: edit_config(f, architectures=["T5"]), r"config.json: architectures is \['T5'\]"),
        (
            lambda f: edit_config(f, vocab_size=25),
            r"tensor model.embed_tokens.weight has shape \[24, 8\], expected \[25",
        ),
        (
            lambda f: edit_config(f, num_hidden_layers=2),
            "tensor model.layers.2.input_layernorm.weight and 8 more is unk",
        ),
        (
            lambda f: edit_config(f, num_hidden_layers=4),
            r"tensor model.layers.3.*weight is missing, expected shape",
        ),
        (
            lambda f: edit_config(f, tie_word_embeddings=False),
            r"tensor lm_head.weight is missing, expected shape \[24",
        ),
        (
            lambda f: edit_index(f, norm, ""),
            r"tensor model.norm.weight is missing, expected shape \[8\]",
        ),
        (
            lambda f: edit_index(f, norm, "model-00001-of-00005.safetensors"),
            "00001-of-00005.*: tensor model.norm.weight",
        ),
        (
            lambda f: edit_index(f, norm, "../other.safetensors"),
            "weight_map names '../other.safetensors', expected",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map is missing"),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "neither model.safetensors nor model.safetensors.ind",
        ),
        (
            lambda f: (f / "model-00003-of-00005.safetensors").unlink(),
            "model-00003-of-00005.safetensors: No such file",
        ),
        (
            lambda f: cut(f, -4),
            r"00002-of-00005.safetensors: truncated within tensor \S+ \(\d+ bytes, expected at l",
        ),
        (
            lambda f: cut(f, 100),
            r"00002-of-00005.safetensors: truncated, or not a safetensors file \(100 bytes\)",
        ),
        (
            lambda f: cut(f, 3),
            r"00002-of-00005.safetensors: truncated, or not a safetensors file \(3 bytes\)",
        ),
    ]


@pytest.mark.parametrize(("harm", "match"), damage_cases())
def test_every_damage_has_a_line_of_its_own(harm, match, sound, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    assert len(list(folder.glob("*.safetensors"))) == 5
    read_checkpoint(folder)
    harm(folder)
    with pytest.raises(UserError, match=match) as raised:
        read_checkpoint(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"not json", "its header: not JSON"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "its header is not that of a safetensors file"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            "4 bytes for shape .2. of F32",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
            "its header is not that",
        ),
        (b"[]", "its header: holds a list, expected an object"),
        (b"[" * 5000, "its header: not JSON .nested too deeply"),
        (
            b'{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
            "offsets and shape must be whole numbers",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
            "8 bytes for shape .-1, -2. of F32",
        ),
    ],
)
def test_damaged_headers(header, match, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=match):
        open_tensors(file)


def headed(*offsets: tuple[int, int]) -> bytes:
    """A file whose tensors a, b, ... of float32 claim these bytes; 16 bytes of numbers follow."""
    header = {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("abc", offsets, strict=False)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        ([(0, 8), (8, 16)], None),
        ([(8, 16), (0, 8)], None),
        ([(0, 8), (8, 8), (8, 16)], None),
        ([(0, 8), (0, 8), (8, 16)], "tensor b overlaps another"),
        ([(0, 8), (4, 16)], "tensor b overlaps another"),
        ([(0, 4), (8, 16)], "tensor b leaves bytes before it unused"),
        ([(4, 16)], "tensor a leaves bytes before it unused"),
        ([(0, 8)], "8 bytes behind the last tensor"),
        ([], "16 bytes behind the last tensor"),
        ([(0, 8), (8, 20)], "truncated within tensor b"),
    ],
)
def test_every_byte_belongs_to_one_tensor(offsets, match, tmp_path):
    """As the library has it, where it is installed."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(headed(*offsets))
    if match is None:
        assert len(open_tensors(file)) == len(offsets)
    else:
        with pytest.raises(UserError, match=match):
            open_tensors(file)
    library = pytest.importorskip("safetensors.numpy")
    if match is None:
        assert len(library.load_file(file)) == len(offsets)
    else:
        with pytest.raises(Exception, match="(?i)header|offset|buffer|invalid"):
            library.load_file(file)


def rewritten(folder, change) -> None:
    """The checkpoint's one file with tensors changed: `change` gets {name: array}."""
    path = folder / "model.safetensors"
    tensors = {name: stored.read() for name, stored in open_tensors(path).items()}
    change(tensors)
    path.unlink()
    write_tensors(
        path,
        [
            TensorToWrite(name, x.shape, x.dtype, lambda x=x: x)
            for name, x in sorted(tensors.items())
        ],
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_numbers_that_are_not_finite_are_named_by_their_tensor(name, dtype, value, tmp_path):
    """Tensors that are read straight into their place, and those that are a part of one of ours."""
    folder = tmp_path / "model"
    write_checkpoint(folder, *model("llama", dtype))

    def change(tensors):
        tensors[name].reshape(-1)[[1, 3]] = value

    rewritten(folder, change)
    with pytest.raises(UserError, match=f"tensor {name} has 2 values that are not finite"):
        read_checkpoint(folder)


def test_the_largest_numbers_are_finite(tmp_path):
    folder = write(tmp_path / "model", "llama")

    def change(tensors):
        tensors["model.norm.weight"][:2] = [3.4e38, 1e-45]

    rewritten(folder, change)
    _, params = read_checkpoint(folder)
    assert float(params["final_norm"]["scale"][0]) > 3e38


@pytest.mark.parametrize("change", [0, 1])
def test_a_second_table_of_a_tied_checkpoint_must_be_the_same(change, tmp_path):
    folder = write(tmp_path / "model", "gemma2")

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change

    rewritten(folder, add_head)
    if not change:
        config, params = read_checkpoint(folder)
        assert config.tied_embeddings and "unembedding" not in params
        return
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        read_checkpoint(folder)


def test_quantized_numbers_are_refused(tmp_path):
    folder = write(tmp_path / "model")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= {"dtype": "F8_E4M3"}
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(
        UserError, match="tensor model.norm.weight is F8_E4M3, expected one of F32, F16, BF16"
    ):
        read_checkpoint(folder)


def test_weights_are_not_written_over(tmp_path):
    folder = write(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="has model.safetensors already; choose another folder"):
        write(folder)
    with pytest.raises(UserError, match="model.family: 'toy'"):
        write_checkpoint(tmp_path / "toy", ModelConfig(), {})
    assert (folder / "model.safetensors").read_bytes() == before and not (tmp_path / "toy").exists()


def test_the_files_are_those_of_the_safetensors_library(tmp_path):
    library = pytest.importorskip(
        "safetensors.numpy", reason="needs safetensors: pip install 'rlbf_jax[hf]'"
    )
    folder = write(tmp_path / "model")
    theirs = library.load_file(folder / "model.safetensors")
    ours = find_tensors(folder)
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name])
    library.save_file(theirs, tmp_path / "saved.safetensors")
    for name, tensor in open_tensors(tmp_path / "saved.safetensors").items():
        np.testing.assert_array_equal(tensor.read(), theirs[name])


PEAK = """
import pathlib, resource, sys, jax
from rlbf_jax.models.weights.read import read_checkpoint
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.block_until_ready(jax.numpy.ones(3) + 1)
before = resident()
_, params = read_checkpoint(pathlib.Path(sys.argv[1]), scan_layers=True)
jax.block_until_ready(params)
print(resident() - before, sum(x.nbytes for x in jax.tree.leaves(params)), \
params["embedding"].nbytes)
"""


@pytest.mark.slow
def test_reading_holds_one_copy_and_one_tensor(tmp_path):
    """Half a gigabyte in bfloat16, scanned layers, largest tensor an eighth of it."""
    config = styled(
        ModelConfig(
            family="llama", vocab_size=32_768, num_layers=20, width=1024, num_heads=16,
            num_kv_heads=8, head_dim=64, mlp_width=2816, dtype="bfloat16", param_dtype="bfloat16",
        )
    )  # fmt: skip
    write_checkpoint(
        tmp_path / "model", config, tree_of(config, lambda x: np.ones(x.shape, x.dtype))
    )
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, total, largest = map(int, done.stdout.split())
    assert total > 5e8 and grown <= 1.2 * total + largest, (grown / total, largest / total)


MESH = """
import os, pathlib, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np
from rlbf_jax.models.weights.read import read_checkpoint
from rlbf_jax.parallel.mesh import MeshConfig, make_mesh
folder = pathlib.Path(sys.argv[1])
for scan in (False, True):
    _, whole = read_checkpoint(folder, scan_layers=scan)
    _, split = read_checkpoint(folder, make_mesh(MeshConfig(1, 2, 2)), scan_layers=scan)
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    assert len(split["embedding"].sharding.device_set) == 4
    assert split["embedding"].addressable_shards[0].data.shape == (24, 4)
print("same")
"""


@pytest.mark.slow
def test_parameters_are_read_onto_a_mesh(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MESH, str(write(tmp_path / "model", "gemma2"))],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "same", done.stderr
