"""Every critic that a setting can name, in one list.

A new critic is one file with a function `World -> Critic`, and one line in `CRITICS`. Critics that
need more than a name (an endpoint, a folder) are settings of their own: `runs.critics`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.toy_lexicon import toy_lexicon
from rlbf_jax.data.world import World

CRITICS: dict[str, Callable[[World], Critic]] = {
    "toy_lexicon": toy_lexicon,
}
"""THE list: what `--critic` of a run and of `rlbf audit` reads."""


def critic_named(name: str, world: World) -> Critic:
    """The critic of a name, for texts of a world.

    Raises ValueError for a name that the list does not have, with the nearest match, and for a
    critic that cannot judge this world.
    """
    if name not in CRITICS:
        near = difflib.get_close_matches(name, CRITICS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CRITICS)}"
        raise ValueError(f"no critic is called {name!r}; {hint}")
    return CRITICS[name](world)
