"""Losses and gradients that TRL's own trainers gave for the same numbers.

`tests/reference/make_trl.py` recorded them; the names are those of docs/objectives.md.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.objectives.masked import masked_term
from rlbf_jax.objectives.policy import clipped_surrogate, kl_estimate
from rlbf_jax.training.policy import PolicyConfig

TRL = dict(np.load(pathlib.Path(__file__).parents[1] / "reference" / "trl.npz"))
MOST = 12
"""`max_completion_length` of the recording."""
SETTINGS = {
    "grpo": {"algorithm": "grpo", "normalization": "sequence"},
    "bnpo": {"algorithm": "grpo", "normalization": "token"},
    "dr_grpo": {"algorithm": "dr_grpo"},
    "dapo": {"algorithm": "dapo"},
    "gspo": {"algorithm": "grpo", "normalization": "sequence", "ratio": "sequence"},
    "kl": {"algorithm": "grpo", "normalization": "token", "kl_weight": 0.3},
    "rloo": {"algorithm": "rloo"},
}


def loss_of(config, old):
    """The policy loss (and KL) of a configuration, as a function of the log-probabilities."""
    action = jnp.asarray(TRL["mask"] > 0)
    advantage = jnp.where(action, jnp.asarray(TRL["advantage"], jnp.float32)[:, None], 0.0)
    reference = jnp.asarray(TRL["reference"], jnp.float32)

    def loss(new):
        chosen = config.chosen
        policy, _ = clipped_surrogate(
            new, old, advantage, action, config.clip, chosen.normalization,
            clip_high=chosen.clip_high, ratio=config.ratio, most=MOST,
        )  # fmt: skip
        kl = masked_term(kl_estimate(new, reference, config.kl_estimator), action)
        return policy.mean + config.kl_weight * kl.mean

    return loss


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_those_of_trl(name):
    config = PolicyConfig(**SETTINGS[name])
    new = jnp.asarray(TRL["new"], jnp.float32)
    old = new if name == "rloo" else jnp.asarray(TRL["old"], jnp.float32)
    loss, grad = jax.value_and_grad(loss_of(config, old))(new)
    if name != "rloo":  # whose loss is of whole responses, not of ids; its gradient is what counts
        np.testing.assert_allclose(loss, TRL[f"{name}.loss"], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(grad, TRL[f"{name}.grad"], rtol=1e-5, atol=1e-6)


def test_the_recording_clips_on_either_side_and_tells_the_variants_apart():
    ratio = np.exp(TRL["new"] - TRL["old"])[TRL["mask"] > 0]
    assert (ratio < 0.8).any() and (ratio > 1.28).any() and (abs(ratio - 1.24) < 0.04).any()
    grads = [TRL[f"{name}.grad"] for name in SETTINGS]
    for i, one in enumerate(grads):
        assert all(abs(one - other).max() > 1e-3 for other in grads[:i])
