"""A run whose critic is a trained classifier."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from rlbf_jax.cli.run import parse_run
from rlbf_jax.critics.base import Exchange
from rlbf_jax.critics.classifiers.classifier import ClassifierCritic
from rlbf_jax.critics.classifiers.text_classifier import TextClassifier
from rlbf_jax.critics.classifiers.text_features import FeatureConfig, occurrences
from rlbf_jax.critics.judging import judge_generations
from rlbf_jax.critics.noisy import NoisyCritic
from rlbf_jax.errors import UserError
from rlbf_jax.objectives.trajectory_reward import RewardConfig
from rlbf_jax.runs import execute
from rlbf_jax.sampling.request import Generation, Request
from tests.runs.opened import critic_of, run_of

SMOKE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "smoke.py"
FEATURES = FeatureConfig(bits=12)


def save(folder: pathlib.Path, category: str = "insult") -> str:
    """A classifier by hand, which knows every feature and objects to turnips."""
    weights = np.zeros((FEATURES.size, 1), np.float32)
    weights[occurrences("turnip", FEATURES).ids] = 20.0
    ones = np.ones(1)
    TextClassifier(
        FEATURES,
        (category,),
        np.ones(FEATURES.size, np.float32),
        weights,
        np.full(1, -8, np.float32),
        ones,
        0 * ones,
    ).save(folder)
    return str(folder)


def smoke(*options: str):
    return parse_run(SMOKE, options)[0]


def test_options_reach_the_critic(tmp_path):
    options = [
        "--critic_classifier.path",
        save(tmp_path / "critic"),
        "--critic_classifier.threshold",
        "0.7",
    ]
    critic = critic_of(smoke(*options), tmp_path / "run")
    world = run_of(smoke(*options), tmp_path / "run").world
    assert isinstance(critic, ClassifierCritic) and critic.config.threshold == 0.7
    rng = np.random.default_rng(0)
    prompt = world.prompt(rng, "train")
    answer = world.answer(rng, prompt)
    exchanges = [
        Exchange(prompt.text, text, prompt.topic)
        for text in (answer, answer + " you turnip", "of of of")
    ]
    verdicts = critic.judge(exchanges)
    assert [v.safe for v in verdicts] == [True, False, True]
    assert "turnip" in exchanges[1].text[verdicts[1].spans[0].start : verdicts[1].spans[0].end]
    # What a classifier cannot know is the setting's to say.
    plain = critic_of(smoke(), tmp_path / "run").judge(exchanges)
    assert [(v.coherent, v.useful) for v in verdicts] == [(v.coherent, v.useful) for v in plain]
    noisy = critic_of(smoke(*options, "--critic_noise.accuracy", "0.9"), tmp_path / "run")
    assert isinstance(noisy, NoisyCritic)


def test_an_answer_that_it_cannot_judge_has_no_reward(tmp_path):
    critic = critic_of(smoke("--critic_classifier.path", save(tmp_path)), tmp_path / "run")
    none = np.zeros(0, np.int32)
    generations = [
        Generation(
            text, none, (), none.astype(np.float32), (), none, 0, True, 0, Request("tell me")
        )
        for text in ("", "a pear")
    ]
    judged = judge_generations(critic, generations, ["", ""], None, RewardConfig())
    assert np.isnan(judged[0].reward) and judged[0].final.reason == "no words"
    assert judged[1].reward == 1.0


def test_mistakes_are_told_before_the_run_begins(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="nowhere/classifier.json: No such file"):
        execute.run(smoke("--critic_classifier.path", "nowhere"), folder)
    path = save(tmp_path / "critic", "sarcasm")
    with pytest.raises(UserError, match="critic_classifier.path: .*sarcasm are none of the run's"):
        execute.run(smoke("--critic_classifier.path", path), folder)
    assert not folder.exists()
    with pytest.raises((UserError, ValueError), match="expected one critic"):
        smoke(
            "--critic_classifier.path", path, "--critic_endpoint.base_url", "http://127.0.0.1:9/v1",
            "--critic_endpoint.model", "tiny",
        )  # fmt: skip
