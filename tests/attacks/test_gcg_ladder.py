"""The ladder against nanoGCG 0.3.0: the same weights, draws replayed, every rung compared
(`reference/make_gcg.py`)."""

import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlbf_jax.attacks.search import gcg_step
from rlbf_jax.attacks.search.gcg import GcgConfig, Goal, gcg
from rlbf_jax.attacks.search.gcg_candidates import best_ids, replace
from rlbf_jax.attacks.search.gcg_search import Search, State, accept
from rlbf_jax.attacks.search.random_search import RandomSearchConfig, random_search
from tests.reference import gcg_cases as cases

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
TARGET = (len(cases.AFTER), len(cases.AFTER) + len(cases.TARGET))
ALLOWED = jnp.arange(cases.VOCAB) < cases.FORBIDDEN
PREFIX_OF = jax.jit(gcg_step.prefix_of, static_argnums=0)
LOSSES = jax.jit(gcg_step.suffix_losses, static_argnums=(0, 2))
GRADIENT = jax.jit(gcg_step.suffix_gradient, static_argnums=(0, 2))
BEHAVIOR = gcg_step.one_behavior([*cases.PREFIX], [*cases.AFTER, *cases.TARGET], TARGET)


def objective(variant: str) -> gcg_step.Objective:
    return gcg_step.Objective("mellowmax" if variant == "mellowmax" else "ce", first=TARGET[0])


@pytest.fixture(scope="module")
def params() -> dict:
    return cases.params()


@pytest.fixture(scope="module")
def prefix(params):
    return PREFIX_OF(cases.MODEL, params, BEHAVIOR)


@pytest.fixture(scope="module", params=["plain", "buffer", "mellowmax"])
def theirs(request):
    """What nanoGCG did in one variant, with the variant's name."""
    with np.load(REFERENCE / "gcg.npz") as kept:
        found = {
            name.split(".")[1]: kept[name] for name in kept.files if name.startswith(request.param)
        }
    return {"variant": request.param, "starts": np.asarray([cases.INIT])} | found


@pytest.fixture(scope="module")
def start(params, prefix, theirs):
    """Loss, gradient and keys of the suffix the run begins with, the best of the buffer."""
    suffix = jnp.asarray(theirs["starts"][np.argmin(theirs["start_loss"])], jnp.int32)
    return GRADIENT(cases.MODEL, params, objective(theirs["variant"]), BEHAVIOR, prefix, suffix)


def test_loss_of_the_start(params, prefix, theirs):
    starts = jnp.asarray(theirs["starts"], jnp.int32)
    losses, _ = LOSSES(cases.MODEL, params, objective(theirs["variant"]), BEHAVIOR, prefix, starts)
    np.testing.assert_allclose(losses, theirs["start_loss"], atol=1e-5, rtol=0)


def test_gradient(start, theirs):
    loss, gradient, _ = start
    assert float(loss) == pytest.approx(theirs["start_loss"].min(), abs=1e-5)
    difference = np.abs(np.asarray(gradient) - theirs["gradient"])
    assert difference.max() <= 1e-4 * np.abs(theirs["gradient"]).max()


def test_best_ids_are_the_same_sets_but_for_ties(start, theirs):
    """An id that only one side has is as good as the worst that is kept."""
    gradient = np.asarray(start[1])
    ours = np.asarray(jax.jit(best_ids, static_argnums=2)(start[1], ALLOWED, cases.TOPK))
    assert ours.max() < cases.FORBIDDEN
    for row, mine, other in zip(gradient, ours, theirs["best"].astype(int), strict=True):
        border = row[mine].max()
        for token in set(mine.tolist()) ^ set(other.tolist()):
            assert abs(row[token] - border) <= 1e-5 * np.abs(row).max()


def test_replayed_draws_give_the_same_suffix_at_every_step(params, prefix, theirs):
    target, positions = objective(theirs["variant"]), jnp.asarray(theirs["positions"], jnp.int32)
    ranks = jnp.asarray(theirs["ranks"], jnp.int32)
    buffer = len(theirs["starts"]) if theirs["variant"] == "buffer" else 0
    search = Search(cases.MODEL, target, cases.STEPS, cases.WIDTH, cases.TOPK, buffer_size=buffer)
    everything = jnp.ones(cases.WIDTH, bool)

    @jax.jit
    def step(state, positions, ranks):
        _, gradient, own = gcg_step.suffix_gradient(
            cases.MODEL, params, target, BEHAVIOR, prefix, state.ids[0]
        )
        made = replace(state.ids[0], best_ids(gradient, ALLOWED, cases.TOPK), positions, ranks)
        losses, matches = gcg_step.candidate_losses(
            cases.MODEL,
            params,
            target,
            BEHAVIOR,
            prefix,
            own,
            made,
            positions.min(1),
            everything,
            32,
        )
        return accept(search, state, made, losses, matches, everything), losses, gradient

    state = state_of(theirs["starts"], theirs["start_loss"])
    for number in range(cases.STEPS):
        state, losses, gradient = step(state, positions[number], ranks[number])
        sure = ~tied(gradient, theirs["positions"][number], theirs["ranks"][number])
        assert sure.mean() > 0.9
        np.testing.assert_allclose(
            losses[sure],
            theirs["candidate_losses"][number][sure],
            atol=1e-4,
            rtol=0,
            err_msg=f"{number}",
        )
        assert state.ids[0].tolist() == theirs["history"][number].tolist(), (
            f"first divergence at step {number}"
        )
    np.testing.assert_allclose(state.losses, theirs["step_losses"], atol=1e-4, rtol=0)


def tied(gradient, positions, ranks) -> np.ndarray:
    """[S] bool: candidates with a rank whose neighbor has the same gradient up to rounding:
    either may come first."""
    values = np.sort(np.asarray(gradient)[:, : cases.FORBIDDEN], axis=1)
    near = (
        np.abs(np.diff(values, axis=1, prepend=-np.inf, append=np.inf))
        <= 1e-5 * np.abs(values).max()
    )
    either = near[:, :-1] | near[:, 1:]
    return either[positions.astype(int), ranks.astype(int)].any(axis=-1)


def state_of(starts: np.ndarray, losses: np.ndarray) -> State:
    order = np.argsort(losses, kind="stable")
    ids, loss = jnp.asarray(starts[order], jnp.int32), jnp.asarray(losses[order])
    zero = jnp.int32(0)
    return State(
        jnp.zeros(2, jnp.uint32), zero, ids, loss, ids[0], loss[0], jnp.full(cases.STEPS, jnp.nan),
        jnp.zeros((cases.STEPS, cases.LENGTH), jnp.int32), jnp.asarray(False), zero, zero,
    )  # fmt: skip


# Live --------------------------------------------------------------------------------------------


class Numbers:
    """The peer's tokenizer behind our protocol, as far as a search without a filter reads it."""

    pad_id = bos_id = cases.VOCAB - 1
    eos_ids = (cases.VOCAB - 1,)
    vocab_size = cases.FORBIDDEN

    class rule:
        first_id, end_id, never = cases.VOCAB, cases.VOCAB, ()

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def encode_prompt(self, text):
        return [*self.encode(text), *cases.AFTER]


@pytest.fixture(scope="module")
def peer():
    python = os.environ.get("RLBF_JAX_NANOGCG")
    if not python:
        pytest.skip(
            "RLBF_JAX_NANOGCG is not set: point it at a Python with torch, transformers <= 4.47.1 "
            "and nanogcg"
        )

    def run(command: str, out: pathlib.Path, *args: str):
        folder = out.parent / "model"
        if not folder.exists():
            cases.write(folder)
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        script = [python, str(REFERENCE / "make_gcg.py"), command, str(folder), str(out), *args]
        subprocess.run(script, check=True, env=env, capture_output=True)
        return np.load(out)

    return run


@pytest.mark.slow
def test_the_reference_is_what_nanogcg_does(peer, tmp_path):
    with np.load(REFERENCE / "gcg.npz") as kept:
        made = peer("record", tmp_path / "gcg.npz")
        assert set(made.files) == set(kept.files)
        for name in kept.files:
            np.testing.assert_allclose(
                made[name].astype(float), kept[name].astype(float), atol=1e-4, err_msg=name
            )


@pytest.mark.slow
def test_both_search_equally_well_and_better_than_chance(peer, params, tmp_path):
    """20 seeds x 100 steps: 95 % upper bound of the median ratio of best losses,
    by bootstrap over seeds."""
    count, steps = 20, 100
    nano = peer("seeds", tmp_path / "seeds.npz", "--seeds", str(count), "--steps", str(steps))[
        "best"
    ]
    ours, chance = best_losses(params, count, steps)
    print({"ours": np.median(ours), "nanogcg": np.median(nano), "random": np.median(chance)})
    assert upper_bound(ours / nano) <= 1.05
    assert upper_bound(ours / chance) < 1 and upper_bound(nano / chance) < 1


def upper_bound(ratios: np.ndarray) -> float:
    """95 % bound of the median, by bootstrap over seeds."""
    draws = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    return float(np.quantile(np.median(draws, axis=1), 0.95))


def best_losses(params: dict, count: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Best losses of GCG and of random search with as many candidates, for seeds 0..count."""
    prompt, init = (" ".join(map(str, ids)) for ids in (cases.PREFIX, cases.INIT))
    goal = Goal(prompt, cases.TARGET, (0, len(cases.TARGET)))
    options = dict(init=init, separator=" ", filter_ids=False)
    ours, chance = [], []
    for seed in range(count):
        config = GcgConfig(
            **options, steps=steps, search_width=cases.WIDTH, topk=cases.TOPK, seed=seed
        )
        (found,) = gcg(cases.MODEL, params, Numbers(), [goal], config)
        ours.append(found.losses.min())
        (found,) = random_search(
            cases.MODEL, params, Numbers(), [goal], RandomSearchConfig.of_equal_budget(config)
        )
        chance.append(found.loss)
    return np.asarray(ours), np.asarray(chance)
