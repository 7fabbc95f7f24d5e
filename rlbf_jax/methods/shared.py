"""Stages that many papers share: tokenizer, data sets, the base model, supervised training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import cast

from rlbf_jax.data.builders.bsafe_plus import build_bsafe_plus, build_refusal
from rlbf_jax.data.builders.checks import check_bsafe_plus, check_pretraining
from rlbf_jax.data.builders.examples import Built, build_pretraining
from rlbf_jax.data.builders.injection import BsafePlusConfig, InjectedIds, build_injected
from rlbf_jax.data.sources.files import table_digest
from rlbf_jax.directives import EditRule, Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.models.config import LoraConfig, ModelConfig
from rlbf_jax.models.lora import split
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.plain import DECIDES_NOTHING, PATH
from rlbf_jax.runs import start
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.run import BASE, TOKENIZER, Run, data_stage
from rlbf_jax.runs.shapes import check_precision, check_rows, check_rows_suffice, check_width
from rlbf_jax.runs.stage import Stage
from rlbf_jax.tokenizers import FamilyTokenizer, train_tokenizer
from rlbf_jax.training.learner import Learner
from rlbf_jax.training.optimizer import make_optimizer
from rlbf_jax.training.supervised import (
    PackedRows,
    SupervisedConfig,
    supervised_objective,
    train,
)

PRETRAINING = "pretraining"
TOKENIZER_DOCUMENTS = 12_000
"""Most documents that the tokenizer is trained on."""
EXAMPLES = {"bsafe_plus": "sft_examples"}
"""Option that says how large a data set is, where it is not DATASET_examples."""
PLAIN = (PRETRAINING, "refusal")
"""Data sets without directives."""


def foundation(e: Experiment) -> list[Stage]:
    """Tokenizer, pretraining data and the base model;
    of a published checkpoint its tokenizer and model alone."""
    base = e.base
    tokenizer = Stage(
        TOKENIZER,
        make_tokenizer,
        TokenizerStage(base.start_from, base.chat_template, e.rules),
        prepares=True,
    )
    data = Stage(
        data_stage(PRETRAINING), make_pretraining, NoSettings(), (TOKENIZER,), prepares=True
    )
    before = (TOKENIZER,) if base.start_from else (TOKENIZER, data.name)
    settings = BaseStage(
        dataclasses.replace(base.model, lora=LoraConfig()),
        base.pretraining,
        base.start_from,
        e.mesh,
        e.rule,
        e.semantics,
    )
    model = Stage(
        BASE, make_base, settings, before, check_base, fit_base, evaluated=True, headline=True
    )
    return [tokenizer, *([] if base.start_from else [data]), model]


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """For stages that the run's data and seed decide alone."""


# Tokenizer ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenizerStage:
    """Where the tokenizer comes from; the run's data say the rest."""

    start_from: str = dataclasses.field(metadata=PATH)
    chat_template: str
    rules: tuple[str, ...]


def make_tokenizer(run: Run, config: TokenizerStage) -> None:
    """Trains the tokenizer on pretraining documents, or takes that of the checkpoint
    that the run starts from."""
    data = run.data
    if config.start_from:
        start.take_tokenizer(
            start.Wanted(run.world.categories, data.x_max, config.rules, config.chat_template),
            config.start_from,
            run.folder,
        )
        run.note_data("start_from", start.digest(Path(config.start_from)))
    else:
        rng = run.rng(TOKENIZER)
        count = min(data.pretraining_examples, TOKENIZER_DOCUMENTS)
        documents = [run.world.document(rng) for _ in range(count)]
        texts = [text for d in documents for text in (d.prompt.text, d.response)]
        try:
            tokenizer = train_tokenizer(
                texts, data.vocab_size, run.world.categories, data.x_max, kinds=config.rules
            )
        except ValueError as error:
            raise UserError(f"data: {error}") from error
        tokenizer.save(run.folder / TOKENIZER)
    run.note_data(TOKENIZER, run.tokenizer.digest())
    if data.path:
        run.note_data("file", table_digest(Path(data.path)))


# Data sets ----------------------------------------------------------------------------------------


def make_pretraining(run: Run, config: NoSettings) -> None:
    """Documents with violations mixed in: without them there would be nothing to take back."""
    data = run.data

    def build() -> Built:
        check_pretraining(run.world, run.tokenizer, data.row_length)
        return build_pretraining(
            run.world,
            run.tokenizer,
            run.rng(PRETRAINING),
            data.pretraining_examples,
            data.row_length,
        )

    build_dataset(run, PRETRAINING, build)


def build_dataset(run: Run, name: str, build: Callable[[], Built]) -> None:
    """Builds a data set and writes it. Raises UserError where text and settings do not fit."""
    try:
        examples, report = build()
    except ValueError as error:  # InputError is one
        raise UserError(f"data: {name}: {error}") from error
    run.write_dataset(name, examples, report)


@dataclasses.dataclass(frozen=True)
class BsafePlusStage:
    """A data set of safe answers with injected violations and what takes them back,
    or one of refusals."""

    bsafe_plus: BsafePlusConfig
    examples: int


def bsafe_plus_data(config: BsafePlusConfig, examples: int) -> Stage:
    """BSAFE+: the data set `bsafe_plus`."""
    settings = BsafePlusStage(config, examples)
    return Stage(data_stage("bsafe_plus"), make_bsafe_plus, settings, (TOKENIZER,), prepares=True)


def make_bsafe_plus(run: Run, config: BsafePlusStage) -> None:
    def build() -> Built:
        check_bsafe_plus(run.world, run.tokenizer, config.bsafe_plus)
        return build_bsafe_plus(
            run.world, run.tokenizer, run.rng("bsafe_plus"), config.bsafe_plus, config.examples
        )

    build_dataset(run, "bsafe_plus", build)


@dataclasses.dataclass(frozen=True)
class InjectedStage:
    """A data set of injected violations and what takes them back under a rule."""

    injection: BsafePlusConfig
    examples: int
    rule: str


def injected_data(
    name: str,
    make: Callable[[Run, InjectedStage], None],
    injection: BsafePlusConfig,
    examples: int,
    rule: str,
) -> Stage:
    """A data set of a paper's own, made by `make`."""
    settings = InjectedStage(injection, examples, rule)
    return Stage(data_stage(name), make, settings, (TOKENIZER,), prepares=True)


def build_injected_dataset(
    run: Run,
    name: str,
    config: InjectedStage,
    take_back: Callable[[EditRule, InjectedIds], list[int]],
) -> None:
    """Builds a data set of injected violations, each taken back by `take_back` under the stage's
    rule, and of plain examples, and writes it."""

    def build() -> Built:
        return build_injected(
            run.world,
            run.tokenizer,
            run.rng(name),
            config.injection,
            config.examples,
            functools.partial(take_back, run.rule(config.rule)),
        )

    build_dataset(run, name, build)


def refusal_data(config: BsafePlusConfig, examples: int) -> Stage:
    """The refusal baseline's data set, with the shares of BSAFE+."""
    settings = BsafePlusStage(config, examples)
    return Stage(data_stage("refusal"), make_refusal, settings, (TOKENIZER,), prepares=True)


def make_refusal(run: Run, config: BsafePlusStage) -> None:
    def build() -> Built:
        return build_refusal(
            run.world, run.tokenizer, run.rng("refusal"), config.bsafe_plus, config.examples
        )

    build_dataset(run, "refusal", build)


# Base ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BaseStage:
    """The first model."""

    model: ModelConfig
    pretraining: SupervisedConfig
    start_from: str = dataclasses.field(metadata=PATH)
    mesh: MeshConfig
    # No text of pretraining holds a directive, so all rules and both semantics read it alike.
    rule: str = dataclasses.field(metadata=DECIDES_NOTHING)
    semantics: Semantics = dataclasses.field(metadata=DECIDES_NOTHING)


def check_base(run: Run, config: BaseStage) -> None:
    check_width("data.row_length", run.data.row_length, run.base_model)
    if not config.start_from:
        check_precision(config.model, LoraConfig())
        batch = config.pretraining
        check_rows("pretraining.batch_size", batch.batch_size, run.mesh, batch.accumulate)


def fit_base(run: Run, config: BaseStage) -> None:
    if not config.start_from:
        check_rows_suffice(
            "pretraining.batch_size",
            config.pretraining.batch_size,
            PRETRAINING,
            run.rows_of(PRETRAINING),
            "data.pretraining_examples",
        )


def make_base(run: Run, config: BaseStage) -> None:
    """Pretraining, or a checkpoint as it is."""
    if config.start_from:
        tokenizer = cast(FamilyTokenizer, run.tokenizer)
        noted = run.noted_data("start_from")
        made = start.params_of(
            config.start_from, config.model, tokenizer, run.seed, run.mesh, noted
        )
        run.keep(run.model, made)
        return
    supervised, rule = config.pretraining, run.rule(config.rule)
    weight = supervised.directive_weight
    objective = supervised_objective(run.model, rule, config.semantics, weight)
    loop = run.loop(supervised.steps, supervised.checkpoint_every, supervised.keep_checkpoints)
    optimizer = make_optimizer(supervised.optimizer, supervised.steps, name=loop.name)
    learner = Learner(objective, optimizer, run.initial_params, run.mesh, supervised.accumulate)
    batches = PackedRows(run.batches(PRETRAINING, supervised.batch_size))
    run.keep(run.model, train(learner, batches, loop))


# Supervised training ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SupervisedStage:
    """Supervised training of an earlier stage's model on one data set."""

    training: SupervisedConfig
    flag: str = dataclasses.field(metadata=DECIDES_NOTHING)
    """Option that `training` comes from, for messages."""
    dataset: str
    examples: str = dataclasses.field(metadata=DECIDES_NOTHING)
    """Option that says how large the data set is, for messages."""
    start: str
    """Stage whose model is trained."""
    lora: LoraConfig
    rule: str
    semantics: Semantics
    mesh: MeshConfig


def supervised_stage(
    e: Experiment,
    name: str,
    training: SupervisedConfig,
    dataset: str,
    start: str = BASE,
    headline: bool = False,
) -> Stage:
    """A stage that trains on a data set of packed rows, from the model of stage `start`."""
    settings = SupervisedStage(
        training,
        name,
        dataset,
        EXAMPLES.get(dataset, f"{dataset}_examples"),
        start,
        e.base.model.lora,
        e.rule,
        e.semantics,
        e.mesh,
    )
    return Stage(
        name,
        train_supervised,
        settings,
        tuple(dict.fromkeys((TOKENIZER, data_stage(dataset), BASE, start))),
        check_supervised,
        fit_supervised,
        evaluated=True,
        retracts=dataset not in PLAIN,
        headline=headline,
    )


def check_supervised(run: Run, config: SupervisedStage) -> None:
    check_precision(run.base_model, config.lora)
    batch = config.training
    check_rows(f"{config.flag}.batch_size", batch.batch_size, run.mesh, batch.accumulate)


def fit_supervised(run: Run, config: SupervisedStage) -> None:
    check_rows_suffice(
        f"{config.flag}.batch_size",
        config.training.batch_size,
        config.dataset,
        run.rows_of(config.dataset),
        config.examples,
    )


def train_supervised(run: Run, config: SupervisedStage) -> None:
    """Negative log-likelihood of the ids in the loss, read under the rule's lifetimes."""
    rule = run.rule(config.rule)
    model = run.tuned(config.lora, rule)
    trained, frozen = split(run.trainable(config.start, config.lora, rule))
    supervised = config.training
    weight = supervised.directive_weight
    objective = supervised_objective(model, rule, config.semantics, weight)
    loop = run.loop(supervised.steps, supervised.checkpoint_every, supervised.keep_checkpoints)
    optimizer = make_optimizer(supervised.optimizer, supervised.steps, name=loop.name)
    learner = Learner(objective, optimizer, trained, run.mesh, supervised.accumulate, frozen)
    del trained  # the learner's alone from now on: its updates use the buffers up
    batches = PackedRows(run.batches(config.dataset, supervised.batch_size))
    run.keep(model, train(learner, batches, loop))
