"""`rlbf import | export`: published checkpoints in, and out again."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro

from rlbf_jax import arguments
from rlbf_jax.errors import UserError
from rlbf_jax.storage import sync_tree

Folder = tyro.conf.Positional[pathlib.Path]

CONTROLS = "rlbf_controls.json"
"""Marks the files of a published tokenizer that has control tokens."""
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "generation_config.json", CONTROLS,
)  # fmt: skip
"""Patterns of the files beside weights and configuration that belong to a checkpoint."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Import:
    """Read a Hugging Face checkpoint (config.json, safetensors, tokenizer files), check every tensor, and keep it in
    one form: the same format, our order, one dtype."""

    source: Annotated[Folder, tyro.conf.arg(metavar="DIR")]
    """The checkpoint's folder."""
    out: Annotated[Folder, tyro.conf.arg(metavar="OUT")]
    """Folder to make."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the parameters."""
    shard_gb: float = 5.0
    """Most gigabytes (10^9 bytes) of one safetensors file."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model as a Hugging Face checkpoint: config.json, safetensors, and its tokenizer files."""

    model: Annotated[Folder, tyro.conf.arg(metavar="CKPT")]
    """A finished stage of a run (RUN/stages/sft), or what `rlbf import` wrote."""
    out: Annotated[Folder, tyro.conf.arg(metavar="DIR")]
    """Folder to make."""
    shard_gb: float = 5.0
    """Most gigabytes (10^9 bytes) of one safetensors file."""


def import_model(argv: Sequence[str]) -> None:
    """`rlbf import DIR OUT`."""
    args: Import = arguments.parse(Import, "rlbf import", argv)
    from rlbf_jax.models.weights.read import read_checkpoint

    dtype = None if args.dtype == "stored" else args.dtype
    _write(args.source, args.out, args.shard_gb, lambda: read_checkpoint(args.source, dtype=dtype))


def export_model(argv: Sequence[str]) -> None:
    """`rlbf export CKPT DIR`."""
    args: Export = arguments.parse(Export, "rlbf export", argv)
    from rlbf_jax.training.model_folder import load_model

    _write(args.model, args.out, args.shard_gb, lambda: load_model(args.model))


def _write(source: pathlib.Path, out: pathlib.Path, shard_gb: float, read: Callable[[], tuple[Any, Any]]) -> None:
    """Writes what `read` reads from `source` to `out`, with the tokenizer files of `source`; whole or not at all."""
    if not shard_gb > 0:
        raise UserError(f"--shard_gb is {shard_gb}, expected more than 0")
    if out.exists():
        raise UserError(f"{out}: is there already; choose another folder, or delete it")
    import jax

    from rlbf_jax.models.weights.read import read_config
    from rlbf_jax.models.weights.write import write_checkpoint

    config, params = read()
    told = read_config(source) if (source / "config.json").is_file() else {}
    extra = {name: told[name] for name in TOKEN_IDS if name in told}
    with _Whole(out) as partial:
        copy_tokenizer(source, partial)
        write_checkpoint(partial, config, params, extra, int(shard_gb * 1e9))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{out}: {config.family}, {count:,} parameters in {config.param_dtype}")


def copy_tokenizer(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies the tokenizer files of a checkpoint folder, or of the run that a stage's folder is in, as they are.

    A vocabulary that a run trained itself stays behind: under the same file names it has another format.
    """
    run = source.parent.parent / "tokenizer"
    folder = run if (source / "model").is_dir() and (run / CONTROLS).is_file() else source
    for file in sorted(folder.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in TOKENIZER_FILES):
            shutil.copyfile(file, out / file.name)


class _Whole:
    """A folder that takes its name when it is finished; left unfinished, it goes away."""

    def __init__(self, out: pathlib.Path):
        self.out = out
        self.partial = out.with_name(f"{out.name}.{os.getpid()}.partial")

    def __enter__(self) -> pathlib.Path:
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            sync_tree(self.partial)
            os.rename(self.partial, self.out)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
