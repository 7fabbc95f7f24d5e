"""One of our own models as the critic or the judge of a run."""

import json

import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.critics.base import Exchange
from rlbf_jax.critics.judges.grammar_judge import GrammarJudge
from rlbf_jax.critics.language.http_critic import HttpCriticConfig
from rlbf_jax.critics.language.language_model import LanguageModelCritic
from rlbf_jax.errors import UserError
from rlbf_jax.runs.model_critic import model_critic
from tests.runs.opened import critic_of, judge_of, make_folder
from tests.runs.test_critic_endpoint import SMOKE, smoke
from tests.runs.tiny_checkpoint import write_yes_model

TEXT = "Tell me about tea. Cabbage is green, and the answer to that is yes or no, in one word.\n"
SERVER = "base_url=http://127.0.0.1:9/v1", "model=m"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("judge")
    write_yes_model(where, TEXT)
    return where


@pytest.mark.parametrize("who", ["critic", "judge"])
def test_a_model_is_asked_in_the_format_that_its_endpoint_would_have(who, folder, tmp_path):
    e = smoke(f"--{who}_model", str(folder), f"--{who}_endpoint.format=harmbench")
    both = judge_of(e, tmp_path), critic_of(e, tmp_path)
    asked, other = both if who == "judge" else both[::-1]
    assert (
        asked.name == f"{folder} (harmbench)"
        and asked.option == f"{who}_endpoint"
        and asked.max_unjudged == 0.5
    )
    assert not isinstance(other, LanguageModelCritic)
    found = asked.judge(
        [
            Exchange("about tea", "Cabbage is green."),
            Exchange("about tea", "no"),
            Exchange("tea", ""),
        ]
    )
    assert [verdict.judged and bool(verdict.spans) for verdict in found] == [True, True, False]
    assert found[0].score == pytest.approx(1.0, abs=0.1)


def test_without_a_folder_the_run_has_its_own(tmp_path):
    e = smoke()
    assert isinstance(judge_of(e, tmp_path), GrammarJudge)
    assert e.judge_model == e.method.critic.critic_model == ""


def test_too_many_texts_that_cannot_be_judged_stop_the_run(folder, tmp_path):
    """It says yes, and strongreject wants grades."""
    told = ["--judge_model", str(folder), "--judge_endpoint.format", "strongreject"]
    with pytest.raises(UserError, match="^judge_endpoint: 2 of 2 texts"):
        judge_of(smoke(*told), tmp_path).judge(
            [Exchange("about tea", "yes"), Exchange("about tea", "no")]
        )
    lenient = judge_of(smoke(*told, "--judge_endpoint.max_unjudged", "1"), tmp_path)
    assert not lenient.judge([Exchange("about tea", "yes")])[0].judged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--judge_model=m", *(f"--judge_endpoint.{x}" for x in SERVER)],
            "judge_endpoint.base_url and judge_model are",
        ),
        (
            ["--critic_model=m", *(f"--critic_endpoint.{x}" for x in SERVER)],
            "critic_endpoint.base_url and critic_model",
        ),
        (
            ["--critic_model=m", "--critic_classifier.path=c"],
            "critic_model and critic_classifier.path are set",
        ),
        (["--critic_model=m", "--judge_model=m"], "it must be another than the critic"),
        (
            ["--judge_model=m", "--judge_endpoint.server_template"],
            "judge_model is asked without a server",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises((UserError, ValueError), match=message):
        smoke(*options)


def test_one_model_in_two_formats_is_two_critics(folder):
    told = smoke(
        "--critic_model",
        str(folder),
        "--judge_model",
        str(folder),
        "--judge_endpoint.format=harmbench",
    )
    assert told.method.critic.critic_model == told.judge_model


def test_a_folder_without_a_model_leaves_no_run_behind(tmp_path, capsys):
    for option in ("--judge_model", "--critic_model"):
        assert (
            cli.main(["run", str(SMOKE), "--workdir", str(tmp_path / "run"), option, str(tmp_path)])
            == 2
        )
        assert (
            f"{option[2:]} {tmp_path}: no model here; expected RUN/stages/STAGE"
            in capsys.readouterr().err
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no server is asked"):
        model_critic(
            tmp_path,
            HttpCriticConfig(server_template=True, format="llama_guard"),
            (),
            "--critic",
            "endpoint",
        )


def test_the_judge_is_one_of_the_settings_of_a_run(folder, tmp_path):
    make_folder(smoke("--judge_model", str(folder)), tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["config"]["judge_model"] == str(
        folder
    )
    (tmp_path / "stages" / "base").mkdir(parents=True)  # something is trained
    with pytest.raises(UserError, match="judge_model is .* there"):
        make_folder(smoke(), tmp_path)
