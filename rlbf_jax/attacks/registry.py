"""Every attack, drawn or searched, in one list, and what follows from it.

A new attack is one file with `SPECS` and one line in `ATTACKS`. The sets of names below are views:
they hold what the list holds at the moment, so an attack that a program adds to `ATTACKS` is known
to suites, records and reports too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set

from rlbf_jax.attacks import decoding, direct
from rlbf_jax.attacks.base import AttackSpec, Scene, Victim
from rlbf_jax.attacks.forced import further, geometry, late, middle_filling, prefilling
from rlbf_jax.attacks.search import optimized, rank_prefilling

__all__ = ["ATTACKS", "STANDARD", "AttackSpec", "Names", "Scene", "Victim", "spec_of"]

ATTACKS: dict[str, AttackSpec] = {
    spec.name: spec
    for spec in (
        *direct.SPECS,
        *prefilling.SPECS,
        *middle_filling.SPECS,
        *decoding.SPECS,
        *geometry.SPECS,
        *late.SPECS,
        *further.SPECS,
        *optimized.SPECS,
        *rank_prefilling.SPECS,
    )
}
"""THE list. The order is that of default evaluations and of the report's rows."""

STANDARD = tuple(name for name, spec in ATTACKS.items() if spec.standard)
"""What every evaluation runs by default."""


def spec_of(name: str) -> AttackSpec:
    """The attack of a name. Raises ValueError for an unknown one, naming all."""
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}; there are {', '.join(ATTACKS)}")
    return ATTACKS[name]


class Names(Set[str]):
    """Names of the attacks for which something holds now."""

    def __init__(self, holds: Callable[[AttackSpec], bool]):
        self._holds = holds

    @classmethod
    def _from_iterable(cls, it: Iterable[str]) -> frozenset[str]:  # type: ignore[override]
        return frozenset(it)

    def __contains__(self, name: object) -> bool:
        spec = ATTACKS.get(name) if isinstance(name, str) else None
        return spec is not None and self._holds(spec)

    def __iter__(self) -> Iterator[str]:
        return (name for name, spec in ATTACKS.items() if self._holds(spec))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{{{', '.join(self)}}}"


HAS_FORMS = Names(lambda spec: spec.has_forms)
"""Attacks that force a violation of a form split, hence are run once a split."""
BENIGN = Names(lambda spec: spec.benign)
"""Attacks in which nothing bad is asked or forced: every directive is a false one."""
WHOLE = Names(lambda spec: spec.whole)
"""Attacks that force a whole violation, so that a model that cannot erase scores asr 1."""
WORST_OF_N = Names(lambda spec: spec.any_of_n)
"""Attacks that ask a prompt many times: asr is read as any of the answers."""
SEARCHED = Names(lambda spec: spec.searched)
"""Attacks that are made for one checkpoint; `rlbf attack` runs them."""
DRAWN = Names(lambda spec: not spec.searched)
"""Attacks that are the same for every model, hence fit into a suite."""
