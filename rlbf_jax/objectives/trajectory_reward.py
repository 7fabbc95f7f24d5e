"""RLBF's trajectory reward (arXiv 2602.08377, reward table of section 3), one pure function."""

from __future__ import annotations

import dataclasses

from rlbf_jax.ranges import check_finite


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The five values are the paper's; everything below them is ours and off by default."""

    violation: float = -1.0
    """No directive, and the critic finds a violation."""
    clean: float = 1.0
    """No directive, and it finds none."""
    unneeded: float = -0.5
    """A directive whose retracted ids held no violation. With several directives any unneeded one
    gives this value (our choice: the paper's table is written for one)."""
    recovered: float = 1.0
    """Directives needed, and the resulting text is safe, coherent and useful."""
    failed: float = -0.2
    """Directives needed, and the resulting text is unsafe, incoherent or not useful."""
    residue_is_unsafe: bool = False
    """Count a begun violation left in the final text as unsafe. The paper leaves it to its critic;
    an exact lexicon would otherwise call a violation minus its last word safe."""
    torn_is_failed: bool = False
    """Count a recovery that an erasure left torn (half a word, a bridge or an opener with nothing
    behind it) as `failed`. Ours, and off: in the paper's table such a text is `recovered` wherever
    its critic calls it coherent and useful, so an erasure that is a few ids too short is paid like
    a clean one. Needs a critic of seams, which the setting has; a seam that it cannot judge is not
    torn."""
    poor: float | None = None
    """No directive, nothing unsafe, but incoherent or not useful; None: as `clean`. The paper's
    critic prompt treats really bad quality as something to fix, and its table has no value for it.
    At toy scale the policy otherwise learns to say less and less."""
    price_wrong_category: float = 0.0
    """Taken off per directive that names another category than those of the violations it took
    back, where the critic names them. The paper's table does not read the category."""
    price_on_harmless: float = 0.0
    """Taken off a response with directives in which the critic never found a violation, on top of
    `unneeded`: a false backtrack on what only looks like one."""
    price_per_retracted: float = 0.0
    """Taken off per retracted id: in the paper's table violating and taking back pays
    as much as clean text."""
    price_regenerated: float = 0.0
    """Taken off when a violation that was taken back is written again. The paper leaves open
    whether its penalty for this stands in the reward or in the update; ours stands here."""
    price_per_extra: float = 0.0
    """Taken off a recovered response per id erased outside the violating sentence
    (overlap shaping)."""
    most_extra: int = 6
    """Extra ids beyond this cost no more."""

    def __post_init__(self):
        check_finite(self, "violation", "clean", "unneeded", "recovered", "failed", "poor")
        check_finite(self, "price_per_retracted", "price_regenerated", "price_per_extra")
        check_finite(self, "price_wrong_category", "price_on_harmless")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the table reads."""

    has_directive: bool
    retracted_bad: bool
    """Every directive's retracted text overlaps a complete or begun violation."""
    final_safe: bool
    coherent: bool
    useful: bool
    retracted: int = 0
    """Ids retracted in all."""
    extra: int = 0
    """Ids retracted outside the violating sentences."""
    regenerated: bool = False
    """A retracted violation came back, word for word, later in the response."""
    wrong_categories: int = 0
    """Directives whose category is none of those of the violations that they took back."""
    harmless: bool = False
    """No text of the response that the critic saw held a violation, nor the beginning of one."""
    torn: bool | None = None
    """An erasure left the final text torn; None: nobody asked."""


def trajectory_reward(outcome: Outcome, config: RewardConfig = RewardConfig()) -> float:
    """The reward of one response, given once, at its end."""
    if not outcome.has_directive:
        if not outcome.final_safe:
            return config.violation
        good = outcome.coherent and outcome.useful
        return config.clean if good or config.poor is None else config.poor
    reward = config.failed
    torn = bool(outcome.torn) and config.torn_is_failed
    if not outcome.retracted_bad:
        reward = config.unneeded
    elif outcome.final_safe and outcome.coherent and outcome.useful and not torn:
        reward = config.recovered - config.price_per_extra * min(outcome.extra, config.most_extra)
    return (
        reward
        - config.price_per_retracted * outcome.retracted
        - config.price_regenerated * outcome.regenerated
        - config.price_wrong_category * outcome.wrong_categories
        - config.price_on_harmless * outcome.harmless
    )
