"""A critic that asks a language model: any `JudgeFormat` over any `Answerer`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from rlbf_jax.critics.base import Exchange, Verdict
from rlbf_jax.critics.language.answerers import Answerer
from rlbf_jax.critics.language.judge_formats import JudgeFormat
from rlbf_jax.endpoints.client import EndpointError
from rlbf_jax.endpoints.journal import NoAnswer, is_cut
from rlbf_jax.errors import UserError


class LanguageModelCritic:
    """Judges texts by asking a language model; a `Critic`.

    Args:
        answerer: who is asked.
        form: how it is asked, and how its answers are read.
        max_unjudged: largest share of a batch that may stay unjudged.
        option: the option that holds the settings, for messages.
    """

    def __init__(
        self,
        answerer: Answerer,
        form: JudgeFormat,
        *,
        max_unjudged: float = 1.0,
        option: str = "language model",
    ):
        self.answerer = answerer
        self.form = form
        self.max_unjudged = max_unjudged
        self.option = option
        self.name = f"{answerer.name} ({form.name})"
        self.reasons: collections.Counter[str] = collections.Counter()
        """Why texts could not be judged, and how many of them."""

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange, in order. Distinct exchanges are asked once.

        A text without a word is judged without asking: it violates nothing and helps nobody.

        Raises:
            UserError: more texts than `max_unjudged` allows could not be judged; over HTTP also a
                wrong key, address or model name, or a spent budget. Every answer is kept, and no
                failure is: it is asked again by a resumed run.
        """
        asked = list({_key(e): e for e in exchanges if e.text.strip()}.values())
        conversations = [self.form.render(exchange, self.answerer.clip) for exchange in asked]
        answers = self.answerer.ask(conversations, self.form.max_tokens, self.form.words)
        verdicts = {
            _key(e): self._read(answer, e) for e, answer in zip(asked, answers, strict=True)
        }
        unjudged = collections.Counter(v.reason for v in verdicts.values() if not v.judged)
        self._check(unjudged, len(asked), answers)
        self.answerer.keep(a for a in answers if isinstance(a, NoAnswer))
        self.reasons += unjudged
        nothing = Verdict(coherent=False, useful=False, reason="no text")
        return [verdicts.get(_key(e), nothing) for e in exchanges]

    def _read(self, answer: str | NoAnswer, exchange: Exchange) -> Verdict:
        if isinstance(answer, NoAnswer):
            where = "endpoint: " if isinstance(answer, EndpointError) else ""
            return Verdict(judged=False, reason=f"{where}{answer.kind}")
        if self.form.needs_end and is_cut(answer):
            return Verdict(judged=False, reason="cut off")
        return self.form.parse(answer, exchange)

    def _check(
        self, unjudged: collections.Counter[str], total: int, answers: Sequence[str | NoAnswer]
    ) -> None:
        if unjudged.total() <= self.max_unjudged * total:
            return
        reasons = ", ".join(f"{reason} {n}" for reason, n in unjudged.most_common())
        last = next((f"; for instance {a}" for a in answers if isinstance(a, NoAnswer)), "")
        raise UserError(
            f"{self.option}: {unjudged.total()} of {total} texts could not be judged "
            f"({reasons}){last}; max_unjudged "
            f"is {self.max_unjudged:g}. Mend the endpoint or raise --{self.option}.max_unjudged, "
            "then start the same "
            "command again: it goes on from its last checkpoint, with every answer kept"
        )


def _key(exchange: Exchange) -> Exchange:
    """What decides the answer: the topic is not shown."""
    return dataclasses.replace(exchange, topic="")
