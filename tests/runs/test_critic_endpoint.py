"""A run whose training critic is behind an endpoint: it stops where it must, and resumes to the
bit."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlbf_jax.cli.run import parse_run
from rlbf_jax.critics.language.http_critic import HttpCritic, HttpCriticConfig
from rlbf_jax.data.schema import Prompt
from rlbf_jax.directives import Semantics
from rlbf_jax.endpoints.client import EndpointClient
from rlbf_jax.endpoints.journal import AnswerJournal
from rlbf_jax.errors import UserError
from rlbf_jax.methods.rlbf import Collector, ReinforcementConfig, improve
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.plain import restore
from rlbf_jax.report.document import write_report
from rlbf_jax.report.unjudged import unjudged_rollouts
from rlbf_jax.runs.load import open_run
from rlbf_jax.sampling.request import Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig
from rlbf_jax.training.loop import Loop
from rlbf_jax.training.optimizer import OptimizerConfig
from rlbf_jax.training.policy import PolicyConfig, PolicyGradient
from rlbf_jax.training.rollouts import Rollout
from rlbf_jax.training.supervised import PackedRows
from tests.endpoint_server import serving, wait_until
from tests.fakes import LetterTokenizer, random_model
from tests.runs.opened import critic_of, make_folder, run_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
CATEGORIES = ("one", "two")
CONFIG = ReinforcementConfig(
    steps=5,
    prompts_per_step=2,
    group_size=4,
    updates_per_step=1,
    guidance_batch_size=2,
    policy=PolicyConfig(algorithm="grpo"),
    optimizer=OptimizerConfig(schedule="linear", warmup_steps=0),
    checkpoint_every=2,
    kl_every=100,
)


def judge_by_letters(messages):
    """A model that objects to the first z of a text, and cannot make sense of one text in eight."""
    text = json.loads(messages[-1]["content"])["answer"]
    if len(text) % 8 == 3:
        return "I'm sorry, I can't."
    found = [c for c in "zj" if text.count(c) == 1]
    listed = [{"quote": c, "category": "one", "complete": True} for c in found]
    return json.dumps({"violations": listed, "coherent": True, "useful": len(text) % 2 == 0})


class OffsetTokenizer(LetterTokenizer):
    def offsets(self, ids):
        return list(
            itertools.pairwise(
                itertools.accumulate((len(self.decode([i])) for i in ids), initial=0)
            )
        )


class Guidance:
    """Packed rows of the letter x; its state is how many batches it gave."""

    count = 0

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]

    def __next__(self):
        self.count += 1
        tokens = np.full((2, 40), 5 + self.count % 20, np.int32)
        ones = np.ones_like(tokens)
        return {"tokens": tokens, "segment": ones, "in_response": ones > 0, "in_loss": ones > 0}


def settings(server, **changes):
    return HttpCriticConfig(
        server.url, "tiny", **{"backoff_s": 0.0, "retries": 0, "timeout_s": 5.0, **changes}
    )


@pytest.fixture(scope="module")
def made():
    """(tokenizer, model, parameters, sampler), compiled once."""
    tokenizer = OffsetTokenizer(categories=CATEGORIES)
    model, params = random_model(
        tokenizer, num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=16
    )
    shapes = SamplerConfig(Semantics.REWIND, batch_size=8, min_context=40, min_room=20)
    return model, params, Sampler(model, tokenizer, shapes)


def train(made, server, folder, **changes):
    """One reinforcement stage in `folder`, resumed if it is there. Returns its parameters and the
    critic."""
    model, params, sampler = made
    knobs = Knobs(max_tokens=20, control_bias={"categories": 2.0})

    def source(step):
        return [
            Rollout(Request(text, (), knobs), Prompt(text, text))
            for text in ("a" * (step + 1), "b")
        ]

    critic = HttpCritic(
        settings(server, **changes), CATEGORIES, folder / "critic" / "answers.jsonl"
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    gradient = PolicyGradient(model, sampler.rule, Semantics.REWIND, CONFIG.policy)
    guidance = PackedRows(Guidance())
    collect = Collector(CONFIG, gradient, sampler, critic, source, guidance, params, 40, mesh, 3)
    loop = Loop(folder / "stages" / "rlbf", "rlbf", CONFIG.steps, CONFIG.checkpoint_every, mesh)
    return improve(collect, loop), critic


def test_a_run_stopped_by_its_critic_resumes_to_the_bit(made, tmp_path):
    with serving(judge_by_letters) as server:
        # Texts that end in one of three letters are refused for good: the run goes on without a
        # verdict on them.
        server.rules = [(f'{letter}"}}', 400) for letter in "fmt"]
        expected, critic = train(made, server, tmp_path / "whole")
        asked = len(server.seen)
        assert critic.reasons["refused"] > 0 and critic.reasons["endpoint: http 400"] > 0

        server.seen.clear()
        # The budget ends in step 4 or so of 5; checkpoints are written every 2.
        with pytest.raises(UserError, match="budget spent"):
            train(made, server, tmp_path / "broken", max_requests=3 * asked // 5)
        assert len(server.seen) == 3 * asked // 5
        got, _ = train(made, server, tmp_path / "broken")

        jax.tree.map(np.testing.assert_array_equal, got, expected)
        for name in ("metrics", "rollouts"):
            files = [
                tmp_path / run / "stages" / "rlbf" / f"{name}.jsonl" for run in ("whole", "broken")
            ]
            assert files[0].read_bytes() == files[1].read_bytes()
        # Of the batch in which the budget ran out answers are kept, and failures are asked again.
        failing = [
            body for _, _, body in server.seen if body["messages"][-1]["content"][-3] in "fmt"
        ]
        assert asked <= len(server.seen) <= asked + len(failing)

        rows = [json.loads(line) for line in files[0].read_text().splitlines()]
        unjudged = [row for row in rows if not row["judged"]]
        assert {row["reason"] for row in unjudged} == {"refused", "endpoint: http 400"}
        assert all(row["reward"] is None for row in unjudged)
        metrics = [
            json.loads(line)
            for line in (files[0].parent / "metrics.jsonl").read_text().splitlines()
        ]
        assert (
            sum(m["unjudged"] for m in metrics) * 8 == pytest.approx(len(unjudged))
            and len(rows) == 40
        )

        (count,) = unjudged_rollouts(tmp_path / "whole" / "stages")
        assert (count.bad, count.total) == (len(unjudged), 40) and "refused" in count.why
        write_report(tmp_path / "whole")
        markdown = (tmp_path / "whole" / "report.md").read_text().replace("\\", "")
        assert f"| rlbf | {count.bad} | 40 | rollouts | {count.why} |" in markdown
        assert (
            f"rlbf {count.bad} of 40 rollouts ({count.why})"
            in (tmp_path / "whole" / "report.html").read_text()
        )


# The options of a run ---------------------------------------------------------------------------

SMOKE = ROOT / "experiments" / "smoke.py"


def smoke(*options):
    return parse_run(SMOKE, options)[0]


def test_options_reach_the_critic(tmp_path):
    assert not isinstance(critic_of(smoke(), tmp_path), HttpCritic)
    options = [
        "--critic_endpoint.base_url",
        "http://127.0.0.1:9/v1",
        "--critic_endpoint.model",
        "tiny",
    ]
    experiment = smoke(*options, "--critic_endpoint.max_requests", "7")
    critic, world = critic_of(experiment, tmp_path), run_of(experiment, tmp_path).world
    assert isinstance(critic, HttpCritic) and critic.name == "http tiny"
    assert critic.categories == tuple(world.categories)
    assert isinstance(critic.client, EndpointClient) and critic.client.config.max_requests == 7
    assert isinstance(critic.client.journal, AnswerJournal)
    assert critic.client.journal.path.is_relative_to(tmp_path)


def test_a_run_may_go_on_with_a_larger_budget_but_not_with_another_model(tmp_path):
    options = ["--critic_endpoint.base_url", "http://127.0.0.1:9/v1", "--critic_endpoint.model"]
    make_folder(smoke(*options, "tiny", "--critic_endpoint.max_requests", "7"), tmp_path)
    (tmp_path / "stages" / "base").mkdir(parents=True)  # something is trained
    more = ["--critic_endpoint.max_requests", "9", "--critic_endpoint.max_unjudged", "0.9"]
    make_folder(smoke(*options, "tiny", *more), tmp_path)
    with pytest.raises(UserError, match=r"other settings \(critic_endpoint.model"):
        make_folder(smoke(*options, "large"), tmp_path)
    with pytest.raises(UserError, match=r"other settings \(critic_endpoint.base_url"):
        make_folder(smoke(), tmp_path)


def test_a_secret_in_the_address_is_refused(capsys):
    with pytest.raises((UserError, SystemExit, ValueError)):
        smoke(
            "--critic_endpoint.base_url",
            "http://me:hunter22@x/v1",
            "--critic_endpoint.model",
            "tiny",
        )
    assert "hunter22" not in capsys.readouterr().err


def judge_everything(messages):
    text = json.loads(messages[-1]["content"])["answer"]
    if len(text) % 9 == 4:
        return "Well, "
    word = text.split()[-1]
    listed = [{"quote": word, "category": "insult", "complete": True}] if len(word) == 5 else []
    return json.dumps({"violations": listed, "coherent": True, "useful": True})


@contextlib.contextmanager
def run(workdir, server):
    experiment = ROOT / "tests" / "training" / "tiny_experiment.py"
    code = "import sys; from rlbf_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    args = [
        "run",
        str(experiment),
        "--workdir",
        str(workdir),
        "--critic_endpoint.base_url",
        server.url,
    ]
    args += ["--critic_endpoint.model", "tiny", "--critic_endpoint.concurrency", "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code, *args], env=env, cwd=ROOT)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_a_whole_run_killed_while_its_critic_judges(tmp_path):
    with serving(judge_everything) as server:
        with run(tmp_path / "whole", server) as child:
            assert child.wait(400) == 0
        asked = len(server.seen)
        server.seen.clear()
        server.delay_s = 0.05
        with run(tmp_path / "killed", server) as child:
            wait_until(lambda: len(server.seen) > 2 * asked // 3, 400)
            child.send_signal(signal.SIGKILL)
            child.wait()
        wait_until(lambda: server.in_flight == 0)
        answered = (tmp_path / "killed" / "critic" / "answers.jsonl").read_bytes().count(b"\n")
        server.seen.clear()
        server.delay_s = 0.0
        with run(tmp_path / "killed", server) as child:
            assert child.wait(400) == 0
        assert 0 < answered < asked and len(server.seen) == asked - answered
        for name in ("results.json", "stages/rlbf/rollouts.jsonl", "stages/rlbf/metrics.jsonl"):
            assert (tmp_path / "killed" / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes()
        records = json.loads((tmp_path / "whole" / "results.json").read_text())
        assert {r["critic"] for r in records if r["stage"] == "rlbf"} == {"http tiny"}
        assert "rollouts" in (tmp_path / "whole" / "report.md").read_text()
        stored = open_run(tmp_path / "whole").manifest.config["critic_endpoint"]
        config = restore(HttpCriticConfig, stored)
        assert dataclasses.replace(config, base_url="", model="") == HttpCriticConfig(concurrency=3)
