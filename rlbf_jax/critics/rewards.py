"""From verdicts to a reward: RLBF's trajectory table (section 1.5 of the paper notes) as one pure function."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlbf_jax.critics.base import Critic, Exchange, Span, Verdict
from rlbf_jax.ranges import check_finite
from rlbf_jax.sampling.request import Generation


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The five values are the paper's; everything below them is ours and off by default."""

    violation: float = -1.0
    """No directive, and the critic finds a violation."""
    clean: float = 1.0
    """No directive, and it finds none."""
    unneeded: float = -0.5
    """A directive whose retracted ids held no violation. With several directives any unneeded one gives this value
    (our choice: the paper's table is written for one)."""
    recovered: float = 1.0
    """Directives needed, and the resulting text is safe, coherent and useful."""
    failed: float = -0.2
    """Directives needed, and the resulting text is unsafe, incoherent or not useful."""
    residue_is_unsafe: bool = False
    """Count a begun violation left in the final text as unsafe. The paper leaves it to its critic; an exact lexicon
    would otherwise call a violation minus its last word safe."""
    poor: float | None = None
    """No directive, nothing unsafe, but incoherent or not useful; None: as `clean`. The paper's critic prompt treats
    really bad quality as something to fix, and its table has no value for it. At toy scale the policy otherwise learns
    to say less and less."""
    price_per_retracted: float = 0.0
    """Taken off per retracted id: in the paper's table violating and taking back pays as much as clean text."""
    price_regenerated: float = 0.0
    """Taken off when a violation that was taken back is written again. The paper leaves open whether its penalty for
    this stands in the reward or in the update; ours stands here."""
    price_per_extra: float = 0.0
    """Taken off a recovered response per id erased outside the violating sentence (overlap shaping)."""
    most_extra: int = 6
    """Extra ids beyond this cost no more."""

    def __post_init__(self):
        check_finite(self, "violation", "clean", "unneeded", "recovered", "failed", "poor")
        check_finite(self, "price_per_retracted", "price_regenerated", "price_per_extra")


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


def trajectory_reward(outcome: Outcome, config: RewardConfig = RewardConfig()) -> float:
    """The reward of one response, given once, at its end."""
    if not outcome.has_directive:
        if not outcome.final_safe:
            return config.violation
        good = outcome.coherent and outcome.useful
        return config.clean if good or config.poor is None else config.poor
    reward = config.failed
    if not outcome.retracted_bad:
        reward = config.unneeded
    elif outcome.final_safe and outcome.coherent and outcome.useful:
        reward = config.recovered - config.price_per_extra * min(outcome.extra, config.most_extra)
    return reward - config.price_per_retracted * outcome.retracted - config.price_regenerated * outcome.regenerated


@dataclasses.dataclass(frozen=True)
class Judged:
    """A response with what the critic said of it."""

    reward: float
    """NaN where the critic could not judge."""
    outcome: Outcome | None
    final: Verdict
    at_directives: tuple[Verdict, ...]
    """Verdicts on the visible text just before each directive."""


def judge_generations(
    critic: Critic, generations: Sequence[Generation], topics: Sequence[str], tokenizer, config: RewardConfig
) -> list[Judged]:
    """Asks the critic about every final text and every text before a directive, in one call, and applies the table."""
    exchanges: list[Exchange] = []
    for g, topic in zip(generations, topics, strict=True):
        texts = [g.text] + [tokenizer.decode(edit.before) for edit in g.edits]
        exchanges += [Exchange(g.request.prompt, text, topic) for text in texts]
    verdicts = iter(critic.judge(exchanges))
    judged = []
    for g in generations:
        final = next(verdicts)
        befores = tuple(next(verdicts) for _ in g.edits)
        if not (final.judged and all(v.judged for v in befores)):
            judged.append(Judged(float("nan"), None, final, befores))
            continue
        outcome = outcome_of(g, final, befores, tokenizer, config)
        judged.append(Judged(trajectory_reward(outcome, config), outcome, final, befores))
    return judged


def outcome_of(
    generation: Generation, final: Verdict, befores: Sequence[Verdict], tokenizer, config: RewardConfig
) -> Outcome:
    """Reads verdicts into the table's terms."""
    needed, retracted, extra = True, 0, 0
    known: set[str] = set()
    regenerated = False
    for edit, verdict in zip(generation.edits, befores, strict=True):
        offsets = tokenizer.offsets(edit.before)
        text = tokenizer.decode(edit.before)
        removed = offsets[edit.kept :]
        cut = removed[0][0] if removed else len(text)
        bad = [span for span in verdict.spans if span.end > cut]
        needed &= bool(bad)
        regenerated |= bool(known & violations(text, verdict.spans))
        known |= violations(text, bad)
        retracted += len(removed)
        if bad:
            first = min(sentence_start(text, span) for span in bad)
            extra += sum(end <= first for _, end in removed)
    unsafe = bool(final.spans) if config.residue_is_unsafe else not final.safe
    return Outcome(
        has_directive=bool(generation.edits) or generation.malformed > 0,
        retracted_bad=bool(generation.edits) and needed,
        final_safe=not unsafe,
        coherent=final.coherent is not False,
        useful=final.useful is not False,
        retracted=retracted,
        extra=extra,
        regenerated=regenerated or bool(known & violations(generation.text, final.spans)),
    )


def violations(text: str, spans: Sequence[Span]) -> set[str]:
    """The complete violations among spans, as comparable strings."""
    return {text[span.start : span.end].strip().lower() for span in spans if span.complete}


def sentence_start(text: str, span: Span) -> int:
    """Where the sentence of a span begins: a bridge before a violation belongs to it (the paper's X does too)."""
    return max(text.rfind(mark, 0, span.start) for mark in ".!?\n") + 1
