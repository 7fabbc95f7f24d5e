"""Asks a finished stage and judges its answers: the evaluation stages of a run,
and commands after it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlbf_jax.attacks.base import Attempt
from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.language.http_critic import HttpCriticConfig
from rlbf_jax.critics.seams import SeamCritic
from rlbf_jax.data.builders.examples import plain_example
from rlbf_jax.data.schema import Example
from rlbf_jax.data.world import Pool
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.intervals import Interval
from rlbf_jax.evaluation.results import Record, read_results, write_results
from rlbf_jax.evaluation.rows import EvaluationContext
from rlbf_jax.evaluation.suite import SuiteConfig, build_attempts, evaluate
from rlbf_jax.evaluation.tradeoff import control_of, with_bias
from rlbf_jax.evaluation.utility import score_rows, score_texts, utility_records
from rlbf_jax.parallel import hosts
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.plain import PATH
from rlbf_jax.progress import progress, say
from rlbf_jax.runs.critics import evaluation_judge
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.files import read_json
from rlbf_jax.runs.run import BASE, TOKENIZER, Run
from rlbf_jax.runs.shapes import check_rows, check_width
from rlbf_jax.runs.stage import Stage
from rlbf_jax.sampling.policy import Policy
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What is asked of a stage, and who judges."""

    stage: str
    method: str
    """`method` of the records."""
    evaluation: SuiteConfig
    judge_endpoint: HttpCriticConfig
    judge_model: str = dataclasses.field(metadata=PATH)
    perplexity_examples: int
    rule: str
    semantics: Semantics
    max_prompt: int
    sampling_batch: int
    mesh: MeshConfig
    retracts: bool = False
    """Whether the stage was taught directives, so that `evaluation.calibrate` is for it."""

    @classmethod
    def of(
        cls, e: Experiment, stage: str, method: str, retracts: bool = False
    ) -> EvaluationSettings:
        """As an experiment says."""
        return cls(
            stage,
            method or stage,
            e.evaluation,
            e.judge_endpoint,
            e.judge_model,
            e.perplexity_examples,
            e.rule,
            e.semantics,
            e.max_prompt,
            e.sampling_batch,
            e.mesh,
            retracts,
        )

    @property
    def calibrated(self) -> bool:
        """Whether answers are drawn under a bias that was calibrated before."""
        return self.retracts and self.evaluation.calibrate is not None


def evaluation_stages(e: Experiment, stages: Sequence[Stage]) -> list[Stage]:
    """One a stage that keeps a policy: all of them answer the same attempts."""
    made = []
    for stage in (stage for stage in stages if stage.evaluated):
        settings = EvaluationSettings.of(e, stage.name, stage.method, stage.retracts)
        before = [calibration_stage(stage.name)] if settings.calibrated else []
        after = tuple(dict.fromkeys((TOKENIZER, BASE, stage.name, *before)))
        name = f"evaluate_{stage.name}"
        made.append(Stage(name, evaluate_stage, settings, after, check_evaluation, fit_evaluation))
    return made


def calibration_stage(stage: str) -> str:
    """Name of the stage that finds another one's bias, see `tradeoff.calibration_stages`."""
    return f"calibrate_{stage}"


def calibration_file(stage: str) -> str:
    """Where it is kept in a run's folder."""
    return f"evaluation/calibration_{stage}.json"


def check_evaluation(run: Run, config: EvaluationSettings) -> None:
    check_rows("sampling_batch", config.sampling_batch, run.mesh)
    width = config.max_prompt + config.evaluation.knobs.max_tokens
    check_width("max_prompt + evaluation.knobs.max_tokens", width, run.base_model, in_blocks=False)


def fit_evaluation(run: Run, config: EvaluationSettings) -> None:
    """Raises UserError where an attack finds nothing that fits."""
    _ = Evaluator(run, config).attempts


def evaluate_stage(run: Run, config: EvaluationSettings) -> None:
    """Evaluates a finished stage under every attack; writes rows and records."""
    Evaluator(run, config).evaluate()


class Evaluator:
    """A stage of a run, what is asked of it and who judges; parts are made when first needed."""

    def __init__(self, run: Run, config: EvaluationSettings):
        self.run, self.config = run, config

    @property
    def suite(self) -> SuiteConfig:
        return self.config.evaluation

    @functools.cached_property
    def policy(self) -> Policy:
        """Raises UserError if the stage is not finished."""
        return self.run.policy(self.config.stage, self.config.rule, self.config.semantics)

    @functools.cached_property
    def attempts(self) -> list[Attempt]:
        """Raises UserError where an attack does not fit."""
        try:
            return build_attempts(self.run.world, self.run.tokenizer, self.suite)
        except ValueError as error:
            raise UserError(
                f"evaluation: {error} (options of --evaluation, as --evaluation.knobs.max_tokens)"
            ) from error

    @functools.cached_property
    def judge(self) -> Critic:
        """Judge of evaluations, another object than the critic of training."""
        run, config = self.run, self.config
        return evaluation_judge(
            config.judge_endpoint,
            config.judge_model,
            run.world.categories,
            lambda: run.setting.judge(run, config.perplexity_examples),
            run.folder,
        )

    @functools.cached_property
    def seams(self) -> SeamCritic:
        """The setting's critic of seams, whoever judges: a judge is asked about violations."""
        return self.run.setting.seams(self.run)

    def sampler(self) -> Sampler:
        """Every stage of a run samples with one shape, so one program serves them all."""
        config, mesh = self.config, self.run.mesh
        room = config.evaluation.knobs.max_tokens
        shapes = SamplerConfig(
            semantics=config.semantics,
            batch_size=config.sampling_batch,
            min_context=config.max_prompt,
            min_room=room,
        )
        return self.policy.sampler(shapes, mesh)

    def sampling(self, label: str) -> Callable[[Sequence[Request]], list[Generation]]:
        """A function that samples requests with the evaluation's key
        and a progress bar of this label, under the calibrated bias where there is one: it is the
        policy's, so no request shows it."""
        key = jax.random.key(self.suite.seed)
        sampler, params, bias = self.sampler(), self.policy.params, self.bias
        control = control_of(self.policy.rule)

        def sample(requests: Sequence[Request]) -> list[Generation]:
            moved = (
                [with_bias(request, bias, control) for request in requests] if bias else requests
            )
            with progress(len(requests), label) as bar:
                return sampler(params, moved, key, progress=bar.update)

        return sample

    @functools.cached_property
    def bias(self) -> float:
        """On the logits of the ids that begin a directive: the calibrated one, or 0.

        Raises UserError where it should have been found and was not."""
        if not self.config.calibrated:
            return 0.0
        stage = self.config.stage
        path = self.run.folder / calibration_file(stage)
        found = read_json(path).get("bias")
        if not isinstance(found, int | float):
            marker = self.run.folder / "done" / calibration_stage(stage)
            raise UserError(
                f"{path}: no calibrated bias; delete {marker}, then `rlbf run` finds it"
            )
        return float(found)

    def context(self, benchmark: str | None = None, data: Pool | None = None) -> EvaluationContext:
        """Whose answers an evaluation's are; None: as the configured suite says."""
        config = self.config
        return EvaluationContext(
            method=config.method,
            stage=config.stage,
            semantics=config.semantics,
            seed=self.run.seed,
            data=data or self.suite.pool,
            benchmark=benchmark or self.suite.benchmark,
            critic=self.run.notes(config.stage).get("critic", ""),
            rule=self.run.rule(config.rule),
        )

    def clean_examples(self) -> list[Example]:
        """Held-out answers to harmless prompts of the evaluation's pool."""
        run, rng = self.run, np.random.default_rng(self.suite.seed)
        examples = []
        for _ in range(self.config.perplexity_examples):
            prompt = run.world.prompt(rng, self.suite.pool)
            answer = run.world.answer(rng, prompt)
            example = plain_example(prompt.text, answer, run.tokenizer, run.data.row_length)
            if isinstance(example, Example):
                examples.append(example)
        return examples

    def evaluate(self) -> list[Record]:
        """Evaluates the stage under every attack; writes rows and records."""
        run, stage = self.run, self.config.stage
        policy = self.policy
        read_results(run.folder / "results.json")  # damage is named before the work, not after it
        began = time.perf_counter()
        sample = self.sampling(f"evaluate {stage}")
        records, rows = evaluate(
            sample, self.attempts, self.judge, run.tokenizer, self.context(), self.seams
        )
        template = dataclasses.replace(records[0], attack="none", split="all", knobs={}, judge="")
        scores = score_texts(run.model, policy.params, self.clean_examples(), 64)
        records += utility_records(scores, template)
        if self.config.calibrated:
            bias = Interval(self.bias, self.bias, self.bias, "none", 1, 1)
            records.append(template.measured("control_bias", bias))
        run.write_lines(f"evaluation/clean_text/{stage}.jsonl", score_rows(scores))
        run.write_lines(f"evaluation/{stage}.jsonl", rows)
        hosts.first_alone(lambda: write_results(run.folder / "results.json", records))
        seconds = time.perf_counter() - began
        say(f"{stage}: evaluated {len(rows)} responses in {seconds:.1f} s")
        return records

    def with_suite(self, **changes: Any) -> Evaluator:
        """The same stage under a suite that differs."""
        suite = dataclasses.replace(self.suite, **changes)
        return Evaluator(self.run, dataclasses.replace(self.config, evaluation=suite))
