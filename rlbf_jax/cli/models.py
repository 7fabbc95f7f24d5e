"""`rlbf import | export`: published checkpoints in, and out again."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.errors import UserError
from rlbf_jax.storage import sync_tree

Folder = tyro.conf.Positional[pathlib.Path]

CONTROLS = "rlbf_controls.json"
"""Marks the files of a published tokenizer that has control tokens."""
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "generation_config.json", CONTROLS, "rlbf_policy.json",
)  # fmt: skip
"""Patterns of the files beside weights and configuration that belong to a checkpoint."""
RECIPE = "custom_generate"
DEFAULT_RULES = "backtrack,reset"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Import:
    """Read a Hugging Face checkpoint (config.json, safetensors, tokenizer files) or a GGUF file,
    check every tensor, and keep it in one form: the former's format, our order, one dtype."""

    source: Annotated[Folder, tyro.conf.arg(metavar="CKPT")]
    """The checkpoint's folder, or a GGUF file, whose weights are dequantized."""
    out: Annotated[Folder, tyro.conf.arg(metavar="OUT")]
    """Folder to make."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Of the parameters."""
    shard_gb: float = 5.0
    """Most gigabytes (10^9 bytes) of one safetensors file."""
    categories: str = ""
    """Kinds of violation, separated by commas: adds control tokens,
    and rows of the embedding for them."""
    x_max: int = 40
    """Largest X of [BACKTRACK_BY_X], with --categories."""
    rules: str = DEFAULT_RULES
    """Edit rules to add control tokens of, with --categories, separated by commas:
    backtrack, reset, replace."""
    chat_template: str = "default"
    """Name of the chat template to keep, where the checkpoint has several, with --categories."""
    seed: int = 0
    """Of the new rows, with --categories."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model as a Hugging Face checkpoint: config.json, safetensors, and its tokenizer
    files. A stage of a run with semantics keep also gets custom_generate/, with which transformers
    edits answers as we do."""

    model: Annotated[Folder, tyro.conf.arg(metavar="CKPT")]
    """A finished stage of a run (RUN/stages/sft), or what `rlbf import` wrote."""
    out: Annotated[Folder, tyro.conf.arg(metavar="DIR")]
    """Folder to make."""
    shard_gb: float = 5.0
    """Most gigabytes (10^9 bytes) of one safetensors file."""
    max_tokens: int = 1024
    """Most ids of an answer in custom_generate/; rollouts of training are shorter."""


def import_model(argv: Sequence[str]) -> None:
    """`rlbf import CKPT OUT`."""
    args: Import = arguments.parse(Import, "rlbf import", argv)
    if args.chat_template != "default" and not args.categories:
        raise UserError(
            "--chat_template chooses for a tokenizer with control tokens; give --categories with it"
        )
    if args.rules != DEFAULT_RULES and not args.categories:
        raise UserError("--rules says what control tokens are of; give --categories with it")
    from rlbf_jax.models.weights.read import read_checkpoint

    dtype = None if args.dtype == "stored" else args.dtype
    with _Whole(args.out, args.shard_gb) as partial:
        if not args.categories:
            config, params = read_checkpoint(args.source, dtype=dtype)
            write_tokenizer(args.source, partial)
            told = _token_ids(args.source)
            _say_of_tokenizer(args.source, config.vocab_size)
        else:
            config, params, told = _with_controls(args, partial)
        _write(args.out, partial, config, params, told, args.shard_gb)


def _say_of_tokenizer(source: pathlib.Path, rows: int) -> None:
    """Opens what was copied as a run would, and says what would stop it."""
    from rlbf_jax.tokenizers import import_tokenizer

    if (source / CONTROLS).is_file():
        return
    try:
        import_tokenizer(source, ("category",), 1, rows)
    except ValueError as error:
        print(f"weights are fine, but no run can use the tokenizer: {error}")


def _with_controls(args: Import, partial: pathlib.Path) -> tuple[Any, dict, dict[str, Any]]:
    """Model, parameters and token ids with control tokens; the tokenizer files are written."""
    from rlbf_jax.models.published_config import config_from_hf
    from rlbf_jax.models.weights.read import read_checkpoint, read_config
    from rlbf_jax.models.weights.rows import rows_of
    from rlbf_jax.runs import publish
    from rlbf_jax.tokenizers import files, import_tokenizer, source

    if (args.source / CONTROLS).is_file():
        raise UserError(
            f"{args.source}: has control tokens already; leave out --categories, or import the "
            "original"
        )
    rows = config_from_hf(read_config(args.source)).vocab_size
    try:
        tokenizer = import_tokenizer(
            args.source,
            arguments.names(args.categories),
            args.x_max,
            rows,
            args.chat_template,
            kinds=arguments.names(args.rules),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    new = rows_of(tokenizer, rows, args.seed, str(args.source))
    dtype = None if args.dtype == "stored" else args.dtype
    config, params = read_checkpoint(args.source, dtype=dtype, new=new)
    tokenizer.save(partial)
    publish.write_generation(
        partial, tokenizer, source.read(args.source).json(files.GENERATION_FILE)
    )
    ids = tokenizer.new_ids
    print(
        f"{len(ids)} control tokens: ids {ids[0]}..{ids[-1]}, {tokenizer.vocab_size - rows} rows "
        "more than before"
    )
    return config, params, publish.token_fields(tokenizer)


def export_model(argv: Sequence[str]) -> None:
    """`rlbf export CKPT DIR`."""
    args: Export = arguments.parse(Export, "rlbf export", argv)
    if args.max_tokens < 1:
        raise UserError(f"--max_tokens is {args.max_tokens}, expected 1 or more")
    from rlbf_jax.models.weights.published import published_form
    from rlbf_jax.runs import publish
    from rlbf_jax.training.model_folder import load_model

    with _Whole(args.out, args.shard_gb) as partial:
        config, params = published_form(*load_model(args.model))
        if not (args.model / "model").is_dir():
            copy_tokenizer(args.model, partial)
            told, remark = _token_ids(args.model), ""
        elif run := publish.run_of(args.model):
            told, remark = (
                publish.token_fields(run.tokenizer),
                publish.write_files(partial, args.out, run, config, args.max_tokens),
            )
        else:
            told, remark = (
                {},
                f"no tokenizer: there is no run around {args.model} (RUN/manifest.json)",
            )
        _write(args.out, partial, config, params, told, args.shard_gb)
    if remark:
        print(remark)


def _write(
    out: pathlib.Path,
    partial: pathlib.Path,
    config: Any,
    params: dict,
    told: dict[str, Any],
    shard_gb: float,
) -> None:
    import jax

    from rlbf_jax.models.weights.write import write_checkpoint

    write_checkpoint(partial, config, params, told, int(shard_gb * 1e9))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{out}: {config.family}, {count:,} parameters in {config.param_dtype}")


def _token_ids(source: pathlib.Path) -> dict[str, Any]:
    """Those of the folder's config.json."""
    from rlbf_jax.models.weights.read import read_config

    told = read_config(source)
    return {name: told[name] for name in TOKEN_IDS if name in told}


def write_tokenizer(source: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the tokenizer files of a checkpoint, copied as they are or read off a GGUF file."""
    from rlbf_jax.gguf_file import is_gguf, open_gguf
    from rlbf_jax.models.config_of_gguf import config_of_gguf
    from rlbf_jax.tokenizers.of_gguf import files_of_gguf

    if not is_gguf(source):
        copy_tokenizer(source, out)
        return
    file = open_gguf(source)
    for name, content in files_of_gguf(file).items():
        (out / name).write_bytes(content)
    for remark in config_of_gguf(file).remarks:
        print(f"the file does not say, the family does: {remark}")


def copy_tokenizer(source: pathlib.Path, out: pathlib.Path) -> None:
    """Copies the tokenizer files of a checkpoint folder as they are, and any recipe it has."""
    for file in sorted(source.iterdir()):
        if file.is_file() and any(
            fnmatch.fnmatch(file.name, pattern) for pattern in TOKENIZER_FILES
        ):
            shutil.copyfile(file, out / file.name)
    if (source / RECIPE / "rlbf_rule.json").is_file():
        shutil.copytree(source / RECIPE, out / RECIPE, ignore=shutil.ignore_patterns("__pycache__"))
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", out / "README.md")


class _Whole:
    """A folder that takes its name when it is finished; left unfinished, it goes away."""

    def __init__(self, out: pathlib.Path, shard_gb: float):
        if not shard_gb > 0:
            raise UserError(f"--shard_gb is {shard_gb}, expected more than 0")
        if out.exists():
            raise UserError(f"{out}: is there already; choose another folder, or delete it")
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
