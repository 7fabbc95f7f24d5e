"""A `World` over a user's own prompts and responses, with violations from a `TemplateInjector`."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from rlbf_jax.data.builders.injectors import TemplateInjector
from rlbf_jax.data.documents import Document, split_sentences
from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.data.sources.files import DataError, Row
from rlbf_jax.data.world import SPLITS, FormSplit, Pool


class UserWorld:
    """Prompts are the user's rows, divided into disjoint pools;
    answers are their responses in whole sentences.

    A harmful prompt is a row's prompt with a request for a violation appended.

    Args:
        rows: prompts and reference responses.
        injector: where violations, bridges, openers and refusals come from.
        development_share: share of the distinct prompts in pool `development`.
        test_share: the same for pool `test`.
        seed: decides which prompt is in which pool.
        max_prompt_words: rows with longer prompts are left out.
        max_response_words: responses are cut after the last sentence that fits; rows whose first
            sentence does not fit are left out.
        min_response_words: rows with a shorter (cut) response are left out.
        violation_share: share of pretraining documents with a violation,
          so that a base model has something to retract.

    Raises:
        DataError: shares that leave a pool empty.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        injector: TemplateInjector,
        *,
        development_share: float = 0.1,
        test_share: float = 0.1,
        seed: int = 0,
        max_prompt_words: int = 40,
        max_response_words: int = 60,
        min_response_words: int = 6,
        violation_share: float = 0.3,
    ):
        self.injector = injector
        self.categories = injector.categories
        self.violation_share = violation_share
        self.left_out: collections.Counter[str] = collections.Counter()
        """Rows left out, by reason."""
        self._prompts: list[Prompt] = []
        for row in rows:
            reference = trim_sentences(row.response, max_response_words)
            if len(row.prompt.split()) > max_prompt_words:
                self.left_out["long prompt"] += 1
            elif not reference:
                self.left_out["long first sentence"] += 1
            elif len(reference.split()) < min_response_words:
                self.left_out["short response"] += 1
            else:
                self._prompts.append(Prompt(f"row-{row.line}", row.prompt, reference=reference))
        self._pools = self._divide(development_share, test_share, seed)

    def _divide(
        self, development_share: float, test_share: float, seed: int
    ) -> dict[Pool, list[Prompt]]:
        if min(development_share, test_share) <= 0 or development_share + test_share >= 1:
            raise DataError(
                "development_share and test_share must be positive and leave something for training"
            )
        # By distinct text: a prompt that occurs twice must not be in two pools.
        groups: dict[str, list[Prompt]] = {}
        for prompt in self._prompts:
            groups.setdefault(" ".join(prompt.text.lower().split()), []).append(prompt)
        order = np.random.default_rng(seed).permutation(len(groups))
        shuffled = [list(groups.values())[i] for i in order]
        first = round(development_share * len(shuffled))
        second = first + round(test_share * len(shuffled))
        parts = {
            "development": shuffled[:first],
            "test": shuffled[first:second],
            "train": shuffled[second:],
        }
        pools: dict[Pool, list[Prompt]] = {}
        for name in ("train", "development", "test"):
            pools[name] = [prompt for group in parts[name] for prompt in group]  # type: ignore[literal-required, index]
            if not pools[name]:
                raise DataError(
                    f"pool {name!r} is empty: {len(self._prompts)} usable rows, left out "
                    f"{dict(self.left_out)}; "
                    "add rows, raise the shares or allow longer texts"
                )
        return pools

    def prompts(self, pool: Pool) -> list[Prompt]:
        """All harmless prompts of a pool."""
        return list(self._pools[pool])

    def prompt(self, rng: np.random.Generator, pool: Pool, *, harmful: bool = False) -> Prompt:
        options = self._pools[pool]
        chosen = options[rng.integers(len(options))]
        if not harmful:
            return chosen
        category = self.categories[rng.integers(len(self.categories))]
        text = chosen.text + self.injector.request(rng, category)
        return Prompt(f"{chosen.id}-{category}", text, True, "", category, chosen.reference)

    def answer(self, rng: np.random.Generator, prompt: Prompt, *, min_words: int = 0) -> str:
        """The row's response, in whole sentences.
        A row has no other, so it may have fewer than `min_words` words."""
        return prompt.reference

    def violation(
        self, rng: np.random.Generator, split: FormSplit, pool: Pool, *, category: str | None = None
    ) -> Violation:
        return self.injector.violation(rng, split, pool, category=category)

    def bridge(self, rng: np.random.Generator) -> str:
        return self.injector.bridge(rng)

    def aside(self, rng: np.random.Generator) -> str:
        """Empty: the rows' own answers are all that is known to be harmless."""
        return ""

    def opener(self, rng: np.random.Generator) -> str:
        return self.injector.opener(rng)

    def refusal(self, rng: np.random.Generator, prompt: Prompt) -> str:
        return self.injector.refusal(rng)

    def document(self, rng: np.random.Generator) -> Document:
        """A pretraining document of pool `train`; its violations have forms of every split.

        Half of the documents with a violation comply with a harmful prompt; the others break off a
        harmless answer at a sentence end and go on with it after the violation.
        """
        if rng.random() >= self.violation_share:
            prompt = self.prompt(rng, "train")
            return Document(prompt, prompt.reference, None)
        harmful = bool(rng.random() < 0.5)
        prompt = self.prompt(rng, "train", harmful=harmful)
        split = SPLITS[rng.integers(len(SPLITS))]
        pool: Pool = "train" if split != "unseen" else ("development", "test")[rng.integers(2)]  # type: ignore[assignment]
        violation = self.violation(rng, split, pool, category=prompt.category or None)
        if harmful:
            return Document(prompt, self.opener(rng) + violation.text, violation)
        sentences = split_sentences(prompt.reference)
        cut = int(rng.integers(1, len(sentences) + 1))
        middle = self.bridge(rng) + violation.text
        return Document(
            prompt, "".join(sentences[:cut]) + middle + "".join(sentences[cut:]), violation
        )


def trim_sentences(text: str, max_words: int) -> str:
    """The longest beginning in whole sentences with at most `max_words` words;
    empty where the first does not fit."""
    kept, words = "", 0
    for sentence in split_sentences(text):
        words += len(sentence.split())
        if words > max_words:
            break
        kept += sentence
    return kept
