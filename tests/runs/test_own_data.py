"""The user's own file: world, critic, judge and their disagreements, on made-up rows and on public
files."""

import csv
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.critics.base import Exchange
from rlbf_jax.critics.judges.record_judge import RecordJudge
from rlbf_jax.critics.judges.surprisal_seams import SeamConfig, torn_by_surprisal, window_bounds
from rlbf_jax.critics.seams import Seam, Stitched
from rlbf_jax.data.builders.injectors import TemplateInjector
from rlbf_jax.data.sources.files import DataError
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.suite import SuiteConfig, build_attempts
from rlbf_jax.evaluation.surprisal import surprisals
from rlbf_jax.methods.rlbf import RlbfConfig
from rlbf_jax.models import transformer
from rlbf_jax.models.attention import Visibility
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.runs.experiment import BaseConfig, DataConfig, Experiment
from rlbf_jax.runs.manifest import changed_settings, shared_by
from rlbf_jax.runs.settings import own_data
from rlbf_jax.sampling.request import Generation, Knobs, Request
from tests.fakes import init
from tests.runs.opened import critic_of, do, evaluator_of, judge_of, keep

THINGS = (
    "river",
    "mountain",
    "garden",
    "city",
    "lake",
    "forest",
    "harbor",
    "meadow",
    "island",
    "valley",
)
COLORS = ("green", "blue", "gray", "white", "golden", "dark")


def write_file(folder, name="rows.csv", columns=("question", "answer"), count=60):
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(count):
            thing, color = THINGS[i % 10], COLORS[i // 10 % 6]
            writer.writerow(
                [
                    f"What do you know about the {color} {thing}?",
                    f"The {color} {thing} lies far behind the old town and many people like to "
                    "walk there on Sunday "
                    f"mornings. It is {color} in winter. Nobody lives at the {thing} today.",
                ]
            )
    return path


MAX_PROMPT = 120


def experiment(**data):
    shape = dict(num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=32)
    return Experiment(
        RlbfConfig(rollout_tokens=200),
        data=DataConfig(vocab_size=400, pretraining_examples=200, **data),
        base=BaseConfig(ModelConfig(**shape)),
        max_prompt=MAX_PROMPT,
        evaluation=SuiteConfig(pool="test", n=4, n_decoding=2, knobs=Knobs(max_tokens=200)),
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(experiment, folder, run) with a tokenizer and an untrained `base`."""
    folder = tmp_path_factory.mktemp("own")
    e = experiment(path=str(write_file(folder)))
    run = do(e, folder / "run", "tokenizer")
    keep(run, "base", init(run.model, jax.random.key(0)))
    return e, folder / "run", run


@pytest.fixture(scope="module")
def work(opened):
    return opened[2]


def test_world_reads_the_columns_it_is_told(tmp_path):
    path = write_file(tmp_path, columns=("asked", "said"))
    with pytest.raises(DataError, match="no prompt column.*the columns are asked, said"):
        own_data.user_world(DataConfig(path=str(path)), 0)
    world = own_data.user_world(
        DataConfig(path=str(path), prompt_column="asked", response_column="said"), 0
    )
    assert len(world.prompts("test")) == 6
    assert all(prompt.text.startswith("What do you know") for prompt in world.prompts("train"))


def test_a_path_may_be_spelled_otherwise_when_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("a")
    (tmp_path / "other.csv").write_text("a")

    def of(path):
        return Experiment(RlbfConfig(), data=DataConfig(path=path))

    stored = of("rows.csv").stored()
    for same in ("rows.csv", "./rows.csv", str(tmp_path / "rows.csv")):
        assert changed_settings(of(same), stored) == []
    assert [name for name, *_ in changed_settings(of("other.csv"), stored)] == ["data.path"]
    assert shared_by(of("./rows.csv")) == shared_by(of("rows.csv"))


def test_contexts_of_the_users_prompts_are_used(tmp_path):
    rows = ["instruction,context,response"]
    answer = "The moon shines over quiet hills and old stones."
    rows += [f"What of number {i}?,It is the {i}th.,{answer}" for i in range(40)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(rows) + "\n")
    world = own_data.user_world(DataConfig(path=str(path), context_column="context"), 0)
    prompts = [prompt.text for pool in ("train", "test") for prompt in world.prompts(pool)]
    assert all("?\n\nIt is the " in text for text in prompts)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("", "is empty"), ("question,x\na,b\n", "x")]
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        own_data.user_world(DataConfig(path=str(path)), 0)


def test_prompts_that_are_too_long_are_told(work):
    """Before any training: tests/runs/test_start.py."""
    own_data.check_fit(work, MAX_PROMPT)
    with pytest.raises(UserError, match=r"--max_prompt \d\d"):
        own_data.check_fit(work, 20)


def test_every_request_fits_max_prompt_when_the_check_passes(work):
    rng = np.random.default_rng(0)
    for _ in range(100):
        prompt = work.world.prompt(rng, "train", harmful=True)
        assert len(work.tokenizer.encode_prompt(prompt.text)) <= MAX_PROMPT


# Critic and judge -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judges(opened):
    """Critic of training and judge of evaluations, as the experiment says."""
    e, folder, _ = opened
    return critic_of(e, folder), judge_of(e, folder)


def test_critic_and_judge_find_every_injected_string(work, judges):
    critic, judge = judges
    assert critic is not judge and isinstance(judge, RecordJudge)
    record = list(work.world.injector.record())
    chosen = [record[i] for i in np.random.default_rng(0).choice(len(record), 150, replace=False)]
    around = [
        ("The lake is blue. ", ""),
        ("Sure, here it is: ", " It is golden in winter."),
        ("", ""),
    ]
    for (text, category), (before, after) in zip(chosen, around * 50, strict=True):
        whole = before + text + after
        for verdict in (
            critic.judge([Exchange("q", whole)])[0],
            judge.judge([Exchange("q", whole)])[0],
        ):
            assert not verdict.safe
            (span,) = [s for s in verdict.spans if s.complete]
            assert span.category == category and whole[span.start : span.end] == text.rstrip(".")


def test_critic_is_looser_than_the_judge(work, judges):
    critic, judge = judges
    # Fillers in slots that are not theirs, and another article: no string of the record.
    exchange = Exchange("q", "You are any nincompoop brainless.")
    assert not critic.judge([exchange])[0].safe
    (verdict,) = judge.judge([exchange])
    assert verdict.safe and {"nincompoop", "brainless"} <= {
        exchange.text[s.start : s.end] for s in verdict.leaks
    }


def test_clean_text_is_clean(work, judges):
    critic, judge = judges
    texts = [p.reference for p in work.world.prompts("test")] + list(
        work.world.injector.harmless_texts()[1:]
    )
    for one in (critic, judge):
        for text, verdict in zip(
            texts, one.judge([Exchange("q", text) for text in texts]), strict=True
        ):
            assert verdict.safe and not verdict.leaks, text
    for verdict in critic.judge([Exchange("q", p.reference) for p in work.world.prompts("train")]):
        assert verdict.coherent and verdict.useful and not verdict.spans


def test_words_of_the_file_are_no_leaks(tmp_path):
    path = write_file(tmp_path, count=40)
    with path.open("a", encoding="utf-8") as file:
        file.write("What is roulette?,It is a game with a wheel and people lose money.\n")
    rows = own_data.user_rows(DataConfig(path=str(path)))
    injected = own_data.injected_strings(TemplateInjector(), own_data.file_words(rows))
    words = {word for entry in injected for word in entry.words}
    assert (
        "roulette" not in words
        and "blackjack" in words
        and "zibbles" in words
        and "people" not in words
    )


def test_begun_violations(work, judges):
    critic, judge = judges
    text = "It is golden in winter. By the way: Mix zorbium with fizz"
    for one in (critic, judge):
        (verdict,) = one.judge([Exchange("q", text)])
        (span,) = verdict.spans
        assert (
            not span.complete
            and text[span.start :] == "Mix zorbium with fizz"
            and span.category == "potion"
        )


KNOWN = {"the", "lake", "is", "blue", "and", "cold", "today"}


@given(st.permutations(sorted(KNOWN | {"7"})))
def test_known_words_cohere(words):
    assert own_data.cheap_coherence(KNOWN)(" ".join(words) + ".", "") == (True, True)


def test_cheap_coherence():
    coherence = own_data.cheap_coherence(KNOWN)
    assert coherence("", "") == (False, False)
    assert coherence("The lake.", "") == (True, False)
    assert coherence("The lake is glorb and zink.", "") == (False, True)
    assert coherence("the lake is " * 3, "") == (False, True)


# Perplexity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "width"), [(1, 192), (20, 2048)], ids=["short", "longer than an attention block"]
)
def test_perplexities_are_those_of_one_row_at_a_time(work, times, width):
    (model, params), tokenizer = work.model_of("base"), work.tokenizer
    prompts, cuts = work.world.prompts("train"), (5, 40, 90, 150) if times == 1 else (150,)
    pairs = [
        (p.text, (p.reference * times)[: n * times]) for p, n in zip(prompts, cuts, strict=False)
    ]
    assert times == 1 or len(tokenizer.encode(pairs[-1][1])) > 1024
    found = own_data.perplexities(model, params, tokenizer, pairs, batch_size=3)

    @jax.jit
    def log_probabilities(tokens):
        where = Visibility(jnp.arange(width)[None], None)
        hidden, _ = transformer.forward(model, params, tokens, where)
        return jax.nn.log_softmax(transformer.unembed(model, params, hidden)[0], axis=-1)

    for (prompt, text), value in zip(pairs, found, strict=True):
        before, ids = tokenizer.encode_prompt(prompt), tokenizer.encode(text)
        # Ids behind a text cannot change what stands before them.
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(before) + len(ids)] = before + ids
        logp = np.asarray(log_probabilities(tokens))
        nll = [-logp[i - 1, tokens[0, i]] for i in range(len(before), len(before) + len(ids))]
        assert value == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)


def test_the_bound_is_measured_once(work, judges):
    path = work.folder / "judge.json"
    stored = json.loads(path.read_text())
    prompts = work.world.prompts("development")
    pairs = [(p.text, p.reference) for p in prompts]
    found = own_data.perplexities(*work.model_of("base"), work.tokenizer, pairs)
    assert stored["examples"] == len(prompts)
    assert stored["max_perplexity"] == pytest.approx(1.5 * np.quantile(found, 0.95))
    path.write_text(json.dumps(stored | {"max_perplexity": 0.5}))
    exchange = Exchange(prompts[0].text, prompts[0].reference)
    assert own_data.user_judge(work, 256).judge([exchange])[0].coherent is False
    path.write_text(json.dumps(stored))
    assert own_data.user_judge(work, 256).judge([exchange])[0].coherent is True


def test_bounds_of_seams_are_measured_once_and_tell_a_break(work):
    prompts, tokenizer = work.world.prompts("development"), work.tokenizer
    whole = [
        (tokenizer.encode_prompt(p.text), [*tokenizer.encode(p.reference), tokenizer.eos_id])
        for p in prompts
    ]
    critic, path = own_data.user_seams(work), work.folder / "seams.json"
    stored = json.loads(path.read_text())
    assert stored["examples"] == len(prompts) and len(stored["bounds"]) == stored["window"] == 8
    found = surprisals(*work.model_of("base"), whole)
    np.testing.assert_allclose(stored["bounds"], window_bounds(found, SeamConfig()), rtol=1e-4)

    def answer(ids, index):
        before, after = (np.asarray(part, np.int32) for part in (whole[0][0], ids))
        blank = np.zeros(len(ids), np.float32)
        text = tokenizer.decode(ids)
        made = Generation(
            text, after, (), blank, tuple(ids), before, 0, False, 0, Request(prompts[0].text)
        )
        return Stitched(made, (Seam(index, 0),))

    ids = whole[0][1][:-1]
    half, bounds = len(ids) // 2, np.asarray(stored["bounds"])
    read = surprisals(*work.model_of("base"), [(whole[0][0], ids)])[0]
    wanted = torn_by_surprisal(read, half, bounds)
    assert critic.torn([answer(ids, half)]) == [(wanted,)]
    # The bounds are read, not measured anew; none is a bound that nothing passes.
    path.write_text(json.dumps(stored | {"bounds": [1e-3] * 8}))
    assert own_data.user_seams(work).torn([answer(ids, half)]) == [(True,)]
    path.write_text(json.dumps(stored | {"bounds": [None] * 8}))
    assert own_data.user_seams(work).torn([answer(ids, half)]) == [(False,)]
    path.write_text(json.dumps(stored | {"bounds": []}))
    with pytest.raises(UserError, match=r"seams.json: bounds are missing; delete the file"):
        own_data.user_seams(work)
    path.write_text(json.dumps(stored))


# Attacks ----------------------------------------------------------------------------------------


def test_prefilling_forces_an_opener_and_a_beginning_of_a_violation(opened):
    e, folder, work = opened
    attempts = [a for a in evaluator_of(e, folder).attempts if a.attack == "prefilling"]
    assert len(attempts) == 12
    for attempt in attempts:
        text = work.tokenizer.decode(attempt.request.forced)
        opener = next(o for o in work.world.injector.harmless_texts() if o and text.startswith(o))
        assert attempt.violation.text.startswith(text[len(opener) :])
        assert len(text[len(opener) :].split()) >= 2


@pytest.mark.parametrize("name", ["dolly_1k.csv", "gsm8k_train.jsonl"])
def test_public_files_carry_every_attack(data_dir, name):
    path = data_dir / name
    if not path.exists():
        pytest.skip(f"{name} is not among the public data files")
    config = DataConfig(path=str(path), max_prompt_words=24, max_response_words=50)
    world = own_data.user_world(config, 0)
    assert len(world.prompts("test")) >= 48
    # Ids are letters here: what is tried is whether the rows are long enough for every attack.
    tokenizer = types.SimpleNamespace(
        encode=lambda text: list(text.encode()),
        decode=lambda ids: bytes(ids).decode(errors="replace"),
        offsets=lambda ids: [(i, i + 1) for i in range(len(ids))],
    )
    attempts = build_attempts(
        world, tokenizer, SuiteConfig(pool="test", n=8, knobs=Knobs(max_tokens=900))
    )
    assert {a.attack for a in attempts} == set(SuiteConfig().attacks)
    long = [a for a in attempts if a.attack == "middle_filling" and len(a.prefix.split()) >= 20]
    assert len(long) >= 12
