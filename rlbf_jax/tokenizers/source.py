"""The tokenizer files of a checkpoint, which is a folder, or a GGUF file."""

from __future__ import annotations

import pathlib

from rlbf_jax.gguf_file import is_gguf, open_gguf
from rlbf_jax.tokenizers import files
from rlbf_jax.tokenizers.of_gguf import files_of_gguf


def read(checkpoint: str | pathlib.Path, template: str = files.DEFAULT) -> files.Files:
    """As `files.read`, of either. Raises InputError if it holds no tokenizer that can be used."""
    path = pathlib.Path(checkpoint)
    if not is_gguf(path):
        return files.read(path, template)
    found = files.Files(files_of_gguf(open_gguf(path)), str(path))
    return files.with_template(path, found, template)
