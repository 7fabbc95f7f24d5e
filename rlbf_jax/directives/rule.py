"""What every edit rule is made of: semantics, limits, state, and the algebra (state, id) -> state.

1. `Semantics`: does a retraction leave the context (`REWIND`) or only the reader's view (`KEEP`).
2. `Limits`, `EditState`: arrays of rows; the caller chooses the first,
   the second is what a row has done.
3. `EditRule`: vocabulary of control ids, `step` (state, id) -> state,
   `legal` (which ids may come next).

Letters: B rows, T padded time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

NEVER = int(np.iinfo(np.int32).max)
"""`died` and `erased` of an id that stays."""


class Semantics(enum.Enum):
    """What dies at a directive."""

    KEEP = "keep"
    """Nothing: later tokens still see erased words; the output handler edits (RLBF, BSAFE, RESET as
    published)."""
    REWIND = "rewind"
    """The erased ids and the directive:
    the id after a directive is drawn from the directive's query, which sees everything;
    as queries, that id and all later ones see live ids only (ours)."""


class Limits(NamedTuple):
    """What a response may do. Stored with its trace, because the legality of an id depends on it.

    All arrays are [B]; forced ids count against every one of them.
    """

    max_emitted: Array
    """int32: most ids a response may emit, control ids included."""
    budget: Array
    """int32: most directives a response may start (lone categories count)."""
    forbid_from: Array
    """int32: no directive may start while `forbid_from <= emitted < forbid_to`."""
    forbid_to: Array
    """int32: see `forbid_from`. (0, NEVER) forbids directives everywhere, (k, NEVER) after the k-th
    id."""
    grammar: Array
    """bool: after a category only a retraction is legal, and a retraction nowhere else. Under a
    rule that copies: only a copy, and then a retraction."""


class EditState(NamedTuple):
    """What a response has done so far. All arrays share one shape, [B] in the sampler."""

    emitted: Array
    """int32: ids emitted, forced and control ids included. Never goes down; also counts random
    draws."""
    visible: Array
    """int32: response ids the reader sees now."""
    pending: Array
    """bool: a category is open, still waiting for its retraction."""
    copied: Array
    """int32: ids since an open flag that are a copy, hence invisible; 0 under rules without
    copies."""
    directives: Array
    """int32: directives started."""
    retractions: Array
    """int32: retractions executed."""
    retracted: Array
    """int32: content ids removed so far, in total."""
    clamped: Array
    """int32: retractions that asked for more ids than were visible."""
    malformed: Array
    """int32: categories that something else than a retraction followed."""
    uncategorized: Array
    """int32: retractions without a category, under a rule that has categories."""


class Legal(NamedTuple):
    """Which kinds of id may come next; [B] bool each."""

    content: Array
    category: Array
    retraction: Array


CONTENT, CATEGORY, RETRACTION = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class EditRule:
    """Vocabulary, step and grammar of one kind of directive.

    Control ids are contiguous from `first_id`: the categories, then the retractions. A rule is
    hashable and is passed to jitted functions as a static argument or closed over.

    A category is *open* until its retraction. Under most rules that is the next id, and anything
    else drops the category; under a rule that copies, content may stand between the two.
    """

    kind: ClassVar[str]
    """What the rule is called in settings and files: `backtrack`, `reset` or `replace`."""
    copies: ClassVar[bool] = False
    """Content after an open category is a copy: never visible, and the category stays open."""
    start_room: ClassVar[int] = 3
    """Ids that must be left where a category starts: a shortest directive and one id more."""

    first_id: int
    categories: tuple[str, ...] = ()
    never: tuple[int, ...] = ()
    """Ids that are never legal in a response: padding, template ids, another rule's control ids."""
    vocab_size: int | None = dataclasses.field(default=None, kw_only=True)
    """Ids of the tokenizer. A model may have more rows (padding of its tables), and none of those
    is ever legal. None: every row of the model has an id."""

    @property
    def num_retractions(self) -> int:
        raise NotImplementedError

    def amount(self, token, copied=0):
        """Visible ids that a retraction removes, before clamping.

        Args:
            token: id of the retraction; an int, or int32 of any shape.
            copied: `EditState.copied` before it, alike.
        """
        raise NotImplementedError

    def name(self, token: int) -> str:
        """`[CATEGORY_C]`, `[BACKTRACK_BY_X]`, `[RESET]`,
        `[FLAG_C]` or `[REPLACE]`, for a control id."""
        raise NotImplementedError

    def rewound(self, budget: int, room: int) -> int:
        """Most cache slots that a row takes back under REWIND, in total.

        Args:
            budget: most directives of the row.
            room: most ids it emits. No rule can take back more: every position of a response lies
                less than that above the prompt's end.
        """
        return room

    # Vocabulary ---------------------------------------------------------------------------------

    @property
    def num_controls(self) -> int:
        return len(self.categories) + self.num_retractions

    @property
    def first_retraction(self) -> int:
        return self.first_id + len(self.categories)

    @property
    def end_id(self) -> int:
        """One past the last control id."""
        return self.first_id + self.num_controls

    def is_category(self, token):
        return (token >= self.first_id) & (token < self.first_retraction)

    def is_retraction(self, token):
        return (token >= self.first_retraction) & (token < self.end_id)

    def is_control(self, token):
        return (token >= self.first_id) & (token < self.end_id)

    def category_id(self, category: str) -> int:
        """Id of a category's token. Raises KeyError for a category the rule does not have."""
        try:
            return self.first_id + self.categories.index(category)
        except ValueError:
            raise KeyError(
                f"unknown category {category!r}; this rule has {', '.join(self.categories)}"
            ) from None

    def names(self) -> list[str]:
        return [self.name(i) for i in range(self.first_id, self.end_id)]

    # Algebra ------------------------------------------------------------------------------------

    def initial(self, shape: tuple[int, ...]) -> EditState:
        zero, no = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
        return EditState(zero, zero, no, zero, zero, zero, zero, zero, zero, zero)

    def step(self, state: EditState, token: Array) -> EditState:
        """The state after `token` ([...] int32). Any id is accepted, legal or not."""
        category, retraction = self.is_category(token), self.is_retraction(token)
        content = ~(category | retraction)
        copy = content & state.pending & self.copies
        asked = jnp.where(retraction, self.amount(token, state.copied), 0)
        removed = jnp.minimum(asked, state.visible)
        bare = retraction & ~state.pending
        return EditState(
            emitted=state.emitted + 1,
            visible=state.visible + (content & ~copy) - removed,
            pending=category | copy,
            copied=jnp.where(copy, state.copied + 1, 0),
            directives=state.directives + (category | bare),
            retractions=state.retractions + retraction,
            retracted=state.retracted + removed,
            clamped=state.clamped + self.clamps(asked, state.visible),
            malformed=state.malformed + (state.pending & ~retraction & ~copy),
            uncategorized=state.uncategorized + (bare & bool(self.categories)),
        )

    def clamps(self, asked, visible):
        """Whether a retraction asked for more than there is."""
        return asked > visible

    def offset(self, state: EditState, token: Array, semantics: Semantics) -> Array:
        """Live response ids before `token`, if it is emitted next:
        its position minus the prompt's length.

        Under REWIND an open category, and what was copied since, is alive only for ids that do not
        drop it: the retraction that closes it and, under a rule that copies, content.
        """
        if semantics is Semantics.KEEP:
            return state.emitted
        goes_on = ~self.is_category(token) if self.copies else self.is_retraction(token)
        return state.visible + jnp.where(state.pending & goes_on, 1 + state.copied, 0)

    def legal(self, state: EditState, limits: Limits) -> Legal:
        """Which kinds of id may come next: budget, room, forbidden windows
        and grammar, in one place.

        Budget and room (`start_room` ids for a category, 2 for a bare retraction) are checked when
        a directive starts. The retraction that closes an open category is always legal.
        """
        remaining = limits.max_emitted - state.emitted
        forbidden = (limits.forbid_from <= state.emitted) & (state.emitted < limits.forbid_to)
        may_start = (state.directives < limits.budget) & ~forbidden
        must_close = state.pending & limits.grammar
        bare = may_start & (remaining >= 2)
        if self.categories:
            bare &= ~limits.grammar
        return Legal(
            content=~must_close,
            category=may_start & (remaining >= self.start_room) & ~must_close,
            retraction=state.pending | bare,
        )

    def within(self, vocab_size: int) -> EditRule:
        """The same rule, under which ids from `vocab_size` on are never legal."""
        if self.vocab_size is not None and self.vocab_size <= vocab_size:
            return self
        return dataclasses.replace(self, vocab_size=vocab_size)

    def legal_ids(self, legal: Legal, vocab_size: int) -> Array:
        """[..., V] bool: the same verdict, per id of a model with V rows. `never` ids and rows that
        the tokenizer does not know are illegal always."""
        kind = np.full(vocab_size, CONTENT)
        kind[self.first_id : self.first_retraction] = CATEGORY
        kind[self.first_retraction : self.end_id] = RETRACTION
        allowed = np.ones(vocab_size, bool)
        allowed[[i for i in self.never if i < vocab_size]] = False
        allowed[vocab_size if self.vocab_size is None else self.vocab_size :] = False
        content, category, retraction = (x[..., None] for x in legal)
        return (
            jnp.where(kind == CONTENT, content, jnp.where(kind == CATEGORY, category, retraction))
            & allowed
        )
