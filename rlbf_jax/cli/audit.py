"""`rlbf critic | audit`: a critic trained on labelled texts; what any critic is worth on them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.critics.classifiers.classifier import ClassifierCritic, VerdictConfig, load_critic
from rlbf_jax.critics.language.http_critic import HttpCriticConfig
from rlbf_jax.data.sources.labelled import LabelledColumns, LabelledTexts, read_labelled
from rlbf_jax.errors import UserError
from rlbf_jax.storage import file_digest, write_whole

File = tyro.conf.Positional[Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")]]


@dataclasses.dataclass(frozen=True)
class TrainCritic:
    """Train a classifier as a critic on labelled texts.

    It is trained once for each fold on the other folds, which says how good it is on texts that it
    has not seen (audit.json, audit.md), then on all texts.
    """

    file: File
    """.csv with a header, or .jsonl with one object a line."""
    out: pathlib.Path
    """Folder to write."""
    folds: int = 5
    """Of the cross-validation; 0: none, and no audit."""
    quarantine: pathlib.Path | None = None
    """JSONL file for malformed rows, which otherwise are refused."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """Measure a critic on labelled texts: accuracy, ranking, calibration, spans, bias by group."""

    file: File
    """.csv with a header, or .jsonl with one object a line."""
    critic: str
    """A folder that `rlbf critic` wrote, or that of a model (RUN/stages/STAGE, or a checkpoint),
    which is asked in the format of --endpoint.format; or a name of `critics.registry.CRITICS`, as
    toy_lexicon; or `http` (a chat model, see --endpoint.base_url)."""
    out: pathlib.Path = pathlib.Path("audit")
    """Folder for audit.json and audit.md."""
    seed: int = 0
    """Of the bootstrap."""
    quarantine: pathlib.Path | None = None
    """JSONL file for malformed rows, which otherwise are refused."""


def train_critic(argv: Sequence[str]) -> None:
    from rlbf_jax.critics.classifiers.classifier_training import (
        ClassifierTrainingConfig,
        train_classifier,
    )

    kinds = {
        "columns": LabelledColumns,
        "verdicts": VerdictConfig,
        "training": ClassifierTrainingConfig,
    }
    parsed = _parse("critic", TrainCritic, kinds, argv)
    args: TrainCritic = parsed.args
    if args.folds != 0 and args.folds < 2:
        raise UserError(f"--folds is {args.folds}, expected 0 (none) or at least 2")
    with arguments.quarantine_offered():
        labelled = read_labelled(args.file, parsed.columns, args.quarantine)
    if args.folds:
        result = _cross_validate(labelled, parsed.training, parsed.verdicts, args.folds)
        _write(args.out, result, args.file, parsed.columns)
    began = time.perf_counter()
    classifier = train_classifier(
        labelled.texts, labelled.labels, labelled.categories, parsed.training
    )
    classifier.save(args.out)
    seconds = time.perf_counter() - began
    print(
        f"{args.out}: classifier {classifier.digest[:8]} of {', '.join(classifier.categories)}, "
        f"{seconds:.1f} s"
    )


def _cross_validate(
    labelled: LabelledTexts, training, verdicts: VerdictConfig, folds: int
) -> dict[str, Any]:
    from rlbf_jax.critics.classifiers.classifier_training import cross_validate
    from rlbf_jax.evaluation.audit import audit, join_folds, judge_texts

    parts = []
    for fold in cross_validate(
        labelled.texts, labelled.labels, labelled.categories, training, folds
    ):
        texts = [labelled.texts[i] for i in fold.held_out.tolist()]
        parts.append(
            (fold.held_out, judge_texts(ClassifierCritic(fold.classifier, verdicts), texts))
        )
        print(
            f"fold {len(parts)} of {folds}: {len(texts)} texts held out, trained in "
            f"{fold.seconds:.1f} s",
            flush=True,
        )
    joined = join_folds(parts, f"classifier, {folds}-fold cross-validation")
    return audit(labelled, joined, seed=training.seed)


def audit_critic(argv: Sequence[str]) -> None:
    kinds = {"columns": LabelledColumns, "verdicts": VerdictConfig, "endpoint": HttpCriticConfig}
    parsed = _parse("audit", Audit, kinds, argv)
    args: Audit = parsed.args
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, expected 0 or more")
    from rlbf_jax.evaluation.audit import audit, judge_texts

    with arguments.quarantine_offered():
        labelled = read_labelled(args.file, parsed.columns, args.quarantine)
    critic = _critic(args, parsed.verdicts, parsed.endpoint, labelled.categories)
    result = audit(labelled, judge_texts(critic, labelled.texts), seed=args.seed)
    _write(args.out, result, args.file, parsed.columns)


def _critic(args: Audit, verdicts: VerdictConfig, endpoint: HttpCriticConfig, categories):
    from rlbf_jax.critics.registry import CRITICS, critic_named

    if args.critic in CRITICS:
        from rlbf_jax.data.worlds.toy_world import ToyWorld, ToyWorldConfig

        try:
            return critic_named(args.critic, ToyWorld(ToyWorldConfig()))
        except ValueError as error:
            raise UserError(f"--critic: {error}") from error
    if args.critic == "http":
        from rlbf_jax.critics.language.http_critic import HttpCritic

        if not endpoint.base_url:
            raise UserError("--critic http needs --endpoint.base_url and --endpoint.model")
        return HttpCritic(endpoint, categories, args.out / "answers.jsonl", option="endpoint")
    folder = pathlib.Path(args.critic)
    if not folder.is_dir():
        names = ", ".join(CRITICS)
        close = difflib.get_close_matches(args.critic, [*CRITICS, "http"], n=1)
        near = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"--critic {args.critic}: no such folder{near}; expected one of `rlbf critic` or of a "
            f"model, {names} or http"
        )
    from rlbf_jax.runs.model_critic import is_model, model_critic

    if is_model(folder):
        return model_critic(folder, endpoint, categories, "--critic", "endpoint")
    return load_critic(folder, verdicts)


def _parse(command: str, kind: type, nested: dict[str, type], argv: Sequence[str]) -> Any:
    """Arguments of a command: those of `kind` and of the file's columns without a prefix, the
    others below one."""
    fields: list[Any] = [("args", Annotated[kind, tyro.conf.arg(name="")])]
    for name, each in nested.items():
        plain = name == "columns"
        typed: Any = Annotated[each, tyro.conf.arg(name="")] if plain else each
        fields.append((name, typed, dataclasses.field(default_factory=each)))
    try:
        return arguments.parse(
            dataclasses.make_dataclass("Args", fields, frozen=True),
            f"rlbf {command}",
            argv,
            kind.__doc__,
        )
    except ValueError as error:  # a part that checks its own values
        raise UserError(f"rlbf {command}: {error}") from error


def _write(
    out: pathlib.Path, result: dict[str, Any], file: pathlib.Path, columns: LabelledColumns
) -> None:
    from rlbf_jax.evaluation.audit import audit_table

    described = {
        "file": file.name,
        "file_sha256": file_digest(file),
        "columns": dataclasses.asdict(columns),
    }
    content = json.dumps(described | result, indent=1, ensure_ascii=False)
    write_whole(out / "audit.json", content + "\n")
    table = audit_table(result)
    write_whole(out / "audit.md", table)
    print(table)
    print(f"audit: {out / 'audit.md'}")
