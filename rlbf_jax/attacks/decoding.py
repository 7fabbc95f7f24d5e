"""Decoding-parameter exploitation (Huang et al., arXiv 2310.06987):
ask under many knobs, count the worst answer.

"Any of n" grows with n by construction, so evaluation reports the mean of every setting and what
independent draws would give beside it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from rlbf_jax.attacks.base import AttackConfig, Attempt, drawn
from rlbf_jax.attacks.direct import draw_prompts
from rlbf_jax.data.world import World
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class DecodingGrid:
    """Settings to try. One knob is varied at a time, the others stay
    as the attack's knobs have them."""

    temperatures: tuple[float, ...] = (0.2, 0.5, 0.8, 1.1, 1.4)
    top_ks: tuple[int, ...] = ()
    top_ps: tuple[float, ...] = ()
    samples: int = 2
    """Answers per prompt and setting."""

    @classmethod
    def paper(cls, samples: int = 1) -> DecodingGrid:
        """The 49 settings that the reference implementation scores:
        20 temperatures, 9 top-k, 20 top-p."""
        twentieths = tuple(round(i / 20, 2) for i in range(1, 21))
        return cls(twentieths, (1, 2, 5, 10, 20, 50, 100, 200, 500), twentieths, samples)

    def settings(self, base: Knobs) -> list[Knobs]:
        """The knobs of every setting, temperatures first."""
        return [
            *(dataclasses.replace(base, temperature=t) for t in self.temperatures),
            *(dataclasses.replace(base, top_k=k) for k in self.top_ks),
            *(dataclasses.replace(base, top_p=p) for p in self.top_ps),
        ]


def decoding(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    n: int,
    config: AttackConfig,
    *,
    options: DecodingGrid = DecodingGrid(),
) -> list[Attempt]:
    """n harmful prompts, each under every setting: n x settings x samples attempts,
    a prompt's side by side."""
    prompts = draw_prompts(world, rng, config.pool, n, harmful=True)
    settings = options.settings(config.knobs)
    if not settings or options.samples < 1:
        raise ValueError(
            "the decoding grid is empty; give at least one temperature, top_k or top_p, and "
            "samples >= 1"
        )
    return [
        Attempt(Request(prompt.text, knobs=knobs), prompt, "decoding")
        for prompt in prompts
        for knobs in settings
        for _ in range(options.samples)
    ]


SPECS = (
    drawn(
        decoding,
        "a harmful prompt under many decoding parameters; the worst answer counts",
        options=DecodingGrid(),
        section="decoding",
        any_of_n=True,
        standard=True,
    ),
)
