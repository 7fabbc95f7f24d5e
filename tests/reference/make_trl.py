"""Reference losses and gradients of TRL's own `GRPOTrainer` and `RLOOTrainer`, on random inputs.

    python tests/reference/make_trl.py OUT.npz
        with trl 1.16.0 and torch (CPU, float64)

`trl.npz` beside this file is what it writes: for each variant `NAME.loss` and `NAME.grad`, the
gradient by the log-probability of every id, and the inputs that all share. The trainers are not
set up: their `_compute_loss` is called with a stand-in that has the settings it reads.
"""

from __future__ import annotations

import sys
from unittest import mock

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

ROWS, TIME, MOST = 6, 9, 12
VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "kl": {"loss_type": "bnpo", "beta": 0.3},
}
CLIP = 0.2


def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Log-probabilities that are far enough apart for some ratios to be clipped."""
    lengths = np.asarray([TIME, 3, 1, 6, TIME, 4])
    new = -rng.exponential(1.5, (ROWS, TIME))
    return {
        "new": new,
        "old": new + rng.normal(0, 0.25, new.shape),
        "reference": new + rng.normal(0, 0.4, new.shape),
        "mask": (np.arange(TIME) < lengths[:, None]).astype(np.float64),
        "advantage": rng.normal(0, 1, ROWS),
    }


def trainer(logprobs: torch.Tensor, **settings) -> mock.MagicMock:
    """What `_compute_loss` reads of a trainer."""
    own = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "grpo",
        "epsilon_low": CLIP,
        "epsilon_high": CLIP,
        "use_vllm": False,
        "max_completion_length": MOST,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
    }
    made = mock.MagicMock(**(own | settings))
    made.args.delta = None
    made.args.use_bias_correction_kl = False
    made.args.steps_per_generation = 1
    made.accelerator.num_processes = 1
    made.accelerator.gather = made.accelerator.gather_for_metrics = lambda tensor: tensor
    made.accelerator.reduce = lambda tensor, **how: tensor
    made._get_per_token_logps_and_entropies = lambda *a, **k: (
        logprobs, torch.zeros_like(logprobs), None,
    )  # fmt: skip
    return made


def recorded(of: type, arrays: dict[str, np.ndarray], **settings) -> tuple[float, np.ndarray]:
    """Loss and gradient."""
    new = torch.tensor(arrays["new"], requires_grad=True)
    mask = torch.tensor(arrays["mask"])
    ids = torch.zeros((ROWS, TIME), dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(arrays["advantage"]),
        "old_per_token_logps": torch.tensor(arrays["old"]),
        "old_logps": (torch.tensor(arrays["old"]) * mask).sum(1),
        "ref_per_token_logps": torch.tensor(arrays["reference"]),
        "num_items_in_batch": mask.sum(),
    }
    loss = of._compute_loss(trainer(new, **settings), None, batch)
    loss.backward()
    return loss.item(), new.grad.numpy()


def main() -> None:
    arrays = inputs(np.random.default_rng(0))
    out = dict(arrays)
    for name, settings in VARIANTS.items():
        out[f"{name}.loss"], out[f"{name}.grad"] = recorded(GRPOTrainer, arrays, **settings)
    fresh = arrays | {"old": arrays["new"]}  # RLOO's one update a batch
    out["rloo.loss"], out["rloo.grad"] = recorded(RLOOTrainer, fresh)
    np.savez_compressed(sys.argv[1], **{name: np.asarray(value) for name, value in out.items()})


if __name__ == "__main__":
    main()
