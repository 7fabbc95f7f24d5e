"""Who answers a judge's question: a chat model behind an endpoint, or one of our own models."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from rlbf_jax.endpoints.client import EndpointClient, EndpointError, Message, raise_hopeless
from rlbf_jax.endpoints.journal import Answer, NoAnswer, is_cut
from rlbf_jax.models import transformer
from rlbf_jax.parallel import hosts
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.sampler import Sampler
from rlbf_jax.sampling.scoring import pack_traces, score

Conversation = Sequence[Message]

CHARACTERS_PER_TOKEN = 4
"""Rule of thumb for English text, used where the judging model's tokenizer is out of reach."""
_SCORE_BUCKET = 64


class Answerer(Protocol):
    """A model that can be asked."""

    name: str

    def ask(
        self, conversations: Sequence[Conversation], max_tokens: int, words: Sequence[str]
    ) -> list[str | NoAnswer]:
        """Answers in order, a failure in the place of one that did not come.

        Args:
            conversations: messages, the last one the user's.
            max_tokens: most tokens of an answer.
            words: the answer begins with one of these; answers are `Answer`s with the first token's
                log-probabilities, where the model gives any. Empty: nobody wants to know.
        """
        ...

    def keep(self, failures: Iterable[NoAnswer]) -> None:
        """The caller goes on without these answers, and must do the same when it is resumed."""
        ...

    def clip(self, text: str, tokens: int) -> str:
        """At most the first `tokens` tokens of a text."""
        ...


class HttpAnswerer:
    """A chat model behind an endpoint.

    Args:
        client: asks.
        option: the option that holds the endpoint's settings, for messages.
        top_logprobs: so many likeliest first tokens are asked for;
          0: none, for endpoints that refuse the field.
        **params: further fields of every request, as `temperature`.
    """

    def __init__(self, client: EndpointClient, option: str, top_logprobs: int = 5, **params: Any):
        self.client = client
        self.option = option
        self.top_logprobs = top_logprobs
        self.params = params
        self.name = f"http {client.config.model}"

    def ask(
        self, conversations: Sequence[Conversation], max_tokens: int, words: Sequence[str]
    ) -> list[str | NoAnswer]:
        """See `Answerer`. Of several processes the first one asks, so that nothing is paid for
        twice and the budget is one; the others are told. Raises UserError for a wrong key, address
        or model name, or a spent budget."""
        if not hosts.several():
            return self._answers(conversations, max_tokens, words)
        answers: list[str | NoAnswer] = []

        def told() -> list[dict[str, Any]]:
            answers.extend(self._answers(conversations, max_tokens, words))
            return [_telling(answer) for answer in answers]

        heard = hosts.from_first(told)
        return answers if hosts.is_first() else [_told(telling) for telling in heard]

    def _answers(
        self, conversations: Sequence[Conversation], max_tokens: int, words: Sequence[str]
    ) -> list[str | NoAnswer]:
        more = (
            {"logprobs": True, "top_logprobs": self.top_logprobs}
            if words and self.top_logprobs
            else {}
        )
        answers = self.client.chat_many(conversations, **self.params, max_tokens=max_tokens, **more)
        raise_hopeless(answers, self.option)
        return list(answers)

    def keep(self, failures: Iterable[NoAnswer]) -> None:
        self.client.keep(f for f in failures if isinstance(f, EndpointError))

    def clip(self, text: str, tokens: int) -> str:
        """At four characters a token: the model's tokenizer is not here."""
        return text[: CHARACTERS_PER_TOKEN * tokens]


def _telling(answer: str | NoAnswer) -> dict[str, Any]:
    """An answer as JSON, for the other processes of a run."""
    if isinstance(answer, NoAnswer):
        status = getattr(answer, "status", None)
        return {"error": str(answer), "kind": answer.kind, "status": status}
    first = getattr(answer, "first_token", None)
    return {"answer": str(answer), "first_token": first, "cut": is_cut(answer)}


def _told(telling: Mapping[str, Any]) -> str | NoAnswer:
    if "error" in telling:
        return EndpointError(telling["error"], telling["kind"], telling["status"])
    return Answer(telling["answer"], telling["first_token"], telling["cut"])


class ModelAnswerer:
    """One of our own models, greedy, directives forbidden: a verdict is not taken back.

    Messages are joined by empty lines into one user's turn. What they say is text, so no control or
    template id comes of it. The first token's log-probabilities are exact, for every word: those of
    the words' own first ids.
    """

    def __init__(self, sampler: Sampler, params: dict, name: str):
        self.sampler = sampler
        self.params = params
        self.name = name

    def ask(
        self, conversations: Sequence[Conversation], max_tokens: int, words: Sequence[str]
    ) -> list[str | NoAnswer]:
        """See `Answerer`. A conversation that is too long for the model gets no answer."""
        prompts = ["\n\n".join(message["content"] for message in c) for c in conversations]
        knobs = Knobs(temperature=0.0, max_tokens=max_tokens).without_directives()
        answers: list[str | NoAnswer] = []
        fitting, ids = [], []
        for prompt in prompts:
            encoded = self.sampler.tokenizer.encode_prompt(prompt)
            if len(encoded) + max_tokens > self._longest:
                answers.append(NoAnswer(f"the prompt has {len(encoded)} ids", "prompt too long"))
                continue
            answers.append("")
            fitting.append(Request(prompt, (), knobs))
            ids.append(encoded)
        generations = self.sampler(self.params, fitting, 0)
        firsts = self._first(ids, words) if words and ids else [None] * len(ids)
        said = iter(
            [
                Answer(g.text, first, not g.finished)
                for g, first in zip(generations, firsts, strict=True)
            ]
        )
        return [a if isinstance(a, NoAnswer) else next(said) for a in answers]

    def keep(self, failures: Iterable[NoAnswer]) -> None:
        """Nothing to keep: the same question fails again."""

    def clip(self, text: str, tokens: int) -> str:
        ids = self.sampler.tokenizer.encode(text)
        return text if len(ids) <= tokens else self.sampler.tokenizer.decode(ids[:tokens])

    @property
    def _longest(self) -> int:
        model, most = self.sampler.model, self.sampler.config.max_context
        return (
            min(most, model.max_positions)
            if model.learned_positions and model.max_positions is not None
            else most
        )

    def _first(
        self, prompts: Sequence[Sequence[int]], words: Sequence[str]
    ) -> list[dict[str, float] | None]:
        """Log-probability of each word's first ids after each prompt, at temperature 1."""
        starts = first_ids(self.sampler.tokenizer, words)
        if not all(starts.values()):
            return [None] * len(prompts)
        rule, semantics = self.sampler.rule, self.sampler.config.semantics
        knobs = Knobs(max_tokens=1).without_directives()
        rows = [(prompt, token) for prompt in prompts for ids in starts.values() for token in ids]
        width = transformer.padded_width(
            self.sampler.model, max(map(len, prompts)) + 1, _SCORE_BUCKET
        )
        size = self.sampler.config.batch_size
        found: list[float] = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            padded = part + part[-1:] * (size - len(part))  # one shape, one compilation
            traces = pack_traces(
                [_one_id(prompt, token, knobs) for prompt, token in padded], rule, width
            )
            logprobs = np.asarray(_scores(self.sampler.model, rule, semantics, self.params, traces))
            found += [float(logprobs[i, len(prompt)]) for i, (prompt, _) in enumerate(part)]
        values = iter(found)
        return [
            {word: _logsumexp([next(values) for _ in ids]) for word, ids in starts.items()}
            for _ in prompts
        ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(model, rule, semantics, params, traces):
    return score(model, params, rule, traces, semantics).logprobs


def _one_id(prompt: Sequence[int], token: int, knobs: Knobs) -> Generation:
    """A response of one id, to be scored."""
    trace, none = np.asarray([token], np.int32), np.zeros(1, np.float32)
    return Generation(
        "",
        trace,
        (),
        none,
        (token,),
        np.asarray(prompt, np.int32),
        0,
        False,
        0,
        Request("", (), knobs),
    )


def first_ids(tokenizer, words: Sequence[str]) -> dict[str, list[int]]:
    """Ids that begin each word, with or without a space before it or a capital;
    ids that begin two words are none's."""
    found = {
        word: {
            ids[0]
            for text in (word, word.capitalize(), f" {word}")
            if (ids := tokenizer.encode(text))
        }
        for word in words
    }
    return {
        word: sorted(ids - {i for other, theirs in found.items() if other != word for i in theirs})
        for word, ids in found.items()
    }


def _logsumexp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(v - most) for v in values))


def share_of(
    first_token: Mapping[str, float] | None, word: str, words: Sequence[str]
) -> float | None:
    """Probability that an answer begins with `word`, given that it begins with one of `words`.

    A token counts for the one word that it begins (letter case and blanks aside: "un" begins
    "unsafe"); one that could begin several counts for none. None where no token counts.
    """
    mass = dict.fromkeys(words, 0.0)
    for token, logprob in (first_token or {}).items():
        begun = [
            w
            for w in words
            if (said := token.strip().lower()) and (w == said or w.startswith(said))
        ]
        if len(begun) == 1:
            mass[begun[0]] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return mass[word] / total if total > 0 else None
