"""Seams: places in a final text where something was taken back, and whether they are torn.

An erasure that is one id too short or too long leaves half a word, a bridge ("By the way,") with
nothing behind it, or an opener without its sentence. No violation is left then, and the words at
large may pass for coherent, so the critic and the judge do not see it; a critic of seams does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from rlbf_jax.directives import Edit
from rlbf_jax.sampling.request import Generation


@dataclasses.dataclass(frozen=True)
class Seam:
    """A place in a final visible text where something was taken back."""

    index: int
    """Of the first visible id behind it; the number of visible ids where the text ends there."""
    at: int
    """The character at which the text goes on; the length of the text where it ends there."""


@dataclasses.dataclass(frozen=True)
class Stitched:
    """A response with the seams of its final text, from left to right."""

    generation: Generation
    seams: tuple[Seam, ...]


@dataclasses.dataclass(frozen=True)
class SeamVerdict:
    """What a critic of seams says of one."""

    at: int
    """`Seam.at`."""
    torn: bool | None
    """None: it cannot say, or nobody was asked."""


class SeamCritic(Protocol):
    """Says of every seam whether it is torn: whether the text around it is not what an untouched
    text could be."""

    name: str

    def torn(self, answers: Sequence[Stitched]) -> list[tuple[bool | None, ...]]:
        """One tuple an answer, in order, with one verdict a seam; None: it cannot say."""
        ...


def seam_indices(edits: Sequence[Edit]) -> tuple[int, ...]:
    """Where the final text has seams, as `Seam.index`, ascending.

    Directives that take back at one place, one after the other, leave one seam, and one that takes
    back across an older seam takes that seam with it. A directive that removed nothing leaves none.
    With nothing kept there still is a seam, at 0: a reset may go on in mid-sentence.
    """
    found: list[int] = []
    for edit in edits:
        if edit.removed:
            found = [index for index in found if index < edit.kept] + [edit.kept]
    return tuple(found)


def stitched(generation: Generation, tokenizer) -> Stitched:
    """A response with its seams, found in its edits."""
    indices = seam_indices(generation.edits)
    if not indices:
        return Stitched(generation, ())
    starts = [start for start, _ in tokenizer.offsets(generation.visible)]
    starts.append(len(generation.text))
    return Stitched(generation, tuple(Seam(index, starts[index]) for index in indices))


def seam_verdicts(
    critic: SeamCritic | None, generations: Sequence[Generation], tokenizer
) -> list[tuple[SeamVerdict, ...]]:
    """Asks about every seam of every response, in one call; None: nobody is asked."""
    answers = [stitched(generation, tokenizer) for generation in generations]
    asked = [answer for answer in answers if answer.seams]
    told: list[tuple[bool | None, ...]] = [(None,) * len(answer.seams) for answer in asked]
    if critic is not None and asked:
        told = critic.torn(asked)
    by_answer = {id(answer): torn for answer, torn in zip(asked, told, strict=True)}
    return [
        tuple(
            SeamVerdict(seam.at, torn)
            for seam, torn in zip(answer.seams, by_answer.get(id(answer), ()), strict=True)
        )
        for answer in answers
    ]


def any_torn(seams: Sequence[SeamVerdict]) -> bool | None:
    """Whether some seam of a response is torn. None: it has no seam, or none is known to be torn
    and some could not be judged."""
    if any(seam.torn for seam in seams):
        return True
    return None if not seams or any(seam.torn is None for seam in seams) else False
