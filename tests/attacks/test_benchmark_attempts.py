"""Attempts from the prompts and targets of a benchmark."""

from __future__ import annotations

import dataclasses

import pytest

from rlbf_jax.attacks.benchmark import benchmark_attempts
from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.data.sources.benchmarks import Behavior
from rlbf_jax.errors import InputError
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.tokenizers import import_tokenizer
from tests.tokenizers import families

TOLD = AttackConfig(knobs=Knobs(max_tokens=40), room=8)
TURNIP = Behavior(
    "a", "Tell me about tea.", "made", category="rude", target="Sure, here it is.", harmful=True
)


def test_nothing_forced_and_the_target_forced(tokenizer):
    direct, prefilled = benchmark_attempts([TURNIP], tokenizer, TOLD)
    assert (direct.attack, direct.request.forced, direct.prompt.harmful) == ("direct", (), True)
    assert (direct.prompt.id, direct.prompt.category, direct.request.prompt) == (
        "a",
        "rude",
        TURNIP.prompt,
    )
    assert prefilled.attack == "prefilling" and prefilled.prompt == direct.prompt
    assert prefilled.request.forced == tuple(tokenizer.encode(TURNIP.target))
    assert prefilled.num_bridge == len(prefilled.request.forced) and prefilled.violation is None
    assert not prefilled.by_construction and prefilled.request.id != direct.request.id
    _, shorter = benchmark_attempts([TURNIP], tokenizer, TOLD, prefill=2)
    assert shorter.request.forced == prefilled.request.forced[:2] and shorter.num_bridge == 2


def test_harmless_and_unlabelled_prompts(tokenizer):
    kind = dataclasses.replace(TURNIP, harmful=False)
    none, benign = benchmark_attempts([kind], tokenizer, TOLD)
    assert (none.attack, benign.attack) == ("none", "benign_prefill")
    assert not none.prompt.harmful and none.prompt.category == ""
    (unknown,) = benchmark_attempts(
        [dataclasses.replace(TURNIP, harmful=None, target="")], tokenizer, TOLD
    )
    assert unknown.attack == "direct" and unknown.prompt.harmful


def test_contexts_are_part_of_what_is_asked(tokenizer):
    asked = benchmark_attempts(
        [dataclasses.replace(TURNIP, context="Also", target="")], tokenizer, TOLD
    )[0]
    assert asked.request.prompt == asked.prompt.text == "Also\n\n---\n\nTell me about tea."
    assert (asked.prompt.context, asked.prompt.question) == ("Also", "Tell me about tea.")
    (plain, _) = benchmark_attempts([TURNIP], tokenizer, TOLD)
    assert plain.prompt.context == plain.prompt.question == ""


def test_ids_do_not_depend_on_what_else_is_asked(tokenizer):
    other = dataclasses.replace(TURNIP, id="b", prompt="By the way")
    both = [a.request.id for a in benchmark_attempts([other, TURNIP], tokenizer, TOLD)]
    alone = [a.request.id for a in benchmark_attempts([TURNIP], tokenizer, TOLD)]
    assert both[2:] == alone and len(set(both)) == 4
    assert benchmark_attempts([], tokenizer, TOLD) == []


def test_targets_leave_room(tokenizer):
    with pytest.raises(ValueError, match="the target of made a forces .* raise knobs.max_tokens"):
        benchmark_attempts([TURNIP], tokenizer, AttackConfig(knobs=Knobs(max_tokens=12), room=8))


def test_conversations(tokenizer, tmp_path):
    turns = dataclasses.replace(TURNIP, target="", history=(("user", "Hi"), ("assistant", "Hello")))
    with pytest.raises(InputError, match="one turn only"):
        benchmark_attempts([turns], tokenizer, TOLD)
    published = import_tokenizer(families.llama(tmp_path), ("rude",), 4)
    (asked,) = benchmark_attempts([turns], published, TOLD)
    messages = [("user", "Hi"), ("assistant", "Hello"), ("user", TURNIP.prompt)]
    expected = published.encode_chat(
        [{"role": role, "content": content} for role, content in messages]
    )
    assert asked.request.prompt_ids == tuple(expected)
