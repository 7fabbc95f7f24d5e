"""A run's folder and the parts that every recipe works with: world, tokenizer, data, model,
sampler, critic, judge."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.classifiers.classifier import check_categories, coherence_of, load_critic
from rlbf_jax.critics.language.http_critic import JUDGE_OPTION, HttpCritic, HttpCriticConfig
from rlbf_jax.critics.noisy import NoisyCritic
from rlbf_jax.data import datasets
from rlbf_jax.data.builders import bsafe_plus
from rlbf_jax.data.builders.checks import check_bsafe_plus, check_pretraining, left_out
from rlbf_jax.data.packing import pack
from rlbf_jax.data.schema import Example
from rlbf_jax.data.world import Pool
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.evaluation.results import Record, read_results, write_results
from rlbf_jax.evaluation.suite import EvaluationContext, build_attempts, evaluate
from rlbf_jax.evaluation.utility import score_rows, score_texts, utility_records
from rlbf_jax.models.config import LoraConfig, ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.models.lora import join, merge
from rlbf_jax.models.transformer import init, init_adapters
from rlbf_jax.parallel.mesh import batch_sharding, make_mesh, row_shards
from rlbf_jax.progress import progress, say
from rlbf_jax.runs import start
from rlbf_jax.runs.experiment import ExperimentConfig
from rlbf_jax.runs.model_critic import model_critic
from rlbf_jax.runs.shapes import check_rows
from rlbf_jax.sampling.request import Generation, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig, sharing
from rlbf_jax.storage import write_whole
from rlbf_jax.tokenizers import FamilyTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from rlbf_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a run's text comes from and who judges it: the toy world, or a user's own data."""

    world: Callable[[ExperimentConfig], Any]
    """A `World` with `document`."""
    critic: Callable[[Workspace], Critic]
    """Of training."""
    judge: Callable[[Workspace], Critic]
    """Of evaluations: another object than the critic."""
    check: Callable[[Workspace], None]
    """Raises UserError where configuration and text do not fit; called once the tokenizer is there.
    """


class Workspace:
    """Paths and parts of one run. Parts are made when first asked for, from the configuration and
    what is on disk."""

    def __init__(self, config: ExperimentConfig, folder: Path, setting: Setting):
        self.config = config
        self.folder = folder
        self.setting = setting
        try:
            self.mesh = make_mesh(config.mesh)
        except ValueError as error:
            raise UserError(f"mesh: {error}") from error
        check_rows(config, row_shards(self.mesh), self.base_model)

    # Parts --------------------------------------------------------------------------------------

    @functools.cached_property
    def world(self) -> Any:
        return self.setting.world(self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        mend = (
            f"delete {self.folder / 'done' / 'data'}, then `rlbf run` makes the same tokenizer "
            "and data again"
        )
        try:
            tokenizer = load_tokenizer(self.folder / "tokenizer")
        except ValueError as error:
            raise UserError(f"{error}; {mend}") from error
        noted = (
            read_json(self.folder / "manifest.json")
            .get("data", {})
            .get("tokenizer", tokenizer.digest())
        )
        if tokenizer.digest() != noted:
            raise UserError(
                f"{self.folder / 'tokenizer'}: not the tokenizer that this run was made with; "
                f"{mend}"
            )
        return tokenizer

    @functools.cached_property
    def base_model(self) -> ModelConfig:
        """The model before its vocabulary is known."""
        return (
            start.model_of(self.config, self.folder)
            if self.config.start_from
            else styled(self.config.model)
        )

    @functools.cached_property
    def model(self) -> ModelConfig:
        """Of `base`, and of every stage once its adapters are merged."""
        return dataclasses.replace(
            self.base_model, vocab_size=self.tokenizer.vocab_size, lora=LoraConfig()
        )

    @functools.cached_property
    def tuned(self) -> ModelConfig:
        """What stages after `base` train: `model`, with adapters where there are to be some."""
        lora = self.config.model.lora
        if not lora.rank:
            return self.model
        rule = self.tokenizer.rule
        rows = LoraConfig(lora.rank, lora.alpha, lora.targets, rule.first_id, rule.num_controls)
        return dataclasses.replace(self.model, lora=rows)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """Of evaluations."""
        return self.sampler_of(self.model)

    @functools.cached_property
    def policy_sampler(self) -> Sampler:
        """Of rollouts, in which adapters are not merged."""
        return self.sampler if self.tuned == self.model else self.sampler_of(self.tuned)

    def sampler_of(self, model: ModelConfig, rows_per_prompt: int = 1) -> Sampler:
        """`rows_per_prompt`: how many requests have the same prompt and forced ids."""
        c = self.config
        shapes = SamplerConfig(
            semantics=c.semantics,
            batch_size=c.sampling_batch,
            # Every stage samples with one shape, so one program serves the whole run.
            min_context=c.max_prompt + c.rollout_tokens,
            min_room=c.rollout_tokens,
            rows_per_context=sharing(c.sampling_batch // row_shards(self.mesh), rows_per_prompt),
        )
        sharding = batch_sharding(self.mesh) if self.mesh.size > 1 else None
        return Sampler(model, self.tokenizer, shapes, sharding=sharding)

    @functools.cached_property
    def critic(self) -> Critic:
        """Of training: the setting's, a classifier, one of our models, or a chat model behind an
        endpoint, of which the run's folder keeps the answers."""
        endpoint, noise = self.config.critic_endpoint, self.config.critic_noise
        classifier = self.config.critic_classifier
        critic: Critic
        if endpoint.base_url:
            critic = HttpCritic(
                endpoint, self.world.categories, self.folder / "critic" / "answers.jsonl"
            )
        elif self.config.critic_model:
            critic = self._model_critic("critic_model", endpoint)
        elif classifier.path:
            # Coherent and useful, of which a classifier knows nothing, stay the setting's to say.
            critic = load_critic(
                Path(classifier.path), classifier, coherence_of(self.setting.critic(self))
            )
            check_categories(critic, self.world.categories)
        else:
            critic = self.setting.critic(self)
        return NoisyCritic(critic, noise, self.world.categories) if noise.active else critic

    @functools.cached_property
    def judge(self) -> Critic:
        """Of evaluations: another object than the critic. The setting's, one of our models, or a
        chat model behind an endpoint."""
        endpoint = self.config.judge_endpoint
        if endpoint.base_url:
            journal = self.folder / "judge" / "answers.jsonl"
            return HttpCritic(endpoint, self.world.categories, journal, option=JUDGE_OPTION)
        if self.config.judge_model:
            return self._model_critic("judge_model", endpoint)
        return self.setting.judge(self)

    def _model_critic(self, option: str, told: HttpCriticConfig) -> Critic:
        return model_critic(
            getattr(self.config, option), told, self.world.categories, option, told.max_unjudged
        )

    @functools.cached_property
    def attempts(self):
        try:
            return build_attempts(self.world, self.tokenizer, self.config.evaluation)
        except ValueError as error:
            raise UserError(
                f"evaluation: {error} (options of --evaluation, as --evaluation.knobs.max_tokens)"
            ) from error

    @property
    def semantics(self) -> Semantics:
        return self.config.semantics

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of this run's seed and a purpose, independent of all others."""
        return np.random.default_rng([self.config.seed, *purpose.encode()])

    # Data ---------------------------------------------------------------------------------------

    def build_tokenizer(self) -> None:
        """Trains the tokenizer on pretraining documents, or takes that of the checkpoint the run
        starts from."""
        if self.config.start_from:
            start.take_tokenizer(self.config, self.folder, self.world.categories)
        else:
            self._train_tokenizer()
        self.setting.check(self)

    def _train_tokenizer(self) -> None:
        data, rng = self.config.data, self.rng("tokenizer")
        documents = [
            self.world.document(rng) for _ in range(min(data.pretraining_examples, 12_000))
        ]
        texts = [text for d in documents for text in (d.prompt.text, d.response)]
        try:
            tokenizer = train_tokenizer(texts, data.vocab_size, self.world.categories, data.x_max)
        except ValueError as error:
            raise UserError(f"data: {error}") from error
        tokenizer.save(self.folder / "tokenizer")

    def build_data(self) -> dict[str, Any]:
        """Writes the data sets as array_record; returns counts and hashes."""
        data, counts = self.config.data, {}
        pretraining = () if self.config.start_from else ("pretraining",)
        try:
            if pretraining:
                check_pretraining(self.world, self.tokenizer, data.row_length)
            check_bsafe_plus(self.world, self.tokenizer, data.bsafe_plus)
        except InputError as error:
            raise UserError(f"data: {error}") from error
        for name in (*pretraining, "bsafe_plus", "refusal"):
            rng = self.rng(name)
            if name == "pretraining":
                built = bsafe_plus.build_pretraining(
                    self.world, self.tokenizer, rng, data.pretraining_examples, data.row_length
                )
            elif name == "bsafe_plus":
                built = bsafe_plus.build_bsafe_plus(
                    self.world, self.tokenizer, rng, data.bsafe_plus, data.sft_examples
                )
            else:
                built = bsafe_plus.build_refusal(
                    self.world, self.tokenizer, rng, data.bsafe_plus, data.refusal_examples
                )
            examples, report = built
            try:
                rows = pack(examples, data.row_length)
            except ValueError as error:
                raise UserError(
                    f"data.row_length: {error} (--data.bsafe_plus.max_tokens)"
                ) from error
            digest = datasets.write_dataset(self.folder / "data" / name, rows, name)
            if told := left_out(report, len(examples)):
                say(f"data: {name}: {told}")
            counts[name] = {"rows": len(rows), "sha256": digest, **dataclasses.asdict(report)}
        return counts

    def note_data(self, hashes: dict[str, str]) -> None:
        """Adds hashes of tokenizer, built data sets and the user's file to the manifest."""
        path = self.folder / "manifest.json"
        manifest = read_json(path)
        manifest["data"] = {"tokenizer": self.tokenizer.digest(), **hashes}
        if self.config.data.path:
            manifest["data"]["file"] = hashlib.sha256(
                Path(self.config.data.path).read_bytes()
            ).hexdigest()
        if self.config.start_from:
            manifest["data"]["start_from"] = start.digest(Path(self.config.start_from))
        if self.config.critic_classifier.path:
            manifest["data"]["critic"] = self.critic.name
        write_json(path, manifest)

    def batches(self, name: str, batch_size: int):
        """An endless, resumable iterator of packed rows."""
        try:
            source = datasets.open_source(self.folder / "data" / name)
        except InputError as error:
            mend = (
                f"delete {self.folder / 'done' / 'data'}, then `rlbf run` makes the same data again"
            )
            raise UserError(f"{error}: {mend}") from error
        return datasets.batches(source, batch_size, self.config.seed)

    # Stages -------------------------------------------------------------------------------------

    def stage_folder(self, stage: str) -> Path:
        return self.folder / "stages" / stage

    def save_params(self, stage: str, params: dict) -> None:
        """Keeps what a stage has trained: a whole decoder, or adapters, which the meta says."""
        model = self.model if stage == "base" else self.tuned
        checkpoints = Checkpoints(self.stage_folder(stage) / "model", writes=True)
        checkpoints.save(
            0, params, {"stage": stage, "model": dataclasses.asdict(model), "base": "base"}
        )
        checkpoints.close()

    def params(self, stage: str) -> dict:
        """A finished stage's decoder parameters, adapters merged. Raises UserError if it has none."""
        if stage == "base" or not self.tuned.lora.rank:
            return self._trained(stage, self.initial_params)
        return merge(self.tuned, self.trainable(stage))[1]

    def trainable(self, stage: str) -> dict:
        """Where a stage after this one starts: its decoder parameters, with adapters (fresh ones
        after `base`) where there are to be some. Raises UserError if the stage is not finished."""
        if not self.tuned.lora.rank:
            return self.params(stage)
        fresh = functools.partial(init_adapters, self.tuned, jax.random.key(self.config.seed))
        adapters = fresh() if stage == "base" else self._trained(stage, fresh)
        return join(adapters, self.params("base"))

    def _trained(self, stage: str, make: Callable[[], dict]) -> dict:
        """What a finished stage has kept, of the structure of what `make` makes."""
        folder = self.stage_folder(stage) / "model"
        if not folder.exists():
            found = sorted(p.parent.name for p in self.folder.glob("stages/*/model"))
            raise UserError(
                f"{self.folder}: no finished stage {stage!r}; finished are "
                f"{', '.join(found) or 'none'}"
            )
        mend = f"delete {folder} and {self.folder / 'done' / stage}, then `rlbf run` makes it again"
        checkpoints = Checkpoints(folder, mend=mend)
        params, _ = checkpoints.restore(jax.eval_shape(make), self.mesh)
        checkpoints.close()
        return params

    def initial_params(self) -> dict:
        """Random ones: what a run that starts from nothing begins with."""
        return init(self.model, jax.random.key(self.config.seed))

    def start_params(self) -> dict:
        """Those of the checkpoint that the run starts from. Raises UserError if it is gone or has
        changed."""
        noted = read_json(self.folder / "manifest.json").get("data", {}).get("start_from")
        tokenizer = cast(FamilyTokenizer, self.tokenizer)
        return start.params_of(self.config, tokenizer, self.mesh, noted)

    # Evaluation ---------------------------------------------------------------------------------

    def clean_examples(self) -> list[Example]:
        """Held-out answers to harmless prompts of the evaluation's pool."""
        rng = np.random.default_rng(self.config.evaluation.seed)
        examples = []
        for _ in range(self.config.perplexity_examples):
            prompt = self.world.prompt(rng, self.config.evaluation.pool)
            example = bsafe_plus.plain_example(
                prompt.text,
                self.world.answer(rng, prompt),
                self.tokenizer,
                self.config.data.row_length,
            )
            if isinstance(example, Example):
                examples.append(example)
        return examples

    def evaluate(self, stage: str, method: str) -> list[Record]:
        """Evaluates a finished stage under every attack; writes rows and records."""
        params = self.params(stage)
        read_results(
            self.folder / "results.json"
        )  # a damaged file is named before the work, not after it
        context = self.context(stage, method)
        began = time.perf_counter()
        sample = self.sampling(params, f"evaluate {stage}")
        records, rows = evaluate(sample, self.attempts, self.judge, self.tokenizer, context)
        template = dataclasses.replace(records[0], attack="none", split="all", knobs={}, judge="")
        scores = score_texts(self.model, params, self.clean_examples(), 64)
        records += utility_records(scores, template)
        self.write_lines(f"evaluation/clean_text/{stage}.jsonl", score_rows(scores))
        self.write_lines(f"evaluation/{stage}.jsonl", rows)
        write_results(self.folder / "results.json", records)
        say(f"{stage}: evaluated {len(rows)} responses in {time.perf_counter() - began:.1f} s")
        return records

    def context(
        self, stage: str, method: str, benchmark: str | None = None, data: Pool | None = None
    ) -> EvaluationContext:
        """Whose answers an evaluation's are; None: as the configured suite says."""
        suite = self.config.evaluation
        return EvaluationContext(
            method=method,
            stage=stage,
            semantics=self.semantics,
            seed=self.config.seed,
            data=data or suite.pool,
            benchmark=benchmark or suite.benchmark,
            critic=self.critic.name if stage == "rlbf" else "",
        )

    def sampling(
        self, params: dict, label: str, rows_per_prompt: int = 1
    ) -> Callable[[Sequence[Request]], list[Generation]]:
        """A function that samples requests with the evaluation's key, and a progress bar with this
        label.

        `rows_per_prompt`: how many of the requests have the same prompt and forced ids.
        """
        key = jax.random.key(self.config.evaluation.seed)
        sampler = (
            self.sampler if rows_per_prompt == 1 else self.sampler_of(self.model, rows_per_prompt)
        )

        def sample(requests: Sequence[Request]) -> list[Generation]:
            with progress(len(requests), label) as bar:
                return sampler(params, requests, key, progress=bar.update)

        return sample

    def write_lines(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Writes a JSON lines file of the run, whole or not at all."""
        write_whole(
            self.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file of the run, whole or not at all."""
        write_json(self.folder / name, content)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the run; empty where there is no such file. Raises UserError where it is
    damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); put the right file back") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, expected an object; put the right file back"
        )
    return content


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
