"""Where control ids stand: the order of rules, what each forbids, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.directives import BacktrackRule, Controls, ReplaceRule, ResetRule

CATEGORIES = ("a", "b")
KINDS = ("backtrack", "reset", "replace")
SOME_KINDS = st.sampled_from(
    [order for n in (1, 2, 3) for order in itertools.permutations(KINDS, n)]
)


def test_default_ids_by_hand():
    controls = Controls(10, CATEGORIES, 3, never=(0, 2))
    assert controls.rule() == controls.rule("backtrack")
    assert controls.rule("backtrack") == BacktrackRule(10, CATEGORIES, (0, 2, 15), x_max=3)
    larger = dataclasses.replace(controls, vocab_size=40)
    assert larger.rule("backtrack") == dataclasses.replace(controls.rule(), vocab_size=40)
    assert [larger.rule(kind).vocab_size for kind in larger.kinds] == [40, 40]
    assert controls.rule("reset") == ResetRule(15, (), (0, 2, 10, 11, 12, 13, 14))
    assert controls.ids == range(10, 16)


def test_replacements_stand_behind():
    old, new = Controls(10, CATEGORIES, 3), Controls(10, CATEGORIES, 3, KINDS)
    assert new.rule("replace") == ReplaceRule(16, CATEGORIES, (10, 11, 12, 13, 14, 15))
    assert new.rule("backtrack").never == (15, 16, 17, 18)
    assert list(new.names().items())[:6] == list(old.names().items())
    assert list(new.names().values())[6:] == ["[FLAG_A]", "[FLAG_B]", "[REPLACE]"]


@given(SOME_KINDS, st.integers(0, 50), st.integers(1, 9))
def test_every_id_belongs_to_one_rule_and_is_barred_from_the_others(kinds, first, x_max):
    controls = Controls(first, CATEGORIES, x_max, kinds, (99,))
    rules = [controls.rule(kind) for kind in kinds]
    assert [rule.kind for rule in rules] == list(kinds) and controls.rule() == rules[0]
    # Neighbors, in the order of the kinds.
    assert [rule.first_id for rule in rules] == [first, *(rule.end_id for rule in rules[:-1])]
    assert controls.ids == range(first, rules[-1].end_id) and controls.end_id == rules[-1].end_id
    assert list(controls.names()) == list(controls.ids)
    assert [name for rule in rules for name in rule.names()] == list(controls.names().values())
    for rule in rules:
        own = set(range(rule.first_id, rule.end_id))
        assert set(rule.never) == {99} | (set(controls.ids) - own)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Controls(5, ("a",), 3).rule("replace"), "kind 'replace'; it has those of backtr"),
        (lambda: Controls(5, ("a",), 3, ("reset",)).rule("backtrack"), "'backtrack'.*of reset$"),
        (lambda: Controls(5, ("a",), 3, ()), "expected some of backtrack, reset, replace"),
        (lambda: Controls(5, ("a",), 3, ("reset", "reset")), "expected some of"),
        (lambda: Controls(5, ("a",), 3, ("undo",)), "kinds are .'undo',.*expected some of"),
        (lambda: Controls(5, (), 3, ("replace",)), "needs at least one category"),
    ],
)
def test_what_there_is_not_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
