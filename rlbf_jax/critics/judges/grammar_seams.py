"""The critic of seams in the toy world: by the world's grammar."""

from __future__ import annotations

from collections.abc import Sequence

from rlbf_jax.critics.seams import Stitched
from rlbf_jax.data.worlds.toy_grammar import torn_at


class GrammarSeams:
    """A seam is torn where `toy_grammar.torn_at` says that the grammar could not have made the text
    around it."""

    name = "toy_grammar"

    def torn(self, answers: Sequence[Stitched]) -> list[tuple[bool | None, ...]]:
        """One tuple an answer; every seam can be judged."""
        return [
            tuple(torn_at(answer.generation.text, seam.at) for seam in answer.seams)
            for answer in answers
        ]
