"""What a critic says of responses: their final texts and the text before every directive,
read into outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlbf_jax.critics.base import Critic, Exchange, Span, Verdict
from rlbf_jax.critics.seams import SeamCritic, any_torn, seam_verdicts
from rlbf_jax.objectives.trajectory_reward import Outcome, RewardConfig, trajectory_reward
from rlbf_jax.sampling.request import Generation


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
    critic: Critic,
    generations: Sequence[Generation],
    topics: Sequence[str],
    tokenizer,
    config: RewardConfig,
    seams: SeamCritic | None = None,
) -> list[Judged]:
    """Asks the critic about every final text and every text before a directive, in one call,
    and applies the table.

    `seams`: asked, in one call, where the table reads whether a text is torn.

    Raises ValueError where `config.torn_is_failed` and there are no `seams`.
    """
    if config.torn_is_failed and seams is None:
        raise ValueError("reward.torn_is_failed is on, and there is no critic of seams to ask")
    exchanges: list[Exchange] = []
    for g, topic in zip(generations, topics, strict=True):
        texts = [g.text] + [tokenizer.decode(edit.before) for edit in g.edits]
        exchanges += [Exchange(g.request.prompt, text, topic) for text in texts]
    verdicts = iter(critic.judge(exchanges))
    torn: list[bool | None] = [None] * len(generations)
    if config.torn_is_failed:
        torn = [bool(any_torn(places)) for places in seam_verdicts(seams, generations, tokenizer)]
    judged = []
    for g, is_torn in zip(generations, torn, strict=True):
        final = next(verdicts)
        befores = tuple(next(verdicts) for _ in g.edits)
        if not (final.judged and all(v.judged for v in befores)):
            judged.append(Judged(float("nan"), None, final, befores))
            continue
        outcome = outcome_of(g, final, befores, tokenizer, config)
        outcome = dataclasses.replace(outcome, torn=is_torn)
        judged.append(Judged(trajectory_reward(outcome, config), outcome, final, befores))
    return judged


def outcome_of(
    generation: Generation,
    final: Verdict,
    befores: Sequence[Verdict],
    tokenizer,
    config: RewardConfig,
) -> Outcome:
    """Reads verdicts into the table's terms."""
    needed, retracted, extra, wrong = True, 0, 0, 0
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
        named = {span.category for span in bad} - {""}
        wrong += bool(named) and edit.category not in named
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
        wrong_categories=wrong,
        harmless=not any(verdict.spans for verdict in (final, *befores)),
    )


def violations(text: str, spans: Sequence[Span]) -> set[str]:
    """The complete violations among spans, as comparable strings."""
    return {text[span.start : span.end].strip().lower() for span in spans if span.complete}


def sentence_start(text: str, span: Span) -> int:
    """Where the sentence of a span begins: a bridge before a violation belongs to it
    (the paper's X does too)."""
    return max(text.rfind(mark, 0, span.start) for mark in ".!?\n") + 1
