"""Safe answers with an injected violation: where it goes, when the model takes it back, its ids.

How it takes it back is a paper's own: a builder hands in `take_back`, which writes the directive
and what follows. After RLBF (arXiv 2602.08377), section 3 and appendix A.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from rlbf_jax.data.builders.examples import (
    Built,
    Rejection,
    collect,
    example_of,
    plain_example,
)
from rlbf_jax.data.documents import end_mark, split_sentences
from rlbf_jax.data.schema import Example, Injection, Prompt, Violating, Violation
from rlbf_jax.data.strange import strange_text
from rlbf_jax.data.world import Pool, World
from rlbf_jax.ranges import check_at_least
from rlbf_jax.tokenizers import Tokenizer

_TRIES = 1000
"""Violations drawn in search of a covered form."""

Injector = Callable[[str, str], "tuple[str, Violation] | None"]
"""(prompt, part1) -> (bridge, violation), as `LanguageModelInjector`; None: nothing usable came."""

Shape = Literal["whole", "late", "word_cut", "token_cut"]
"""When the directive comes: right after the violation, words later, or in its middle."""


@dataclasses.dataclass(frozen=True)
class BsafePlusConfig:
    """Mixture and shapes of BSAFE+ examples. Every default is our choice:
    the paper is silent on all of them."""

    share_plain: float = 0.4
    """Share of examples without injection and directive, which keep general ability
    (the paper mixes some in)."""
    share_harmful: float = 0.25
    """Share of examples, injected or plain, whose prompt asks for a violation."""
    share_other_pools: float = 0.0
    """Share of plain harmless examples with prompts of the development and test pools
    (replay of what a base already read). Leave it at 0 where the evaluation measures fluency
    on those pools' reference answers."""
    share_strange: float = 0.0
    """Share of plain harmless examples whose prompt has random pieces of the vocabulary behind it,
    as searched suffixes look: what is strange in a prompt is no violation in an answer."""
    share_rl_forms: float = 0.0
    """Share of injected violations whose form is of split `rl`: a wider coverage, which leaves no
    form to reinforcement alone."""
    only_forms: tuple[str, ...] = ()
    """Forms of split `sft` that are injected, by name: a narrower coverage. Empty: all of them."""
    late_share: float = 0.25
    """Share of injected examples whose directive comes some words after the violation."""
    late_words: int = 4
    """Most words after the violation; half of them go on with the answer, half are of another one's
    prompt."""
    several_share: float = 0.0
    """Share of injected examples with several violations, taken back from the last to the first by
    a directive each."""
    most_violations: int = 3
    """Such examples have 2 to so many."""
    cut_violation_share: float = 0.2
    """Share of injected examples whose directive comes within the violation, in its second half;
    half of them at a word boundary, half at a token boundary."""
    bridge_share: float = 0.5
    """Share of injections on harmless prompts that are led into by a bridge."""
    word_cut_share: float = 0.25
    """Share of safe answers cut before a word within a sentence;
    the others are cut at a sentence end."""
    loss_on_part1: bool = False
    """Also train on part1, the safe words before the injection."""
    max_tokens: int = 128
    """Longest example, prompt and end of sequence included; longer ones are rejected."""
    on_too_long: Literal["refuse", "split"] = "refuse"
    """When X > x_max: reject the example, or write consecutive directives whose X add up.
    X is never clamped."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}, a share must lie in 0..1")
        check_at_least(self, 1, "late_words")
        check_at_least(self, 2, "most_violations")
        if self.late_share + self.cut_violation_share > 1:
            raise ValueError("late_share + cut_violation_share exceed 1")
        if self.on_too_long not in ("refuse", "split"):
            raise ValueError(f"on_too_long is {self.on_too_long!r}, expected 'refuse' or 'split'")


def build_injection(
    world: World,
    rng: np.random.Generator,
    config: BsafePlusConfig,
    *,
    harmful: bool = False,
    shape: Shape | None = None,
    injector: Injector | None = None,
) -> Injection | Rejection:
    """Injects a training violation (split `sft` unless configured otherwise, pool `train`)
    into a safe answer.

    On a harmless prompt the answer is cut at a sentence end or before a word.
    On a harmful one the model complies from its first word:
    part1 is empty, the bridge is a compliance opener, part2 the whole safe answer.

    Args:
        shape: when the directive comes; None draws it. `token_cut` leaves the violation whole here,
            since its cut is one of ids (see `to_example`).
        injector: asked for bridge and violation instead of the world, on harmless prompts.
    """
    shape = draw_shape(rng, config) if shape is None else shape
    prompt = world.prompt(rng, "train", harmful=harmful)
    answer = world.answer(rng, prompt)
    if harmful:
        part1, part2 = "", answer
        bridge = world.opener(rng)
        violation = _violation(world, rng, config, prompt.category)
    else:
        cut = _cut(rng, answer, config)
        if cut is None:
            return Rejection("answer too short to cut")
        part1, part2 = answer[:cut], answer[cut:]
        if injector is None:
            bridge = world.bridge(rng) if rng.random() < config.bridge_share else ""
            violation = _violation(world, rng, config, None)
        else:
            injected = injector(prompt.text, part1)
            if injected is None:
                return Rejection("injector gave nothing")
            bridge, violation = injected
    earlier: tuple[Violating, ...] = ()
    if config.several_share and rng.random() < config.several_share:
        earlier = _earlier(world, rng, config, prompt)
    tail = ""
    if shape == "late":
        about = prompt if rng.random() < 0.5 else world.prompt(rng, "train")
        tail = _tail(rng, world, violation.text, about, config.late_words)
    elif shape == "word_cut":
        words = violation.text.split(" ")[1:]
        keep = int(rng.integers((len(words) + 1) // 2, max(len(words), 2)))
        violation = dataclasses.replace(violation, text="".join(f" {w}" for w in words[:keep]))
    return Injection(prompt.text, part1, bridge, violation, tail, part2, earlier)


def _earlier(
    world: World, rng: np.random.Generator, config: BsafePlusConfig, prompt: Prompt
) -> tuple[Violating, ...]:
    """Violations that come first, each followed by a sentence of an answer to the prompt."""
    found = []
    for _ in range(int(rng.integers(1, config.most_violations))):
        bridge = world.bridge(rng) if rng.random() < config.bridge_share else ""
        violation = _violation(world, rng, config, prompt.category or None)
        sentence = split_sentences(world.answer(rng, prompt))[0].strip()
        found.append(Violating(bridge, violation, end_mark(violation.text) + f" {sentence}"))
    return tuple(found)


def _violation(
    world: World, rng: np.random.Generator, config: BsafePlusConfig, category: str | None
) -> Violation:
    """A violation to train on, of the forms that are covered."""
    if rng.random() < config.share_rl_forms:
        return world.violation(rng, "rl", "train", category=category)
    for _ in range(_TRIES):
        violation = world.violation(rng, "sft", "train", category=category)
        if not config.only_forms or violation.form in config.only_forms:
            return violation
    raise ValueError(
        f"none of {_TRIES} violations of category {category or 'any'} has a form among only_forms "
        "= "
        f"{', '.join(config.only_forms)}; name forms of split sft, at least one a category"
    )


def draw_shape(rng: np.random.Generator, config: BsafePlusConfig) -> Shape:
    """Draws when the directive comes."""
    u = rng.random()
    if u < config.late_share:
        return "late"
    if u < config.late_share + config.cut_violation_share:
        return "word_cut" if rng.random() < 0.5 else "token_cut"
    return "whole"


def _cut(rng: np.random.Generator, answer: str, config: BsafePlusConfig) -> int | None:
    """Where part2 begins: at white space, with words on both sides;
    None where there is no such place."""
    sentences = split_sentences(answer)
    ends = np.cumsum([len(s) for s in sentences])[:-1]
    spaces = [
        i
        for i in range(1, len(answer) - 1)
        if answer[i] == " " and answer[i - 1] != " " and answer[i + 1] != " "
    ]
    words = sorted(set(spaces) - {int(e) for e in ends})
    within = words and (rng.random() < config.word_cut_share or len(ends) == 0)
    options = words if within else [int(e) for e in ends]
    return options[rng.integers(len(options))] if options else None


def _tail(rng: np.random.Generator, world: World, violation: str, about: Prompt, most: int) -> str:
    """1 to `most` words of an answer, as the model would go on after the violation."""
    words = world.answer(rng, about, min_words=most).split()[: rng.integers(1, most + 1)]
    return end_mark(violation) + "".join(f" {word}" for word in words)


# Ids ----------------------------------------------------------------------------------------------


class InjectedIds(NamedTuple):
    """An injection in ids; the pieces concatenated are the joint encoding."""

    stretches: tuple[tuple[str, list[int]], ...]
    """(category, ids) of each violation with its bridge and tail, in their order."""
    part1: list[int]
    part2: list[int]

    @property
    def taken(self) -> list[int]:
        """Everything between part1 and the directive: bridges, violations, tails."""
        return [token for _, ids in self.stretches for token in ids]

    @property
    def category(self) -> str:
        """Of the last violation."""
        return self.stretches[-1][0]


TakeBack = Callable[[InjectedIds], "list[int] | Rejection"]
"""Ids of the response from the directive on, without end of sequence; all are in the loss."""


def to_ids(
    injection: Injection, tokenizer: Tokenizer, violation_cut: float | None = None
) -> InjectedIds | Rejection:
    """Tokenizes an injection.

    Args:
        violation_cut: in 0..1: keep only the beginning of the violation's ids, at least half
            of them and not all, as if the model had changed its mind in the middle of a word.
            Needs an empty tail.

    Returns:
        Ids, or a rejection where the pieces' ids are not those of the joint encoding: training
        would show ids that the model does not emit.
    """
    part1, bridge, violation, tail, part2 = (
        tokenizer.encode(text)
        for text in (
            injection.part1,
            injection.bridge,
            injection.violation.text,
            injection.tail,
            injection.part2,
        )
    )
    stretches = [(e.violation.category, tokenizer.encode(e.text)) for e in injection.earlier]
    before = injection.part1 + "".join(e.text for e in injection.earlier)
    emitted = before + injection.bridge + injection.violation.text + injection.tail
    pieces = part1 + [token for _, ids in stretches for token in ids]
    if pieces + bridge + violation + tail != tokenizer.encode(emitted):
        return Rejection("illegal cut around the violation")
    if part1 + part2 != tokenizer.encode(injection.part1 + injection.part2):
        return Rejection("illegal cut of the answer")
    if violation_cut is not None:
        if tail:
            raise ValueError("a violation that is cut has no tail")
        if len(violation) < 2:
            return Rejection("violation too short to cut")
        least = (len(violation) + 1) // 2
        most = min(least + int(violation_cut * (len(violation) - least)), len(violation) - 1)
        violation = violation[:most]
    stretches.append((injection.violation.category, bridge + violation + tail))
    return InjectedIds(tuple(stretches), part1, part2)


def injected_example(
    injection: Injection,
    tokenizer: Tokenizer,
    config: BsafePlusConfig,
    take_back: TakeBack,
    violation_cut: float | None = None,
) -> Example | Rejection:
    """An example whose loss is on what `take_back` gives and the end of sequence (and on part1, if
    so configured); see `to_ids` for `violation_cut`."""
    ids = to_ids(injection, tokenizer, violation_cut)
    if isinstance(ids, Rejection):
        return ids
    response = take_back(ids)
    if isinstance(response, Rejection):
        return response
    parts = [
        (ids.part1, config.loss_on_part1),
        (ids.taken, False),
        ([*response, tokenizer.eos_id], True),
    ]
    return example_of(tokenizer.encode_prompt(injection.prompt), parts, config.max_tokens)


def build_injected(
    world: World,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    config: BsafePlusConfig,
    num_examples: int,
    take_back: TakeBack,
    injector: Injector | None = None,
) -> Built:
    """Mixes injected and plain examples on harmless and harmful prompts.

    Violations are of split `sft` (and `rl`, as configured) and pool `train`;
    so are prompts, but for `share_other_pools` of the plain harmless ones.
    A plain harmful example answers with the safe answer.

    Raises:
        ValueError: nearly all draws are rejected.
    """

    def draw() -> tuple[str, Example | Rejection]:
        plain, harmful = rng.random(2) < (config.share_plain, config.share_harmful)
        suffix = "_harmful" if harmful else ""
        if plain:
            pool: Pool = "train"
            if not harmful and rng.random() < config.share_other_pools:
                pool = "development" if rng.random() < 0.5 else "test"
            prompt = world.prompt(rng, pool, harmful=bool(harmful))
            text, strange = prompt.text, ""
            if not harmful and config.share_strange and rng.random() < config.share_strange:
                text, strange = f"{text} {strange_text(tokenizer, rng)}", " strange"
            answer = world.answer(rng, prompt)
            example = plain_example(text, answer, tokenizer, config.max_tokens)
            return f"plain{suffix}{strange}", example
        shape = draw_shape(rng, config)
        injection = build_injection(
            world, rng, config, harmful=bool(harmful), shape=shape, injector=injector
        )
        if isinstance(injection, Rejection):
            return "", injection
        cut = rng.random() if shape == "token_cut" else None
        made = injected_example(injection, tokenizer, config, take_back, cut)
        several = " several" if injection.earlier else ""
        return f"injected{suffix} {shape}{several}", made

    return collect(draw, num_examples)
