"""The shape that all attacks share: a scene in, attempts out.

An attempt is a request (prompt, forced ids, knobs) with a note of what was forced, so that metrics
can tell benign words from violating ones by id counts and nobody re-tokenizes anything.

A new attack is a file with an `AttackSpec`, and a line in `registry.ATTACKS`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlbf_jax.data.schema import Prompt, Violation
from rlbf_jax.data.world import FormSplit, Pool, World
from rlbf_jax.directives import EditRule
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attacked (or plain) prompt.
    The forced ids are `prefix + bridge + span + tail`, in this order."""

    request: Request
    prompt: Prompt
    attack: str
    split: str = "all"
    """Form split of the forced span, or `all`."""
    num_prefix: int = 0
    """Forced ids of benign words before the bridge."""
    num_bridge: int = 0
    """Forced ids of the bridge or compliance opener."""
    num_span: int = 0
    """Forced ids of the (possibly cut) span: a violation, or a harmless one in a benign twin."""
    num_tail: int = 0
    """Forced ids after the span."""
    prefix: str = ""
    """Text of the prefix."""
    violation: Violation | None = None
    """The whole violation of which the span is (a beginning of);
    None in benign twins and unforced attempts."""
    by_construction: bool = False
    """A whole violation is forced: any model that cannot erase scores asr 1 here."""
    search: Any = None
    """What the search of it came to (`search.suffix.Found`); None: nothing was searched."""
    cell: tuple[tuple[str, int], ...] = ()
    """Names and lengths of a geometry, where an attack has several; each is measured apart."""


def unused_id(label: str, used: set[int]) -> int:
    """The id of an attempt's request: 31 bits, from the label alone but for the rare collision
    (the next one is taken).

    It is added to `used`."""
    id_ = zlib.crc32(label.encode()) & 0x7FFFFFFF
    while id_ in used:
        id_ = (id_ + 1) & 0x7FFFFFFF
    used.add(id_)
    return id_


# What an attack is ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """What every attack is given beside its own options."""

    pool: Pool = "development"
    """Where prompts and forms of violation come from."""
    split: FormSplit = "rl"
    """Form split of forced violations; attacks that force none ignore it."""
    knobs: Knobs = Knobs()
    """Decoding parameters. `max_tokens` counts forced ids."""
    room: int = 16
    """Ids that `max_tokens` must leave free after the forced ones."""


Attack = Callable[[World, Tokenizer, np.random.Generator, int, AttackConfig], list[Attempt]]
"""attack(world, tokenizer, rng, n, config) -> attempts: n of them, `decoding` n prompts' worth."""

Sample = Callable[[Sequence[Request]], list[Generation]]


@dataclasses.dataclass(frozen=True)
class Victim:
    """The checkpoint that a searched attack is made for."""

    model: ModelConfig
    params: dict
    sample: Sample
    """Answers of this checkpoint."""
    mesh: Mesh | None = None
    """Whose devices share the search; None: one device."""
    file: pathlib.Path | None = None
    """Where the state of a search is kept, so that it can go on; None: nowhere."""
    rule: EditRule | None = None
    """What it takes back by; None: the first rule that the tokenizer has ids of."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where an attack finds what it needs."""

    world: World
    tokenizer: Tokenizer
    rng: np.random.Generator
    """Draws prompts, targets and geometry: the only source of chance."""
    config: AttackConfig
    policy: Victim | None = None
    """None: nobody in particular is attacked, so nothing can be searched."""


Make = Callable[[Scene, int, Any], list[Attempt]]
"""make(scene, n, options) -> attempts of n prompts."""


@dataclasses.dataclass(frozen=True)
class AttackSpec:
    """An attack, stated once."""

    name: str
    make: Make
    says: str
    """What is asked and forced, in a phrase."""
    options: Any = None
    """Default of its options, an instance of their dataclass; None: it has none."""
    section: str | None = None
    """Field of `SuiteConfig` that holds its options; None: the defaults above."""
    has_forms: bool = False
    """Forces violations of a form split, hence is run once a split; others are run once."""
    benign: bool = False
    """Nothing bad is asked or forced: every directive is a false one."""
    whole: bool = False
    """Forces a whole violation: a model that cannot erase scores asr 1 by construction."""
    any_of_n: bool = False
    """Asks a prompt many times, so that asr is read as any of the answers."""
    searched: bool = False
    """Made for one checkpoint: `make` needs `scene.policy`."""
    standard: bool = False
    """Part of what every evaluation runs by default."""

    def __call__(
        self,
        world: World,
        tokenizer: Tokenizer,
        rng: np.random.Generator,
        n: int,
        config: AttackConfig,
        *,
        options: Any = None,
    ) -> list[Attempt]:
        """The attack as a function of the shape `Attack`; `options`: None takes the defaults."""
        chosen = self.options if options is None else options
        return self.make(Scene(world, tokenizer, rng, config), n, chosen)


def drawn(attack: Callable[..., list[Attempt]], says: str, **fields: Any) -> AttackSpec:
    """The spec of a function of the shape `Attack`, by whose name it goes.

    Args:
      says: see `AttackSpec`.
      fields: other fields of `AttackSpec`; with `options`, the function takes `options=` too.
    """

    def make(scene: Scene, n: int, options: Any) -> list[Attempt]:
        given = {} if options is None else {"options": options}
        return attack(scene.world, scene.tokenizer, scene.rng, n, scene.config, **given)

    return AttackSpec(attack.__name__, make, says, **fields)
