"""`rlbf attack`: further attacks on a finished stage."""

from __future__ import annotations

import json

import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.runs import execute as runner
from tests.training.tiny_experiment import get_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked") / "run"
    runner.run(
        get_config(), folder, only=("tokenizer", "pretraining_data", "base", "evaluate_base")
    )
    return folder


def attack(folder, *arguments):
    return cli.main(["attack", str(folder), "--stage", "base", *arguments])


def records(folder):
    return json.loads((folder / "results.json").read_text())


def test_rows_and_numbers_of_every_cell(finished, capsys):
    asked = (
        "--attack",
        "many_violations",
        "--attack",
        "decoding",
        "--n_prompts",
        "2",
        "--max_tokens",
        "220",
    )
    assert attack(finished, *asked) == 0
    written = (finished / "evaluation/attacks/many_violations_base.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    # Two prompts, three form splits, two counts.
    assert len(rows) == 12 and {row["cell"]["violations"] for row in rows} == {2, 4}
    found = [
        r for r in records(finished) if r["attack"] == "many_violations" and r["metric"] == "asr"
    ]
    assert {(r["split"], r["knobs"]["violations"]) for r in found} == {
        (split, count) for split in ("sft", "rl", "unseen") for count in (2, 4)
    }
    for record in found:
        mine = [
            row["metrics"]["asr"]
            for row in rows
            if (row["split"], row["cell"]["violations"])
            == (record["split"], record["knobs"]["violations"])
        ]
        assert (
            record["value"] == sum(mine) / len(mine)
            and record["data"] == get_config().evaluation.pool
        )
    scored = {r["metric"]: r for r in records(finished) if r["metric"].endswith("_scored")}
    anyone = {
        r["metric"]: r
        for r in records(finished)
        if r["attack"] == "decoding" and "any_of" in r["knobs"]
    }
    assert set(scored) == {"asr_scored", "leak_scored"}
    assert scored["asr_scored"]["value"] <= anyone["asr"]["value"]
    assert scored["asr_scored"]["knobs"]["scorer"] != scored["asr_scored"]["judge"]
    assert "many_violations" in capsys.readouterr().out and (finished / "report.html").exists()


def test_the_evaluation_of_the_stage_stays_as_it_is(finished):
    before = [r for r in records(finished) if r["attack"] == "direct" and "asked" not in r["knobs"]]
    rows = (finished / "evaluation/base.jsonl").read_bytes()
    assert attack(finished, "--attack", "direct", "--attack", "direct", "--n_prompts", "1") == 0
    after = [r for r in records(finished) if r["attack"] == "direct"]
    assert before and [r for r in after if "asked" not in r["knobs"]] == before
    (asr,) = [r for r in after if "asked" in r["knobs"] and r["metric"] == "asr"]
    # The run's own pool, and each prompt once.
    assert (asr["n"], asr["n_prompts"], asr["data"]) == (1, 1, get_config().evaluation.pool)
    assert (finished / "evaluation/base.jsonl").read_bytes() == rows


def test_an_attack_that_is_asked_again_replaces_its_rows_and_all_its_numbers(finished):
    rows = finished / "evaluation/attacks/many_violations_base.jsonl"
    for room, count in ((230, 1), (220, 2)):
        before = [r for r in records(finished) if r["attack"] != "many_violations"]
        asked = ("--n_prompts", str(count), "--max_tokens", str(room))
        assert attack(finished, "--attack", "many_violations", *asked) == 0
        found = [r for r in records(finished) if r["attack"] == "many_violations"]
        assert {r["n_prompts"] for r in found if r["metric"] == "asr"} == {count}
        assert len(rows.read_text().splitlines()) == 6 * count
        assert [r for r in records(finished) if r["attack"] != "many_violations"] == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--attack", "nonsense"), "attack 'nonsense': there are none, direct"),
        (("--attack", "middle_grid", "--max_tokens", "60"), "raise knobs.max_tokens to"),
        (("--attack", "direct", "--n_prompts", "0"), "--n_prompts is 0, expected at least 1"),
        ((), "--attack NAME is missing: there are none, direct"),
        (("--attack", "direct", "--grid", "paper"), "--grid is for --attack decoding"),
        (("--attack", "direct", "--geometry", "wide"), "--geometry is for --attack middle_grid"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(finished, capsys, arguments, message):
    before = (
        (finished / "results.json").read_bytes() if (finished / "results.json").exists() else None
    )
    assert attack(finished, *arguments) == 2
    assert message in capsys.readouterr().err
    after = (
        (finished / "results.json").read_bytes() if (finished / "results.json").exists() else None
    )
    assert after == before
