"""What a critic's verdicts are worth on labelled texts: accuracy, ranking,
calibration, spans, bias by group.

A text that the critic could not judge takes part in no rate; such texts are counted. Texts that
occur twice are one cluster of every interval.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlbf_jax.critics.base import Critic, Exchange, Span, Verdict
from rlbf_jax.critics.classifiers.text_features import WORD
from rlbf_jax.data.sources.labelled import LabelledTexts
from rlbf_jax.evaluation import binary_metrics as metrics
from rlbf_jax.evaluation.intervals import Interval, interval


@dataclasses.dataclass(frozen=True)
class Judgements:
    """A critic's word on N texts."""

    critic: str
    verdicts: tuple[Verdict, ...]
    scores: np.ndarray | None = None
    """float64 [N, C], probability of each category; None: this critic gives verdicts only."""
    categories: tuple[str, ...] = ()
    """Of `scores`."""
    fold: np.ndarray | None = None
    """int64 [N]: the fold of a cross-validation whose critic judged each text."""


def judge_texts(critic: Critic, texts: Sequence[str]) -> Judgements:
    """Asks a critic about texts without prompts; also for probabilities
    (`scores`, `categories`) where it has them."""
    exchanges = [Exchange("", text) for text in texts]
    verdicts = tuple(critic.judge(exchanges))
    scores = getattr(critic, "scores", None)
    if scores is None:
        return Judgements(critic.name, verdicts)
    return Judgements(
        critic.name, verdicts, scores(exchanges), tuple(getattr(critic, "categories", ()))
    )


def join_folds(parts: Iterable[tuple[np.ndarray, Judgements]], name: str) -> Judgements:
    """Judgements of all texts, from those of disjoint folds: (indices of texts, judgements)."""
    parts = list(parts)
    order = np.concatenate([indices for indices, _ in parts])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    verdicts = [verdict for _, part in parts for verdict in part.verdicts]
    fold = np.repeat(np.arange(len(parts)), [len(indices) for indices, _ in parts])
    scores = np.concatenate([part.scores for _, part in parts if part.scores is not None])
    return Judgements(
        name, tuple(verdicts[i] for i in place), scores[place], parts[0][1].categories, fold[place]
    )


def audit(labelled: LabelledTexts, judgements: Judgements, *, seed: int = 0) -> dict[str, Any]:
    """The audit as one JSON object.

    `records` holds one object a number: metric, group (`all`, a category, or a group of the file),
    value, ci_low, ci_high, ci_method, n (rows), n_texts (distinct texts).
    A value that the rows do not define is null.

    Probabilities are of one category each, and the largest of several is none of "any label". So
    where critic or file has several, calibration is told for each category that both know, and for
    `all` only where each has one.
    """
    judged = np.array([verdict.judged for verdict in judgements.verdicts], bool)
    rows = _Rows(labelled, judgements, np.flatnonzero(judged), seed)
    reasons = collections.Counter(
        v.reason or "no reason given" for v in judgements.verdicts if not v.judged
    )
    violates = labelled.labels.any(1)
    records = [
        *_decisions(rows, "all", np.ones(len(rows.labels), bool)),
        *_ranking(rows),
        *(record for told in _calibrated(rows) for record in _calibration(rows, *told)),
        *_categories(rows),
        *_spans(rows),
    ]
    for name, member in labelled.groups.items():
        records += _group(rows, name, member[rows.index])
    result = {
        "critic": judgements.critic,
        "n": len(labelled.texts),
        "n_violating": int(violates.sum()),
        "unjudged": int((~judged).sum()),
        "unjudged_reasons": dict(reasons.most_common()),
        "seed": seed,
        "records": records,
    }
    calibration = {group: _reliability(p, y, seed) for group, p, y in _calibrated(rows) if len(p)}
    result |= calibration.pop("all", {})
    return result | ({"calibration": calibration} if calibration else {})


def _reliability(p: np.ndarray, y: np.ndarray, seed: int) -> dict[str, Any]:
    return {
        "calibration_floor": metrics.calibration_floor(p, seed=seed),
        "reliability": metrics.reliability(p, y),
    }


class _Rows:
    """The judged rows."""

    def __init__(
        self, labelled: LabelledTexts, judgements: Judgements, index: np.ndarray, seed: int
    ):
        self.labelled, self.index, self.seed = labelled, index, seed
        self.texts = [labelled.texts[i] for i in index]
        self.labels = labelled.labels[index].any(1)
        self.verdicts = [judgements.verdicts[i] for i in index]
        self.flagged = np.array([not verdict.safe for verdict in self.verdicts], bool)
        self.scores = None if judgements.scores is None else judgements.scores[index]
        self.score = None if self.scores is None else self.scores.max(1)
        self.categories = judgements.categories
        self.fold = None if judgements.fold is None else judgements.fold[index]

    def mean(
        self, metric: str, group: str, values: np.ndarray, where: np.ndarray
    ) -> dict[str, Any]:
        chosen = np.flatnonzero(where)
        found = interval(
            values[chosen].astype(float).tolist(), [self.texts[i] for i in chosen], seed=self.seed
        )
        return _record(metric, group, found)

    def bootstrap(
        self,
        metric: str,
        group: str,
        of: metrics.Metric,
        where: np.ndarray | None = None,
        strata=None,
    ):
        chosen = np.arange(len(self.texts)) if where is None else np.flatnonzero(where)
        texts = [self.texts[i] for i in chosen]
        return _record(
            metric, group, metrics.bootstrap_metric(of, texts, strata=strata, seed=self.seed)
        )


def _record(metric: str, group: str, found: Interval) -> dict[str, Any]:
    value, low, high = (None if math.isnan(x) else x for x in (found.value, found.low, found.high))
    return {"metric": metric, "group": group, "value": value, "ci_low": low, "ci_high": high,
            "ci_method": found.method, "n": found.n, "n_texts": found.n_prompts}  # fmt: skip


def _decisions(rows: _Rows, group: str, member: np.ndarray) -> list[dict[str, Any]]:
    """Rates of the verdicts of a group's rows."""
    y, flagged = rows.labels, rows.flagged
    return [
        rows.mean("accuracy", group, flagged == y, member),
        rows.mean("precision", group, y, member & flagged),
        rows.mean("recall", group, flagged, member & y),
        rows.mean("false_positive_rate", group, flagged, member & ~y),
    ]


def _ranking(rows: _Rows) -> list[dict[str, Any]]:
    """Metrics of the score, where there is one."""
    if rows.score is None:
        return []
    y, score = rows.labels, rows.score
    records = [
        rows.bootstrap("auc", "all", functools.partial(metrics.auc, score, y)),
        rows.bootstrap(
            "average_precision", "all", functools.partial(metrics.average_precision, score, y)
        ),
    ]
    if rows.fold is not None:
        parts = [np.flatnonzero(rows.fold == k) for k in np.unique(rows.fold)]

        def mean_of_folds(w: np.ndarray) -> np.ndarray:
            return np.mean([metrics.auc(score[p], y[p], w[..., p]) for p in parts], 0)

        records.append(
            rows.bootstrap("auc_mean_of_folds", "all", mean_of_folds, strata=rows.fold.tolist())
        )
        for k, part in enumerate(parts):
            inside = np.isin(np.arange(len(y)), part)
            records.append(_auc(rows, f"auc_fold_{k}", "all", inside))
    return records


def _calibrated(rows: _Rows) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(group, probability of each row, label of each row)
    where one is the probability of the other."""
    if rows.scores is None:
        return []
    theirs = rows.labelled.categories
    if len(rows.categories) == len(theirs) == 1:
        return [("all", rows.scores[:, 0], rows.labels)]
    return [
        (name, rows.scores[:, c], rows.labelled.labels[rows.index, theirs.index(name)])
        for c, name in enumerate(rows.categories)
        if name in theirs
    ]


def _calibration(rows: _Rows, group: str, p: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    return [
        rows.bootstrap("brier", group, functools.partial(metrics.brier, p, y)),
        rows.bootstrap(
            "calibration_error", group, functools.partial(metrics.calibration_error, p, y)
        ),
    ]


def _auc(rows: _Rows, metric: str, group: str, where: np.ndarray) -> dict[str, Any]:
    """AUC of the score over some rows."""
    assert rows.score is not None
    score, y = rows.score[where], rows.labels[where]
    return rows.bootstrap(metric, group, functools.partial(metrics.auc, score, y), where)


def _categories(rows: _Rows) -> list[dict[str, Any]]:
    """Where the file has several categories: how many texts of each are found at all,
    and how well it is told apart."""
    labelled, records = rows.labelled, []
    if len(labelled.categories) < 2:
        return []
    for c, name in enumerate(labelled.categories):
        has = labelled.labels[rows.index, c]
        named = np.array([any(s.category == name for s in v.spans) for v in rows.verdicts], bool)
        records.append(rows.mean("recall", name, rows.flagged, has))
        records.append(rows.mean("category_recall", name, named, has))
        records.append(rows.mean("category_false_positive_rate", name, named, ~has))
        if rows.scores is not None and name in rows.categories:
            score = rows.scores[:, rows.categories.index(name)]
            records.append(rows.bootstrap("auc", name, functools.partial(metrics.auc, score, has)))
    return records


def _group(rows: _Rows, name: str, member: np.ndarray) -> list[dict[str, Any]]:
    """Bias against a group: its rates, their difference from the rest,
    and the AUCs of Borkan et al. (2019).

    `auc` ranks within the group; `auc_bpsn` sets the group's harmless texts against everybody
    else's violations (low: harmless texts about the group score too high); `auc_bnsp` the group's
    violations against others' harmless texts.
    """
    y, flagged = rows.labels, rows.flagged

    def difference(w: np.ndarray) -> np.ndarray:
        mine, others = ((w * (part & ~y)) for part in (member, ~member))
        total, rest = mine.sum(-1), others.sum(-1)
        known = (total > 0) & (rest > 0)
        gap = (mine * flagged).sum(-1) / np.where(known, total, 1) - (others * flagged).sum(
            -1
        ) / np.where(known, rest, 1)
        return np.where(known, gap, np.nan)

    records = [
        *_decisions(rows, name, member),
        rows.bootstrap("false_positive_rate_difference", name, difference),
    ]
    if rows.score is not None:
        records.append(_auc(rows, "auc", name, member))
        records.append(_auc(rows, "auc_bpsn", name, member & ~y | ~member & y))
        records.append(_auc(rows, "auc_bnsp", name, member & y | ~member & ~y))
    return records


# Spans --------------------------------------------------------------------------------------------


def _spans(rows: _Rows) -> list[dict[str, Any]]:
    """Overlap of the critic's spans with the file's, where it has any: means over texts."""
    if rows.labelled.spans is None:
        return []
    wanted = [rows.labelled.spans[i] for i in rows.index]
    some = np.array([bool(spans) for spans in wanted], bool)
    pairs = list(zip(rows.texts, wanted, [v.spans for v in rows.verdicts], strict=True))
    iou = np.array([span_iou(w, found) for _, w, found in pairs])
    characters = np.array(
        [_f1(_characters(w), _characters(_pairs(found))) for _, w, found in pairs]
    )
    words = np.array([span_word_f1(text, w, found) for text, w, found in pairs])
    return [
        rows.mean("span_iou", "all", iou, some),
        rows.mean("span_word_f1", "all", words, some),
        rows.mean("span_character_f1", "all", characters, np.ones(len(some), bool)),
    ]


def span_iou(wanted: Sequence[tuple[int, int]], found: Sequence[Span]) -> float:
    """Characters in both over characters in either; 1 where both are empty."""
    a, b = _characters(wanted), _characters(_pairs(found))
    return len(a & b) / len(a | b) if a | b else 1.0


def span_word_f1(text: str, wanted: Sequence[tuple[int, int]], found: Sequence[Span]) -> float:
    """F1 over the words that spans touch; 1 where both touch none."""
    words = [match.span() for match in WORD.finditer(text)]

    def touched(spans: Sequence[tuple[int, int]]) -> set[int]:
        return {
            k
            for k, (start, end) in enumerate(words)
            if any(s < end and start < e for s, e in spans)
        }

    return _f1(touched(wanted), touched(_pairs(found)))


def _pairs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in spans]


def _characters(spans: Sequence[tuple[int, int]]) -> set[int]:
    return {i for start, end in spans for i in range(start, end)}


def _f1(wanted: set[int], found: set[int]) -> float:
    """As in SemEval-2021 task 5: of one text, 1 where both are empty."""
    return 2 * len(wanted & found) / (len(wanted) + len(found)) if wanted or found else 1.0


# Text ---------------------------------------------------------------------------------------------


def audit_table(result: dict[str, Any]) -> str:
    """An audit as Markdown."""
    unjudged = ", ".join(f"{reason} {n}" for reason, n in result["unjudged_reasons"].items())
    lines = [
        f"# Audit of {result['critic']}",
        "",
        f"{result['n']} texts, {result['n_violating']} of them labelled as violations; "
        f"could not judge {result['unjudged']}" + (f" ({unjudged})" if unjudged else "") + ".",
        "",
        "| metric | group | value | 95 % interval | rows |",
        "|---|---|---|---|---|",
    ]
    for r in result["records"]:
        span = "-" if r["ci_low"] is None else f"{r['ci_low']:.3f} .. {r['ci_high']:.3f}"
        value = "-" if r["value"] is None else f"{r['value']:.3f}"
        group = r["group"].replace("|", "\\|")
        lines.append(f"| {r['metric']} | {group} | {value} | {span} | {r['n']} |")
    told = {"": result} if "reliability" in result else result.get("calibration", {})
    for name, calibration in told.items():
        of, error = f" of {name}" if name else "", f"{calibration['calibration_floor']:.3f}"
        lines += [
            "",
            f"Perfectly calibrated probabilities{of} would show a calibration error of {error} "
            "here.",
            "",
        ]
        lines += ["| rows | mean probability | share labelled |", "|---|---|---|"]
        lines += [
            f"| {b['n']} | {b['mean_probability']:.3f} | {b['share_positive']:.3f} |"
            for b in calibration["reliability"]
        ]
    return "\n".join(lines) + "\n"
