"""The model and prompt of the ladder against nanoGCG. Pure numpy apart from our own package.

    python -m tests.reference.gcg_cases FOLDER      writes the model as a Hugging Face checkpoint

`make_gcg.py` reads that folder with transformers and nanoGCG.
Weights come from names and a seed, so none are stored.
"""

from __future__ import annotations

import json
import pathlib
import sys
import zlib

import jax
import numpy as np

from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.models.transformer import init
from rlbf_jax.models.weights.write import write_checkpoint

VOCAB, LENGTH, WIDTH, TOPK, STEPS = 512, 20, 64, 96, 30
FORBIDDEN = 480
"""Ids from here on are not printable, hence not allowed."""
PREFIX, AFTER, TARGET = (7, 40, 41, 300, 21), (9, 8), (100, 201, 302, 403, 33, 44)
INIT = (55,) * LENGTH
MODEL = styled(
    ModelConfig(
        family="llama", vocab_size=VOCAB, num_layers=2, width=64, num_heads=4, num_kv_heads=2,
        head_dim=16, mlp_width=128, max_positions=256, tied_embeddings=False,
    )
)  # fmt: skip


def params(seed: int = 0, model: ModelConfig = MODEL) -> dict:
    """Parameters whose values come from numpy, larger than at the start of training,
    so that every id matters."""

    def filled(path, leaf) -> np.ndarray:
        name = "/".join(str(part.key) for part in path)
        draws = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(
            leaf.shape, np.float32
        )
        if name.endswith("scale"):
            return 1 + 0.1 * draws
        fan_in = (
            leaf.shape[1]
            if "embedding" in name
            else leaf.size // leaf.shape[-1]
            if "out" in name
            else leaf.shape[0]
        )
        return draws * np.float32((2.0 if "unembedding" in name else 1.0) / fan_in**0.5)

    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(filled, shapes)


def write(folder: pathlib.Path, seed: int = 0, model: ModelConfig = MODEL) -> None:
    write_checkpoint(folder, model, params(seed, model))
    case = dict(
        vocab=model.vocab_size, forbidden=FORBIDDEN, prefix=PREFIX, after=AFTER, target=TARGET,
        init=INIT, width=WIDTH, topk=TOPK, steps=STEPS,
    )  # fmt: skip
    (folder / "case.json").write_text(json.dumps(case))


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
