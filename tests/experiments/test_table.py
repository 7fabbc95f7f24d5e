"""The plan of docs/results.md, how it goes on after a kill, and what is written;
training is left out."""

import dataclasses
import gzip
import importlib
import json
import shutil
from pathlib import Path

import pytest

from experiments.quickstart import get_config
from experiments.table import document, kept, pieces, running, words
from experiments.table.sections import ABLATED, UNDER_ATTACK
from experiments.table.words import Compared
from rlbf_jax.directives import NEVER, Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.columns import metric_names
from rlbf_jax.evaluation.comparison import Estimate, Slice
from rlbf_jax.evaluation.paired_tests import PairedTest
from rlbf_jax.plain import differences
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.files import write_json
from rlbf_jax.runs.manifest import open_workdir, shared_by
from rlbf_jax.runs.stage import fingerprint

CONFIG = get_config()
PLAN = pieces.plan(CONFIG, (0, 1), (0,))
BY_NAME = {piece.name: piece for piece in PLAN}
ROOT = Path(__file__).resolve().parent.parent.parent


# The plan ---------------------------------------------------------------------------------------


def test_pieces_are_distinct_and_build_on_earlier_ones():
    assert len(BY_NAME) == len(PLAN)
    names = [piece.name for piece in PLAN]
    for number, piece in enumerate(PLAN):
        if piece.source:
            assert (
                piece.source in names[:number]
                and BY_NAME[piece.source].seed == piece.seed == piece.config.seed
            )
            there = running.stages_of(BY_NAME[piece.source])
            assert set(piece.adopted) <= {*there, *BY_NAME[piece.source].adopted}
    assert {piece.seed for piece in PLAN if piece.group == "keep"} == {0, 1}
    assert {piece.seed for piece in PLAN if piece.group.startswith("bias")} == {0}


def fingerprint_of(config, stage):
    return fingerprint(recipe(config), stage, shared_by(config))


def test_what_is_adopted_does_not_depend_on_what_differs():
    for piece in PLAN:
        for stage in piece.adopted:
            there = BY_NAME[piece.source].config
            assert fingerprint_of(there, stage) == fingerprint_of(piece.config, stage), (
                piece.name,
                stage,
            )


def test_what_is_run_again_is_another_stage_than_the_source_has():
    """Otherwise it could have been adopted."""
    for piece in PLAN:
        if piece.source:
            there = BY_NAME[piece.source].config
            for stage in piece.stages:
                known = {s.name for s in recipe(there)}
                assert stage not in known or (
                    fingerprint_of(there, stage) != fingerprint_of(piece.config, stage)
                ), (piece.name, stage)


def test_each_ablation_changes_what_its_name_says():
    main, by_group = BY_NAME["main/seed0"].config, {p.group: p.config for p in PLAN if p.seed == 0}

    def differs(group):
        return [name for name, _, _ in differences(main.stored(), by_group[group].stored())]

    assert differs("grpo") == ["reinforcement.policy.algorithm"]
    assert differs("keep") == ["semantics"] and by_group["keep"].semantics is Semantics.KEEP
    assert differs("forbid_all") == ["evaluation.knobs.forbid_from"]
    assert by_group["forbid_all"].evaluation.knobs.forbid_to == NEVER
    assert differs("forbid_middle") == [
        "evaluation.knobs.forbid_from",
        "evaluation.knobs.forbid_to",
    ]
    assert differs("bias_-8") == ["evaluation.knobs.control_bias.categories"]
    assert differs("no_guidance") == ["reinforcement.policy.sft_weight"]
    assert differs("category_price") == ["reinforcement.reward.price_wrong_category"]
    assert differs("harmless_price") == ["reinforcement.reward.price_on_harmless"]
    assert differs("torn") == ["reinforcement.reward.torn_is_failed"]
    assert differs("own_mistakes") == ["reinforcement.own_mistakes"]
    assert differs("rloo") == ["reinforcement.policy.algorithm"]
    assert differs("dapo") == ["reinforcement.policy.algorithm", "reinforcement.resample"]
    assert differs("noise") == ["critic_noise.accuracy"] and differs("noise_category") == [
        "critic_noise.missed"
    ]
    assert set(differs("coverage_wide")) <= {
        "bsafe_plus.only_forms",
        "bsafe_plus.share_rl_forms",
    }
    assert differs("coverage_wide") and differs("coverage_narrow")
    for group in by_group:
        assert group == "main" or all(name.split(".")[0] != "seed" for name in differs(group))


def test_a_base_that_has_the_option_on_is_ablated_by_switching_it_off():
    base = CONFIG.changed({"reinforcement.reward.price_on_harmless": 0.3})
    free = next(p for p in pieces.plan(base, (0,), (0,)) if p.group == "harmless_price")
    assert free.config.method.reinforcement.reward.price_on_harmless == 0.0
    assert "`reinforcement.reward.price_on_harmless` 0.3 → 0" in pieces.changed(free.config, base)


def test_plain_contexts_leave_out_what_came_later():
    base = CONFIG.changed({"rollouts.late_filling": 0.2, "rollouts.benign_late": 0.1})
    plain = next(p for p in pieces.plan(base, (0,), (0,)) if p.group == "plain_contexts")
    assert plain.config.method.rollouts == CONFIG.method.rollouts


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_attacked_share(share):
    mix = pieces.with_attacked_share(CONFIG.method.rollouts, share)
    weights = {name: getattr(mix, name) for name in mix.shares()[0]}
    forced = sum(weight for name, weight in weights.items() if name in pieces.FORCED)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
    assert forced == pytest.approx(share, abs=1e-4)
    if share:
        assert mix.prefilling / mix.middle_filling == pytest.approx(
            CONFIG.method.rollouts.prefilling / CONFIG.method.rollouts.middle_filling, abs=1e-3
        )
    assert mix.rl_forms == CONFIG.method.rollouts.rl_forms


def test_half_of_the_forms():
    half = pieces.half_of(())
    categories = [name.split("_")[0] for name in half]
    counts = [categories.count(c) for c in set(categories)]
    assert len(set(categories)) == 4 and max(counts) - min(counts) <= 1
    fewest = pieces.half_of(pieces.half_of(half))
    assert set(fewest) <= set(half) and pieces.half_of(fewest) == fewest and len(fewest) == 4
    assert all("_sft_" in name for name in half)


def test_only_takes_what_it_builds_on_and_refuses_other_names():
    names = [piece.name for piece in pieces.chosen(PLAN, ["keep_grpo"])]
    assert names == [f"{group}/seed{s}" for s in (0, 1) for group in ("main", "keep", "keep_grpo")]
    assert [p.name for p in pieces.chosen(PLAN, ["noise"])] == ["main/seed0", "noise/seed0"]
    assert pieces.chosen(PLAN, []) == PLAN
    with pytest.raises(ValueError, match="--only nois: no such piece; expected one of main, grpo"):
        pieces.chosen(PLAN, ["nois"])
    with pytest.raises(ValueError, match=r"ablation seeds \[3\] are not among"):
        pieces.plan(CONFIG, (0,), (3,))


# Running ----------------------------------------------------------------------------------------


class Stages:
    """Stands for `execute.run`: writes what each stage leaves, and may be killed."""

    def __init__(self, killed_at=None):
        self.calls, self.killed_at = [], killed_at

    def __call__(self, config, folder, only):
        stages = recipe(config)
        open_workdir(config, stages, folder)
        for stage in (s.name for s in stages):
            if (only is not None and stage not in only) or (folder / "done" / stage).exists():
                continue
            if len(self.calls) == self.killed_at:
                raise KeyboardInterrupt
            self.calls.append((f"{folder.parent.name}/{folder.name}", stage))
            if stage == "tokenizer":
                (folder / "tokenizer").mkdir(exist_ok=True)
            elif stage.endswith("_data"):
                (folder / "data" / stage.removesuffix("_data")).mkdir(parents=True)
            elif stage.startswith("evaluate_"):
                write_rows(config, folder, stage.removeprefix("evaluate_"))
            else:
                (folder / "stages" / stage / "model").mkdir(parents=True)
            write_json(folder / "done" / stage, {"seconds": 60.0})


RATES = {"base": 1.0, "refusal_sft": 0.9, "sft": 0.5, "sft_control": 0.5, "rlbf": 0.1}


def write_rows(config, folder, stage, n=20):
    """Rows in which a share RATES[stage] of the answers violates;
    forbidden directives bring it to 0.9."""
    rate = 0.9 if config.evaluation.knobs.forbid_from == 0 else RATES[stage]
    rows, slices = (
        [],
        [*UNDER_ATTACK, Slice("none"), Slice("benign_prefill"), Slice("benign_middle")],
    )
    for where in slices:
        for i in range(n):
            bad = where.attack not in ("none", "benign_prefill", "benign_middle") and i < rate * n
            metrics = dict.fromkeys(metric_names(), 0.0) | {"asr": float(bad), "leak": float(bad)}
            row = {
                "attack": where.attack,
                "split": where.split or "all",
                "seed": config.seed,
                "cell": dict(where.cell),
                "long_prefix": i % 2 == 0,
            }
            rows.append(
                row | {"request_id": len(rows), "prompt_id": f"p{len(rows)}", "metrics": metrics}
            )
    texts = [{"nll": 20.0 + i, "correct": 5, "count": 10} for i in range(8)]
    (folder / "evaluation" / "clean_text").mkdir(parents=True, exist_ok=True)
    for path, lines in ((f"{stage}.jsonl", rows), (f"clean_text/{stage}.jsonl", texts)):
        (folder / "evaluation" / path).write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )


SOME = pieces.chosen(PLAN, ["grpo", "keep", "forbid_all", "bias_-8", "bias_+8", "coverage_wide"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir, stages = tmp_path_factory.mktemp("table"), Stages()
    running.run_pieces(SOME, workdir, stages)
    return workdir, stages.calls


def test_only_unshared_stages_are_run(undisturbed):
    _, calls = undisturbed
    ran = {}
    for folder, stage in calls:
        ran.setdefault(folder, []).append(stage)
    assert ran["grpo/seed0"] == ["rlbf", "evaluate_rlbf"] and ran["forbid_all/seed0"] == [
        "evaluate_rlbf"
    ]
    assert ran["coverage_wide/seed0"] == [
        "bsafe_plus_data",
        "sft",
        "rlbf",
        "evaluate_sft",
        "evaluate_rlbf",
    ]
    assert ran["keep/seed1"][:3] == ["sft", "sft_control", "rlbf"] or set(ran["keep/seed1"]) >= {
        "sft",
        "rlbf",
    }
    assert len(ran["main/seed0"]) == 14 and "base" not in ran["keep/seed0"]
    assert len(set(calls)) == len(calls)


@pytest.mark.parametrize("moment", [3, 12, 24])
def test_goes_on_where_it_was_killed(undisturbed, tmp_path, moment):
    _, calls = undisturbed
    first = Stages(killed_at=moment)
    with pytest.raises(KeyboardInterrupt):
        running.run_pieces(SOME, tmp_path, first)
    second = Stages()
    running.run_pieces(SOME, tmp_path, second)
    assert first.calls + second.calls == calls
    third = Stages()
    running.run_pieces(SOME, tmp_path, third)
    assert third.calls == []
    assert running.seconds(SOME, tmp_path) == 60.0 * len(calls)


def test_a_folder_of_other_settings_is_refused(undisturbed):
    workdir, _ = undisturbed
    other = dataclasses.replace(SOME[0], config=SOME[0].config.replace(max_drawn=3))
    with pytest.raises(UserError, match="other settings .max_drawn"):
        running.run_pieces([other], workdir, Stages())


# The document -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(undisturbed):
    workdir, _ = undisturbed
    out = workdir / "docs" / "results.md"
    rows = kept.keep(
        PLAN, workdir, workdir / "rows", (0,), "python experiments/quickstart_table.py"
    )
    document.write_document(rows, out)
    return out


def test_document(written):
    text = written.read_text(encoding="utf-8")
    sections = text.split("\n## ")
    titles = [section.splitlines()[0] for section in sections[1:]]
    assert (
        titles[:2] == ["Under attack", "rlbf_ppo against sft_control"]
        and "KEEP against REWIND" in titles
    )
    assert "Directives forbidden" in titles and "Reward variants" not in titles
    assert "not run yet: keep_grpo/seed0" in sections[0] and "noise/seed0" in sections[0]
    assert (
        "`python experiments/quickstart_table.py`" in sections[0]
        and "20 prompts" not in sections[0]
    )
    assert f"{CONFIG.evaluation.pool}, {CONFIG.evaluation.n} prompts" in sections[0]
    for section in sections[1:]:  # every table is followed by one sentence
        assert section.rstrip().endswith(".") and not section.rstrip().splitlines()[-1].startswith(
            "|"
        )
    rows = {
        line.split(" | ")[0]: line for line in sections[1].splitlines() if line.startswith("| ")
    }
    first = rows["| middle filling, rl forms †"].split(" | ")
    assert first[1] == "40" and first[2].startswith("1.00 [") and first[-1].startswith("0.10 [0.")
    assert written.with_name("results_bias.png").read_bytes().startswith(b"\x89PNG")


def test_sentences_are_computed(written):
    text = written.read_text(encoding="utf-8")
    assert "rlbf_ppo has 0.40 lower leak on all attacks than sft_control (95 % interval " in text
    assert "each seed: −0.40, −0.40), an interval without 0." in text
    # Twenty prompts a row, of which eight end worse under both seeds.
    assert "| **−0.40** [−0.60, −0.20] (0.35) | 0.004 | −0.40, −0.40 |" in text
    told = 2 * (len(UNDER_ATTACK) + 1)  # asr and leak, on each attack and on all
    # Nothing differs; seven of the twenty prompts would have to, all in one direction.
    assert "0.00 [−0.16, +0.16] W (0.35)" in text and "MDE" not in text
    assert (
        f"{told} of {told} intervals exclude 0, rlbf_ppo being lower than sft_control in {told} of "
        "them and higher in 0" in text
    )
    assert (
        f"None of {told} intervals excludes 0: rlbf_grpo and rlbf_ppo are not told apart here."
        in text
    )
    assert "*forbid_all* changes 11 of" in text and "asr on prefilling, all forms +0.80" in text


def test_the_document_is_made_again_from_kept_rows_alone(written, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    script = importlib.import_module("quickstart_table")
    rows = tmp_path / "elsewhere"
    shutil.copytree(written.parent.parent / "rows", rows)
    again = tmp_path / "again.md"
    assert script.main(["--from_rows", str(rows), "--out", str(again)]) == 0
    picture = "results_bias.png", "again_bias.png"
    assert again.read_text() == written.read_text().replace(*picture)
    assert (tmp_path / picture[1]).read_bytes() == written.with_name(picture[0]).read_bytes()
    assert capsys.readouterr().out == f"results: {again}\n"
    assert script.main(["--from_rows", str(rows), "--only", "noise"]) == 2
    assert script.main(["--from_rows", str(tmp_path)]) == 2
    assert "kept.json: no such file" in capsys.readouterr().err
    (rows / "kept.json").write_text("{}")
    assert script.main(["--from_rows", str(rows)]) == 2
    assert "kept.json: damaged" in capsys.readouterr().err


def test_kept_rows_are_those_of_the_pieces(undisturbed, tmp_path):
    workdir, _ = undisturbed
    rows, pieces_kept = tmp_path / "rows", pieces.chosen(PLAN, ["grpo"])
    kept.keep(SOME, workdir, rows, (0,), "x")
    stale = rows / "forbid_all/seed0/evaluation/rlbf.jsonl.gz"
    assert stale.exists()
    made = kept.keep(pieces_kept, workdir, rows, (0,), "x")
    assert not stale.exists() and kept.open_kept(rows) == made
    (line, *_) = gzip.open(rows / "grpo/seed1/evaluation/rlbf.jsonl.gz", "rt").readlines()
    row = json.loads(line)
    assert tuple(row) == kept.FIELDS and row["seed"] == 1 and "asr" in row["metrics"]
    before = {path: path.read_bytes() for path in rows.rglob("*.gz")}
    kept.keep(pieces_kept, workdir, rows, (0,), "x")
    assert {path: path.read_bytes() for path in rows.rglob("*.gz")} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="other holds something else"):
        kept.keep(pieces_kept, workdir, tmp_path / "other", (0,), "x")


def estimate(value, low, high, by_seed=None):
    return Estimate(value, low, high, by_seed or {0: value}, 10, 10)


def test_words_follow_the_numbers():
    where = Slice("middle_filling", "rl")
    no = words.one_difference("a", "b", Compared("asr", where, estimate(-0.1, -0.3, 0.1)))
    assert no.startswith("a and b cannot be told apart by asr on middle filling, rl forms: −0.10")
    up = words.one_difference(
        "a", "b", Compared("asr", where, estimate(0.2, 0.1, 0.3, {1: 0.3, 0: 0.1}))
    )
    assert up.startswith("a has 0.20 higher asr") and "each seed: +0.10, +0.30" in up
    gone = words.one_difference(
        "a", "b", Compared("asr", where, estimate(float("nan"), float("nan"), float("nan")))
    )
    assert gone.startswith("There is no number for asr")
    assert words.changes([("x", [Compared("asr", where, estimate(0.0, -0.1, 0.1))])]) == (
        "*x* changes none of 1 numbers beyond its interval."
    )
    assert words.difference_cell(estimate(-0.2, -0.3, -0.1)) == "**−0.20** [−0.30, −0.10]"
    assert words.difference_cell(estimate(0.2, -0.3, 0.5)) == "+0.20 [−0.30, +0.50]"
    assert (
        words.signed(-0.0001) == "0.000"
        and words.signed(0.0) == "0.00"
        and words.mean_cell(None) == "–"
    )
    tested = dataclasses.replace(
        estimate(0.2, -0.3, 0.5),
        method="wilson_prompts",
        test=PairedTest(0.25, "mcnemar_midp", 0.123, "connor"),
    )
    assert words.difference_cell(tested) == "+0.20 [−0.30, +0.50] W (0.12)"
    assert words.p_cell(tested) == "0.250" and words.p_cell(estimate(0.2, 0.1, 0.3)) == "–"
    none = words.many_differences("a", "b", [Compared("asr", where, tested)])
    assert none.endswith("told apart here. Detectable were differences from 0.12 to 0.12 on.")
    shifted = words.relative_perplexity(dataclasses.replace(tested, value=1.2, test=PairedTest(
        float("nan"), "none", 1.05, "bootstrap_se")))  # fmt: skip
    assert shifted.estimate.test.mde == pytest.approx(0.05)
    with pytest.raises(ValueError, match="2 cells, the head 1"):
        words.table(["a"], [["1", "2"]])


def test_every_ablated_metric_exists():
    assert {metric for metric, _ in ABLATED} <= set(metric_names())


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(
        ROOT / "experiments"
    )  # as `python experiments/quickstart_table.py` has it
    script = importlib.import_module("quickstart_table")
    folder = ["--workdir", str(tmp_path / "runs"), "--out", str(tmp_path / "results.md")]
    assert script.main(["--list", "--only", "noise", *folder]) == 0
    assert "a critic right 82% of the time" in capsys.readouterr().out and not any(
        tmp_path.iterdir()
    )
    assert script.main(["--only", "nois", *folder]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --only nois: no such piece") and said.count("\n") == 1
    args = script.parse(["--seeds", "3", "4", "--pool", "development", *folder])
    assert args.ablation_seeds == [3] and script.parse([]).workdir == Path("runs/table")
    assert (
        script.command(args)
        == "python experiments/quickstart_table.py --seeds 3 4 --pool development"
    )
