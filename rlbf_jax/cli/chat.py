"""`rlbf chat`: a conversation with a stage of a run, or with any checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import tyro

from rlbf_jax.cli import arguments
from rlbf_jax.cli.generate import Folder
from rlbf_jax.errors import InputError, UserError

if TYPE_CHECKING:
    from rlbf_jax.sampling.policy import Policy
    from rlbf_jax.sampling.request import Generation, Request

HELP = """/raw      show what was taken back, or only what a reader sees
/bias X   add X to the logits of what begins a directive (0: as trained)
/keep     what was taken back stays in the model's context
/rewind   it leaves the context
/new      forget the conversation
/quit     end (so does the end of input)"""
EVERY = 4
"""Ids between two looks at an answer that is being written."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talk to a stage of a run, or to a checkpoint. On a terminal answers appear as they are \
written, and what is taken back is struck through; in a pipe a line is a question, and an answer \
is what a reader sees. /help lists what else can be typed."""

    folder: Folder
    """Folder of a run, of one of its stages, or of a checkpoint; or a GGUF file."""
    stage: str = ""
    """A stage of the run, as base or sft; default: its last one."""
    system: str = ""
    """What the conversation begins with, where the model's chat template has such turns."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.95
    """Draw from the smallest set of ids with this much probability."""
    max_tokens: int = 256
    """Most ids of an answer, directives included."""
    budget: int = 4
    """Most directives of an answer."""
    control_bias: dict[str, float] = dataclasses.field(default_factory=dict)
    """Added to logits of control ids, as `--control_bias categories 2.0`."""
    seed: int = 0
    """Same seed and questions, same answers."""
    raw: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show directives and erased words in a pipe too."""


def chat(argv: Sequence[str]) -> None:
    """`rlbf chat FOLDER`."""
    args: Chat = arguments.parse(Chat, "rlbf chat", argv)
    if args.max_tokens < 1 or args.budget < 0:
        raise UserError(
            f"--max_tokens is {args.max_tokens} and --budget {args.budget}, expected at least 1 "
            "and 0"
        )
    from rlbf_jax.runs import load

    policy = load.load(args.folder, args.stage)
    on_terminal = sys.stdout.isatty()
    conversation = Conversation(policy, args, on_terminal or args.raw)
    for line in _lines(f"{policy.name or args.folder}: /help lists commands"):
        if line.startswith("/"):
            told = conversation.command(line)
            if told is None:
                return
            print(told, file=sys.stdout if on_terminal else sys.stderr)
        elif line:
            try:
                conversation.say(line, _live if on_terminal else _still)
            except InputError as error:  # say, a question with characters that no text has
                print(f"error: {error}", file=sys.stderr)


class Conversation:
    """What was said, and how the next answer is drawn."""

    def __init__(self, policy: Policy, args: Chat, raw: bool):
        self.policy, self.args, self.raw = policy, args, raw
        self.bias = 0.0
        self.forget()
        self.turns = 0

    def forget(self) -> None:
        system = [{"role": "system", "content": self.args.system}] if self.args.system else []
        self.messages: list[dict[str, str]] = system

    def command(self, line: str) -> str | None:
        """What to say of a line that is a command; None: the end."""
        from rlbf_jax.directives import Semantics

        name, _, value = line[1:].strip().partition(" ")
        if name in ("quit", "exit"):
            return None
        if name == "raw":
            self.raw = not self.raw
            return "raw view" if self.raw else "what a reader sees"
        if name == "new":
            self.forget()
            return "a new conversation"
        if name in ("keep", "rewind"):
            self.policy = self.policy.replace(semantics=Semantics(name))
            return f"semantics {name}"
        if name == "bias":
            try:
                self.bias = float(value)
            except ValueError:
                return f"/bias {value}: expected a number"
            return f"bias {self.bias:+g} on what begins a directive"
        return HELP if name in ("help", "h", "?") else f"/{name} is no command\n{HELP}"

    def say(self, text: str, show: Callable) -> None:
        """Asks, and shows the answer while it is written."""
        request = self._request(text)
        with show(self) as look:
            (answer,) = self._sampler()(
                self.policy.params,
                [request],
                self.args.seed,
                ended=lambda _, so_far: look(so_far),
                every=EVERY,
            )
            look(answer)
        said = ({"role": "user", "content": text}, {"role": "assistant", "content": answer.text})
        self.messages += said
        self.turns += 1

    def shown(self, answer: Generation):
        """An answer for a terminal, or, in a pipe, as text."""
        from rlbf_jax.report import traces

        if not self.raw:
            return traces.printable(answer.text)
        row = traces.row_of(answer, self.policy.tokenizer, self.policy.rule)
        return traces.render_trace_terminal(row)

    def _request(self, text: str) -> Request:
        from rlbf_jax.evaluation.tradeoff import control_of, with_bias
        from rlbf_jax.sampling.request import Knobs, Request

        args, tokenizer = self.args, self.policy.tokenizer
        knobs = Knobs(
            temperature=args.temperature,
            top_p=args.top_p,
            max_tokens=args.max_tokens,
            budget=args.budget,
            control_bias=args.control_bias,
        )
        ids = None
        if getattr(tokenizer, "template", None) is not None:
            turn = {"role": "user", "content": text}
            ids = tuple(tokenizer.encode_chat([*self.messages, turn]))  # type: ignore[attr-defined]
        request = Request(text, (), knobs, id=self.turns, prompt_ids=ids)
        return with_bias(request, self.bias, control_of(self.policy.rule)) if self.bias else request

    def _sampler(self):
        from rlbf_jax.sampling.batching import SamplerConfig

        return self.policy.sampler(SamplerConfig(batch_size=1, min_room=self.args.max_tokens))


def _lines(greeting: str) -> Iterator[str]:
    """Lines of input, with a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    print(greeting)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


@contextlib.contextmanager
def _live(conversation: Conversation) -> Iterator[Callable[[Generation], bool]]:
    """On a terminal: the answer as it is now, again and again in its place."""
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(highlight=False), auto_refresh=False, transient=False) as live:

        def look(answer: Generation) -> bool:
            live.update(conversation.shown(answer), refresh=True)
            return False

        yield look


@contextlib.contextmanager
def _still(conversation: Conversation) -> Iterator[Callable[[Generation], bool]]:
    """In a pipe: the answer once it is whole."""
    latest: list[Generation] = []

    def look(answer: Generation) -> bool:
        latest[:] = [answer]
        return False

    yield look
    print(str(conversation.shown(latest[0])), flush=True)
