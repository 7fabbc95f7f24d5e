"""What is run: a method on some data, from some base, measured in some way.

An `Experiment` holds what every paper shares; everything of one paper's own is in its
`MethodConfig`. On the command line and in a manifest both stand side by side, without a prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

import tyro

from rlbf_jax.critics.language.http_critic import HttpCriticConfig
from rlbf_jax.data.worlds.toy_world import ToyWorldConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.directives.controls import RULES
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.plain import FLAT, PATH, plain
from rlbf_jax.ranges import check_at_least, check_between
from rlbf_jax.training.supervised import SupervisedConfig

if TYPE_CHECKING:
    from rlbf_jax.runs.stage import Stage

Beside = tyro.conf.arg(name="")
"""Options of this field stand without a prefix."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from, and what it is cut into."""

    path: str = dataclasses.field(default="", metadata=PATH)
    """The user's prompts and responses (.csv, .jsonl, .parquet, or tfds:NAME); empty: the embedded
    toy world."""
    prompt_column: str | None = None
    """None: the first present of instruction, prompt, question."""
    response_column: str | None = None
    """None: the first present of response, answer, output."""
    context_column: str | None = None
    """Its texts stand behind the prompts. None: prompts stand alone, and it is said where the file
    has a column `context` or `input`; "": prompts stand alone."""
    max_prompt_words: int = 30
    """Rows with longer prompts are left out of a user's file."""
    max_response_words: int = 40
    """Responses are trimmed to whole sentences of at most this many words."""
    world: ToyWorldConfig = ToyWorldConfig()
    vocab_size: int = 2560
    """SentencePiece pieces; control ids come on top."""
    x_max: int = 40
    """Largest X of [BACKTRACK_BY_X]. The RLBF paper does not state its range; choose it from the
    data's longest violations."""
    rules: tuple[str, ...] = ()
    """Edit rules (backtrack, reset, replace) that the vocabulary has control ids of; empty: those
    that the method names. Runs with one vocabulary can share a base, whatever their methods."""
    pretraining_examples: int = 16_000
    row_length: int = 128
    """Ids of a packed training row."""

    def __post_init__(self):
        check_at_least(
            self, 1, "max_prompt_words", "max_response_words", "vocab_size", "x_max", "row_length"
        )
        check_at_least(self, 1, "pretraining_examples")
        if len(set(self.rules)) < len(self.rules) or set(self.rules) - set(RULES):
            raise ValueError(
                f"rules is {self.rules}, expected some of {', '.join(RULES)}, each once"
            )


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The model that every other stage starts from: trained here, or published."""

    model: ModelConfig = ModelConfig()
    """The tokenizer sets its vocabulary size; adapters (`lora`) are for stages after `base`."""
    pretraining: SupervisedConfig = SupervisedConfig()
    start_from: str = dataclasses.field(default="", metadata=PATH)
    """A checkpoint folder, as published or as `rlbf import` wrote it: the run's base model and
    tokenizer are these. No tokenizer is trained and nothing is pretrained; of `model` dtype,
    param_dtype, remat and scan_layers count."""
    chat_template: str = "default"
    """Name of the chat template, where the checkpoint of `start_from` has several."""

    def __post_init__(self):
        if self.chat_template != "default" and not self.start_from:
            raise ValueError(
                f"chat_template is {self.chat_template!r}, but start_from is empty: only a "
                "checkpoint has chat templates to choose from"
            )


class MethodConfig:
    """What a paper brings: a frozen dataclass in `methods/PAPER.py` that derives from this."""

    name: ClassVar[str]
    """As in `methods.METHODS`, manifests and messages."""
    paper: ClassVar[str]
    """Title and arXiv number, for messages."""
    rule: ClassVar[str]
    """Kind of edit rule that its models follow: backtrack, reset or replace."""
    rules: ClassVar[tuple[str, ...]] = ("backtrack", "reset")
    """Edit rules that its vocabulary has control ids of, where `data.rules` names none."""

    def stages(self, experiment: Experiment) -> Sequence[Stage]:
        """The recipe, in order, evaluations left out.
        Raises UserError for settings that do not go together."""
        raise NotImplementedError


M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[M]):
    """Everything a run depends on. `manifest.json` holds it resolved."""

    method: Annotated[M, Beside] = dataclasses.field(metadata=FLAT)
    """The paper's own settings."""
    seed: int = 0
    """Of parameters, data and rollouts. The evaluation's attempts have a seed of their own."""
    semantics: Semantics = Semantics.REWIND
    """KEEP is the papers'; REWIND, ours, is better at toy scale."""
    data: DataConfig = DataConfig()
    base: Annotated[BaseConfig, Beside] = dataclasses.field(default=BaseConfig(), metadata=FLAT)
    mesh: MeshConfig = MeshConfig()
    max_prompt: int = 24
    """Most ids of a prompt, template included."""
    sampling_batch: int = 96
    """Rows of a sampling batch."""
    evaluation: SuiteConfig = SuiteConfig()
    judge_endpoint: HttpCriticConfig = HttpCriticConfig()
    """A chat model as the judge of evaluations, in place of the setting's own;
    off while its base_url is empty."""
    judge_model: str = dataclasses.field(default="", metadata=PATH)
    """A folder of one of our models in its place, asked in the format of `judge_endpoint` and by
    what else it says of a format; off while empty."""
    perplexity_examples: int = 256
    """Held-out clean answers on which perplexity and accuracy are measured."""

    def __post_init__(self):
        check_between(self, 0, 2**32 - 1, "seed")
        check_at_least(self, 1, "max_prompt", "sampling_batch", "perplexity_examples")
        check_one_source("judge", self.judge_endpoint, self.judge_model)
        _check_judge_is_another(self)

    def replace(self, **changes: Any) -> Experiment[M]:
        """A copy with some settings changed, each by its flag's name, whatever part it is in.

        Raises TypeError for a name that is no setting of this experiment.
        """
        return _replaced(self, changes)

    def changed(self, settings: Mapping[str, Any]) -> Experiment[M]:
        """A copy with settings changed by their dotted flags.

        For instance `{"sft.optimizer.learning_rate": 1e-3}`.

        Raises TypeError for a name that is no setting of this experiment.
        """
        made = self
        for name, value in settings.items():
            first, _, rest = name.partition(".")
            made = made.replace(**{first: _set(setting(made, first), rest, value)})
        return made

    @property
    def rule(self) -> str:
        """Kind of the method's edit rule."""
        return self.method.rule  # type: ignore[attr-defined]

    @property
    def rules(self) -> tuple[str, ...]:
        """Edit rules that the vocabulary has control ids of."""
        return self.data.rules or self.method.rules  # type: ignore[attr-defined]

    def stored(self) -> dict[str, Any]:
        """As a manifest holds it."""
        method = self.method
        name = method.name  # type: ignore[attr-defined]
        return {"method": name, "rule": self.rule, **plain(self)}


def _replaced(value: Any, changes: dict[str, Any]) -> Any:
    """A dataclass with fields changed, in itself or in its flat parts."""
    own, parts = {}, {}
    left = dict(changes)
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        if field.name in left and not _is_inside(old, field, left[field.name]):
            own[field.name] = left.pop(field.name)
        elif field.metadata.get("flat"):
            parts[field.name] = getattr(value, field.name)
    for name, part in parts.items():
        inside = {key: left.pop(key) for key in list(left) if _has(part, key)}
        if inside:
            own[name] = _replaced(part, inside)
    if left:
        raise TypeError(f"{', '.join(left)}: no such setting of {type(value).__name__}")
    return dataclasses.replace(value, **own)


def _is_inside(part: Any, field: dataclasses.Field, new: Any) -> bool:
    """Whether a flat part's name means the setting in it that is called the same (`critic`), and
    not the whole part: `new` is no such part."""
    flat = bool(field.metadata.get("flat"))
    return flat and _has(part, field.name) and type(new) is not type(part)


def _set(old: Any, dotted: str, value: Any) -> Any:
    if not dotted:
        return value
    first, _, rest = dotted.partition(".")
    if not dataclasses.is_dataclass(old) or not hasattr(old, first):
        raise TypeError(f"{dotted}: no such setting of {type(old).__name__}")
    return dataclasses.replace(old, **{first: _set(getattr(old, first), rest, value)})  # type: ignore[type-var]


def _has(part: Any, name: str) -> bool:
    return any(
        field.name == name or (field.metadata.get("flat") and _has(getattr(part, field.name), name))
        for field in dataclasses.fields(part)
    )


def setting(experiment: Any, name: str) -> Any:
    """A setting by its flag's name, as `sft` or `reinforcement.reward.clean`.

    Raises TypeError for a name that is no setting.
    """
    first, _, rest = name.partition(".")
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        if field.metadata.get("flat") and _has(value, first):
            return setting(value, name)
        if field.name == first:
            return setting(value, rest) if rest else value
    raise TypeError(f"{name}: no such setting of {type(experiment).__name__}")


def check_one_source(
    who: str, endpoint: HttpCriticConfig, folder: str, classifier: str = "", name: str = ""
) -> None:
    """Raises ValueError where a critic or judge is named in more than one way."""
    ways = {
        f"{who}_endpoint.base_url": endpoint.base_url,
        f"{who}_model": folder,
        f"{who}_classifier.path": classifier,
        who: name,
    }
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are set, expected one {who}")
    if folder and endpoint.server_template:
        raise ValueError(
            f"{who}_endpoint.server_template is set, but {who}_model is asked without a server"
        )


def _check_judge_is_another(experiment: Experiment) -> None:
    """Raises ValueError where the critic of training would also judge."""
    critic = getattr(experiment.method, "critic", None)
    endpoint, folder = experiment.judge_endpoint, experiment.judge_model
    if critic is None or not (endpoint.base_url or folder):
        return
    of_training = critic.critic_endpoint
    who = (endpoint.base_url, endpoint.model, folder, endpoint.format, endpoint.guidelines)
    trains = (
        of_training.base_url,
        of_training.model,
        critic.critic_model,
        of_training.format,
        of_training.guidelines,
    )
    if who == trains:
        raise ValueError(
            "the judge of evaluations asks the critic's model in the same format; it must be "
            "another than the critic of training: choose another model or format"
        )
