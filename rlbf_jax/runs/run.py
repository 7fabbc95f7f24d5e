"""A run's folder, its world and tokenizer, and the results of its stages."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlbf_jax.critics.base import Critic
from rlbf_jax.data import datasets
from rlbf_jax.data.builders.checks import left_out
from rlbf_jax.data.builders.examples import BuildReport
from rlbf_jax.data.packing import pack
from rlbf_jax.data.schema import Example
from rlbf_jax.directives import EditRule, Semantics
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.models.config import LoraConfig, ModelConfig
from rlbf_jax.models.lora import join
from rlbf_jax.models.transformer import init, init_adapters
from rlbf_jax.parallel import hosts
from rlbf_jax.parallel.mesh import batch_sharding
from rlbf_jax.parallel.placing import Assembled, rows_here
from rlbf_jax.progress import say
from rlbf_jax.runs.critics import CriticConfig, training_critic
from rlbf_jax.runs.experiment import DataConfig
from rlbf_jax.runs.files import read_json, write_json
from rlbf_jax.runs.setting import Setting
from rlbf_jax.sampling.policy import Policy
from rlbf_jax.sampling.program import as_program
from rlbf_jax.storage import write_whole
from rlbf_jax.tokenizers import Tokenizer, load_tokenizer
from rlbf_jax.training.checkpoint import Checkpoints
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.model_folder import config_of, load_model

TOKENIZER = "tokenizer"
"""Name of the stage that makes the tokenizer, and of its folder."""
BASE = "base"
"""Name of the stage whose model all others start from."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What all views of a run share; made when first asked for."""

    folder: Path
    seed: int
    data: DataConfig
    setting: Setting
    mesh: Mesh
    untrained: Callable[[], ModelConfig]
    """The base model before its vocabulary is known."""

    @functools.cached_property
    def world(self) -> Any:
        return self.setting.world(self.data, self.seed)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        folder, marker = self.folder / TOKENIZER, self.folder / "done" / TOKENIZER
        mend = f"delete {marker}, then `rlbf run` makes the same tokenizer and data again"
        try:
            tokenizer = load_tokenizer(folder)
        except ValueError as error:
            raise UserError(f"{error}; {mend}") from error
        noted = read_json(self.folder / "manifest.json").get("data", {}).get(TOKENIZER)
        if noted not in (None, tokenizer.digest()):
            raise UserError(f"{folder}: not the tokenizer that this run was made with; {mend}")
        return tokenizer

    @functools.cached_property
    def base_model(self) -> ModelConfig:
        return self.untrained()


class Run:
    """What stages and commands work with. Shows no experiment: a stage's settings are its own.

    Args:
      stage: the stage that works with it; empty: a command, which may ask for everything.
      reads: stages whose results it may ask for.
    """

    def __init__(self, parts: Parts, stage: str = "", reads: frozenset[str] = frozenset()):
        self._parts, self.stage, self._reads = parts, stage, reads
        self.folder, self.seed, self.data = parts.folder, parts.seed, parts.data
        self.setting, self.mesh = parts.setting, parts.mesh

    def seen_by(self, stage: str, reads: Iterable[str]) -> Run:
        """The same run for a stage that may ask for the results of `reads` alone."""
        return Run(self._parts, stage, frozenset(reads))

    def _needs(self, stage: str) -> None:
        if self.stage and stage not in self._reads:
            raise ValueError(
                f"stage {self.stage} asks for the result of {stage}, which it does not come after; "
                "name it in `after`"
            )

    # What is there ----------------------------------------------------------------------------

    @property
    def world(self) -> Any:
        """A `World` with `document`; a user's file is read when it is first needed."""
        return self._parts.world

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError where the tokenizer is damaged or another than the run was made with."""
        self._needs(TOKENIZER)
        return self._parts.tokenizer

    @property
    def base_model(self) -> ModelConfig:
        """The base model before its vocabulary is known."""
        self._needs(BASE)
        return self._parts.base_model

    @property
    def model(self) -> ModelConfig:
        """The base model, and that of every stage once its adapters are merged."""
        size = self.tokenizer.vocab_size
        return dataclasses.replace(self.base_model, vocab_size=size, lora=LoraConfig())

    def rule(self, kind: str) -> EditRule:
        """The edit rule of a kind over the vocabulary's control ids."""
        return self.tokenizer.controls.rule(kind)

    def tuned(self, lora: LoraConfig, rule: EditRule) -> ModelConfig:
        """What stages after `base` train: the model, with adapters where `lora` has a rank, which
        then also train the rows of the rule's control ids."""
        if not lora.rank:
            return self.model
        rows = LoraConfig(lora.rank, lora.alpha, lora.targets, rule.first_id, rule.num_controls)
        return dataclasses.replace(self.model, lora=rows)

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of this run's seed and a purpose, independent of all others."""
        return np.random.default_rng([self.seed, *purpose.encode()])

    def critic(self, config: CriticConfig) -> Critic:
        """The critic of training that `config` names, or the setting's own."""
        return training_critic(config, self.world, lambda: self.setting.critic(self), self.folder)

    # Models -----------------------------------------------------------------------------------

    def stage_folder(self, stage: str) -> Path:
        return self.folder / "stages" / stage

    def keep(self, model: ModelConfig, params: dict, **notes: Any) -> None:
        """Keeps what this stage has trained: a whole decoder, or adapters alone, as `model` says.

        `notes`: JSON about the training (the critic's name), see `notes`.
        """
        checkpoints = Checkpoints(self.stage_folder(self.stage) / "model", writes=True)
        meta = {
            "stage": self.stage,
            "model": dataclasses.asdict(model),
            "base": BASE,
            "notes": notes,
        }
        checkpoints.save(0, params, meta)
        checkpoints.close()

    def notes(self, stage: str) -> dict[str, Any]:
        """What a finished stage has noted with its model. Raises UserError if it has none."""
        return self._meta(stage).get("notes", {})

    def policy(self, stage: str, rule: str, semantics: Semantics) -> Policy:
        """A finished stage's model as something that answers, adapters merged.

        Raises UserError if the stage has kept none.
        """
        model, params = self.model_of(stage)
        program = as_program(model)
        return Policy(program, params, self.tokenizer, self.rule(rule), semantics, stage)

    def trainable(self, stage: str, lora: LoraConfig, rule: EditRule) -> dict:
        """Where a stage after this one starts: its decoder parameters, with adapters (fresh ones
        after `base`) where `lora` has a rank. Raises UserError if the stage is not finished."""
        if not lora.rank:
            return self.model_of(stage)[1]
        self._meta(stage)
        model = self.tuned(lora, rule)
        fresh = functools.partial(init_adapters, model, jax.random.key(self.seed))
        base = self.model_of(BASE)[1]
        return join(fresh() if stage == BASE else self._restored(stage, fresh), base)

    def initial_params(self) -> dict:
        """Random parameters, which a run that starts from nothing begins with."""
        return init(self.model, jax.random.key(self.seed))

    def model_of(self, stage: str) -> tuple[ModelConfig, dict]:
        """A finished stage's decoder, adapters merged. Raises UserError if it has none."""
        meta = self._meta(stage)
        if config_of(meta.get("model"), self.stage_folder(stage)).lora.rank:
            self._meta(meta["base"])  # adapters are kept alone, on the model that they change
        return load_model(self.stage_folder(stage), self.mesh, self._mend(stage))

    def _meta(self, stage: str) -> dict[str, Any]:
        self._needs(stage)
        folder = self.stage_folder(stage) / "model"
        if not folder.exists():
            done = sorted(p.parent.name for p in self.folder.glob("stages/*/model"))
            raise UserError(
                f"{self.folder}: no finished stage {stage!r}; finished are "
                f"{', '.join(done) or 'none'}"
            )
        checkpoints = Checkpoints(folder, mend=self._mend(stage))
        meta = checkpoints.meta()
        checkpoints.close()
        config_of(meta.get("model"), self.stage_folder(stage))
        return meta

    def _restored(self, stage: str, make: Callable[[], dict]) -> dict:
        """What a finished stage has kept, of the structure of what `make` makes."""
        folder = self.stage_folder(stage) / "model"
        checkpoints = Checkpoints(folder, mend=self._mend(stage))
        params, _ = checkpoints.restore(jax.eval_shape(make), self.mesh)
        checkpoints.close()
        return params

    def _mend(self, stage: str) -> str:
        folder, marker = self.stage_folder(stage) / "model", self.folder / "done" / stage
        return f"delete {folder} and {marker}, then `rlbf run` makes it again"

    def loop(self, steps: int, checkpoint_every: int, keep: int = 1) -> Loop:
        """The training loop of this stage: journals, checkpoints, signals."""
        folder = self.stage_folder(self.stage)
        return Loop(folder, self.stage, steps, checkpoint_every, self.mesh, keep)

    # Data -------------------------------------------------------------------------------------

    def write_dataset(self, name: str, examples: Sequence[Example], report: BuildReport) -> None:
        """Packs examples into rows and writes them as array_record; counts go to data/report.json,
        the hash into the manifest. Raises UserError where an example is longer than a row."""
        try:
            rows = pack(examples, self.data.row_length)
        except ValueError as error:
            raise UserError(f"data.row_length: {error} (max_tokens of the data set)") from error
        sha256 = datasets.write_dataset(self.folder / "data" / name, rows, name)
        if remark := left_out(report, len(examples)):
            say(f"data: {name}: {remark}")
        counts = {"rows": len(rows), "sha256": sha256, **dataclasses.asdict(report)}
        path = self.folder / "data" / "report.json"
        write_json(path, read_json(path) | {name: counts})
        self.note_data(name, sha256)

    def rows_of(self, name: str) -> int:
        """Rows of a data set."""
        self._needs(data_stage(name))
        return int(read_json(self.folder / "data" / "report.json").get(name, {}).get("rows", 0))

    def batches(self, name: str, batch_size: int) -> Any:
        """An endless, resumable iterator of packed rows. Of several processes each reads its own
        rows of the common batches, which are assembled on the devices of all."""
        stage = data_stage(name)
        self._needs(stage)
        try:
            source = datasets.open_source(self.folder / "data" / name)
        except InputError as error:
            marker = self.folder / "done" / stage
            mend = f"delete {marker}, then `rlbf run` makes the same data again"
            raise UserError(f"{error}: {mend}") from error
        if not hosts.several():
            return datasets.batches(source, batch_size, self.seed)
        rows = batch_sharding(self.mesh)
        here = datasets.batches(source, batch_size, self.seed, rows_here(batch_size, rows))
        return Assembled(here, batch_size, rows)

    def note_data(self, name: str, value: Any) -> None:
        """Adds to `data` of the manifest."""
        path = self.folder / "manifest.json"
        manifest = read_json(path)
        manifest["data"] = manifest.get("data", {}) | {name: value}
        write_json(path, manifest)

    def noted_data(self, name: str) -> Any:
        """What `note_data` noted; None where there is nothing."""
        self._needs(TOKENIZER)
        return read_json(self.folder / "manifest.json").get("data", {}).get(name)

    # Files ------------------------------------------------------------------------------------

    def write_lines(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Writes a JSON lines file of the run, whole or not at all; the first of several
        processes does, and none goes on before the file is there."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        hosts.first_alone(lambda: write_whole(self.folder / name, lines))

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file of the run, as `write_lines` does."""
        hosts.first_alone(lambda: write_json(self.folder / name, content))


def data_stage(name: str) -> str:
    """The stage that makes a data set."""
    return f"{name}_data"
