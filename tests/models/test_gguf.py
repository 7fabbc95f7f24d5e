"""GGUF files against the published checkpoints that they were converted from."""

import functools
import json

import gguf
import jax
import numpy as np
import pytest

from rlbf_jax.cli.main import main
from rlbf_jax.errors import UserError
from rlbf_jax.gguf_file import open_gguf
from rlbf_jax.models import transformer
from rlbf_jax.models.config_of_gguf import config_of_gguf, llama3_factors
from rlbf_jax.models.published_config import config_from_hf
from rlbf_jax.models.weights.read import find_tensors, read_checkpoint, read_config
from rlbf_jax.models.weights.write import write_checkpoint
from rlbf_jax.runs.start import digest
from rlbf_jax.tokenizers import import_tokenizer
from rlbf_jax.tokenizers.source import read as read_tokenizer
from tests.models import gguf_files
from tests.tokenizers import families

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}  # fmt: skip
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "rope_theta": 5e5,
              "tie_word_embeddings": False},
    "llama_tied": {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1,
                   "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2, "rope_theta": 1e6,
              "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "rope_theta": 1e6,
              "tie_word_embeddings": False},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 3,
               "sliding_window": 16, "query_pre_attn_scalar": 16,
               "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7,
               "sliding_window": 8, "query_pre_attn_scalar": 16, "rope_theta": 1e6},
}  # fmt: skip


@functools.cache
def model(name):
    """A family's tiny model. Its numbers are multiples of 2^-10, so that Gemma's norms survive
    + 1 and - 1."""
    config = config_from_hf(SHAPE | CONFIGS[name])
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    rng = np.random.default_rng(len(name))
    return config, jax.tree.map(
        lambda leaf: (rng.integers(-512, 512, leaf.shape) / 1024).astype(np.float32), shapes
    )


def folder_of(name, path):
    path.mkdir()
    write_checkpoint(path, *model(name), {}, 10**9)
    return path


@pytest.fixture
def llama_file(tmp_path):
    """A file of the Llama, and the fields and tensors that it is made of."""
    parts = gguf_files.converted(folder_of("llama", tmp_path / "published"))
    return gguf_files.write(tmp_path / "model.gguf", *parts), parts


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_that_of_the_published_checkpoint(name, tmp_path):
    folder = folder_of(name, tmp_path / "published")
    file = gguf_files.write(tmp_path / "model.gguf", *gguf_files.converted(folder))
    config, params = read_checkpoint(folder)
    found, ours = read_checkpoint(file)
    assert found == config
    for (path, expected), (_, value) in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree_util.tree_leaves_with_path(ours),
        strict=True,
    ):
        np.testing.assert_array_equal(value, expected, err_msg=str(path))


def quantizations():
    known = gguf.GGMLQuantizationType
    kinds = [known.F32, known.F16, *gguf.quants._type_traits]
    return [kind for kind in kinds if 256 % gguf.GGML_QUANT_SIZES[kind][0] == 0]


@pytest.mark.parametrize("kind", quantizations(), ids=lambda kind: kind.name)
def test_numbers_are_those_that_the_package_dequantizes(kind, tmp_path):
    """Of random bytes, some of which are no numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 256, (12, 256 // block * size), np.uint8)
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    stored = (raw, kind) if plain is None else raw.view(plain)
    with np.errstate(all="ignore"):
        check_numbers(stored, gguf.dequantize(raw, kind).reshape(12, 256), tmp_path)


def check_numbers(stored, values, tmp_path):
    fields = {"attention.head_count": 4, "attention.head_count_kv": 2}
    tensors = {"blk.0.ffn_up.weight": stored, "blk.0.attn_k.weight": stored}
    file = gguf_files.write(tmp_path / "a.gguf", "llama", fields, tensors)
    found = find_tensors(file)
    up = found["model.layers.0.mlp.up_proj.weight"]
    assert up.shape == (12, 256) and up.dtype == np.float32
    np.testing.assert_array_equal(up.read(), values)
    into = np.empty((12, 256), np.float32)
    up.read_into(into)
    np.testing.assert_array_equal(into, values)
    # Of a head's six rows, llama.cpp has 0 3 1 4 2 5.
    keys = found["model.layers.0.self_attn.k_proj.weight"].read()
    order = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    np.testing.assert_array_equal(keys, values[order])
    same = np.array_equal(values, values)  # not where there are no numbers
    assert up.equals(up) == same
    assert not up.equals(found["model.layers.0.self_attn.k_proj.weight"])


# What files do not say, or say otherwise ----------------------------------------------------------


def test_a_float_is_the_decimal_that_the_authors_wrote(llama_file):
    file, _ = llama_file
    assert read_config(file)["rms_norm_eps"] == 1e-5 and read_config(file)["rope_theta"] == 5e5


def test_what_the_family_says_is_told(tmp_path):
    folder = folder_of("gemma3", tmp_path / "published")
    file = gguf_files.write(tmp_path / "a.gguf", *gguf_files.converted(folder))
    told = config_of_gguf(open_gguf(file))
    assert told.config["rope_local_base_freq"] == 10_000 and len(told.remarks) == 2
    assert "query_pre_attn_scalar 16" in told.remarks and "every 6th layer" in told.remarks[1]


def test_the_largest_gemmas_scale_queries_by_width_over_heads(tmp_path):
    name, fields, tensors = gguf_files.converted(folder_of("gemma2", tmp_path / "published"))
    file = gguf_files.write(tmp_path / "a.gguf", name, fields | {"block_count": 46}, tensors)
    assert read_config(file)["query_pre_attn_scalar"] == 8


def test_llama_3s_scaling_is_read_off_its_factors(llama_file, tmp_path):
    _, (name, fields, tensors) = llama_file
    published = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192}  # fmt: skip
    factors = llama3_factors(5e5, 16, published)
    assert factors[0] == 1 and factors[-1] == 32 and (np.diff(factors) >= 0).all()
    scaled = tensors | {"rope_freqs.weight": factors.astype(np.float32)}
    file = gguf_files.write(tmp_path / "a.gguf", name, fields, scaled)
    assert read_config(file)["rope_scaling"] == {"rope_type": "llama3", **published}
    config, _ = read_checkpoint(file)
    assert (config.rope_scaling, config.rope_factor) == ("llama3", 32.0)
    odd = tensors | {"rope_freqs.weight": np.linspace(1, 5, 8, dtype=np.float32)}
    file = gguf_files.write(tmp_path / "b.gguf", name, fields, odd)
    with pytest.raises(UserError, match="is not Llama 3's scaling by 5"):
        read_config(file)


def test_linear_scaling_is_taken_over_and_others_are_refused(llama_file, tmp_path):
    _, (name, fields, tensors) = llama_file
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    file = gguf_files.write(tmp_path / "a.gguf", name, fields | linear, tensors)
    assert read_checkpoint(file)[0].rope_factor == 8.0
    file = gguf_files.write(
        tmp_path / "b.gguf", name, fields | {"rope.scaling.type": "yarn"}, tensors
    )
    with pytest.raises(UserError, match="rope.scaling.type is 'yarn', expected none or linear"):
        read_config(file)


def test_a_changed_file_is_another_and_is_read_again(llama_file, tmp_path):
    file, (name, fields, tensors) = llama_file
    before = digest(file)
    assert read_config(file)["rope_theta"] == 5e5 and digest(file) == before
    gguf_files.write(file, name, fields | {"rope.freq_base": 7e5}, tensors)
    assert read_config(file)["rope_theta"] == 7e5 and digest(file) != before


# Bad files ----------------------------------------------------------------------------------------


def broken(file, parts, how):
    name, fields, tensors = parts
    if how == "missing":
        file.unlink()
    elif how == "not gguf":
        file.write_bytes(b"PK" + file.read_bytes())
    elif how == "truncated header":
        file.write_bytes(file.read_bytes()[:200])
    elif how == "truncated numbers":
        file.write_bytes(file.read_bytes()[:-4000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "split":
        gguf_files.write(file, name, fields, tensors, {"split.count": 3})
    elif how == "architecture":
        gguf_files.write(file, "mamba", fields, tensors)
    elif how == "field":
        gguf_files.write(
            file, name, {k: v for k, v in fields.items() if k != "block_count"}, tensors
        )
    elif how == "tensor":
        gguf_files.write(
            file,
            name,
            fields,
            tensors | {"blk.0.ffn_gate_exps.weight": tensors["output_norm.weight"]},
        )
    elif how == "no tensor":
        kept = {k: v for k, v in tensors.items() if k != "blk.1.attn_v.weight"}
        gguf_files.write(file, name, fields, kept)
    elif how == "no table":
        kept = {k: v for k, v in tensors.items() if k != "token_embd.weight"}
        gguf_files.write(file, name, fields, kept)
    elif how == "not finite":
        bad = tensors["output_norm.weight"] * np.float32("nan")
        gguf_files.write(file, name, fields, tensors | {"output_norm.weight": bad})
    elif how == "layers":
        counts = fields | {"attention.head_count_kv": [2, 4]}
        gguf_files.write(file, name, counts, tensors)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing", "No such file or directory; expected a GGUF file"),
        ("not gguf", "not a GGUF file"),
        ("empty", "not a GGUF file"),
        ("truncated header", "truncated or damaged"),
        ("truncated numbers", "truncated or damaged"),
        ("split", "one of 3 parts; join them"),
        ("architecture", "architecture 'mamba', expected one of llama, qwen2"),
        ("field", "says nothing of llama.block_count"),
        ("tensor", "tensor blk.0.ffn_gate_exps.weight is unknown to a llama model"),
        ("no tensor", "tensor model.layers.1.self_attn.v_proj.weight is missing"),
        ("no table", "tensor token_embd.weight is missing"),
        ("not finite", "has 32 values that are not finite"),
        ("layers", "head_count_kv differs from layer to layer"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(llama_file, how, told):
    file, parts = llama_file
    broken(file, parts, how)
    with pytest.raises(UserError) as caught:
        read_checkpoint(file)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


# Tokenizers ---------------------------------------------------------------------------------------

TEXTS = [
    "", " ", "The moon shines", "  two  spaces\n\nand lines\t", "été ñandú 字 😀", "it's 1234567 x",
    "<|im_start|>user", "<start_of_turn>", "a<table>b",
    "DON'T   Stop\r\n  1,000.50", "\u200bñ e\u0301",
]  # fmt: skip


def same_tokenizer(folder, fields, tmp_path):
    """Whether ids, chats and roles of a file are those of the folder that it was made of."""
    file = gguf_files.write(tmp_path / "t.gguf", "llama", {}, {"a": np.ones(4, np.float32)}, fields)
    theirs = import_tokenizer(folder, ["x"], 4)
    ours = import_tokenizer(file, ["x"], 4)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
        chat = [{"role": "user", "content": text}]
        assert ours.encode_chat(chat) == theirs.encode_chat(chat), text
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (
        theirs.bos_id,
        theirs.eos_ids,
        theirs.pad_id,
    )
    assert ours.guarded_ids == theirs.guarded_ids
    return file


def test_a_llama_3_tokenizer(tmp_path):
    folder = families.llama(tmp_path / "published")
    ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    more = {
        "tokenizer.chat_template": config["chat_template"],
        "tokenizer.ggml.add_bos_token": True,
    }
    fields = gguf_files.of_byte_level(folder, "llama-bpe", **more)
    fields |= {"tokenizer.ggml.eos_token_id": ids[0], "tokenizer.ggml.eom_token_id": ids[1]}
    same_tokenizer(folder, fields | {"tokenizer.ggml.eot_token_id": ids[2]}, tmp_path)


def test_a_qwen_tokenizer(tmp_path):
    folder = families.qwen(tmp_path / "published")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    template = (folder / "chat_template.jinja").read_text()
    fields = gguf_files.of_byte_level(folder, "qwen2", **{"tokenizer.chat_template": template})
    fields |= {"tokenizer.ggml.eot_token_id": ends[1]}
    same_tokenizer(folder, fields, tmp_path)


def test_a_gemma_tokenizer_with_several_chat_templates(tmp_path):
    folder = families.gemma_sentencepiece(tmp_path / "published")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    fields = gguf_files.of_sentencepiece(
        folder,
        **{
            "tokenizer.chat_template": families.GEMMA_TEMPLATE,
            "tokenizer.chat_template.tool_use": "{{ 1 }}",
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.eot_token_id": ends[1],
        },
    )
    file = same_tokenizer(folder, fields, tmp_path)
    assert (
        read_tokenizer(file, "tool_use").json("tokenizer_config.json")["chat_template"] == "{{ 1 }}"
    )
    with pytest.raises(ValueError, match="no chat template is called 'other'; found default, tool"):
        read_tokenizer(file, "other")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"tokenizer.ggml.pre": "unheard-of"},
            "pre is 'unheard-of', expected one of gpt-2, smollm",
        ),
        ({"tokenizer.ggml.model": "bert"}, "model is 'bert', expected gpt2"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 types of 383 tokens"),
        ({"tokenizer.ggml.merges": None}, "says nothing of tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": None}, "says nothing of tokenizer.ggml.tokens"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_line(change, told, tmp_path):
    made = families.byte_level()
    folder = families.write(tmp_path / "published", made, {})
    fields = gguf_files.of_byte_level(folder, "gpt-2") | change
    fields = {name: value for name, value in fields.items() if value is not None}
    file = gguf_files.write(tmp_path / "t.gguf", "llama", {}, {"a": np.ones(4, np.float32)}, fields)
    with pytest.raises(UserError) as caught:
        import_tokenizer(file, ["x"], 4)
    assert told in str(caught.value) and str(file) in str(caught.value)


def test_a_vocabulary_may_lack_what_nobody_types(tmp_path):
    folder = families.write(tmp_path / "published", families.byte_level(), {"eos_token": "a"})
    fields = gguf_files.of_byte_level(folder, "smollm")
    pieces, drop = fields["tokenizer.ggml.tokens"], ("\u0106", "\u00c0")  # bytes 0x06 and 0xC0
    fields["tokenizer.ggml.tokens"] = [f"<unused{p}>" if p in drop else p for p in pieces]
    fields["tokenizer.ggml.eos_token_id"] = 5
    file = gguf_files.write(tmp_path / "t.gguf", "llama", {}, {"a": np.ones(4, np.float32)}, fields)
    tokenizer = import_tokenizer(file, ["x"], 4)
    assert tokenizer.decode(tokenizer.encode("moon\x06 27 é")) == "moon 27 é"
    assert tokenizer.decode(tokenizer.encode("moon\x07 27 é")) == "moon\x07 27 é"
    fields["tokenizer.ggml.tokens"] = ["<unused>" if p == "z" else p for p in pieces]
    file = gguf_files.write(tmp_path / "u.gguf", "llama", {}, {"a": np.ones(4, np.float32)}, fields)
    with pytest.raises(UserError, match="no piece for 1 of the 256 bytes"):
        import_tokenizer(file, ["x"], 4)


# Commands -----------------------------------------------------------------------------------------


def test_import_writes_what_the_published_checkpoint_holds(tmp_path, capsys):
    config = config_from_hf(SHAPE | CONFIGS["llama"] | {"vocab_size": 600})
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    folder = families.qwen(tmp_path / "published")
    write_checkpoint(folder, config, params, {}, 10**9)
    name, fields, tensors = gguf_files.converted(folder)
    template = {"tokenizer.chat_template": (folder / "chat_template.jinja").read_text()}
    tokens = gguf_files.of_byte_level(folder, "qwen2", **template)
    file = gguf_files.write(tmp_path / "model.gguf", name, fields, tensors, tokens)
    assert main(["import", str(file), str(tmp_path / "ours")]) == 0
    assert "the file does not say, the family does: no sliding window" in capsys.readouterr().out
    expected, found = find_tensors(folder), find_tensors(tmp_path / "ours")
    assert expected.keys() == found.keys()
    for each in expected:
        np.testing.assert_array_equal(found[each].read(), expected[each].read())
    plain = import_tokenizer(tmp_path / "ours", ["x"], 4)
    assert plain.encode("The moon 12") == import_tokenizer(folder, ["x"], 4).encode("The moon 12")
    wanted = ["--categories", "rude,odd", "--x_max", "9"]
    assert main(["import", str(file), str(tmp_path / "ready"), *wanted]) == 0
    assert main(["import", str(folder), str(tmp_path / "same"), *wanted]) == 0
    assert (
        read_config(tmp_path / "ready")["vocab_size"]
        == read_config(tmp_path / "same")["vocab_size"]
    )
    a, b = (read_checkpoint(tmp_path / each)[1] for each in ("ready", "same"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_import_says_what_would_stop_a_run(tmp_path, capsys):
    folder = folder_of("llama", tmp_path / "published")
    assert main(["import", str(folder), str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "weights are fine, but no run can use the tokenizer" in told
    assert "holds no tokenizer" in told
    config = config_from_hf(SHAPE | CONFIGS["llama"] | {"vocab_size": 600})
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    fitting = families.qwen(tmp_path / "fitting")
    write_checkpoint(fitting, config, zeros, {}, 10**9)
    assert main(["import", str(fitting), str(tmp_path / "c")]) == 0
    assert "no run can use" not in capsys.readouterr().out
