import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.columns import metric_names
from rlbf_jax.evaluation.comparison import (
    Arm,
    Slice,
    column,
    difference,
    load_arm,
    mean_over_seeds,
    perplexity_ratio,
)
from rlbf_jax.evaluation.intervals import paired_difference, wilson
from rlbf_jax.evaluation.paired_tests import detectable_difference


def row(request, prompt, attack="middle_filling", split="rl", seed=0, long=False, **metrics):
    return {
        "request_id": request,
        "prompt_id": prompt,
        "attack": attack,
        "split": split,
        "seed": seed,
        "long_prefix": long,
        "metrics": dict.fromkeys(metric_names()) | metrics,
    }


def mean(numbers):
    return sum(numbers) / len(numbers)


def slow_paired(a, b, prompts, seeds, replicates, seed):
    """By loops: prompts are drawn once for all seeds, each with all of its rows; a seed of which
    nothing is drawn has the mean of all its rows."""
    names = list(dict.fromkeys(prompts))
    rows = list(zip([x - y for x, y in zip(a, b, strict=True)], prompts, seeds, strict=True))
    by_seed = {s: mean([d for d, _, owner in rows if owner == s]) for s in sorted(set(seeds))}
    draws = np.random.default_rng(seed).integers(0, len(names), (replicates, len(names)))
    means = []
    for draw in draws.tolist():
        drawn = {
            s: [d for g in draw for d, prompt, owner in rows if (prompt, owner) == (names[g], s)]
            for s in by_seed
        }
        means.append(mean([mean(some) if some else by_seed[s] for s, some in drawn.items()]))
    means.sort()

    def quantile(q):
        at = q * (len(means) - 1)
        low = math.floor(at)
        return means[low] + (at - low) * (means[min(low + 1, len(means) - 1)] - means[low])

    return mean(list(by_seed.values())), quantile(0.025), quantile(0.975), by_seed


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0]), st.floats(-3, 3), st.integers(0, 6), st.integers(0, 2)
        ),
        min_size=1,
        max_size=40,
    )
)
def test_paired_difference_equals_its_slow_twin(rows):
    a, b, prompts, seeds = (list(values) for values in zip(*rows, strict=True))
    found = paired_difference(a, b, prompts, seeds, replicates=50, seed=5)
    value, low, high, by_seed = slow_paired(a, b, prompts, seeds, 50, 5)
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high))
    assert found.by_seed == pytest.approx(by_seed) and list(found.by_seed) == sorted(by_seed)
    assert found.n_prompts == len(set(prompts))


def test_seeds_weigh_alike_however_many_rows_they_have():
    found = paired_difference([1.0] * 9 + [0.0], [0.0] * 10, list(range(10)), [0] * 9 + [1])
    assert found.value == 0.5 and found.by_seed == {0: 1.0, 1: 0.0}


def arm(name, values, prompts=None, metric="asr"):
    """values[seed] = one number (or None) an attempt."""
    return Arm(
        name,
        {
            seed: [
                row(100 + i, (prompts or range(len(numbers)))[i], seed=seed, **{metric: value})
                for i, value in enumerate(numbers)
            ]
            for seed, numbers in values.items()
        },
    )


WHERE = Slice("middle_filling", "rl")


def test_difference_pairs_attempts_not_places():
    a = arm("a", {0: [1.0, 0.0, 1.0, 0.0], 1: [1.0, 1.0, 0.0, 0.0]})
    b = Arm(
        "b",
        {
            seed: rows[::-1]
            for seed, rows in arm("b", {0: [0, 0, 1, 0], 1: [1, 0, 0, 0]}).rows.items()
        },
    )
    found = difference(a, b, WHERE, "asr")
    assert found.by_seed == {0: 0.25, 1: 0.25} and found.value == 0.25
    assert (found.n, found.n_prompts, found.left_out) == (8, 4, 0)
    assert found.method == "joint_bootstrap" and found.test.p_method == "mcnemar_midp_prompts"
    assert found.half_width == (found.high - found.low) / 2
    twin = paired_difference(
        [1, 0, 1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0, 0, 0], list(range(4)) * 2, [0] * 4 + [1] * 4
    )
    assert (found.low, found.high) == (twin.low, twin.high)
    swapped = difference(b, a, WHERE, "asr")
    assert swapped.value == -0.25 and swapped.low == pytest.approx(-found.high, abs=0.13)


def test_pairs_without_a_number_on_one_side_are_left_out_and_counted():
    a, b = arm("a", {0: [1.0, None, 0.0, None]}), arm("b", {0: [0.0, 1.0, None, None]})
    found = difference(a, b, WHERE, "asr")
    assert (found.n, found.left_out, found.value) == (1, 2, 1.0)
    nothing = difference(a, arm("c", {0: [None] * 4}), WHERE, "asr")
    assert math.isnan(nothing.value) and nothing.left_out == 2 and not nothing.excludes_zero


def test_other_seeds_or_other_attempts_are_refused():
    a = arm("a", {0: [1.0, 0.0]})
    with pytest.raises(ValueError, match="compare the same seeds"):
        difference(a, arm("b", {1: [1.0, 0.0]}), WHERE, "asr")
    with pytest.raises(ValueError, match="other attempts"):
        difference(a, arm("b", {0: [1.0, 0.0, 0.0]}), WHERE, "asr")
    with pytest.raises(ValueError, match="no metric 'ars'"):
        column(a.rows[0], WHERE, "ars")


def test_alike_rows_claim_no_certainty():
    zeros, ones = (
        arm("zeros", {0: [0.0] * 20, 1: [0.0] * 20}),
        arm("ones", {0: [1.0] * 20, 1: [1.0] * 20}),
    )
    rate = mean_over_seeds(zeros, WHERE, "asr")
    # Both seeds ask the same twenty prompts.
    assert (rate.value, rate.low, rate.high) == (0.0, *wilson(0, 20))
    assert (rate.method, rate.test) == ("wilson_prompts", None)
    assert (
        mean_over_seeds(ones, WHERE, "asr").low,
        mean_over_seeds(ones, WHERE, "asr").high,
    ) == wilson(20, 20)
    same = difference(zeros, zeros, WHERE, "asr")
    assert (same.low, same.high) == (-wilson(0, 20)[1], wilson(0, 20)[1]) and not same.excludes_zero
    assert (same.method, same.test.p) == ("wilson_prompts", 1.0)
    assert same.test.mde == detectable_difference(20, 0.0)
    apart = difference(zeros, ones, WHERE, "asr")
    assert (apart.value, apart.low, apart.excludes_zero) == (-1.0, -1.0, True)
    assert apart.high == pytest.approx(-1 + 2 * wilson(0, 20)[1]) and apart.test.p < 1e-5
    counts = arm("counts", {0: [0.0] * 20}, metric="wasted_tokens")
    assert (
        mean_over_seeds(counts, WHERE, "wasted_tokens").high == 0.0
    )  # a count has no bound of its own


def test_slices_and_any_of_n():
    rows = [
        row(1, "p", split="sft", asr=1.0),
        row(2, "p", split="rl", long=True, asr=0.0),
        row(3, "q", split="rl", asr=1.0),
        *(
            row(10 + i, f"p{i // 3}", "decoding", "all", asr=float(i == 4), useful=float(i == 4))
            for i in range(6)
        ),
    ]
    one = Arm("one", {0: rows})
    assert mean_over_seeds(one, Slice("middle_filling"), "asr").value == pytest.approx(2 / 3)
    assert mean_over_seeds(one, Slice("middle_filling", "rl"), "asr").n == 2
    assert mean_over_seeds(one, Slice("middle_filling", None, True), "asr").value == 0.0
    assert mean_over_seeds(one, Slice("decoding"), "asr").by_seed == {0: 0.5}  # one of p1's three
    assert mean_over_seeds(one, Slice("decoding"), "useful").by_seed == pytest.approx({0: 1 / 6})
    assert math.isnan(mean_over_seeds(one, Slice("direct"), "asr").value)
    assert Slice("deep_prefilling", "rl").label == "deep prefilling, rl forms"
    assert [Slice("prefilling").label, Slice("none").label] == ["prefilling, all forms", "none"]


def texts(nll, count):
    return [{"nll": a, "correct": 0, "count": b} for a, b in zip(nll, count, strict=True)]


def test_perplexity_ratio():
    counts = [10, 20, 30]
    a = Arm("a", {}, {0: texts([22, 40, 66], counts), 1: texts([20, 40, 60], counts)})
    b = Arm("b", {}, {0: texts([20, 40, 60], counts), 1: texts([20, 40, 60], counts)})
    found = perplexity_ratio(a, b)
    assert found.by_seed == pytest.approx({0: math.exp(8 / 60), 1: 1.0})
    assert found.value == pytest.approx(math.exp(4 / 60)) and found.low <= found.value <= found.high
    # The worst draw is the second answer three times.
    assert found.low == pytest.approx(1.0) and (found.n, found.n_prompts) == (6, 3)
    assert found.method == "joint_bootstrap" and found.test.mde > 1
    agreeing = perplexity_ratio(
        *(Arm("", {}, dict.fromkeys(range(4), arm.texts[0])) for arm in (a, b))
    )
    alone = perplexity_ratio(*(Arm("", {}, {0: arm.texts[0]}) for arm in (a, b)))
    assert (agreeing.low, agreeing.high) == pytest.approx((alone.low, alone.high))
    assert alone.method == "bootstrap" and alone.low < alone.value < alone.high
    with pytest.raises(ValueError, match="other answers"):
        perplexity_ratio(a, Arm("c", {}, {0: texts([1], [1])}))
    assert math.isnan(perplexity_ratio(a, Arm("d", {})).value)


def test_load_arm(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / str(seed) / "evaluation"
        folder.mkdir(parents=True)
        (folder / "sft.jsonl").write_text(json.dumps(row(1, "p", seed=seed, asr=1.0)) + "\n")
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    loaded = load_arm("sft", folders, "sft")
    assert mean_over_seeds(loaded, WHERE, "asr").by_seed == {0: 1.0, 1: 1.0} and loaded.texts == {
        0: [],
        1: [],
    }
    for folder in folders.values():  # rows may be packed since
        plain = folder / "evaluation" / "sft.jsonl"
        packed = plain.with_name("sft.jsonl.gz")
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        plain.rename(folder / "unpacked")
    assert load_arm("sft", folders, "sft") == loaded
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match="sft.jsonl.gz: damaged"):
        load_arm("sft", folders, "sft")
    for folder in folders.values():
        (folder / "unpacked").rename(folder / "evaluation" / "sft.jsonl")
    with pytest.raises(UserError, match="rows of seed 1, expected seed 0"):
        load_arm("sft", {0: folders[1]}, "sft")
    with pytest.raises(UserError, match="rlbf.jsonl: no such file"):
        load_arm("rlbf", folders, "rlbf")
    (tmp_path / "0" / "evaluation" / "sft.jsonl").write_text('{"seed": 0}\n{"se')
    with pytest.raises(UserError, match="sft.jsonl, line 2: not JSON"):
        load_arm("sft", folders, "sft")
