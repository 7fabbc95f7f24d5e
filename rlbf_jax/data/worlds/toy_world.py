"""The embedded toy world: regular English on thirty-five topics, with harmless nonsense
as stand-in violations.

`ToyWorld` draws prompts, answers, violations and pretraining documents;
`toy_grammar.parse` reads its grammar back.

An answer is `[opener] [refusal] (sentence | aside)+`; any of them may begin with a bridge. So
bridges, openers and leaving the topic are by themselves no sign of a violation.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar, cast

import numpy as np

from rlbf_jax.data.documents import Document
from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.data.world import FormSplit, Pool
from rlbf_jax.data.worlds import toy_violations, toy_words

T = TypeVar("T")
_SLOT = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"\w+")
_UNSEEN_IN_TRAINING = "unseen forms are for evaluation only; ask for pool 'development' or 'test'"


@dataclasses.dataclass(frozen=True)
class Topic:
    """A topic and the words that belong to it alone."""

    name: str
    pool: Pool
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    places: tuple[str, ...]

    def words(self, role: str) -> tuple[str, ...]:
        """Words of a role: N, V, A, P, or T (the topic's name)."""
        return {
            "N": self.nouns,
            "V": self.verbs,
            "A": self.adjectives,
            "P": self.places,
            "T": (self.name,),
        }[role]


@dataclasses.dataclass(frozen=True)
class Form:
    """A template of violations."""

    name: str
    """`category_split_number`."""
    category: str
    split: FormSplit
    pool: Pool
    """The evaluation pool that the form belongs to, `development` or `test`;
    the `train` pool draws from both."""
    slots: tuple[tuple[str, ...], ...]
    """The words allowed at each place, in order; a fixed word is a tuple of one."""


@dataclasses.dataclass(frozen=True)
class ToyWorldConfig:
    """Shares of what the toy world draws, each in 0..1."""

    bridge_share: float = 0.08
    """Benign sentences that begin with a bridge."""
    aside_share: float = 0.06
    """Benign sentences that a harmless remark off the topic goes before."""
    aside_bridge_share: float = 0.8
    """Such remarks that follow a bridge."""
    lookalike_share: float = 0.7
    """Such remarks in the frame of a violation, with harmless words."""
    opener_share: float = 0.08
    """Answers to harmless prompts that begin with an opener."""
    harmful_share: float = 0.35
    """Documents whose prompt asks for a violation."""
    comply_share: float = 0.92
    """Documents with a harmful prompt that comply; the others refuse."""
    inject_share: float = 0.15
    """Documents with a harmless prompt and a violation all the same."""
    inject_bridge_share: float = 0.8
    """Such violations that follow a bridge."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise ValueError(
                    f"ToyWorldConfig.{field.name} is {value}; expected a share in 0..1"
                )


def _read_topics() -> tuple[Topic, ...]:
    pools: tuple[tuple[Pool, dict[str, str]], ...] = (
        ("train", toy_words.TRAIN_TOPICS),
        ("development", toy_words.DEVELOPMENT_TOPICS),
        ("test", toy_words.TEST_TOPICS),
    )
    return tuple(
        Topic(name, pool, *(tuple(part.split()) for part in words.split("/")))
        for pool, table in pools
        for name, words in table.items()
    )


def _read_forms() -> tuple[Form, ...]:
    forms = []
    for category, rows in toy_violations.FORMS.items():
        counts: Counter[str] = Counter()
        for split, pool, template in rows:
            counts[split] += 1
            slots = tuple(
                toy_violations.FILLERS[w[1:-1]] if w[0] == "{" else (w,) for w in template.split()
            )
            name = f"{category}_{split}_{counts[split]}"
            forms.append(Form(name, category, cast(FormSplit, split), cast(Pool, pool), slots))
    return tuple(forms)


TOPICS = _read_topics()
FORMS = _read_forms()


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    # Several times faster than rng.choice or rng.integers, and documents need dozens of draws.
    return items[int(rng.random() * len(items))]


def _template_parts(template: str) -> tuple[str, ...]:
    """Literal, slot, literal, slot, ..., literal."""
    return tuple(_SLOT.split(template))


def _fill(rng: np.random.Generator, template: str, topic: Topic, ask: str = "") -> str:
    values = {role: _pick(rng, topic.words(role)) for role in "NVAPT"} | {"ask": ask}
    parts = _template_parts(template)
    return "".join(values[part] if i % 2 else part for i, part in enumerate(parts))


class ToyWorld:
    """Implements `rlbf_jax.data.world.World`. Every method draws from `rng` alone."""

    def __init__(self, config: ToyWorldConfig = ToyWorldConfig()):
        self.config = config
        self.categories: tuple[str, ...] = tuple(toy_violations.FORMS)
        self.form_table: dict[str, Form] = {form.name: form for form in FORMS}
        self._topics: dict[str, Topic] = {topic.name: topic for topic in TOPICS}

    # Words ----------------------------------------------------------------------------------------

    @functools.cached_property
    def benign_words(self) -> frozenset[str]:
        """Lower-case words of prompts, sentences, bridges, openers and refusals."""
        texts = [*toy_words.SENTENCES, *toy_words.BRIDGES, *toy_words.OPENERS, *toy_words.REFUSALS]
        texts += [*toy_words.HARMLESS_PROMPTS, *toy_words.HARMFUL_PROMPTS]
        texts += [
            *toy_words.ASIDES,
            *toy_words.LOOKALIKES,
            *(ask for asks in toy_words.ASKS.values() for ask in asks),
        ]
        words = {w for text in texts for w in _WORD.findall(_SLOT.sub("", text).lower())}
        return frozenset(
            words.union(
                *(t.words(role) for t in TOPICS for role in "NVAPT"),
                *toy_words.ASIDE_FILLERS.values(),
            )
        )

    @functools.cached_property
    def leak_words(self) -> dict[str, str]:
        """Lower-case words that only violations contain, with their (first) category."""
        table: dict[str, str] = {}
        for form in FORMS:
            for word in {w for slot in form.slots for w in slot} - self.benign_words:
                table.setdefault(word, form.category)
        return table

    # The World protocol ---------------------------------------------------------------------------

    def prompt(self, rng: np.random.Generator, pool: Pool, *, harmful: bool = False) -> Prompt:
        """A prompt on a topic of the pool. Raises ValueError for an unknown pool."""
        topics = _POOL_TOPICS.get(pool)
        if topics is None:
            raise ValueError(f"unknown pool {pool!r}; expected one of {', '.join(_POOL_TOPICS)}")
        return self._prompt(rng, _pick(rng, topics), harmful)

    def answer(self, rng: np.random.Generator, prompt: Prompt, *, min_words: int = 0) -> str:
        """Two to five sentences on the prompt's topic (more until `min_words`);
        a refusal first if it is harmful."""
        if prompt.topic not in self._topics:
            raise ValueError(
                f"prompt {prompt.id!r}: topic {prompt.topic!r} is no topic of the toy world"
            )
        if prompt.harmful:
            parts, count = [self.refusal(rng, prompt)], 2 + int(rng.random() * 3)
        else:
            parts = [self.opener(rng)] if rng.random() < self.config.opener_share else []
            count = 2 + int(rng.random() * 4)
        parts += self._sentences(rng, self._topics[prompt.topic], count)
        missing = min_words - sum(len(part.split()) for part in parts)
        while missing > 0:
            more = self._sentences(rng, self._topics[prompt.topic], 1, avoid=parts)
            missing -= len(more[0].split())
            parts += more
        return " ".join(parts)

    def violation(
        self, rng: np.random.Generator, split: FormSplit, pool: Pool, *, category: str | None = None
    ) -> Violation:
        """See `World.violation`. Raises ValueError for unseen forms in the train pool
        and for unknown names."""
        if split == "unseen" and pool == "train":
            raise ValueError(_UNSEEN_IN_TRAINING)
        return _say(rng, _pick(rng, _select(split, None if pool == "train" else pool, category)))

    def bridge(self, rng: np.random.Generator) -> str:
        return " " + _pick(rng, toy_words.BRIDGES)

    def aside(self, rng: np.random.Generator) -> str:
        lookalike = rng.random() < self.config.lookalike_share
        parts = _template_parts(_pick(rng, toy_words.LOOKALIKES if lookalike else toy_words.ASIDES))
        words = (
            _pick(rng, toy_words.ASIDE_FILLERS[part]) if i % 2 else part
            for i, part in enumerate(parts)
        )
        return " " + "".join(words)

    def opener(self, rng: np.random.Generator) -> str:
        return _pick(rng, toy_words.OPENERS)

    def refusal(self, rng: np.random.Generator, prompt: Prompt) -> str:
        return _pick(rng, toy_words.REFUSALS)

    # Beyond the protocol --------------------------------------------------------------------------

    def forms(self, split: FormSplit | None = None, pool: Pool | None = None) -> list[Form]:
        """Forms of a split (None: all) that a pool may draw from (None: all).
        Raises ValueError if there are none."""
        if pool != "train":
            return list(_select(split, pool, None))
        if split == "unseen":
            raise ValueError(_UNSEEN_IN_TRAINING)
        return [form for form in _select(split, None, None) if form.split != "unseen"]

    def any_violation(self, rng: np.random.Generator, category: str | None = None) -> Violation:
        """A violation of any form of any split, for pretraining:
        the base model has seen everything."""
        return _say(rng, _pick(rng, _select(None, None, category)))

    def document(self, rng: np.random.Generator) -> Document:
        """A pretraining document over all topics; shares are in the configuration."""
        config, topic = self.config, _pick(rng, TOPICS)
        harmful = rng.random() < config.harmful_share
        prompt = self._prompt(rng, topic, harmful)
        if harmful and rng.random() < config.comply_share:
            violation = self.any_violation(rng, prompt.category)
            rest = self._sentences(rng, topic, int(rng.random() * 3))
            return Document(
                prompt, " ".join([self.opener(rng) + violation.text + ".", *rest]), violation
            )
        if harmful or rng.random() >= config.inject_share:
            return Document(prompt, self.answer(rng, prompt), None)
        violation = self.any_violation(rng)
        bridge = self.bridge(rng) if rng.random() < config.inject_bridge_share else ""
        before = self._sentences(rng, topic, 1 + int(rng.random() * 3))
        if rng.random() < config.opener_share:
            before.insert(0, self.opener(rng))
        after = self._sentences(rng, topic, int(rng.random() * 3), avoid=before)
        return Document(
            prompt, " ".join([" ".join(before) + bridge + violation.text + ".", *after]), violation
        )

    def _prompt(self, rng: np.random.Generator, topic: Topic, harmful: bool) -> Prompt:
        category = _pick(rng, self.categories) if harmful else ""
        ask = _pick(rng, toy_words.ASKS[category]) if harmful else ""
        text = _fill(
            rng,
            _pick(rng, toy_words.HARMFUL_PROMPTS if harmful else toy_words.HARMLESS_PROMPTS),
            topic,
            ask,
        )
        digest = hashlib.blake2s(text.encode(), digest_size=6).hexdigest()
        return Prompt(
            f"{topic.name}-{category or 'harmless'}-{digest}", text, harmful, topic.name, category
        )

    def _sentences(
        self, rng: np.random.Generator, topic: Topic, count: int, avoid: Sequence[str] = ()
    ) -> list[str]:
        used, sentences = set(avoid), []
        for _ in range(count):
            if rng.random() < self.config.aside_share:
                remark = self.aside(rng)[1:]
                bridged = rng.random() < self.config.aside_bridge_share
                remark = (
                    f"{_pick(rng, toy_words.BRIDGES)} {remark}"
                    if bridged
                    else remark[0].upper() + remark[1:]
                )
                sentences.append(f"{remark}.")
            sentence = _fill(rng, _pick(rng, toy_words.SENTENCES), topic)
            for _ in range(4):
                if sentence not in used:
                    break
                sentence = _fill(rng, _pick(rng, toy_words.SENTENCES), topic)
            used.add(sentence)
            if rng.random() < self.config.bridge_share:
                sentence = f"{_pick(rng, toy_words.BRIDGES)} {sentence[0].lower()}{sentence[1:]}"
            sentences.append(sentence)
        return sentences


_POOL_TOPICS: dict[str, tuple[Topic, ...]] = {
    pool: tuple(t for t in TOPICS if t.pool == pool) for pool in ("train", "development", "test")
}


@functools.cache
def _select(split: FormSplit | None, pool: Pool | None, category: str | None) -> tuple[Form, ...]:
    chosen = tuple(
        form
        for form in FORMS
        if split in (None, form.split)
        and pool in (None, form.pool)
        and category in (None, form.category)
    )
    if not chosen:
        raise ValueError(
            f"no form of violation has split {split!r}, pool {pool!r}, category {category!r}; "
            "splits are sft, rl, "
            f"unseen, pools train, development, test, categories {', '.join(toy_violations.FORMS)}"
        )
    return chosen


def _say(rng: np.random.Generator, form: Form) -> Violation:
    words = [slot[0] if len(slot) == 1 else _pick(rng, slot) for slot in form.slots]
    return Violation(" " + " ".join(words), form.category, form.name, form.split)
