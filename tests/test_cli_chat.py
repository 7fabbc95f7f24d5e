"""`rlbf chat`: what is asked of the sampler, and what is shown."""

import dataclasses
import io
import sys

import numpy as np
import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError
from rlbf_jax.runs import load
from rlbf_jax.sampling.request import Generation
from rlbf_jax.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Bread rises best in a warm corner."] * 9, 300, ("privacy",), 8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@dataclasses.dataclass(frozen=True)
class FakePolicy:
    """Writes something, takes its last two ids back and goes on; tells of it in the middle."""

    tokenizer: object
    asked: list
    semantics: Semantics = Semantics.REWIND
    name: str = "toy"
    params: dict = dataclasses.field(default_factory=dict)

    @property
    def rule(self):
        return self.tokenizer.controls.rule()

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def sampler(self, shapes):
        def sample(params, requests, seed, ended, every):
            (request,) = requests
            if "\ud800" in request.prompt:
                raise InputError("a lone surrogate")
            self.asked.append((request, seed, self.semantics, shapes.batch_size, every))
            whole = self.answer(request, 99)
            assert ended(0, self.answer(request, 2)) is False and ended(0, whole) is False
            return [whole]

        return sample

    def answer(self, request, count):
        head, gone, tail = (
            self.tokenizer.encode(t) for t in ("Bread rises", " best", " in a warm corner")
        )
        gone = gone[-2:]
        directive = [self.rule.category_id("privacy"), self.rule.backtrack_id(len(gone))]
        trace = [*head, *gone, *directive, *tail, self.tokenizer.eos_id][:count]
        visible = (*head, *tail)[:count]
        nothing = np.zeros(0, np.int32)
        return Generation(
            self.tokenizer.decode(visible), np.asarray(trace), (),
            np.zeros(len(trace), np.float32), visible, nothing, 0, True, 0, request,
        )  # fmt: skip


@pytest.fixture
def asked(tokenizer, monkeypatch):
    found = []
    monkeypatch.setattr(load, "load", lambda folder, stage: FakePolicy(tokenizer, found))
    return found


def talk(monkeypatch, text, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return cli.main(["chat", "w", *options])


def test_a_line_in_a_pipe_is_a_question_and_its_answer_what_a_reader_sees(
    asked, monkeypatch, capsys
):
    assert talk(monkeypatch, "One?\n\n Two? \n", "--seed", "3", "--temperature", "0") == 0
    out = capsys.readouterr()
    assert out.out == "Bread rises in a warm corner\n" * 2 and not out.err
    assert [(a[0].prompt, a[0].id, a[1]) for a in asked] == [("One?", 0, 3), ("Two?", 1, 3)]
    assert {a[3:] for a in asked} == {(1, 4)}
    assert asked[0][0].knobs.temperature == 0 and asked[0][0].prompt_ids is None


def test_commands_change_the_view_the_bias_and_the_semantics(asked, monkeypatch, capsys):
    lines = "/raw\nA?\n/bias 2.5\n/keep\nB?\n/bias x\n/rewind\n/nonsense\nC?\n/quit\nD?\n"
    assert talk(monkeypatch, lines, "--control_bias", "categories", "1") == 0
    out, err = capsys.readouterr()
    assert out.count("[CATEGORY_PRIVACY]") == 3 and "best" in out
    assert "bias +2.5" in err and "/bias x: expected a number" in err and "no command" in err
    assert [a[0].prompt for a in asked] == ["A?", "B?", "C?"]
    assert [a[0].knobs.control_bias["categories"] for a in asked] == [1.0, 3.5, 3.5]
    assert [a[2] for a in asked] == [Semantics.REWIND, Semantics.KEEP, Semantics.REWIND]


def test_a_chat_template_gets_all_that_was_said(asked, tokenizer, monkeypatch, capsys):
    class Chatty:
        template = "there is one"

        def __init__(self):
            self.seen = []

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode_chat(self, messages):
            self.seen.append([(m["role"], m["content"]) for m in messages])
            return [7, 8]

    chatty = Chatty()
    monkeypatch.setattr(load, "load", lambda folder, stage: FakePolicy(chatty, asked))
    assert talk(monkeypatch, "A?\nB?\n/new\nC?\n", "--system", "Be brief.") == 0
    told, first = ("system", "Be brief."), ("user", "A?")
    answer = ("assistant", "Bread rises in a warm corner")
    assert chatty.seen == [
        [told, first],
        [told, first, answer, ("user", "B?")],
        [told, ("user", "C?")],
    ]
    assert all(a[0].prompt_ids == (7, 8) for a in asked)


def test_a_question_that_is_no_text_ends_nothing(asked, monkeypatch, capsys):
    assert talk(monkeypatch, "A?\n\ud800\nB?\n") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and err == "error: a lone surrogate\n"


def test_on_a_terminal_answers_appear_as_they_are_written(asked, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert talk(monkeypatch, "A?\n/help\n") == 0
    shown = screen.getvalue()
    assert "\x1b[9;31m" in shown and "[CATEGORY_PRIVACY]" in shown
    assert shown.index("Bread") < shown.index("[CATEGORY_PRIVACY]") and "/quit" in shown


@pytest.mark.parametrize(
    ("option", "told"), [("--max_tokens", "--max_tokens is 0"), ("--budget", "--budget -1")]
)
def test_bad_options_are_one_line(asked, monkeypatch, capsys, option, told):
    value = "0" if option == "--max_tokens" else "-1"
    assert talk(monkeypatch, "A?\n", option, value) == 2
    assert told in capsys.readouterr().err and not asked
