"""Advice in messages names options that the command has."""

import re

import pytest

from rlbf_jax.cli import main as cli
from tests.endpoint_server import KEY, serving

GOOD = '{"prompt": "p", "response": "r"}\n'


def told(capsys, *argv) -> str:
    """The one line with which a command ends."""
    assert cli.main([str(arg) for arg in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def options(capsys, *command) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    return set(re.findall(r"--[\w.]+", capsys.readouterr().out))


def test_an_audit_whose_judge_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\nYou are kind.,0\nYou are not.,1\n")
    with serving(lambda messages: "perhaps") as server:
        error = told(
            capsys, "audit", rows, "--critic", "http", "--out", tmp_path / "out",
            "--endpoint.base_url", server.url, "--endpoint.model", "m",
            "--endpoint.format", "harmbench",
        )  # fmt: skip
    advised = set(re.findall(r"--[\w.]+\w", error))
    assert advised == {"--endpoint.max_unjudged"} <= options(capsys, "audit")


@pytest.mark.parametrize(
    ("command", "content", "offered"),
    [
        (("audit", "{file}", "--critic", "toy_lexicon"), '{"text": "a", "label": "?"}\n', True),
        (("critic", "{file}"), '{"text": "a", "label": "?"}\n', True),
        (("data", "build", "{file}", "--tokenizer", "{tokenizer}"), GOOD + '{"prompt": 3}\n', True),
        (("data", "tokenizer", "{file}"), GOOD + '{"prompt": 3}\n', False),
    ],
)
def test_a_malformed_row(command, content, offered, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    places = {"{file}": file, "{tokenizer}": tmp_path / "tokenizer"}
    if "{tokenizer}" in command:
        texts = tmp_path / "texts.txt"
        texts.write_text("The moon shines over quiet hills. " * 50)
        out = str(places["{tokenizer}"])
        size = ["--vocab_size", "330"]
        assert cli.main(["data", "tokenizer", str(texts), "--out", out, *size]) == 0
    error = told(capsys, *(places.get(arg, arg) for arg in command), "--out", tmp_path / "out")
    assert "; mend the row" in error and ("--quarantine" in error) == offered
    asked = command[:2] if command[0] == "data" else command[:1]
    assert ("--quarantine" in options(capsys, *asked)) == offered
