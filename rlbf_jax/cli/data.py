"""`rlbf data tokenizer | build`: data sets from a user's own texts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.errors import UserError

USAGE = """usage: rlbf data tokenizer | build ...

  tokenizer   train a tokenizer on text files
  build       build BSAFE+ from a file of prompts and responses
"""


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Train a lossless SentencePiece vocabulary with control ids on text files."""

    files: tyro.conf.Positional[
        Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="FILE ...")]
    ]
    """UTF-8 text, .csv, .jsonl or .parquet files (of the last three, prompts and responses are
    read)."""
    out: pathlib.Path
    """Folder to write."""
    vocab_size: int = 2048
    """Pieces, control ids not counted."""
    categories: str = "insult,privacy,potion,gamble"
    """Kinds of violation, separated by commas."""
    x_max: int = 32
    """Largest X of [BACKTRACK_BY_X]."""
    rules: str = "backtrack,reset"
    """Edit rules to add control tokens of, separated by commas: backtrack, reset, replace."""


@dataclasses.dataclass(frozen=True)
class BuildData:
    """Build BSAFE+ from a file of prompts and responses:
    violations in, directives that take them back.

    Violations come from templates, or from a chat model (`--injector.base_url`), whose answers are
    kept in
    OUT.answers.jsonl: a build that is killed and started again asks for none of them twice.
    """

    file: tyro.conf.Positional[Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")]]
    """.csv with a header, .jsonl with one object a line, or .parquet."""
    tokenizer: pathlib.Path
    """Folder that `rlbf data tokenizer` wrote."""
    out: pathlib.Path
    """Folder for the data set (array_record)."""
    num_examples: int = 1000
    """Examples to make."""
    seed: int = 0
    """Same seed, same data set."""
    prompt_column: str | None = None
    """Default: the first present of instruction, prompt, question."""
    response_column: str | None = None
    """Default: the first present of response, answer, output."""
    context_column: str | None = None
    """Its texts stand behind the prompts; default: prompts stand alone."""
    quarantine: pathlib.Path | None = None
    """JSONL file for malformed rows, which otherwise are refused."""


def train_tokenizer(argv: Sequence[str]) -> None:
    args = arguments.parse(TrainTokenizer, "rlbf data tokenizer", argv)
    if not args.files:
        raise UserError("data tokenizer needs at least one text file")
    from rlbf_jax import tokenizers

    texts = [text for file in args.files for text in _texts(file)]
    try:
        tokenizer = tokenizers.train_tokenizer(
            texts,
            args.vocab_size,
            arguments.names(args.categories),
            args.x_max,
            kinds=arguments.names(args.rules),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    tokenizer.save(args.out)
    print(
        f"{args.out}: {tokenizer.vocab_size} ids, {len(tokenizer.controls.ids)} of them control ids"
    )


def _texts(file: pathlib.Path) -> list[str]:
    """Texts of a file: both columns of a prompt/response file, otherwise the whole file."""
    if file.suffix.lower() in (".csv", ".jsonl", ".parquet"):
        from rlbf_jax.data.sources.files import read_rows

        return [text for row in read_rows(file) for text in (row.prompt, row.response)]
    try:
        return [file.read_text(encoding="utf-8")]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: byte {error.start} is not UTF-8; convert the file to UTF-8"
        ) from error


def build_data(argv: Sequence[str]) -> None:
    from rlbf_jax.data import datasets, packing
    from rlbf_jax.data.builders import checks as build_checks
    from rlbf_jax.data.builders.injection import BsafePlusConfig
    from rlbf_jax.data.builders.injectors import TemplateInjector
    from rlbf_jax.data.builders.language_model_injector import InjectorConfig
    from rlbf_jax.data.sources import files
    from rlbf_jax.data.worlds import user_world
    from rlbf_jax.tokenizers import load_tokenizer

    fields: list[Any] = [
        ("args", Annotated[BuildData, tyro.conf.arg(name="")]),
        ("bsafe", BsafePlusConfig, dataclasses.field(default_factory=BsafePlusConfig)),
        ("injector", InjectorConfig, dataclasses.field(default_factory=InjectorConfig)),
    ]
    made = dataclasses.make_dataclass("Build", fields, frozen=True)
    try:
        parsed = arguments.parse(made, "rlbf data build", argv, BuildData.__doc__)
        args: BuildData = parsed.args
        tokenizer = load_tokenizer(args.tokenizer)
        columns = (args.prompt_column, args.response_column, args.context_column)
        with arguments.quarantine_offered():
            rows = files.read_rows(args.file, *columns, quarantine=args.quarantine)
        world = user_world.UserWorld(
            rows, TemplateInjector(tokenizer.controls.categories), seed=args.seed
        )
        build_checks.check_bsafe_plus(world, tokenizer, parsed.bsafe)
        datasets.check_writable(args.out)
        examples, report = _examples(world, tokenizer, args, parsed.bsafe, parsed.injector)
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # TFDS reports on stdout, which is for our one JSON object
            digest = datasets.write_dataset(
                args.out, packing.pack(examples, parsed.bsafe.max_tokens)
            )
    except ValueError as error:  # DataError is one
        raise UserError(str(error)) from error
    print(json.dumps({"out": str(args.out), "sha256": digest, **report}, indent=1))


def _examples(
    world, tokenizer, args: BuildData, bsafe, injector
) -> tuple[list[Any], dict[str, Any]]:
    """Examples, and what is reported of them."""
    import numpy as np

    from rlbf_jax.data.builders import bsafe_plus, language_model_injector
    from rlbf_jax.endpoints.client import EndpointClient
    from rlbf_jax.endpoints.journal import AnswerJournal

    if not injector.base_url:
        rng = np.random.default_rng(args.seed)
        examples, counts = bsafe_plus.build_bsafe_plus(
            world, tokenizer, rng, bsafe, args.num_examples
        )
        return examples, dataclasses.asdict(counts)
    journal = AnswerJournal(args.out.with_name(args.out.name + ".answers.jsonl"))
    client = EndpointClient(injector, journal)
    model = language_model_injector.LanguageModelInjector(client, world.categories, injector)
    examples, counts = language_model_injector.build_bsafe_plus_by_model(
        world, tokenizer, args.seed, bsafe, args.num_examples, model
    )
    asked = {"answers": dict(sorted(model.reasons.items())), "requests_sent": client.requests_sent,
             "tokens_paid": client.tokens_paid, "journal": str(journal.path)}  # fmt: skip
    return examples, dataclasses.asdict(counts) | {"injector": asked}


def data(argv: Sequence[str]) -> None:
    """`rlbf data tokenizer | build`."""
    from rlbf_jax.cli.main import dispatch

    dispatch({"tokenizer": train_tokenizer, "build": build_data}, "rlbf data", USAGE, argv)
