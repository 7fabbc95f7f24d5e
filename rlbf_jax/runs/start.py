"""A run that starts from a published checkpoint.

Its tokenizer, model and parameters are the checkpoint's, where others train their own.

RUN/tokenizer/                the checkpoint's, with control tokens
RUN/start_from/               its configurations: a finished run needs the checkpoint no more
RUN/manifest.json             `data.start_from`: what the folder held when the run's data was made
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from rlbf_jax.directives import DEFAULT_KINDS
from rlbf_jax.errors import UserError
from rlbf_jax.gguf_file import is_gguf
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.models.published_config import config_from_hf
from rlbf_jax.models.weights.read import read_checkpoint, read_config
from rlbf_jax.models.weights.rows import rows_of
from rlbf_jax.runs.experiment import BaseConfig
from rlbf_jax.storage import write_whole
from rlbf_jax.tokenizers import FamilyTokenizer, import_tokenizer, source
from rlbf_jax.tokenizers.files import DEFAULT, GENERATION_FILE, META_FILE, read
from rlbf_jax.tokenizers.folder import meta

FOLDER = "start_from"
PIECE, PIECES = 1 << 16, 16
"""Bytes of a piece of a weight file, and pieces, that its digest reads:
a megabyte, whatever the file's size."""
OF_THE_RUN = ("dtype", "param_dtype", "remat", "scan_layers")
"""Fields of the model that the experiment decides; the checkpoint decides all others."""


def model_of(base: BaseConfig, run: Path) -> ModelConfig:
    """The base model before its vocabulary is known: configured, or the checkpoint's as the run
    computes it, with the checkpoint's vocabulary.

    Raises UserError where neither the run nor the folder has a config.json,
    or it is of an unknown architecture.
    """
    if not base.start_from:
        return styled(base.model)
    made = (run / "done" / "tokenizer").exists() and (run / FOLDER / "config.json").is_file()
    model = config_from_hf(read_config(run / FOLDER if made else _folder(base.start_from)))
    return dataclasses.replace(model, **{name: getattr(base.model, name) for name in OF_THE_RUN})


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run wants of a checkpoint's tokenizer."""

    categories: Sequence[str]
    x_max: int
    rules: Sequence[str] = DEFAULT_KINDS
    """Kinds of edit rule."""
    chat_template: str = DEFAULT


def take_tokenizer(wanted: Wanted, start_from: str, run: Path) -> None:
    """Writes the run's tokenizer, made of the checkpoint's,
    and copies of the checkpoint's configurations.

    Raises UserError where the tokenizer cannot be used, or has control tokens
    of another run already.
    """
    folder = _folder(start_from)
    find_tokenizer(folder, wanted).save(run / "tokenizer")
    if is_gguf(folder):
        write_whole(run / FOLDER / "config.json", json.dumps(read_config(folder), indent=1) + "\n")
        if (told := source.read(folder).content.get(GENERATION_FILE)) is not None:
            write_whole(run / FOLDER / GENERATION_FILE, told)
    for name in ("config.json", GENERATION_FILE):
        if (folder / name).is_file():
            write_whole(run / FOLDER / name, (folder / name).read_bytes())


def find_tokenizer(folder: Path, wanted: Wanted) -> FamilyTokenizer:
    """The tokenizer of a checkpoint folder, which gets control tokens unless it has the right ones.

    Raises UserError where it has others or another chat template,
    or does not fit the checkpoint's embedding.
    """
    rows = config_from_hf(read_config(folder)).vocab_size
    kinds = tuple(wanted.rules)
    if not (folder / META_FILE).is_file():
        return import_tokenizer(
            folder, wanted.categories, wanted.x_max, rows, wanted.chat_template, kinds=kinds
        )
    tokenizer = FamilyTokenizer(files := read(folder))
    held = meta(files).template
    if wanted.chat_template not in (DEFAULT, held):
        raise UserError(
            f"{folder}: was imported with the chat template {held!r}, --chat_template is "
            f"{wanted.chat_template!r}; import the original again with that one, or leave the "
            "option out"
        )
    there = tokenizer.controls
    here = (tuple(wanted.categories), wanted.x_max, kinds)
    if (there.categories, there.x_max, there.kinds) != here:
        raise UserError(
            f"{folder}: has control tokens for {', '.join(there.categories)} and x_max "
            f"{there.x_max} ({', '.join(there.kinds)}), expected {', '.join(wanted.categories)} "
            f"and x_max {wanted.x_max} ({', '.join(kinds)}); set --data.x_max, or take the "
            "checkpoint without them"
        )
    if tokenizer.vocab_size != rows:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, but vocab_size is {rows} in "
            "config.json; `rlbf import --categories` writes a folder in which they agree"
        )
    return tokenizer


def params_of(
    start_from: str,
    model: ModelConfig,
    tokenizer: FamilyTokenizer,
    seed: int,
    mesh: Mesh,
    noted: str | None,
) -> dict:
    """The checkpoint's parameters on `mesh`, with new rows for control tokens that it did not have.

    Args:
      model: says dtype and scanning.
      seed: decides the new rows.
      noted: digest of the folder when the run's tokenizer was made.

    Raises UserError where the folder is gone or no longer what it was.
    """
    folder = _folder(start_from)
    if digest(folder) != noted:
        raise UserError(
            f"start_from: {folder} is not what it was when this run's data was made (config.json "
            "or the weight files have changed); put the checkpoint back, or choose another "
            "--workdir"
        )
    rows = config_from_hf(read_config(folder)).vocab_size
    fresh = not (folder / META_FILE).is_file()
    new = rows_of(tokenizer, rows, seed, str(folder)) if fresh else None
    return read_checkpoint(
        folder, mesh, dtype=model.param_dtype, scan_layers=model.scan_layers, new=new
    )[1]


def digest(folder: Path) -> str:
    """SHA-256 (hex) of config.json and of every weight file's name, size,
    header and `PIECES` pieces of its numbers.

    The whole of a small file; a change of a large one that no piece meets goes unnoticed,
    other training does not.
    """
    read_config(folder)
    single = is_gguf(folder)
    found = hashlib.sha256(b"" if single else (folder / "config.json").read_bytes())
    for path in [folder] if single else sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            header = PIECE if single else 8 + int.from_bytes(file.read(8), "little")
            header = min(size, header)
            file.seek(0)
            found.update(file.read(header))
            # Evenly from the first number to the last.
            room = max(0, size - header - PIECE)
            for at in sorted({header + room * i // (PIECES - 1) for i in range(PIECES)}):
                file.seek(at)
                found.update(file.read(PIECE))
    return found.hexdigest()


def _folder(start_from: str) -> Path:
    folder = Path(start_from)
    if is_gguf(folder) and folder.is_file():
        return folder
    if not (folder / "config.json").is_file():
        raise UserError(
            f"start_from: {folder} holds no config.json; expected a GGUF file, or a checkpoint "
            "folder as published, or as `rlbf import` or `rlbf export` wrote it"
        )
    return folder
