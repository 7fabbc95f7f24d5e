"""`rlbf attack` on a whole, tiny run."""

import dataclasses
import json
import pathlib

import pytest

from rlbf_jax.attacks.search.gcg import GcgConfig
from rlbf_jax.attacks.search.optimized import OptimizedConfig
from rlbf_jax.cli.attack import Search, optimized
from rlbf_jax.cli.main import main

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_options_of_a_search_are_the_library_s():
    assert optimized(Search()) == OptimizedConfig()
    fields = {field.name for field in dataclasses.fields(GcgConfig)} - {"search_width"} | {"width"}
    own = {"neighbors", "window"}
    assert {field.name for field in dataclasses.fields(Search)} == fields | own
    told = dict(steps=3, topk=5, positions="stratified", n_replace=2, buffer_size=4,
                kind="mellowmax", alpha=2.0, placement="before", separator=" ", filter_ids=False,
                allow_non_ascii=True, early_stop=True, batch_size=16, seed=7, init="a",
                control_floor=-2.0)  # fmt: skip
    made = optimized(Search(width=9, control_weight=0.25, window=3, neighbors=2, **told))
    assert made == OptimizedConfig(GcgConfig(search_width=9, **told), 0.25, 3, 2)


@pytest.mark.slow
def test_attacks_of_a_stage_end_up_in_its_results(tmp_path, capsys):
    work = tmp_path / "run"
    assert (
        main(
            [
                "run",
                str(ROOT / "experiments" / "smoke.py"),
                "--workdir",
                str(work),
                "--no-baselines",
            ]
        )
        == 0
    )
    before = json.loads((work / "results.json").read_text())
    names = ("gcg", "adaptive_gcg", "trigger", "random_search")
    command = ["attack", str(work), "--stage", "sft", "--n_prompts", "2"]
    command += [word for name in names for word in ("--attack", name)]
    assert main([*command, "--search.steps", "3", "--search.width", "8", "--search.topk", "8"]) == 0
    records = json.loads((work / "results.json").read_text())[len(before) :]
    assert {r["attack"] for r in records} == set(names)
    for name in names:
        found = {r["metric"]: r for r in records if r["attack"] == name}
        assert found["target_loss"]["value"] <= found["start_loss"]["value"]
        assert {"asr", "emitted", "backtrack_rate"} <= set(found) and found["asr"]["knobs"][
            "candidates"
        ] == 24
        rows = [
            json.loads(line)
            for line in (work / "evaluation" / "attacks" / f"{name}_sft.jsonl").open()
        ]
        assert all(row["search"]["message"].startswith(row["prompt"]) for row in rows)
        assert len(rows) == 2 and all(
            row["search"]["loss"] <= row["search"]["start_loss"] for row in rows
        )
    assert main(["attack", str(work), "--stage", "nowhere", "--attack", "gcg"]) == 2
    assert "no finished stage 'nowhere'" in capsys.readouterr().err
