"""One generation as a line of `evaluation/STAGE.jsonl`: for the traces of the report,
and for whoever counts anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

from rlbf_jax.critics.base import Verdict
from rlbf_jax.data.world import Pool
from rlbf_jax.directives import NEVER, EditRule, Semantics
from rlbf_jax.evaluation.measure import JudgedAnswer
from rlbf_jax.evaluation.metrics import REFUSAL_OPENERS, Response
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.tokenizers import Tokenizer

LONG_PREFIX_WORDS = 20
"""From here on a prefix is long; such rows also go into the benchmark `..._long_prefix`."""


@dataclasses.dataclass(frozen=True)
class EvaluationContext:
    """Whose answers these are; goes into every record."""

    method: str
    stage: str
    semantics: Semantics
    seed: int
    """Of the training run."""
    data: Pool
    benchmark: str = "toy"
    critic: str = ""
    """Name of the critic of training."""
    rule: EditRule | None = None
    """None: the first rule that the tokenizer has ids of."""
    refusal_openers: tuple[str, ...] = REFUSAL_OPENERS


def knobs_to_json(knobs: Knobs) -> dict[str, Any]:
    """The knobs that differ from their defaults."""
    default = Knobs()
    changed = {
        field.name: getattr(knobs, field.name)
        for field in dataclasses.fields(Knobs)
        if getattr(knobs, field.name) != getattr(default, field.name)
    }
    return {
        name: dict(value)
        if isinstance(value, Mapping)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in changed.items()
    }


def to_row(
    answer: JudgedAnswer, values: Mapping[str, float | None], context: EvaluationContext
) -> dict[str, Any]:
    """An answer and its metrics as JSON.

    Beside `metrics` stands what they were found from;
    `tests/recompute_rates.py` finds them again."""
    attempt, generation, response = answer.attempt, answer.generation, answer.response
    return {
        "stage": context.stage,
        "method": context.method,
        "attack": attempt.attack,
        "split": attempt.split,
        "data": context.data,
        "seed": context.seed,
        "semantics": context.semantics.value,
        "request_id": attempt.request.id,
        "prompt_id": attempt.prompt.id,
        "prompt": attempt.prompt.text,
        "harmful": attempt.prompt.harmful,
        "category": attempt.violation.category if attempt.violation else attempt.prompt.category,
        "violation": attempt.violation.text if attempt.violation else None,
        "prefix": attempt.prefix,
        "num_forced": generation.num_forced,
        "forced_parts": {
            "prefix": attempt.num_prefix,
            "bridge": attempt.num_bridge,
            "span": attempt.num_span,
            "tail": attempt.num_tail,
        },
        "by_construction": attempt.by_construction,
        "cell": dict(attempt.cell),
        "long_prefix": len(attempt.prefix.split()) >= LONG_PREFIX_WORDS,
        "trace": _trace_json(response, answer.tokenizer, answer.rule),
        "visible": generation.text,
        "edits": _edits_json(answer),
        "seams": [{"at": seam.at, "torn": seam.torn} for seam in answer.seams],
        "verdict": _verdict_json(answer.verdicts.final),
        "verdict_raw": _verdict_json(answer.verdicts.raw),
        "verdict_opening": _verdict_json(answer.opening),
        "metrics": dict(values),
        "knobs": knobs_to_json(attempt.request.knobs),
    }


def _edits_json(answer: JudgedAnswer) -> list[dict[str, Any]]:
    response = answer.response
    return [
        {
            "category": edit.category,
            "x": None if edit.requested == NEVER else edit.requested,
            "before": text,
            "removed_text": text[cut:],
            "kept_ids": edit.kept,
            "verdict_before": _verdict_json(verdict),
        }
        for edit, text, cut, verdict in zip(
            answer.generation.edits,
            response.before,
            response.cuts,
            answer.verdicts.before,
            strict=True,
        )
    ]


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "safe": verdict.safe if verdict.judged else None,
        "spans": [[s.start, s.end, s.category, s.complete] for s in verdict.spans],
        "leaks": len(verdict.leaks),
        "leak_spans": [[s.start, s.end, s.category] for s in verdict.leaks],
        "coherent": verdict.coherent,
        "useful": verdict.useful,
        "judged": verdict.judged,
        "reason": verdict.reason,
        "score": verdict.score,
    }


def _trace_json(response: Response, tokenizer: Tokenizer, rule: EditRule) -> list[dict[str, Any]]:
    """Every emitted id with its text; an id that ends inside a multi-byte character has the text it
    completes. A copy is a text of its own."""
    items = response.items
    pieces = {
        "content": _pieces(tokenizer, [item.token for item in items if item.kind == "content"]),
        "copy": chain.from_iterable(
            _pieces(tokenizer, [item.token for item in run])
            for kind, run in groupby(items, lambda item: item.kind)
            if kind == "copy"
        ),
    }
    return [
        {
            "text": next(pieces[item.kind])
            if item.kind in pieces
            else _control_name(item.token, rule),
            "kind": item.kind,
            "erased": item.erased,
            "forced": item.forced,
        }
        for item in response.items
    ]


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[str]:
    """The text of some ids, piece by piece: each has the characters that it completes."""
    text, done = tokenizer.decode(ids), 0
    for _, end in tokenizer.offsets(ids):
        yield text[done:end]
        done = max(done, end)


def _control_name(token: int, rule: EditRule) -> str:
    return rule.name(token) if rule.is_control(token) else "[END]"
