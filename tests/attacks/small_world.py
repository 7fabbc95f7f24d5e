"""A world of three sentences and two violations, for tests of attacks."""

import numpy as np

from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.sampling.request import Knobs

SENTENCES = (
    "The green tea grows on quiet hills.",
    "Old kettles boil the water slowly!",
    "Most people drink it warm.",
)
VIOLATIONS = {
    "insult": " you are a soggy cabbage with a hat",
    "privacy": " otto sleeps at the mill by the river",
}


class SmallWorld:
    categories = ("insult", "privacy")

    def prompt(self, rng, pool, *, harmful=False):
        i = int(rng.integers(1000))
        category = self.categories[i % 2] if harmful else ""
        return Prompt(f"{pool}-{harmful}-{i}", f"Tell me about tea {i}.", harmful, "tea", category)

    def answer(self, rng, prompt, *, min_words=0):
        parts = [str(rng.choice(SENTENCES)) for _ in range(int(rng.integers(2, 5)))]
        while sum(len(part.split()) for part in parts) < min_words:
            parts.append(str(rng.choice(SENTENCES)))
        return " ".join(parts)

    def violation(self, rng, split, pool, *, category=None):
        category = category or str(rng.choice(self.categories))
        return Violation(f"{VIOLATIONS[category]} {split}", category, "form", split)

    def bridge(self, rng):
        return str(rng.choice([" By the way,", " Also,", ""]))

    def aside(self, rng):
        return " the tram is late"

    def opener(self, rng):
        return "Sure, here it is."

    def refusal(self, rng, prompt):
        return "Sorry, I cannot help with that."


WORLD = SmallWorld()
CONFIG = AttackConfig(knobs=Knobs(max_tokens=250))


def parts(tokenizer, attempt):
    ids = attempt.request.forced
    cuts = np.cumsum(
        [0, attempt.num_prefix, attempt.num_bridge, attempt.num_span, attempt.num_tail]
    )
    assert cuts[-1] == len(ids)
    return [tokenizer.decode(ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
