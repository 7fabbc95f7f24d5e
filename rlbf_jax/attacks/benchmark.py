"""Attempts from a public benchmark: its prompts as they are, and prefilling with its own targets.

A benchmark has prompts and at most the beginning of a compliant answer.
It has no violations, hence nothing for attacks that force one (deep prefilling, middle filling),
and no harmless twins of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlbf_jax.attacks.base import Attempt, unused_id
from rlbf_jax.attacks.direct import AttackConfig
from rlbf_jax.attacks.forced.prefilling import check_room
from rlbf_jax.data.schema import Prompt
from rlbf_jax.data.sources.benchmarks import Behavior
from rlbf_jax.sampling.request import Request
from rlbf_jax.tokenizers import Tokenizer
from rlbf_jax.tokenizers.conversation import conversation_ids


def benchmark_attempts(
    behaviors: Sequence[Behavior],
    tokenizer: Tokenizer,
    config: AttackConfig,
    prefill: int | None = None,
) -> list[Attempt]:
    """Every behavior once with nothing forced, and once more with (a beginning of)
    its target forced, if it has one.

    The attack is `none` for a harmless prompt, where a refusal or a directive is a mistake,
    and `direct` for any other: a prompt of which the benchmark does not say whether it
    is harmful is treated as one that may be. Forced ids count as bridge,
    because a target promises a violation and is none.

    Args:
      config: knobs and room; pool and split are not used.
      prefill: most ids of a target that are forced; None: all.

    Raises:
      InputError: a conversation of several turns, where the tokenizer has a template for one.
      ValueError: a forced target that leaves less than `room` ids of `max_tokens`.
    """
    attempts = []
    used: set[int] = set()
    for behavior in behaviors:
        harmless = behavior.harmful is False
        prompt = Prompt(
            behavior.id,
            behavior.request,
            not harmless,
            category="" if harmless else behavior.category,
            context=behavior.context,
            question=behavior.prompt if behavior.context else "",
        )
        prompt_ids = _prompt_ids(behavior, tokenizer)

        def attempt(
            attack: str, forced: Sequence[int] = (), prompt=prompt, prompt_ids=prompt_ids
        ) -> Attempt:
            id_ = unused_id(f"{attack}/{prompt.id}/{prompt.text}", used)
            request = Request(prompt.text, tuple(forced), config.knobs, id_, prompt_ids)
            return Attempt(request, prompt, attack, num_bridge=len(forced))

        attempts.append(attempt("none" if harmless else "direct"))
        if behavior.target:
            forced = tokenizer.encode(behavior.target)[:prefill]
            check_room(forced, config, f"the target of {behavior.benchmark} {behavior.id}")
            attempts.append(attempt("benign_prefill" if harmless else "prefilling", forced))
    return attempts


def _prompt_ids(behavior: Behavior, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    if not behavior.history:
        return None
    history = [{"role": role, "content": content} for role, content in behavior.history]
    return tuple(
        conversation_ids(tokenizer, [*history, {"role": "user", "content": behavior.request}])[0]
    )
