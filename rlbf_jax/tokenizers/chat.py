"""A checkpoint's own chat template, rendered so that it is known
which characters the template wrote.

A template may do anything with a message: trim it, split it, look into it. So the characters of a
message are put on a disguise before rendering: every character that is not white space becomes a
private-use character that occurs nowhere in the template. White space stays, lengths stay, hence
trimming, splitting at white space and tests for emptiness do what they always do. After rendering
the disguise comes off; what wore one is a user's, all else is the template's.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from rlbf_jax.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
DATE = datetime.date(2024, 7, 26)
"""What templates that ask for the date get (Llama 3's own default),
so that a run is the same tomorrow."""
_PRIVATE = range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template.

    Args:
        source: the template.
        variables: what the template may name besides the messages:
          `bos_token` and its like, as text.
        date: answer to `strftime_now`.
        where: file, for messages.
    """

    source: str
    variables: Mapping[str, str]
    date: datetime.date = DATE
    where: str = "chat template"

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        try:
            return environment(self.date).from_string(self.source)
        except jinja2.TemplateError as error:
            raise InputError(
                f"{self.where}: not a Jinja chat template ({_line(error)}{error})"
            ) from error

    def plain(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The text that `transformers` renders.
        Raises InputError where the template refuses the messages."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except jinja2.TemplateError as error:
            raise InputError(
                f"{self.where}: the template refuses these messages ({error})"
            ) from error
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InputError(
                f"{self.where}: the template fails ({type(error).__name__}: {error})"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        is_spelled: Callable[[str], bool] = lambda _: False,
    ) -> tuple[str, bytes]:
        """Text, and one byte a character: 0 where a message wrote it, 1 elsewhere
        (and for white space).

        Args:
            messages: `{"role": one of ROLES, "content": str}` each.
            is_spelled: whether a content spells a token of the template. Such a content is opaque
                to the template's logic; any other must give exactly what `transformers` renders.

        Raises:
            InputError: other keys or roles; or the template changes or inspects the text of
                messages (other than trimming, splitting at white space or measuring it), so that
                user text cannot be told from its own.
        """
        _check(messages)
        contents = [message["content"] for message in messages]
        on, off = self._disguise(contents)
        masked = self.plain(
            [{**m, "content": m["content"].translate(on)} for m in messages], add_generation_prompt
        )
        text = masked.translate(off)
        if not any(map(is_spelled, contents)) and text != self.plain(
            messages, add_generation_prompt
        ):
            raise InputError(
                f"{self.where}: the template changes or inspects the text of messages, so that "
                "user text cannot be "
                "kept apart from turn tokens; use a template that only trims it"
            )
        return text, bytes(ord(character) not in off for character in masked)

    def _disguise(self, contents: Sequence[str]) -> tuple[dict[int, int], dict[int, int]]:
        characters = sorted({ord(c) for content in contents for c in content if not c.isspace()})
        taken = {ord(c) for c in itertools.chain(self.source, *self.variables.values())}
        free = (point for points in _PRIVATE for point in points if point not in taken)
        on = dict(zip(characters, free, strict=False))
        if len(on) < len(characters):
            raise InputError(
                f"a conversation has {len(characters)} different characters; at most {len(on)} fit"
            )
        return on, {point: character for character, point in on.items()}


def environment(date: datetime.date) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox in which `transformers` renders templates (`utils/chat_template_utils.py`)."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.datetime.combine(
        date, datetime.time()
    ).strftime(form)
    return made


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the model says: its body, here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _check(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise InputError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"} or not all(
            isinstance(value, str) for value in message.values()
        ):
            raise InputError(
                f"message {index}: expected the texts 'role' and 'content', found {sorted(message)}"
            )
        if message["role"] not in ROLES:
            raise InputError(
                f"message {index}: role {message['role']!a} is not one of {', '.join(ROLES)}"
            )


def _line(error: jinja2.TemplateError) -> str:
    number = getattr(error, "lineno", None)
    return f"line {number}: " if number else ""
