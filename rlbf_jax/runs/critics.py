"""The critic of training and the judge of evaluations, as settings name them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.classifiers.classifier import (
    ClassifierCriticConfig,
    check_categories,
    coherence_of,
    load_critic,
)
from rlbf_jax.critics.language.http_critic import (
    JUDGE_OPTION,
    OPTION,
    HttpCritic,
    HttpCriticConfig,
)
from rlbf_jax.critics.noisy import NoiseConfig, NoisyCritic
from rlbf_jax.critics.registry import critic_named
from rlbf_jax.data.world import World
from rlbf_jax.errors import UserError
from rlbf_jax.plain import PATH
from rlbf_jax.runs.experiment import check_one_source
from rlbf_jax.runs.model_critic import check_model, model_critic


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """Who judges while a model trains; the setting's own critic where nothing is named."""

    critic: str = ""
    """A critic by its name in `critics.registry.CRITICS`; empty: the setting's own."""
    critic_endpoint: HttpCriticConfig = HttpCriticConfig()
    """A chat model as the critic of training, in place of the setting's own; off while its base_url
    is empty."""
    critic_model: str = dataclasses.field(default="", metadata=PATH)
    """A folder of one of our models (RUN/stages/STAGE, or a checkpoint) in its place, asked in the
    format of `critic_endpoint` and by what else it says of a format; off while empty."""
    critic_classifier: ClassifierCriticConfig = ClassifierCriticConfig()
    """A classifier of `rlbf critic` in its place; off while its path is empty."""
    critic_noise: NoiseConfig = NoiseConfig()
    """Errors put into the critic of training; the judge of evaluations has none."""

    def __post_init__(self):
        path = self.critic_classifier.path
        check_one_source("critic", self.critic_endpoint, self.critic_model, path, self.critic)


def training_critic(
    config: CriticConfig, world: World, own: Callable[[], Critic], folder: Path
) -> Critic:
    """The critic that `config` names.

    Args:
      world: the run's, whose texts it judges.
      own: makes the setting's critic.
      folder: the run's, which keeps the answers of an endpoint.

    Raises UserError for a name, classifier or model that cannot be used.
    """
    classifier, categories = config.critic_classifier, world.categories
    critic: Critic
    if config.critic_endpoint.base_url:
        journal = folder / "critic" / "answers.jsonl"
        critic = HttpCritic(config.critic_endpoint, categories, journal)
    elif config.critic_model:
        critic = model_critic(
            config.critic_model,
            config.critic_endpoint,
            categories,
            "critic_model",
            OPTION,
            config.critic_endpoint.max_unjudged,
        )
    elif classifier.path:
        # Coherent and useful, of which a classifier knows nothing, stay the setting's to say.
        critic = load_critic(Path(classifier.path), classifier, coherence_of(own()))
        check_categories(critic, categories)
    elif config.critic:
        try:
            critic = critic_named(config.critic, world)
        except ValueError as error:
            raise UserError(f"critic: {error}") from error
    else:
        critic = own()
    noise = config.critic_noise
    return NoisyCritic(critic, noise, categories) if noise.active else critic


def evaluation_judge(
    endpoint: HttpCriticConfig,
    model: str,
    categories: Sequence[str],
    own: Callable[[], Critic],
    folder: Path,
) -> Critic:
    """The judge of evaluations, another object than the critic. Arguments: `training_critic`."""
    if endpoint.base_url:
        journal = folder / "judge" / "answers.jsonl"
        return HttpCritic(endpoint, categories, journal, option=JUDGE_OPTION)
    if model:
        most = endpoint.max_unjudged
        return model_critic(model, endpoint, categories, "judge_model", JUDGE_OPTION, most)
    return own()


def check_critic(config: CriticConfig) -> None:
    """Raises UserError where a critic's model folder holds none, before anything is made."""
    if config.critic_model:
        check_model(config.critic_model, "critic_model")
