"""One root object for an experiment. Each part is a dataclass next to the code it configures."""

from __future__ import annotations

import dataclasses

from rlbf_jax.critics.classifiers.classifier import ClassifierCriticConfig
from rlbf_jax.critics.language.http_critic import HttpCriticConfig
from rlbf_jax.critics.noisy import NoiseConfig
from rlbf_jax.data.builders.bsafe_plus import BsafePlusConfig
from rlbf_jax.data.worlds.toy_world import ToyWorldConfig
from rlbf_jax.directives import Semantics
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.parallel.mesh import MeshConfig
from rlbf_jax.ranges import check_at_least, check_between
from rlbf_jax.training.reinforcement import ReinforcementConfig
from rlbf_jax.training.supervised import SupervisedConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from, and how much of it is built."""

    path: str = ""
    """The user's prompt/response file (.csv, .jsonl); empty: the embedded toy world."""
    prompt_column: str | None = None
    """None: the first present of instruction, prompt, question."""
    response_column: str | None = None
    """None: the first present of response, answer, output."""
    max_prompt_words: int = 30
    """Rows with longer prompts are left out of a user's file."""
    max_response_words: int = 40
    """Responses are trimmed to whole sentences of at most this many words."""
    world: ToyWorldConfig = ToyWorldConfig()
    vocab_size: int = 2048
    """SentencePiece pieces; control ids come on top."""
    x_max: int = 40
    """Largest X. The paper does not state its range; choose it from the data's longest violations.
    """
    pretraining_examples: int = 16_000
    sft_examples: int = 4_000
    refusal_examples: int = 2_000
    row_length: int = 128
    """Ids of a packed training row."""
    bsafe_plus: BsafePlusConfig = BsafePlusConfig()

    def __post_init__(self):
        check_at_least(
            self, 1, "max_prompt_words", "max_response_words", "vocab_size", "x_max", "row_length"
        )
        check_at_least(self, 1, "pretraining_examples", "sft_examples", "refusal_examples")


@dataclasses.dataclass(frozen=True)
class RolloutMix:
    """What reinforcement rollouts start from, as relative weights. Ours: the paper does not say.

    Without attacked contexts the policy learns to prevent and forgets how to recover, because after
    SFT live violations are too rare to learn from.
    """

    none: float = 0.2
    """Harmless prompts, nothing forced."""
    direct: float = 0.15
    """Harmful prompts, nothing forced."""
    prefilling: float = 0.2
    deep_prefilling: float = 0.1
    middle_filling: float = 0.3
    benign_prefill: float = 0.0
    benign_middle: float = 0.05
    rl_forms: float = 0.7
    """Share of forced violations whose form SFT has not seen."""

    def __post_init__(self):
        weights = [field.name for field in dataclasses.fields(self) if field.name != "rl_forms"]
        check_at_least(self, 0, *weights)
        check_between(self, 0, 1, "rl_forms")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"every weight is 0, expected one of {', '.join(weights)} above 0")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on. `manifest.json` holds it resolved."""

    method: str = "rlbf"
    """A recipe of `rlbf_jax.methods`."""
    seed: int = 0
    """Of parameters, data and rollouts. The evaluation's attempts have a seed of their own."""
    semantics: Semantics = Semantics.REWIND
    """KEEP is the paper's; REWIND, ours, is better at toy scale."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    """Its vocabulary size is set from the tokenizer."""
    start_from: str = ""
    """A checkpoint folder, as published or as `rlbf import` wrote it: the run's base model and
    tokenizer are these. No tokenizer is trained and nothing is pretrained; of `model` dtype,
    param_dtype, remat and scan_layers count."""
    chat_template: str = "default"
    """Name of the chat template, where the checkpoint of `start_from` has several."""
    mesh: MeshConfig = MeshConfig()
    pretraining: SupervisedConfig = SupervisedConfig()
    refusal_sft: SupervisedConfig = SupervisedConfig()
    sft: SupervisedConfig = SupervisedConfig()
    reinforcement: ReinforcementConfig = ReinforcementConfig()
    rollouts: RolloutMix = RolloutMix()
    critic_endpoint: HttpCriticConfig = HttpCriticConfig()
    """A chat model as the critic of training, in place of the setting's own; off while its base_url
    is empty."""
    critic_model: str = ""
    """A folder of one of our models (RUN/stages/STAGE, or a checkpoint) in its place, asked in the
    format of `critic_endpoint` and by what else it says of a format; off while empty."""
    critic_classifier: ClassifierCriticConfig = ClassifierCriticConfig()
    """A classifier of `rlbf critic` in its place; off while its path is empty."""
    judge_endpoint: HttpCriticConfig = HttpCriticConfig()
    """A chat model as the judge of evaluations, in place of the setting's own; off while its
    base_url is empty."""
    judge_model: str = ""
    """A folder of one of our models in its place, asked in the format of `judge_endpoint` and by
    what else it says of a format; off while empty."""
    critic_noise: NoiseConfig = NoiseConfig()
    """Errors put into the critic of training; the judge of evaluations has none."""
    rollout_tokens: int = 88
    """Most ids of a rollout, forced ones included."""
    max_drawn: int = 48
    """Most ids a rollout draws itself."""
    rollout_budget: int = 4
    """Most directives of a rollout."""
    evaluation: SuiteConfig = SuiteConfig()
    sampling_batch: int = 96
    """Rows of a sampling batch."""
    max_prompt: int = 24
    """Most ids of a prompt, template included."""
    perplexity_examples: int = 256
    """Held-out clean answers on which perplexity and accuracy are measured."""
    baselines: bool = True
    """Also train and evaluate `refusal_sft` and `sft_control`."""

    def __post_init__(self):
        check_between(self, 0, 2**32 - 1, "seed")
        check_at_least(
            self,
            1,
            "rollout_tokens",
            "max_drawn",
            "sampling_batch",
            "max_prompt",
            "perplexity_examples",
        )
        check_at_least(self, 0, "rollout_budget")
        if self.chat_template != "default" and not self.start_from:
            raise ValueError(
                f"chat_template is {self.chat_template!r}, but start_from is empty: only a "
                "checkpoint has chat "
                "templates to choose from"
            )
        self._check_critics()

    def _check_critics(self) -> None:
        critic, judge = (
            (e.base_url, e.model, folder, e.format, e.guidelines)
            for e, folder in (
                (self.critic_endpoint, self.critic_model),
                (self.judge_endpoint, self.judge_model),
            )
        )
        if (self.judge_endpoint.base_url or self.judge_model) and judge == critic:
            raise ValueError(
                "the judge of evaluations asks the critic's model in the same format; it must be "
                "another than the "
                "critic of training: choose another model or format"
            )
        for who, folder, endpoint, classifier in (
            ("critic", self.critic_model, self.critic_endpoint, self.critic_classifier.path),
            ("judge", self.judge_model, self.judge_endpoint, ""),
        ):
            told = {
                f"{who}_endpoint.base_url": endpoint.base_url,
                f"{who}_model": folder,
                f"{who}_classifier.path": classifier,
            }
            given = [name for name, value in told.items() if value]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} are set, expected one {who}")
            if folder and endpoint.server_template:
                raise ValueError(
                    f"{who}_endpoint.server_template is set, but {who}_model is asked without a "
                    "server"
                )
