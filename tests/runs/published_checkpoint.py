"""A small checkpoint folder in published form, made without torch: random weights and a tokenizer
of toy sentences."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from rlbf_jax.data.worlds.toy_world import ToyWorld, ToyWorldConfig
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.models.weights.write import write_checkpoint
from tests.fakes import init

TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{{ '<|' + message['role'] + '|>' + message['content'] + '<|turn|>' }}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|turn|>", "<|user|>", "<|assistant|>")
SPARE = 6
"""Rows of the embedding beyond the tokenizer: too few for control tokens."""


def make_checkpoint(folder: pathlib.Path, family: str = "llama", **model) -> pathlib.Path:
    """Writes the folder; `model` changes fields of its `ModelConfig`."""
    rng, world = np.random.default_rng(0), ToyWorld(ToyWorldConfig())
    documents = [world.document(rng) for _ in range(300)]
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(
        [text for d in documents for text in (d.prompt.text, d.response)], trainer
    )
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    ids = {name: made.token_to_id(name) for name in SPECIAL}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    told = {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    generation = {"eos_token_id": [ids["<|end|>"], ids["<|turn|>"]], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    shape = dict(num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24)
    shape |= (
        dict(family=family, vocab_size=made.get_vocab_size() + SPARE, tied_embeddings=False) | model
    )
    config = styled(ModelConfig(**shape))
    params = jax.tree.map(lambda x: 2 * x, init(config, jax.random.key(0)))
    write_checkpoint(
        folder, config, params, {"bos_token_id": ids["<|begin|>"], "eos_token_id": ids["<|end|>"]}
    )
    return folder
