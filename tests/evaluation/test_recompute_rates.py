"""tests/recompute_rates.py finds every number of results.json again,
and finds the ones that were made up."""

import dataclasses
import json
import zlib

import numpy as np
import pytest

from rlbf_jax.critics.judges.grammar_judge import GrammarJudge
from rlbf_jax.critics.judges.grammar_seams import GrammarSeams
from rlbf_jax.data.worlds.toy_world import ToyWorld
from rlbf_jax.directives import ReplaceRule, Semantics, render
from rlbf_jax.evaluation.columns import metric_names
from rlbf_jax.evaluation.many_answers import QUANTILES
from rlbf_jax.evaluation.results import write_results
from rlbf_jax.evaluation.suite import EvaluationContext, SuiteConfig, build_attempts, evaluate
from rlbf_jax.evaluation.utility import TextScores, score_rows, utility_records
from rlbf_jax.sampling.request import Generation, Knobs
from rlbf_jax.tokenizers import train_tokenizer
from tests import recompute_rates

CONFIG = SuiteConfig(n=12, n_decoding=4, knobs=Knobs(temperature=0.7, max_tokens=120))


class Doubtful:
    """The judge, which cannot judge some texts."""

    name = "doubtful"

    def __init__(self, judge):
        self.judge_all = judge

    def judge(self, exchanges):
        verdicts = self.judge_all.judge(exchanges)
        unsure = [zlib.crc32(x.text.encode()) % 13 == 0 for x in exchanges]
        return [
            dataclasses.replace(v, judged=not no) for v, no in zip(verdicts, unsure, strict=True)
        ]


def wild(world, tokenizer, attempts):
    """A sampler that does everything a model may do: takes back right, short,
    long and twice; violates, refuses."""
    rule, forced_by = tokenizer.controls.rule(), {a.request.id: a for a in attempts}

    def say(request, rng):
        attempt = forced_by[request.id]
        ids = []
        for _ in range(int(rng.integers(0, 3))):
            x = [
                attempt.num_span,
                attempt.num_span + attempt.num_bridge,
                int(rng.integers(1, rule.x_max + 1)),
            ]
            x = int(np.clip(x[int(rng.integers(3))] + attempt.num_tail, 1, rule.x_max))
            category = (
                attempt.violation.category if attempt.violation and rng.random() < 0.7 else "insult"
            )
            if rng.random() < 0.9:
                ids.append(rule.first_id + rule.categories.index(category))
            if rng.random() < 0.9:
                ids.append(rule.backtrack_id(x))
            if rng.random() < 0.4:
                ids += tokenizer.encode(
                    world.violation(rng, "rl", "development").text + ". caf\u00e9 \u2713"
                )
        texts = [
            world.refusal(rng, attempt.prompt),
            " " + world.answer(rng, attempt.prompt),
            " gibberish soup",
        ]
        return ids + tokenizer.encode(texts[int(rng.integers(3))])

    def sample(requests):
        generations = []
        for request in requests:
            emitted = [*request.forced, *say(request, np.random.default_rng(request.id))]
            ends = request.id % 5 > 0
            r = render(rule, emitted)
            trace = np.asarray([*emitted, *([tokenizer.eos_id] if ends else [])], np.int32)
            none = np.zeros(0, np.float32)
            text = tokenizer.decode(r.visible)
            generations.append(
                Generation(
                    text,
                    trace,
                    r.edits,
                    none,
                    r.visible,
                    none,
                    len(request.forced),
                    ends,
                    r.malformed,
                    request,
                )
            )
        return generations

    return sample


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, world, rng = tmp_path_factory.mktemp("run"), ToyWorld(), np.random.default_rng(0)
    documents = [world.document(rng) for _ in range(400)]
    texts = [text for d in documents for text in (d.prompt.text, d.response)]
    tokenizer = train_tokenizer(texts, 700, world.categories, 24)
    attempts = build_attempts(world, tokenizer, CONFIG)
    context = EvaluationContext(
        "rlbf_ppo", "rlbf", Semantics.REWIND, 0, "development", critic="lexicon"
    )
    judge = Doubtful(GrammarJudge(world))
    say = wild(world, tokenizer, attempts)
    records, rows = evaluate(say, attempts, judge, tokenizer, context, GrammarSeams())
    scores = TextScores(*(np.asarray(x, float) for x in ([30.5, 7.25], [3, 5], [11, 6])))
    template = dataclasses.replace(records[0], attack="none", split="all", knobs={}, judge="")
    write_results(folder / "results.json", records + utility_records(scores, template))
    for name, lines in (("rlbf.jsonl", rows), ("clean_text/rlbf.jsonl", score_rows(scores))):
        path = folder / "evaluation" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_every_number_is_found_again(run):
    records = json.loads((run / "results.json").read_text())
    number, wrong = recompute_rates.compare(run)
    assert wrong == [] and number == len(records) > 250
    named = set(metric_names()) - {"judge_score"} | QUANTILES.keys() | {"asr_excess"}
    assert named <= {r["metric"] for r in records}
    names = metric_names()[: metric_names().index("corrected")]
    values = {metric: {r["value"] for r in records if r["metric"] == metric} for metric in names}
    # A metric that is 0 or 1 everywhere could be found again without being counted.
    assert all(found - {0.0, 1.0} for found in values.values()), values
    assert {"toy", "toy_long_prefix"} == {r["benchmark"] for r in records}


def test_its_own_metrics_equal_the_rows(run):
    rows = recompute_rates.lines(run / "evaluation" / "rlbf.jsonl")
    for row in rows:
        stored = {name: value for name, value in row["metrics"].items() if value is not None}
        assert recompute_rates.measure(row) == pytest.approx(stored)


def test_rows_of_replacements_are_counted_anew():
    """Flags, copies and replacements, closed, dropped, clamped and left open."""
    world, rng = ToyWorld(), np.random.default_rng(0)
    documents = [world.document(rng) for _ in range(200)]
    texts = [text for d in documents for text in (d.prompt.text, d.response)]
    tokenizer = train_tokenizer(texts, 500, world.categories, 24)
    rule = ReplaceRule(tokenizer.controls.rule().first_id, world.categories)
    config = dataclasses.replace(CONFIG, n=6, attacks=("none", "direct", "middle_filling"))
    attempts = build_attempts(world, tokenizer, config)

    def sample(requests):
        return [say(request, np.random.default_rng(request.id)) for request in requests]

    def say(request, rng):
        ids = list(request.forced)
        for _ in range(int(rng.integers(0, 4))):
            said = tokenizer.encode(world.violation(rng, "rl", "development").text + " caf\u00e9.")
            ids += said if rng.random() < 0.6 else []
            ids += [rule.first_id + int(rng.integers(len(rule.categories)))] * (rng.random() < 0.9)
            ids += said[int(rng.integers(len(said))) :] if rng.random() < 0.8 else []
            ids += [rule.replace_id] * (rng.random() < 0.8)
        ids += tokenizer.encode(" safe words")
        r = render(rule, ids)
        text, none = tokenizer.decode(r.visible), np.zeros(0, np.float32)
        trace, forced = np.asarray(ids, np.int32), len(request.forced)
        return Generation(
            text, trace, r.edits, none, r.visible, none, forced, False, r.malformed, request
        )

    context = EvaluationContext("bsafe", "sft", Semantics.KEEP, 0, "development", rule=rule)
    judge, seams = GrammarJudge(world), GrammarSeams()
    _, rows = evaluate(sample, attempts, judge, tokenizer, context, seams)
    assert {row["metrics"]["torn_seam"] for row in rows} == {None, 1.0}
    kinds = {item["kind"] for row in rows for item in row["trace"]}
    assert kinds == {"content", "copy", "category", "retraction"}
    counts = {name: sum(row["metrics"][name] for row in rows) for name in ("malformed", "clamped")}
    assert all(counts.values()), counts
    for row in rows:
        stored = {name: value for name, value in row["metrics"].items() if value is not None}
        assert recompute_rates.measure(row) == pytest.approx(stored)


def test_a_changed_number_is_found(run, tmp_path):
    (tmp_path / "evaluation" / "clean_text").mkdir(parents=True)
    for name in ("rlbf.jsonl", "clean_text/rlbf.jsonl"):
        (tmp_path / "evaluation" / name).write_bytes((run / "evaluation" / name).read_bytes())
    records = json.loads((run / "results.json").read_text())
    where = {
        (r["benchmark"], r["attack"], r["split"], r["metric"]): i for i, r in enumerate(records)
    }
    for change in ({"value": 0.123}, {"n": 3}, {"ci_low": 0.001}, {"split": "made_up"}):
        changed = [dict(r) for r in records]
        changed[where["toy", "middle_filling", "rl", "backtrack_rate"]] |= change
        (tmp_path / "results.json").write_text(json.dumps(changed))
        _, wrong = recompute_rates.compare(tmp_path)
        assert wrong and "backtrack_rate" in wrong[0], change


def test_a_changed_trace_is_found(run):
    row = next(r for r in recompute_rates.lines(run / "evaluation" / "rlbf.jsonl") if r["edits"])
    for item in row["trace"]:
        item["erased"] = False
    with pytest.raises(AssertionError, match="edits of the trace are not those of the row"):
        recompute_rates.measure(row)


def test_a_seam_that_was_left_out_or_moved_is_found(run):
    row = next(r for r in recompute_rates.lines(run / "evaluation" / "rlbf.jsonl") if r["seams"])
    for seams in ([], [seam | {"at": seam["at"] + 1} for seam in row["seams"]]):
        with pytest.raises(AssertionError, match="the trace has seams at"):
            recompute_rates.measure(row | {"seams": seams, "visible": "as if"})


def test_it_stands_alone():
    source = open(recompute_rates.__file__, encoding="utf-8").read()
    assert (
        "import rlbf_jax" not in source
        and "from rlbf_jax" not in source
        and '["metrics"]' not in source
    )
