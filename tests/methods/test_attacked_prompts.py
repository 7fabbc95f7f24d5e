"""What rollouts start from: shares, forms, room; a step's prompts follow from its number."""

import collections
import dataclasses

import numpy as np
import pytest

from experiments.smoke import get_config
from rlbf_jax.attacks import ATTACKS
from rlbf_jax.data.worlds.toy_world import FORMS, TOPICS
from rlbf_jax.evaluation.suite import SuiteConfig
from rlbf_jax.methods.attacked_prompts import (
    Drawn,
    RolloutMix,
    attack_options,
    fitting,
    prompt_source,
)
from rlbf_jax.sampling.request import Knobs
from tests.runs.opened import do, run_of

CONFIG = get_config().changed({"data.pretraining_examples": 100})
KNOBS = Knobs(temperature=0.8, max_tokens=88, budget=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    do(CONFIG, folder, "tokenizer")
    return folder


def source_of(folder, mix, count=40, drawn=48, e=CONFIG, knobs=KNOBS, **changed):
    options = attack_options(e.changed(changed).evaluation, mix)
    return prompt_source(run_of(e, folder), mix, Drawn(count, drawn, knobs, options))


def only(kind, rl_forms=0.0):
    return RolloutMix(**dict.fromkeys(CONTEXTS, 0.0) | {kind: 1.0, "rl_forms": rl_forms})


CONTEXTS = sorted(
    {f.name for f in dataclasses.fields(RolloutMix)}
    - {"rl_forms", "searched_share", "tails", "violations"}
)


def test_shares_are_the_weights_normalized_and_every_weight_is_an_attack():
    kinds, shares = RolloutMix(**dict.fromkeys(CONTEXTS, 0.1)).shares()
    assert sorted(kinds) == CONTEXTS and set(kinds) <= set(ATTACKS)
    kinds, shares = RolloutMix().shares()
    assert all(getattr(RolloutMix(), kind) for kind in kinds) and shares.sum() == pytest.approx(1)
    _, doubled = dataclasses.replace(
        RolloutMix(), **{kind: 2 * getattr(RolloutMix(), kind) for kind in kinds}
    ).shares()
    np.testing.assert_allclose(doubled, shares)
    assert dict(zip(kinds, shares, strict=True))["middle_filling"] == pytest.approx(0.3)


def test_mixes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="every weight is 0"):
        dataclasses.replace(only("none"), none=0.0)
    with pytest.raises(ValueError, match="none is -1"):
        RolloutMix(none=-1)
    with pytest.raises(ValueError, match="rl_forms is 1.5"):
        RolloutMix(rl_forms=1.5)


def texts(rollouts):
    return [(r.request.prompt, r.request.forced, r.request.knobs) for r in rollouts]


def test_a_steps_prompts_follow_from_seed_and_step(folder):
    one, same = source_of(folder, RolloutMix()), source_of(folder, RolloutMix())
    assert texts(one(3)) == texts(same(3)) and texts(one(0)) != texts(one(1))
    one(7)
    assert texts(one(3)) == texts(same(3))  # whatever was drawn in between
    other = source_of(folder, RolloutMix(), e=CONFIG.replace(seed=1))
    assert texts(other(3)) != texts(one(3))


def test_kinds_come_in_their_shares(folder):
    source, mix = source_of(folder, RolloutMix(), 60), RolloutMix()
    rollouts = [r for step in range(20) for r in source(step)]
    assert len(rollouts) == 1200
    forced = sum(bool(r.request.forced) for r in rollouts) / 1200
    assert forced == pytest.approx(1 - mix.none - mix.direct, abs=0.05)
    harmful = sum(r.prompt.harmful for r in rollouts if not r.request.forced) / 1200
    assert harmful == pytest.approx(mix.direct, abs=0.04)


@pytest.mark.parametrize(("rl_forms", "split"), [(0.0, "sft"), (1.0, "rl")])
def test_forms_are_those_of_their_split_and_prompts_those_of_training(folder, rl_forms, split):
    run = run_of(CONFIG, folder)
    topics = {topic.name for topic in TOPICS if topic.pool == "train"}
    rollouts = source_of(folder, only("deep_prefilling", rl_forms), 30)(0)
    found = collections.Counter()
    for r in rollouts:
        text = run.tokenizer.decode(r.request.forced)
        for name in ("sft", "rl", "unseen"):
            found[name] += any(form_occurs(form, text) for form in forms(name))
        assert r.prompt.topic in topics
    assert found[split] == 30 and found["unseen"] == 0


def test_contexts_with_a_geometry_of_their_own_draw_one_a_prompt(folder):
    """Late violations by as many ids as there may be, one violation after another."""
    run = run_of(CONFIG, folder)
    late = dataclasses.replace(only("late_filling"), tails=5)
    benign = dataclasses.replace(only("benign_late"), tails=5)
    tails = [collections.Counter(), collections.Counter()]
    for counter, mix in zip(tails, (late, benign), strict=True):
        for r in source_of(folder, mix, 60)(0):
            text = run.tokenizer.decode(r.request.forced)
            counter[len(run.tokenizer.encode(text[text.rindex(".") :])) if "." in text else 0] += 1
    assert all(len(counter) > 2 for counter in tails)
    many = dataclasses.replace(only("many_violations"), violations=3)
    counts = collections.Counter()
    for r in source_of(folder, many, 40, knobs=dataclasses.replace(KNOBS, max_tokens=190))(0):
        text = run.tokenizer.decode(r.request.forced)
        counts[
            sum(form_occurs(form, part) for form in forms("sft") for part in text.split("."))
        ] += 1
    assert set(counts) == {2, 3} and min(counts.values()) > 5


def test_strange_suffixes_may_be_searched_ones_in_their_share(folder):
    found, drawn = (" zig zag", " tick tock"), Drawn(60, 48, KNOBS, SuiteConfig())
    mix = dataclasses.replace(only("strange_suffix"), searched_share=0.5)

    def prompts(mix, suffixes):
        source = prompt_source(
            run_of(CONFIG, folder), mix, dataclasses.replace(drawn, suffixes=suffixes)
        )
        return [r.request.prompt for step in range(4) for r in source(step)]

    counts = [sum(p.endswith(suffix) for p in prompts(mix, found)) for suffix in found]
    assert 80 < sum(counts) < 160 and min(counts) > 30
    assert not any(p.endswith(found) for p in prompts(mix, ()))  # the search comes later
    plain = dataclasses.replace(mix, searched_share=0.0)
    assert prompts(plain, found) == prompts(plain, ())


def test_a_rare_attempt_without_room_is_drawn_again():
    sizes = iter([1, 9, 9, 2, 3])

    def draw(count):
        drawn = [next(sizes) for _ in range(count)]
        if max(drawn) > 5:
            raise ValueError("no room")
        return drawn

    assert fitting(draw, 1) == [1]
    assert fitting(draw, 1) == [2]  # both nines are drawn again
    assert fitting(draw, 1, at_once=False) == [3]
    assert fitting(draw, 0) == fitting(draw, 0, at_once=False) == []
    sizes = iter([9] * 9)
    with pytest.raises(ValueError, match="no room"):
        fitting(draw, 2)
    assert len(list(sizes)) == 9 - 2 - 5
    sizes = iter([9, 1])
    with pytest.raises(ValueError, match="no room"):  # as where settings are checked
        fitting(draw, 1, tries=1)


def forms(split):
    return [form for form in FORMS if form.split == split]


def form_occurs(form, text):
    """Whether some row of words fits the form's slots."""
    words = [word.strip(".,:!?").lower() for word in text.split()]
    slots = [{filler.lower().strip(".,:!?") for filler in slot} for slot in form.slots]
    ends = range(len(words) - len(slots) + 1)
    return any(all(w in s for w, s in zip(words[at:], slots, strict=False)) for at in ends)


def test_a_rollout_draws_no_more_than_is_scored(folder):
    for r in source_of(folder, RolloutMix(), 60, drawn=20)(0):
        assert r.request.knobs.max_tokens - len(r.request.forced) <= 20
        assert dataclasses.replace(r.request.knobs, max_tokens=88) == KNOBS


def test_geometry_is_the_evaluations(folder):
    """And nothing else of it."""
    some = source_of(folder, only("middle_filling"), 20)(0)
    longer = source_of(folder, only("middle_filling"), 20, **{"evaluation.middle.long_words": 12})
    assert texts(some) != texts(longer(0))
    mix = RolloutMix()
    options = attack_options(CONFIG.evaluation, mix)
    assert options == attack_options(CONFIG.changed({"evaluation.n": 99}).evaluation, mix)
    assert options.middle == CONFIG.evaluation.middle and options.n != CONFIG.evaluation.n
    # Neither do options of attacks that no rollout starts from, nor the list of attacks.
    others = CONFIG.changed({"evaluation.attacks": ("none", "direct"), "evaluation.n_decoding": 7})
    assert options == attack_options(others.evaluation, mix)
    assert options.attacks == ("none",) and options.decoding == SuiteConfig().decoding
