"""A critic by its name: the list, the setting `critic` of a run, and `rlbf audit --critic`."""

import json

import pytest

from experiments import smoke
from rlbf_jax.cli import main as cli
from rlbf_jax.critics.base import Verdict
from rlbf_jax.critics.language.http_critic import HttpCriticConfig
from rlbf_jax.critics.noisy import NoiseConfig
from rlbf_jax.critics.registry import CRITICS, critic_named
from rlbf_jax.data.worlds.toy_world import ToyWorld, ToyWorldConfig
from rlbf_jax.errors import UserError
from rlbf_jax.runs.critics import CriticConfig
from rlbf_jax.runs.execute import recipe
from rlbf_jax.runs.experiment import setting
from rlbf_jax.runs.stage import fingerprint
from tests.runs.opened import critic_of, make_folder


class Lenient:
    """Lets everything pass."""

    name = "lenient"

    def judge(self, exchanges):
        return [Verdict() for _ in exchanges]


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.setitem(CRITICS, "lenient", lambda world: Lenient())


def test_a_run_asks_the_critic_that_it_names(lenient, tmp_path):
    e = smoke.get_config()
    assert critic_of(e, tmp_path).name == "toy_lexicon"
    assert critic_of(e.replace(critic="lenient"), tmp_path).name == "lenient"
    noisy = e.replace(critic="lenient", critic_noise=NoiseConfig(accuracy=0.9))
    name = critic_of(noisy, tmp_path).name
    assert name.startswith("lenient") and name != "lenient"


def test_the_setting_and_the_part_of_the_same_name_are_told_apart():
    e = smoke.get_config()
    named = e.changed({"critic": "toy_lexicon"})
    assert setting(named, "critic") == "toy_lexicon" == named.method.critic.critic
    whole = CriticConfig(critic_noise=NoiseConfig(accuracy=0.9))
    assert e.replace(critic=whole).method.critic == whole
    # In the stage's fingerprint: another critic, another policy.
    prints = [fingerprint(recipe(each), "rlbf", {}) for each in (e, named)]
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("toy_lexikon", "no critic is called 'toy_lexikon'; did you mean toy_lexicon?"),
        ("nobody", "there are toy_lexicon"),
    ],
)
def test_an_unknown_name_is_refused_before_anything_is_made(name, message, tmp_path, capsys):
    e = smoke.get_config().replace(critic=name)
    with pytest.raises(UserError, match="critic"):
        critic_of(e, tmp_path)
    file, folder = "experiments/smoke.py", tmp_path / "run"
    assert cli.main(["run", file, "--critic", name, "--workdir", str(folder)]) == 2
    assert message in capsys.readouterr().err and not folder.exists()


def test_a_critic_of_the_toy_world_is_refused_for_other_text(tmp_path):
    with pytest.raises(ValueError, match="the toy world only"):
        critic_named("toy_lexicon", object())


def test_one_critic_only():
    endpoint = HttpCriticConfig(base_url="http://127.0.0.1:1/v1", model="m")
    with pytest.raises(ValueError, match="critic_endpoint.base_url and critic are set"):
        CriticConfig(critic="toy_lexicon", critic_endpoint=endpoint)
    with pytest.raises(ValueError, match="critic_model and critic are set"):
        CriticConfig(critic="toy_lexicon", critic_model="runs/a/stages/sft")


def test_the_manifest_holds_the_name(lenient, tmp_path):
    make_folder(smoke.get_config().replace(critic="lenient"), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert stored["config"]["critic"] == "lenient"
    (entry,) = [stage for stage in stored["stages"] if stage["name"] == "rlbf"]
    assert entry["config"]["critic"] == "lenient"


def test_audit_reads_the_same_list(lenient, tmp_path, capsys):
    world = ToyWorld(ToyWorldConfig())
    forms = list(world.form_table.values())[:4]
    lines = ["text,label"]
    for form in forms:
        lines += [f"{' '.join(slot[0] for slot in form.slots)},1", "the roses grow well.,0"]
    file = tmp_path / "labelled.csv"
    file.write_text("\n".join(lines) + "\n")
    wanted = ["--text_column", "text", "--label_column", "label"]
    for critic in ("lenient", "toy_lexicon"):
        out = tmp_path / critic
        command = ["audit", str(file), "--critic", critic, *wanted, "--out", str(out)]
        assert cli.main(command) == 0, capsys.readouterr().err
        assert json.loads((out / "audit.json").read_text())["critic"] == critic
    assert cli.main(["audit", str(file), "--critic", "toy_lexikon", *wanted]) == 2
    assert "did you mean toy_lexicon?" in capsys.readouterr().err
