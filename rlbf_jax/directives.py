"""Edit rules: which emitted ids a reader sees, and which ids later queries may still attend to.

The ground floor of the project; everything that samples, scores, trains or evaluates shares the rule
objects of this file. In order:

1. `Semantics`: does a retraction leave the context (`REWIND`) or only the reader's view (`KEEP`).
2. `Limits`, `EditState`: per-row arrays; the first is chosen by the caller, the second is what a row has done.
3. `EditRule`: vocabulary of control ids, `step` (state, id) -> state, `legal` (which ids may come next).
   `BacktrackRule` is RLBF's `[CATEGORY_c] [BACKTRACK_BY_X]`; `ResetRule` is RESET's single token.
4. `layout`: positions and lifetimes of every id of (packed) rows, for one teacher-forced pass.
5. `render`: the output handler in plain Python: ids -> visible ids and the list of edits.

Letters: B rows, T padded time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NEVER = int(np.iinfo(np.int32).max)
"""`died` and `erased` of an id that stays."""


class Semantics(enum.Enum):
    """What dies at a directive."""

    KEEP = "keep"
    """Nothing: later tokens still see erased words; the output handler edits (RLBF, BSAFE, RESET as published)."""
    REWIND = "rewind"
    """The erased ids and the directive: the id after a directive is drawn from the directive's query, which sees
    everything; as queries, that id and all later ones see live ids only (ours)."""


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
    """int32: see `forbid_from`. (0, NEVER) forbids directives everywhere, (k, NEVER) after the k-th id."""
    grammar: Array
    """bool: after a category only a retraction is legal, and a retraction nowhere else."""


class EditState(NamedTuple):
    """What a response has done so far. All arrays share one shape, [B] in the sampler."""

    emitted: Array
    """int32: ids emitted, forced and control ids included. Never goes down; also counts random draws."""
    visible: Array
    """int32: response ids the reader sees now."""
    pending: Array
    """bool: the last id was a category, still waiting for its retraction."""
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

    Control ids are contiguous from `first_id`: the categories, then the retractions. A rule is hashable and is
    passed to jitted functions as a static argument or closed over.
    """

    first_id: int
    categories: tuple[str, ...] = ()
    never: tuple[int, ...] = ()
    """Ids that are never legal in a response: padding, template ids, another rule's control ids."""

    @property
    def num_retractions(self) -> int:
        raise NotImplementedError

    def amount(self, token: Array | np.ndarray | int):
        """Visible ids that a retraction id removes, before clamping."""
        raise NotImplementedError

    def name(self, token: int) -> str:
        """`[CATEGORY_C]`, `[BACKTRACK_BY_X]` or `[RESET]`, for a control id."""
        raise NotImplementedError

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
            raise KeyError(f"unknown category {category!r}; this rule has {', '.join(self.categories)}") from None

    def names(self) -> list[str]:
        return [self.name(i) for i in range(self.first_id, self.end_id)]

    # Algebra ------------------------------------------------------------------------------------

    def initial(self, shape: tuple[int, ...]) -> EditState:
        zero = jnp.zeros(shape, jnp.int32)
        return EditState(zero, zero, jnp.zeros(shape, bool), zero, zero, zero, zero, zero, zero)

    def step(self, state: EditState, token: Array) -> EditState:
        """The state after `token` ([...] int32). Any id is accepted, legal or not."""
        category, retraction = self.is_category(token), self.is_retraction(token)
        content = ~(category | retraction)
        asked = jnp.where(retraction, self.amount(token), 0)
        removed = jnp.minimum(asked, state.visible)
        bare = retraction & ~state.pending
        return EditState(
            emitted=state.emitted + 1,
            visible=state.visible + content - removed,
            pending=category,
            directives=state.directives + (category | bare),
            retractions=state.retractions + retraction,
            retracted=state.retracted + removed,
            clamped=state.clamped + self.clamps(asked, state.visible),
            malformed=state.malformed + (state.pending & ~retraction),
            uncategorized=state.uncategorized + (bare & bool(self.categories)),
        )

    def clamps(self, asked, visible):
        """Whether a retraction asked for more than there is."""
        return asked > visible

    def offset(self, state: EditState, token: Array, semantics: Semantics) -> Array:
        """Live response ids before `token`, if it is emitted next: its position minus the prompt's length.

        Under REWIND a pending category is alive only for the retraction that closes it.
        """
        if semantics is Semantics.KEEP:
            return state.emitted
        return state.visible + (state.pending & self.is_retraction(token))

    def legal(self, state: EditState, limits: Limits) -> Legal:
        """Which kinds of id may come next: budget, room, forbidden windows and grammar, in one place.

        Budget and room (3 ids for category, retraction and one more; 2 for a bare retraction) are checked when a
        directive starts. The retraction that closes an open category is always legal.
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
            category=may_start & (remaining >= 3) & ~must_close,
            retraction=state.pending | bare,
        )

    def legal_ids(self, legal: Legal, vocab_size: int) -> Array:
        """[..., V] bool: the same verdict, per id. `never` ids are illegal always."""
        kind = np.full(vocab_size, CONTENT)
        kind[self.first_id : self.first_retraction] = CATEGORY
        kind[self.first_retraction : self.end_id] = RETRACTION
        allowed = np.ones(vocab_size, bool)
        allowed[[i for i in self.never if i < vocab_size]] = False
        content, category, retraction = (x[..., None] for x in legal)
        return jnp.where(kind == CONTENT, content, jnp.where(kind == CATEGORY, category, retraction)) & allowed


@dataclasses.dataclass(frozen=True)
class BacktrackRule(EditRule):
    """RLBF (arXiv 2602.08377, section 3): `[CATEGORY_c]` then `[BACKTRACK_BY_X]`, X in 1..x_max.

    X counts visible response ids; control ids are never visible and never counted. X beyond the text clamps.
    The paper does not state the range of X.
    """

    x_max: int = 32

    @property
    def num_retractions(self) -> int:
        return self.x_max

    def amount(self, token):
        return token - self.first_retraction + 1

    def backtrack_id(self, x: int) -> int:
        """Id of `[BACKTRACK_BY_x]`. Raises ValueError outside 1..x_max: X is never clamped when we build data."""
        if not 1 <= x <= self.x_max:
            raise ValueError(f"X = {x} is outside 1..{self.x_max}; raise x_max or split the span")
        return self.first_retraction + x - 1

    def name(self, token: int) -> str:
        if self.is_category(token):
            return f"[CATEGORY_{self.categories[token - self.first_id].upper()}]"
        return f"[BACKTRACK_BY_{self.amount(token)}]"


@dataclasses.dataclass(frozen=True)
class ResetRule(EditRule):
    """RESET (arXiv 2409.14586): one token that removes the whole visible response. The usual budget is 1."""

    @property
    def num_retractions(self) -> int:
        return 1

    def amount(self, token):
        return token * 0 + NEVER

    def clamps(self, asked, visible):
        return (asked > visible) & False

    def name(self, token: int) -> str:
        if self.is_category(token):
            return f"[CATEGORY_{self.categories[token - self.first_id].upper()}]"
        return "[RESET]"


# Lifetimes --------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where every id of a batch of rows stands. Arrays are [B, T]; times are indices into T."""

    position: Array
    """int32: live ids before this one, prompt included, within its packing segment."""
    died: Array
    """int32: query i of the same segment sees key j iff j <= i < died[j]. NEVER if it stays."""
    erased: Array
    """int32: one past the retraction that removed this content id from the reader's view, whatever the semantics."""
    before: EditState
    """The state before each id, from which its legality follows. Zero outside responses."""


def layout(rule: EditRule, tokens: Array, segment: Array, in_response: Array, semantics: Semantics) -> Layout:
    """Positions and lifetimes of rows that may pack several examples.

    Args:
      tokens: [B, T] int32, each segment a prompt followed by a response.
      segment: [B, T] int32, constant within an example, 0 for padding.
      in_response: [B, T] bool, true for emitted ids (forced ones included).
    """
    time = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], 1)

    def advance(carry, column):
        state, prompt = carry
        token, start, responding = column
        fresh = rule.initial(token.shape)
        state = jax.tree.map(lambda zero, old: jnp.where(start, zero, old), fresh, state)
        prompt = jnp.where(start, 0, prompt)
        position = prompt + jnp.where(responding, rule.offset(state, token, semantics), 0)
        after = jax.tree.map(lambda new, old: jnp.where(responding, new, old), rule.step(state, token), state)
        return (after, prompt + ~responding), (position, state, after.visible)

    carry = (rule.initial(tokens.shape[:1]), jnp.zeros(tokens.shape[:1], jnp.int32))
    _, columns = jax.lax.scan(advance, carry, (tokens.T, starts.T, in_response.T))
    position, before, visible_after = jax.tree.map(lambda x: x.T, columns)

    retraction = in_response & rule.is_retraction(tokens)
    control = in_response & rule.is_control(tokens)
    content = in_response & ~control
    # Content id j falls at the first later retraction that leaves no more ids visible than stood before j.
    falls = (
        (time[None, None, :] > time[None, :, None])
        & retraction[:, None, :]
        & (segment[:, None, :] == segment[:, :, None])
        & (visible_after[:, None, :] <= before.visible[:, :, None])
    )
    first = jnp.min(jnp.where(falls, time[None, None, :] + 1, NEVER), axis=-1)
    erased = jnp.where(content, first, NEVER)
    if semantics is Semantics.KEEP:
        return Layout(position, jnp.full_like(erased, NEVER), erased, before)
    closed = control & jnp.concatenate([retraction[:, 1:] & ~starts[:, 1:], jnp.zeros_like(control[:, :1])], 1)
    closed &= rule.is_category(tokens)
    died = jnp.where(control, time[None] + 1 + closed, erased)
    return Layout(position, died, erased, before)


# The output handler -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Edit:
    """One executed retraction."""

    index: int
    """Index of the retraction id among the emitted ids."""
    category: str | None
    """Announced category; None for a bare retraction."""
    requested: int
    """X; NEVER for a reset."""
    before: tuple[int, ...]
    """Visible ids just before the directive."""
    kept: int
    """How many of them stay visible; `before[kept:]` were removed."""

    @property
    def removed(self) -> tuple[int, ...]:
        return self.before[self.kept :]

    @property
    def clamped(self) -> bool:
        return NEVER > self.requested > len(self.before)


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A trace as its reader sees it."""

    visible: tuple[int, ...]
    edits: tuple[Edit, ...]
    malformed: int
    """Categories without a retraction, one at the very end included."""


def render(rule: EditRule, emitted: Sequence[int]) -> Rendered:
    """Applies the edits of a trace (response ids only, plain Python)."""
    visible: list[int] = []
    edits: list[Edit] = []
    pending: str | None = None
    malformed = 0
    for index, token in enumerate(int(t) for t in emitted):
        if rule.is_retraction(token):
            asked = int(rule.amount(token))
            kept = max(0, len(visible) - asked)
            edits.append(Edit(index, pending, asked, tuple(visible), kept))
            del visible[kept:]
            pending = None
            continue
        malformed += pending is not None
        pending = rule.categories[token - rule.first_id] if rule.is_category(token) else None
        if pending is None:
            visible.append(token)
    return Rendered(tuple(visible), tuple(edits), malformed + (pending is not None))
