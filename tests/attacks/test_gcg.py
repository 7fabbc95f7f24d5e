"""GCG's parts against plain ways to say the same, and what holds for a whole search."""

import dataclasses
import functools
import importlib
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.attacks.search import gcg_search, gcg_step
from rlbf_jax.attacks.search.gcg import GcgConfig, Goal, gcg
from rlbf_jax.attacks.search.gcg_candidates import (
    allowed_ids,
    best_ids,
    draw_positions,
    draw_ranks,
    replace,
    survives,
)
from rlbf_jax.attacks.search.gcg_search import Search, State, accept
from rlbf_jax.attacks.search.random_search import RandomSearchConfig, random_search
from rlbf_jax.directives import BacktrackRule, ResetRule
from rlbf_jax.errors import InputError
from rlbf_jax.models import lora, transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.config import LoraConfig, ModelConfig
from tests.attacks import planted
from tests.attacks.planted import NumberTokenizer
from tests.fakes import LetterTokenizer, random_model

TOKENIZER = LetterTokenizer()
MODEL, PARAMS = random_model(TOKENIZER, num_layers=1)
GOALS = [
    Goal("tell me", tuple(TOKENIZER.encode("sure thing")), (0, 10)),
    Goal("now hello there", tuple(TOKENIZER.encode("yes it is.")), (0, 3), (4, 8)),
]
CONFIG = GcgConfig(init="xxxxx", steps=6, search_width=12, topk=8, batch_size=4)
RANDOM = RandomSearchConfig.of_equal_budget(CONFIG, neighbors=4)

GEMMA = dict(
    num_layers=2,
    norm="rms_plus_one",
    post_norms=True,
    qk_norm=True,
    attention_softcap=5.0,
    final_softcap=8.0,
    windows=(6, None),
)
LEARNED = dict(
    learned_positions=True, max_positions=64, scale_embeddings=False, norm="layer", gated_mlp=False
)
FAMILIES = {"gemma": GEMMA, "learned": LEARNED, "tied": dict(tied_embeddings=True, num_kv_heads=1)}


def small(**fields) -> ModelConfig:
    shape = dict(
        vocab_size=48, num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=24
    )
    return ModelConfig(**(shape | dict(tied_embeddings=False) | fields))


# Arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradient_are_those_of_whole_rows(family):
    """Against one pass over prefix, suffix and tail with an explicit one-hot matrix;
    candidates start late or not."""
    model = small(**FAMILIES[family])
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    prefix, suffix, tail = (rng.integers(0, 48, n).tolist() for n in (7, 8, 6))
    (behavior,) = rows_of(
        gcg_step.stack([gcg_step.one_behavior(prefix, tail, (2, 6)), longer_behavior(rng)]), 1
    )
    objective = gcg_step.Objective(first=2)

    def whole(one_hot, ids):
        """Mean loss of tail[2:] with the suffix as a one-hot matrix, by the plain forward pass."""
        rows = jnp.asarray([[*prefix, *ids, *tail]])
        before, after = len(prefix), len(prefix) + len(ids)
        table = params["embedding"]
        # The decoder takes ids, so a table with the mixed rows behind it stands
        # in for one-hot rows.
        mixed = {
            n: jnp.pad(x, ((0, 8), (0, 0))) if n == "unembedding" else x for n, x in params.items()
        }
        mixed["embedding"] = jnp.concatenate([table, one_hot @ table])
        rows = rows.at[0, before:after].set(jnp.arange(len(ids)) + 48)
        wider = dataclasses.replace(model, vocab_size=48 + len(ids))
        hidden, _ = transformer.forward(
            wider, mixed, rows, Visibility(jnp.arange(rows.shape[1])[None])
        )
        logits = transformer.unembed(wider, mixed, hidden[0, after + 1 : -1])[..., :48]
        logp = jax.nn.log_softmax(logits)
        return -jnp.mean(logp[jnp.arange(4), jnp.asarray(tail[2:])])

    loss_of = jax.jit(jax.value_and_grad(whole))
    loss, gradient = loss_of(jax.nn.one_hot(jnp.asarray(suffix), 48), jnp.asarray(suffix))
    changed = np.tile(suffix, (6, 1))
    first = np.asarray([0, 3, 7, 5, 2, 6], np.int32)
    changed[np.arange(6), first] = rng.integers(0, 48, 6)

    @jax.jit
    def ours(params, behavior):
        kept = gcg_step.prefix_of(model, params, behavior)
        loss, gradient, own = gcg_step.suffix_gradient(
            model, params, objective, behavior, kept, jnp.asarray(suffix)
        )
        wanted = jnp.asarray([True] * 5 + [False])
        losses, _ = gcg_step.candidate_losses(
            model,
            params,
            objective,
            behavior,
            kept,
            own,
            jnp.asarray(changed),
            jnp.asarray(first),
            wanted,
            2,
        )
        return loss, gradient, losses

    found = ours(params, behavior)
    np.testing.assert_allclose(found[0], loss, atol=2e-5)
    np.testing.assert_allclose(found[1], gradient, atol=1e-4 * float(jnp.abs(gradient).max()))
    expected = [float(loss_of(jax.nn.one_hot(row, 48), row)[0]) for row in jnp.asarray(changed)]
    np.testing.assert_allclose(found[2][:5], expected[:5], atol=2e-5)
    assert np.isposinf(found[2][5])


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_that_are_not_merged_count(tied):
    """Losses, gradient and candidates of a model with adapters are the merged model's, where the
    tail holds control ids, which have rows of their own."""
    adapters = LoraConfig(rank=2, first_row=40, rows=7)
    model = small(tied_embeddings=tied, lora=adapters)
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    rows = [name for name in lora.ROWS if name in params]
    for number, name in enumerate(rows):
        params[name] = jax.random.normal(jax.random.key(number), params[name].shape)
    rng = np.random.default_rng(0)
    tail, suffix = [5, 40, 45, 7, 8, 46], rng.integers(0, 40, 6)
    behavior = gcg_step.one_behavior(rng.integers(0, 40, 7).tolist(), tail, (2, 6))
    objective = gcg_step.Objective(first=2)
    changed = np.tile(suffix, (4, 1))
    changed[np.arange(4), [5, 3, 1, 0]] = [41, 42, 9, 45]

    @functools.partial(jax.jit, static_argnums=0)
    def measure(model, params):
        kept = gcg_step.prefix_of(model, params, behavior)
        loss, gradient, own = gcg_step.suffix_gradient(
            model, params, objective, behavior, kept, jnp.asarray(suffix)
        )
        some = jnp.asarray(changed), jnp.asarray([5, 3, 1, 0]), jnp.ones(4, bool)
        losses, _ = gcg_step.candidate_losses(
            model, params, objective, behavior, kept, own, *some, 2
        )
        return loss, gradient, losses

    found, expected = measure(model, params), measure(*lora.merge(model, params))
    plain = measure(model, params | {name: jnp.zeros_like(params[name]) for name in rows})
    for ours, merged, without in zip(found, expected, plain, strict=True):
        most = float(jnp.abs(merged).max())
        np.testing.assert_allclose(ours, merged, atol=1e-4 * most)
        assert not np.allclose(without, merged, atol=1e-2 * most)


def longer_behavior(rng):
    return gcg_step.one_behavior(
        rng.integers(0, 48, 11).tolist(), rng.integers(0, 48, 9).tolist(), (3, 9)
    )


def rows_of(stacked, count):
    return [jax.tree.map(lambda x, r=r: x[r], stacked) for r in range(count)]


LOSSES = jax.jit(gcg_step.losses_of_logits, static_argnums=0)


def logits_and_behavior():
    rng = np.random.default_rng(3)
    behavior = gcg_step.one_behavior([1], rng.integers(0, 20, 7).tolist(), (1, 4), (5, 7))
    return rng.normal(0, 2, (3, 6, 20)).astype(np.float32), behavior


@pytest.mark.parametrize("kind", ["ce", "mellowmax"])
@pytest.mark.parametrize("reset", [False, True])
def test_losses_of_logits_are_those_of_plain_numpy(kind, reset):
    logits, behavior = logits_and_behavior()
    rule = ResetRule(17, (), (0,)) if reset else BacktrackRule(14, ("a", "b"), (0,), x_max=4)
    opening = [17] if reset else [14, 15]
    illegal = {0, 16, 17, 18, 19} - {17 if reset else -1} if not reset else {0}
    objective = gcg_step.Objective(
        kind, 2.0, target_weight=0.5, control_weight=0.3, rule=rule, first=1
    )
    losses, _ = LOSSES(objective, jnp.asarray(logits), behavior)
    for row, found in zip(logits.astype(float), losses, strict=True):
        labels = [row[j, behavior.tail[1 + j]] for j in range(3)]
        if kind == "ce":
            part = np.mean([np.log(np.exp(row[j]).sum()) - labels[j] for j in range(3)])
        else:
            part = np.log(np.mean(np.exp(2.0 * -np.asarray(labels)))) / 2.0
        legal = [i for i in range(20) if i not in illegal]
        control = [
            np.log(np.exp(row[j][opening]).sum() / np.exp(row[j][legal]).sum()) for j in (4, 5)
        ]
        assert float(found) == pytest.approx(0.5 * part + 0.3 * np.mean(control), abs=1e-5)


def test_rows_beyond_the_tokenizer_take_nothing_from_a_directive():
    logits = np.random.default_rng(4).normal(0, 2, (3, 20)).astype(np.float32)
    rule = BacktrackRule(10, ("a", "b"), (0,), x_max=4)
    known = gcg_step.directive_logprobs(rule, jnp.asarray(logits[:, :17]))
    padded = gcg_step.directive_logprobs(rule.within(17), jnp.asarray(logits))
    np.testing.assert_allclose(padded, known, rtol=1e-6)
    assert (np.asarray(gcg_step.directive_logprobs(rule, jnp.asarray(logits))) < known).all()


@pytest.mark.parametrize("weight", [0.3, -0.3])
def test_a_floor_holds_where_directives_are_suppressed(weight):
    """Of each place by itself, in the loss and in what its gradient moves."""
    logits, behavior = logits_and_behavior()
    rule = BacktrackRule(14, ("a", "b"), (0,), x_max=4)
    objective = gcg_step.Objective(target_weight=0.0, control_weight=weight, rule=rule, first=1)
    logp = np.asarray(gcg_step.directive_logprobs(rule, jnp.asarray(logits)))[:, 4:6]
    floor = float(np.median(logp))
    floored = dataclasses.replace(objective, control_floor=floor)
    losses, gradient = (
        LOSSES(floored, logits, behavior)[0],
        CONTROL_GRADIENT(floored, logits, behavior),
    )
    below = (logp < floor) & (weight > 0)
    assert below.any() == (weight > 0)
    np.testing.assert_allclose(losses, weight * np.where(below, floor, logp).mean(1), atol=1e-5)
    assert np.array_equal(np.abs(np.asarray(gradient)[:, 4:6]).max(-1) == 0, below)


CONTROL_GRADIENT = jax.jit(
    lambda objective, logits, behavior: jax.grad(
        lambda x: gcg_step.losses_of_logits(objective, x, behavior)[0].sum()
    )(logits),
    static_argnums=0,
)  # fmt: skip


def test_mellowmax_tends_to_the_largest_and_matches_need_every_id():
    logits, behavior = logits_and_behavior()
    objective = gcg_step.Objective("mellowmax", 200.0, first=1)
    losses, matches = LOSSES(objective, jnp.asarray(logits), behavior)
    worst = -np.take_along_axis(logits[:, :3], behavior.tail[None, 1:4, None], -1)[..., 0].min(1)
    np.testing.assert_allclose(losses, worst, atol=np.log(3) / 200 + 1e-4)
    assert not matches.any()
    logits[1, np.arange(3), behavior.tail[1:4]] = 50
    logits[2, np.arange(2), behavior.tail[1:3]] = 50
    assert LOSSES(objective, jnp.asarray(logits), behavior)[1].tolist() == [False, True, False]


# Candidates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
@pytest.mark.parametrize("n_replace", [1, 3, 5])
def test_draws_are_in_range_distinct_and_even(kind, n_replace):
    positions = np.asarray(draw_positions(jax.random.key(0), kind, 200, 5, n_replace))
    assert positions.shape == (200, n_replace) and positions.min() == 0 and positions.max() == 4
    assert all(len(set(row)) == n_replace for row in positions.tolist())
    counts = np.bincount(positions[:, 0], minlength=5)
    assert (counts == 40).all() if kind == "stratified" else (20 < counts).all()
    ranks = np.asarray(draw_ranks(jax.random.key(1), 200, n_replace, 7))
    assert sorted(set(ranks.ravel().tolist())) == list(range(7))


def test_replace_puts_the_drawn_ids_where_they_belong():
    best = np.arange(12).reshape(3, 4) + 100
    made = replace(
        jnp.asarray([7, 8, 9]),
        jnp.asarray(best),
        jnp.asarray([[2, 0], [1, 2]]),
        jnp.asarray([[3, 1], [0, 0]]),
    )
    assert made.tolist() == [[101, 8, 111], [7, 104, 108]]


def test_best_ids_are_allowed_and_of_most_negative_gradient():
    gradient = np.random.default_rng(0).normal(size=(3, 30)).astype(np.float32)
    allowed = np.arange(30) % 3 != 0
    found = np.asarray(best_ids(jnp.asarray(gradient), jnp.asarray(allowed), 5))
    for row, ids in zip(gradient, found, strict=True):
        assert ids.tolist() == sorted(np.flatnonzero(allowed), key=lambda i: row[i])[:5]


def test_what_no_text_makes_is_never_allowed():
    allowed = np.flatnonzero(allowed_ids(TOKENIZER, MODEL.vocab_size))
    assert allowed.tolist() == list(range(5, TOKENIZER.controls.rule().first_id))

    class Accents(LetterTokenizer):
        def decode(self, ids):
            return super().decode(ids).replace("a", "\u00e4").replace("b", "\n")

    assert set(allowed) - set(np.flatnonzero(allowed_ids(Accents(), 60))) == {5, 6}
    assert np.flatnonzero(allowed_ids(Accents(), 60, non_ascii=True)).tolist() == allowed.tolist()


class Merging(LetterTokenizer):
    """`ab` has an id of its own, so that neighbors change how a text is encoded."""

    def __init__(self):
        super().__init__()
        self.pair = self.rule.end_id
        self.vocab_size = self.pair + 1

    def encode(self, text):
        ids, rest = [], text
        while rest:
            pair = rest.startswith("ab")
            ids += [self.pair] if pair else super().encode(rest[0])
            rest = rest[2 if pair else 1 :]
        return ids

    def decode(self, ids):
        return "".join("ab" if i == self.pair else super(Merging, self).decode([i]) for i in ids)


def test_the_filter_reads_the_whole_conversation():
    tokenizer = Merging()
    prompt = "say a"
    before, after = tokenizer.encode_prompt(prompt)[:-1], [tokenizer.model_id]
    a, b, c = TOKENIZER.encode("abc")
    suffixes = np.asarray([[c, c], [a, b], [tokenizer.pair, c], [b, c], [c, a]])
    kept = survives(tokenizer, lambda text: prompt + text, before, after, suffixes)
    assert kept.tolist() == [
        True,
        False,
        True,
        False,
        True,
    ]  # the fourth merges with the prompt's last letter


# Searches ----------------------------------------------------------------------------------------


def module_of():
    return importlib.import_module("rlbf_jax.attacks.search.suffix_search")


def same(a, b) -> bool:
    return (
        a.ids == b.ids and a.loss == b.loss and np.array_equal(a.losses, b.losses, equal_nan=True)
    )


@pytest.fixture(scope="module")
def plain():
    return gcg(MODEL, PARAMS, TOKENIZER, GOALS, CONFIG)


def test_a_search_lowers_the_loss_with_allowed_ids_only(plain):
    for goal, found in zip(GOALS, plain, strict=True):
        assert found.loss < found.start_loss and found.evaluations == 6 * 12
        assert found.text == goal.prompt + TOKENIZER.decode(found.ids)
        assert found.history.min() >= 5 and found.history.max() < TOKENIZER.controls.rule().first_id
        assert found.loss == pytest.approx(min(found.start_loss, found.losses.min()))
        assert loss_of_text(found) == pytest.approx(found.loss, abs=1e-4)


def logits_of(rows, position):
    hidden, _ = transformer.forward(MODEL, PARAMS, rows, Visibility(position))
    return transformer.unembed(MODEL, PARAMS, hidden[0])


def loss_of_text(found, config=CONFIG) -> float:
    """What a search with these options minimizes, by a plain pass over the conversation as text."""
    ids = [*TOKENIZER.encode_prompt(found.text), *found.goal.answer]
    begin = len(ids) - len(found.goal.answer)
    position = jnp.arange(len(ids))[None]
    logits = np.asarray(jax.jit(lambda rows: logits_of(rows, position))(jnp.asarray([ids])), float)
    total = np.log(np.exp(logits).sum(-1))
    targets = [begin + t for t in range(*found.goal.target)]
    labels = np.asarray([logits[at - 1, ids[at]] for at in targets])
    if config.kind == "ce":
        loss = np.mean([total[at - 1] for at in targets] - labels)
    else:
        loss = np.log(np.mean(np.exp(-config.alpha * labels))) / config.alpha
    places = [begin + t - 1 for t in range(*found.goal.control)]
    if not config.control_weight or not places:
        return float(loss)
    first, rule = TOKENIZER.controls.rule().first_id, TOKENIZER.controls.rule()
    legal = [i for i in range(first + 2) if i not in rule.never]  # content, and the two categories
    scores = [
        np.log(np.exp(logits[at, first : first + 2]).sum() / np.exp(logits[at, legal]).sum())
        for at in places
    ]
    if config.control_floor is not None and config.control_weight > 0:
        scores = np.maximum(scores, config.control_floor)
    return float(loss + config.control_weight * np.mean(scores))


OPTIONS = {
    "mellowmax": dict(kind="mellowmax", alpha=2.0),
    "suppress": dict(control_weight=0.5, control_floor=-0.5),
    "provoke": dict(control_weight=-0.5, buffer_size=4, placement="before", separator=" "),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_search_says_of_its_suffix_is_what_a_plain_pass_says(plain, name):
    config = dataclasses.replace(CONFIG, **OPTIONS[name])
    found = gcg(MODEL, PARAMS, TOKENIZER, GOALS, config)
    for one in found:
        assert one.text == config.compose(one.goal.prompt, TOKENIZER.decode(one.ids))
        assert one.loss == pytest.approx(loss_of_text(one, config), abs=1e-4)
    if config.buffer_size:  # whose further entries start elsewhere
        alone = dataclasses.replace(config, buffer_size=0, steps=1)
        others = gcg(MODEL, PARAMS, TOKENIZER, GOALS, alone)
        assert any(a.start_loss < b.start_loss - 1e-3 for a, b in zip(found, others, strict=True))


def test_every_option_of_the_search_reaches_it(monkeypatch):
    seen = []
    monkeypatch.setattr(
        importlib.import_module("rlbf_jax.attacks.search.gcg"),
        "search_suffixes",
        lambda search, *rest: seen.append(search) or [],
    )
    told = dict(steps=3, search_width=7, topk=5, n_replace=2, positions="stratified")
    for more in (dict(buffer_size=3), dict(anneal=True)):
        gcg(MODEL, PARAMS, TOKENIZER, GOALS, dataclasses.replace(CONFIG, **told, **more))
    for search, (buffer, accepted) in zip(seen, [(3, "always"), (0, "anneal")], strict=True):
        assert (search.steps, search.width, search.topk, search.n_replace) == (3, 7, 5, 2)
        assert (search.positions, search.buffer_size, search.accept) == (
            "stratified",
            buffer,
            accepted,
        )


def test_without_anything_to_filter_the_loop_on_the_device_does_the_same(plain):
    device = gcg(MODEL, PARAMS, TOKENIZER, GOALS, dataclasses.replace(CONFIG, filter_ids=False))
    for a, b in zip(plain, device, strict=True):
        assert a.ids == b.ids and np.array_equal(a.history, b.history)
        np.testing.assert_allclose(a.losses, b.losses, atol=1e-5)


@pytest.mark.parametrize("filter_ids", [True, False])
def test_a_search_that_was_stopped_goes_on_bit_for_bit(tmp_path, filter_ids, monkeypatch):
    config = dataclasses.replace(CONFIG, filter_ids=filter_ids)
    whole = gcg(MODEL, PARAMS, TOKENIZER, GOALS, config)
    module = module_of()
    save, file = module._Work.save, tmp_path / "state.npz"

    def struck(self, path, states):
        save(self, path, states)
        if int(states.step[0]) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Work, "save", struck)
    with pytest.raises(KeyboardInterrupt):
        gcg(MODEL, PARAMS, TOKENIZER, GOALS, config, file=file, save_every=2)
    monkeypatch.undo()
    again = gcg(MODEL, PARAMS, TOKENIZER, GOALS, config, file=file, save_every=2)
    assert all(map(same, whole, again))
    with pytest.raises(InputError, match="the state of another search"):
        gcg(MODEL, PARAMS, TOKENIZER, GOALS, dataclasses.replace(config, seed=1), file=file)
    file.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="not a state of a search"):
        gcg(MODEL, PARAMS, TOKENIZER, GOALS, config, file=file)


def test_when_everything_is_filtered_out_the_suffix_stays_and_steps_are_counted(monkeypatch):
    monkeypatch.setattr(module_of(), "survives", lambda *args: np.zeros(len(args[-1]), bool))
    (found,) = gcg(MODEL, PARAMS, TOKENIZER, GOALS[:1], CONFIG)
    assert found.filtered_steps == 6 and found.evaluations == 0 and np.isposinf(found.losses).all()
    assert list(found.ids) == TOKENIZER.encode("xxxxx") and found.loss == found.start_loss


@pytest.fixture(scope="module")
def chance():
    return random_search(MODEL, PARAMS, TOKENIZER, GOALS, RANDOM)


def test_random_search_only_improves_and_spends_the_same(chance):
    assert RANDOM.generations * RANDOM.neighbors == CONFIG.steps * CONFIG.search_width
    for found in chance:
        assert found.evaluations == 72 and found.loss < found.start_loss
        seen = np.minimum.accumulate(np.concatenate([[found.start_loss], found.losses]))
        changed = np.any(
            np.diff(found.history, axis=0, prepend=[TOKENIZER.encode("xxxxx")]), axis=1
        )
        assert np.array_equal(changed, np.diff(seen) < 0) and found.loss == pytest.approx(seen[-1])


def test_a_planted_weakness_is_found_by_gcg_and_not_by_random_search():
    """The model complies only when four secret ids are in the suffix (as held-out rows show)."""
    model, params = planted.planted_model()
    rows, complies = planted.training_rows(np.random.default_rng(9), 300)
    answers = planted.next_ids(model, params, rows[:, :-3])[:, -1]
    assert np.mean((answers == planted.COMPLY[0]) == complies) >= 0.98
    tokenizer = NumberTokenizer()
    goal = Goal(" ".join(map(str, planted.PROMPT)), planted.COMPLY, (0, 3))
    broken = []
    for seed in range(5):
        config = GcgConfig(
            init=planted.INIT,
            separator=" ",
            steps=12,
            search_width=16,
            topk=8,
            filter_ids=False,
            seed=seed,
        )
        (found,) = gcg(model, params, tokenizer, [goal], config)
        (chance,) = random_search(
            model, params, tokenizer, [goal], RandomSearchConfig.of_equal_budget(config)
        )
        assert found.evaluations == chance.evaluations
        broken.append(set(planted.SECRET) <= set(found.ids))
        answers = [
            planted.greedy(model, params, tokenizer.encode_prompt(f.text), 3)
            for f in (found, chance)
        ]
        assert answers == [planted.COMPLY if broken[-1] else planted.REFUSE, planted.REFUSE]
    # The model is trained here, so which seeds need more steps differs between versions of XLA.
    assert sum(broken) >= 3


# What is kept ------------------------------------------------------------------------------------


ACCEPT = jax.jit(accept, static_argnums=0)


def kept(
    search: Search, state: State, loss: float, token: int, wanted: bool = True, match: bool = False
) -> State:
    """One step whose best candidate has this loss and id."""
    candidates, losses = jnp.full((2, 3), token, jnp.int32), jnp.asarray([loss + 1, loss])
    losses = jnp.where(wanted, losses, jnp.inf)
    return ACCEPT(
        search, state, candidates, losses, jnp.asarray([match, False]), jnp.full(2, wanted)
    )


def fresh(*losses: float, seed: int = 0) -> State:
    ids = jnp.tile(jnp.arange(len(losses), dtype=jnp.int32)[:, None], (1, 3))
    zero, loss = jnp.int32(0), jnp.asarray(losses, jnp.float32)
    return State(
        jax.random.key_data(jax.random.key(seed)), zero, ids, loss, ids[0], loss[0],
        jnp.full(8, jnp.nan), jnp.zeros((8, 3), jnp.int32), jnp.asarray(False), zero, zero,
    )  # fmt: skip


def search(**fields) -> Search:
    return Search(MODEL, gcg_step.Objective(), 8, 2, 1, **fields)


def test_without_a_buffer_the_newest_is_kept_and_the_best_remembered():
    state = kept(search(), kept(search(), fresh(1.0), 0.5, 7), 2.0, 8)
    assert (state.ids[0, 0], state.loss[0], state.best_ids[0], state.best_loss) == (8, 2.0, 7, 0.5)
    assert state.losses[:2].tolist() == [0.5, 2.0] and state.history[:2, 0].tolist() == [7, 8]
    after = kept(search(), state, 0.1, 9, wanted=False)
    assert (after.ids[0, 0], after.filtered, after.step) == (8, 1, 3) and np.isposinf(
        after.losses[2]
    )


def test_a_buffer_drops_its_worst_and_goes_on_from_its_best():
    state = fresh(1.0, 2.0, 3.0)
    for loss, token, expected in (
        (2.5, 7, [1.0, 2.0, 2.5]),
        (2.6, 8, [1.0, 2.0, 2.5]),
        (0.5, 9, [0.5, 1.0, 2.0]),
    ):
        state = kept(search(buffer_size=3), state, loss, token)
        assert state.loss.tolist() == expected
    assert state.ids[:, 0].tolist() == [9, 0, 1] and state.history[:3, 0].tolist() == [0, 0, 9]


def test_annealing_takes_worse_suffixes_early_and_better_ones_always():
    annealed = search(accept="anneal")
    early = [kept(annealed, fresh(1.0, seed=s), 2.0, 7).ids[0, 0] == 7 for s in range(60)]
    assert 0.15 < np.mean(early) < 0.5  # exp(-1 / (7 / 8)) = 0.32
    late = fresh(1.0)._replace(step=jnp.int32(7))
    assert (
        kept(annealed, late, 1.1, 7).ids[0, 0] == 0 and kept(annealed, late, 0.9, 7).ids[0, 0] == 7
    )


def test_early_stop_needs_a_match_and_to_be_asked_for():
    for asked, match in ((True, True), (True, False), (False, True)):
        assert bool(kept(search(early_stop=asked), fresh(1.0), 2.0, 7, match=match).stopped) == (
            asked and match
        )


def test_a_search_stops_at_a_match():
    params = PARAMS | {
        "unembedding": PARAMS["unembedding"] * 0
    }  # all logits are equal: any answer is the likeliest
    config = dataclasses.replace(CONFIG, early_stop=True, filter_ids=False, batch_size=12)
    (found,) = gcg(MODEL, params, TOKENIZER, GOALS[:1], config)
    assert found.stopped and len(found.losses) == 1


# Mesh and messages -------------------------------------------------------------------------------

MESHED = """
import dataclasses, json
from rlbf_jax.attacks.search.gcg import gcg
from rlbf_jax.parallel.mesh import MeshConfig, make_mesh
from tests.attacks.test_gcg import CONFIG, GOALS, MODEL, PARAMS, TOKENIZER
for mesh in (None, make_mesh(MeshConfig(2, 2, 2))):
    for filter_ids in (True, False):
        config = dataclasses.replace(CONFIG, filter_ids=filter_ids, steps=3)
        found = gcg(MODEL, PARAMS, TOKENIZER, [*GOALS, GOALS[0]], config, mesh=mesh)
        print(json.dumps([[f.ids, f.loss, f.evaluations] for f in found]))
"""


def test_a_mesh_of_eight_finds_what_one_device_finds(run_in_child):
    alone, alone_device, meshed, meshed_device = map(
        json.loads, run_in_child(textwrap.dedent(MESHED)).splitlines()
    )
    for one, many in ((alone, meshed), (alone_device, meshed_device)):
        assert [row[0] for row in one] == [row[0] for row in many] and len(many) == 3
        np.testing.assert_allclose([row[1] for row in one], [row[1] for row in many], atol=1e-5)
        assert [row[2] for row in many] == [3 * 12] * 3


DIVIDED = """
import dataclasses, json, pathlib, tempfile
from rlbf_jax.attacks.search import gcg_search
from rlbf_jax.attacks.search import suffix_search as module
from rlbf_jax.attacks.search.gcg import gcg
from rlbf_jax.attacks.search.random_search import random_search
from rlbf_jax.parallel.mesh import MeshConfig, make_mesh
from tests.attacks.test_gcg import CONFIG, GOALS, MODEL, PARAMS, RANDOM, TOKENIZER

seen, losses_of, save = [], gcg_search.candidate_losses, module._Work.save
def counted(*args):
    seen.append(len(args[6]))  # while a program is traced: the candidates of one device
    return losses_of(*args)
gcg_search.candidate_losses = counted

def struck(self, file, states):
    save(self, file, states)
    raise KeyboardInterrupt

def resumed(config, mesh):
    file = pathlib.Path(tempfile.mkdtemp()) / "state.npz"
    module._Work.save = struck
    try:
        gcg(MODEL, PARAMS, TOKENIZER, GOALS[:1], config, mesh=mesh, file=file, save_every=2)
    except KeyboardInterrupt:
        module._Work.save = save
    return gcg(MODEL, PARAMS, TOKENIZER, GOALS[:1], config, mesh=mesh, file=file)

def shown(found):
    print(json.dumps(\
[[f.history.tolist(), [f.loss, *f.losses.tolist()], f.evaluations] for f in found]))

rows, eight = make_mesh(MeshConfig(2, 2, 2)), make_mesh(MeshConfig(4, 2, 1))
shown(gcg(MODEL, PARAMS, TOKENIZER, GOALS[:1], CONFIG, mesh=eight))
shown(gcg(MODEL, PARAMS, TOKENIZER, GOALS, \
dataclasses.replace(CONFIG, filter_ids=False), mesh=rows))
shown(random_search(MODEL, PARAMS, TOKENIZER, GOALS[:1], \
dataclasses.replace(RANDOM, filter_ids=False), mesh=eight))
print(json.dumps(seen))
shown(resumed(CONFIG, eight))
"""


def test_fewer_goals_than_devices_divide_their_candidates(plain, chance, run_in_child):
    one, two, random, seen, resumed = map(
        json.loads, run_in_child(textwrap.dedent(DIVIDED)).splitlines()
    )
    for alone, divided in ((plain[:1], one), (plain, two), (chance[:1], random)):
        for found, (history, losses, evaluations) in zip(alone, divided, strict=True):
            assert found.history.tolist() == history and found.evaluations == evaluations
            np.testing.assert_allclose([found.loss, *found.losses], losses, atol=1e-5)
    # 12 candidates over 8 devices; over 2 for each of two goals; 4 over 8.
    assert seen == [2, 6, 1]
    assert resumed == one


@pytest.mark.parametrize(
    ("goals", "groups"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (20, 8)]
)
def test_groups_of_devices_are_of_equal_size_and_none_is_without_a_goal(goals, groups):
    class Eight:
        shape = {"slice": 1, "data": 4, "fsdp": 2, "tensor": 3}
        devices = np.arange(24).reshape(1, 4, 2, 3)

    devices = gcg_search.search_devices(Eight, goals)
    assert devices.shape == (groups, 8 // groups, 3) and devices.ravel().tolist() == list(range(24))


def test_mistakes_are_named():
    with pytest.raises(
        InputError, match="the initial suffix 'a' has other ids within its conversation"
    ):
        tokenizer = Merging()
        gcg(
            MODEL,
            PARAMS,
            tokenizer,
            [Goal("b", (7,), (0, 1))],
            dataclasses.replace(CONFIG, init="a", placement="before"),
        )
    learned, params = random_model(
        TOKENIZER, num_layers=1, learned_positions=True, max_positions=20
    )
    with pytest.raises(
        InputError,
        match="a suffix of 5 ids and the answer wished for take .. ids, and the model has 20",
    ):
        gcg(learned, params, TOKENIZER, GOALS, CONFIG)
    with pytest.raises(InputError, match="n_replace is 9, and the suffix has 5 ids only"):
        gcg(MODEL, PARAMS, TOKENIZER, GOALS, dataclasses.replace(CONFIG, n_replace=9))
    with pytest.raises(InputError, match="goal 1: the loss is not a number"):
        broken = PARAMS | {
            "embedding": PARAMS["embedding"].at[TOKENIZER.encode("w")[0]].set(jnp.nan)
        }
        start_only = dataclasses.replace(CONFIG, init="xxxxx")
        work = module_of()._Work(search(), broken, TOKENIZER, GOALS, start_only, None)
        work.check(work.begun(None)[0])
    for wrong in (
        dict(steps=0),
        dict(topk=0),
        dict(anneal=True, buffer_size=2),
        dict(init=""),
        dict(seed=-1),
        dict(control_floor=0.0),
    ):
        with pytest.raises(ValueError):
            GcgConfig(**wrong)
    with pytest.raises(ValueError, match="target is 0..4"):
        Goal("a", (1, 2, 3), (0, 4))
    with pytest.raises(ValueError, match="nothing is searched for"):
        Goal("a", (1, 2, 3), (1, 1))
    assert gcg(MODEL, PARAMS, TOKENIZER, [], CONFIG) == []
