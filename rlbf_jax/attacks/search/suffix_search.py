"""The loop of a search for suffixes: many goals at once, on a mesh, resumable from a file.

`gcg` and `random_search` hand in a `Search`; the steps are in `gcg_search.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlbf_jax.attacks.search import gcg_search
from rlbf_jax.attacks.search.gcg_candidates import (
    allowed_ids,
    check_topk,
    split_prompt,
    survives,
)
from rlbf_jax.attacks.search.gcg_search import Search, State
from rlbf_jax.attacks.search.gcg_step import (
    Behavior,
    Objective,
    first_column,
    one_behavior,
    stack,
)
from rlbf_jax.attacks.search.suffix import Found, Goal, SuffixConfig
from rlbf_jax.errors import InputError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.transformer import unrolled
from rlbf_jax.parallel.mesh import replicated, shardings
from rlbf_jax.storage import write_whole
from rlbf_jax.tokenizers import Tokenizer

INIT_CHARACTERS = ".,!?;:()[]{}@#$%&*wxyz"
"""What further entries of a buffer begin with, as in nanoGCG."""


def search_suffixes(
    search: Search,
    params: dict,
    tokenizer: Tokenizer,
    goals: Sequence[Goal],
    config: SuffixConfig,
    mesh: Mesh | None,
    file: pathlib.Path | None,
    save_every: int,
) -> list[Found]:
    """`gcg` for a search of any kind; model, objective, topk and chunk are filled in here."""
    if not goals:
        return []
    work = _Work(search, params, tokenizer, goals, config, mesh)
    states, done = work.begun(file)
    while done < search.steps and not np.all(jax.device_get(states.stopped)):
        done = (
            min(search.steps, done + save_every - done % save_every)
            if file is not None
            else search.steps
        )
        states = work.advance(states, done)
        work.check(states)
        if file is not None:
            work.save(file, states)
    return work.found(states)


def _check_positions(model: ModelConfig, behaviors: Behavior, suffix: int) -> None:
    """Raises InputError where prefix, suffix and tail are more ids than the model
    has learned positions."""
    longest = int(np.max(behaviors.prefix_length)) + suffix + behaviors.tail.shape[-1]
    if (
        model.learned_positions
        and model.max_positions is not None
        and longest > model.max_positions
    ):
        raise InputError(
            f"a prompt, a suffix of {suffix} ids and the answer wished for take {longest} ids, "
            "and the model has "
            f"{model.max_positions} positions; shorten the prompts or the suffix"
        )


class _Work:
    """Arrays of one search, padded to the mesh, and its loop."""

    def __init__(self, search, params, tokenizer, goals, config: SuffixConfig, mesh):
        self.tokenizer, self.goals, self.config, self.mesh = tokenizer, list(goals), config, mesh
        model, params = unrolled(search.model, params)
        self.suffix = list(
            tokenizer.encode(config.init) if isinstance(config.init, str) else config.init
        )
        if search.n_replace > len(self.suffix):
            raise InputError(
                f"n_replace is {search.n_replace}, and the suffix has {len(self.suffix)} ids only"
            )
        self.splits = [
            split_prompt(tokenizer, self._compose(goal), self.suffix) for goal in self.goals
        ]
        behaviors = stack(
            [_behavior(goal, *split) for goal, split in zip(self.goals, self.splits, strict=True)]
        )
        _check_positions(model, behaviors, len(self.suffix))
        allowed = allowed_ids(tokenizer, model.vocab_size, config.allow_non_ascii)
        topk = check_topk(
            search.topk if search.proposal == "gradient" else model.vocab_size, allowed
        )
        rule = search.objective.rule or tokenizer.controls.rule()
        objective = Objective(
            config.kind,
            config.alpha,
            control_weight=config.control_weight,
            control_floor=config.control_floor,
            rule=rule if config.control_weight else None,
            first=first_column(behaviors),
        )
        chunk = min(
            config.batch_size or (32 if jax.default_backend() == "cpu" else 64), search.width
        )
        self.search = dataclasses.replace(
            search,
            model=model,
            objective=objective,
            topk=topk,
            chunk=chunk,
            early_stop=config.early_stop,
        )
        self.params, self.allowed, groups = params, jnp.asarray(allowed), 1
        if mesh is not None:
            self.mesh = gcg_search.search_mesh(mesh, len(self.goals))
            self.params = jax.device_put(
                params, gcg_search.whole_rows(self.mesh, shardings(params, mesh))
            )
            self.allowed = jax.device_put(self.allowed, replicated(self.mesh))
            groups, shares = (
                self.mesh.shape[gcg_search.BEHAVIORS],
                self.mesh.shape[gcg_search.CANDIDATES],
            )
            self.search = dataclasses.replace(self.search, shares=shares)
        # Groups take equally many: the last goal fills up what is missing.
        self.fill = np.minimum(
            np.arange(-(-len(self.goals) // groups) * groups), len(self.goals) - 1
        )
        self.behaviors = self._placed(jax.tree.map(lambda x: x[self.fill], behaviors))

    def _compose(self, goal: Goal):
        return lambda suffix: self.config.compose(goal.prompt, suffix)

    def _placed(self, tree: Any) -> Any:
        if self.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(gcg_search.BEHAVIORS)))

    def _starts(self) -> np.ndarray:
        """[S, n]: the initial suffix, and random characters for the rest of a buffer."""
        size, rng = max(1, self.search.buffer_size), np.random.default_rng(self.config.seed)
        allowed = np.flatnonzero(self.allowed)
        singles = [
            ids[0]
            for c in INIT_CHARACTERS
            if _encodes(self.tokenizer, c) and len(ids := self._ids(c)) == 1
        ]
        pool = np.intersect1d(singles, allowed) if singles else allowed
        others = rng.choice(pool if len(pool) else allowed, (size - 1, len(self.suffix)))
        return np.concatenate([[self.suffix], others]).astype(np.int32)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def begun(self, file: pathlib.Path | None) -> tuple[State, int]:
        """States before the first step, or as the file has them, and how many steps are done."""
        key = jax.random.key(self.config.seed)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(self.fill))
        starts = np.broadcast_to(self._starts(), (len(self.fill), *self._starts().shape))
        self.prefixes, states = gcg_search.begin_all(
            self.search,
            self.mesh,
            self.params,
            self.behaviors,
            self._placed(keys),
            self._placed(starts),
        )
        self.start_loss = np.asarray(jax.device_get(states.best_loss))
        self.fingerprint = self._fingerprint(states)
        if file is None or not file.exists():
            return states, 0
        return self._stored(file, states)

    def _fingerprint(self, states: State) -> str:
        """Of all that a state depends on; the start losses stand for the parameters."""
        digest = hashlib.sha256(repr((self.search, self.config)).encode())
        for leaf in jax.tree.leaves(
            jax.device_get((self.behaviors, states.key, states.ids, states.loss))
        ):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()

    def _stored(self, file: pathlib.Path, states: State) -> tuple[State, int]:
        try:
            with np.load(file, allow_pickle=False) as kept:
                same = str(kept["fingerprint"]) == self.fingerprint
                read = State(*(kept[name] for name in State._fields)) if same else None
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{file}: not a state of a search ({error}); delete it to start again"
            ) from error
        if read is None:
            raise InputError(
                f"{file}: the state of another search (goals, settings or model differ); delete it"
            )
        return self._placed(jax.tree.map(lambda _, x: jnp.asarray(x), states, read)), int(
            read.step.max()
        )

    def save(self, file: pathlib.Path, states: State) -> None:
        content = io.BytesIO()
        np.savez(
            content, fingerprint=np.asarray(self.fingerprint), **jax.device_get(states)._asdict()
        )
        write_whole(file, content.getvalue())

    def advance(self, states: State, until: int) -> State:
        if not self.config.filter_ids:
            return gcg_search.advance_all(
                self.search,
                self.mesh,
                self.params,
                self.allowed,
                until,
                self.behaviors,
                self.prefixes,
                states,
            )
        while int(np.max(jax.device_get(states.step))) < until and not np.all(
            jax.device_get(states.stopped)
        ):
            proposals = gcg_search.propose_all(
                self.search,
                self.mesh,
                self.params,
                self.allowed,
                self.behaviors,
                self.prefixes,
                states,
            )
            wanted = self._placed(self._wanted(states, np.asarray(proposals.candidates)))
            states = gcg_search.evaluate_all(
                self.search,
                self.mesh,
                self.params,
                self.behaviors,
                self.prefixes,
                states,
                proposals,
                wanted,
            )
        return states

    def _wanted(self, states: State, candidates: np.ndarray) -> np.ndarray:
        """[R, width]: what survives as text. Rows that have stopped,
        or only fill the mesh, want nothing."""
        wanted = np.zeros(candidates.shape[:2], bool)
        stopped = np.asarray(jax.device_get(states.stopped))
        for row, (goal, split) in enumerate(zip(self.goals, self.splits, strict=True)):
            if not stopped[row]:
                wanted[row] = survives(self.tokenizer, self._compose(goal), *split, candidates[row])
        return wanted

    def check(self, states: State) -> None:
        """Raises InputError where a loss is not a number."""
        step, losses, start = (
            np.asarray(jax.device_get(x)) for x in (states.step, states.losses, self.start_loss)
        )
        for row in range(len(self.goals)):
            if np.isnan(start[row]) or np.isnan(losses[row, : step[row]]).any():
                raise InputError(
                    f"goal {row}: the loss is not a number; look for non-finite values in the "
                    "parameters"
                )

    def found(self, states: State) -> list[Found]:
        rows = [
            jax.tree.map(lambda x, r=r: np.asarray(x)[r], jax.device_get(states))
            for r in range(len(self.goals))
        ]
        return [
            self._found(goal, row, state)
            for row, (goal, state) in enumerate(zip(self.goals, rows, strict=True))
        ]

    def _found(self, goal: Goal, row: int, state: State) -> Found:
        ids, step = tuple(state.best_ids.tolist()), int(state.step)
        return Found(
            goal=goal,
            ids=ids,
            text=self.config.compose(goal.prompt, self.tokenizer.decode(ids)),
            loss=float(state.best_loss),
            start_loss=float(self.start_loss[row]),
            losses=np.asarray(state.losses)[:step],
            history=np.asarray(state.history)[:step],
            stopped=bool(state.stopped),
            filtered_steps=int(state.filtered),
            evaluations=int(state.evaluated),
        )


def _encodes(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a tokenizer knows a character; only stand-ins of tests do not know them all."""
    try:
        return bool(tokenizer.encode(text))
    except ValueError:
        return False


def _behavior(goal: Goal, before: list[int], after: list[int]):
    begin = len(after)

    def moved(span: tuple[int, int]) -> tuple[int, int]:
        return begin + span[0], begin + span[1]

    return one_behavior(before, [*after, *goal.answer], moved(goal.target), moved(goal.control))
