"""A model as other people's harnesses want it: folders in, conversations in, visible text out.

What the lm-eval and inspect_ai adapters share. A harness sees only what a reader sees: edits are
applied, control ids never become text, and a stop string ends the answer at the moment it stands in
the visible text.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp

from rlbf_jax.directives import Semantics
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig, check_knobs
from rlbf_jax.tokenizers import Tokenizer, import_tokenizer, load_tokenizer
from rlbf_jax.tokenizers.folder import META_FILE
from rlbf_jax.training.model_folder import load_model

_DEFAULT_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that answers."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    semantics: Semantics
    directives: bool
    """Whether it may take anything back."""
    vocab_size: int
    """Ids that the checkpoint knows; ids beyond were added for a published checkpoint without
    control tokens."""
    path: str

    @property
    def max_length(self) -> int:
        """Most ids of prompt and response, where nobody says another number."""
        return self.config.max_positions or _DEFAULT_LENGTH


def open_model(
    path: str | Path,
    tokenizer: str | Path | None = None,
    semantics: str | None = None,
    directives: bool = True,
) -> Model:
    """Loads a model with its tokenizer.

    Args:
      path: RUN/stages/STAGE, or a folder as `rlbf import`, `rlbf export` and others write it. A
        published checkpoint whose tokenizer has no control tokens cannot take anything back.
      tokenizer: folder of the tokenizer; None: the run's, or the one beside the weights.
      semantics: `keep` or `rewind`; None: the run's, else `keep`.
      directives: false forbids all of them.

    Raises:
      UserError: a part is missing or cannot be read, or the tokenizer has more ids than the model.
    """
    path = Path(path)
    config, params = load_model(path)
    run = path.parent.parent
    in_run = (path / "model").is_dir()
    folder = Path(tokenizer) if tokenizer else run / "tokenizer" if in_run else path
    stored = _stored_semantics(run / "manifest.json") if in_run else Semantics.KEEP
    try:
        chosen = Semantics(semantics) if semantics else stored
    except ValueError:
        raise UserError(
            f"semantics is {semantics!r}, expected {' or '.join(s.value for s in Semantics)}"
        ) from None
    known = config.vocab_size
    found: Tokenizer
    try:
        if _is_ours(folder):
            found = load_tokenizer(folder)
        else:
            found = import_tokenizer(folder, (), 1, config.vocab_size)
            directives = False
            config, params = _with_rows(config, params, found.vocab_size)
    except ValueError as error:
        raise UserError(f"{error}; name the tokenizer's folder as tokenizer=DIR") from error
    if found.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {found.vocab_size} ids, the model in {path} "
            f"{config.vocab_size}; "
            "name the right one as tokenizer=DIR"
        )
    return Model(config, params, found, chosen, directives, known, str(path))


def _is_ours(folder: Path) -> bool:
    """Whether a tokenizer has control tokens: those of a run, and published ones that were given
    some."""
    if (folder / META_FILE).is_file():
        return True
    try:
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == "sentencepiece"


def _stored_semantics(manifest: Path) -> Semantics:
    try:
        return Semantics(json.loads(manifest.read_text(encoding="utf-8"))["config"]["semantics"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{manifest}: cannot be read ({type(error).__name__}: {error}); put the run's "
            "manifest back, or export the "
            "stage with `rlbf export`"
        ) from error


def _with_rows(config: ModelConfig, params: dict, vocab_size: int) -> tuple[ModelConfig, dict]:
    """Zero rows for ids that the tokenizer has and the checkpoint has not; they are never legal and
    never scored."""
    if vocab_size <= config.vocab_size:
        return config, params
    more = ((0, vocab_size - config.vocab_size), (0, 0))
    tables = {
        name: jnp.pad(params[name], more) for name in ("embedding", "unembedding") if name in params
    }
    return dataclasses.replace(config, vocab_size=vocab_size), params | tables


# Answers ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """One request of a harness, as ids."""

    prompt_ids: tuple[int, ...]
    forced: tuple[int, ...] = ()
    knobs: Knobs = Knobs()
    text: str = ""
    """For display."""
    seed: int = 0
    stops: tuple[str, ...] = ()
    """Decoding ends soon after one of these stands in the visible text; `visible_until` cuts."""


class QuestionSampler:
    """Samples answers to a harness's questions. The key of an answer depends on its prompt, its
    seed and how often that prompt came before, not on the order or company in which a harness
    asks."""

    def __init__(self, model: Model, batch_size: int, max_length: int, seed: int = 0):
        self.model = model
        self.max_length = max_length
        self.seed = seed
        self._asked: collections.Counter[tuple[int, ...]] = collections.Counter()
        shapes = SamplerConfig(
            semantics=model.semantics,
            batch_size=batch_size,
            min_context=128,
            min_room=128,
            bucket=128,
            max_context=max_length,
        )
        self._sampler = Sampler(model.config, model.tokenizer, shapes)

    def answer(self, questions: Sequence[Question]) -> list[Generation]:
        """One generation a question, in order; a prompt that leaves no room for `max_tokens` loses
        its beginning.

        Raises InputError as `check` does.
        """
        requests = [self._request(question) for question in questions]
        # Neighbors of about one length share a compiled width.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids or ()))
        stops = [questions[i].stops for i in order]

        def ended(place: int, generation: Generation) -> bool:
            return is_settled(generation, self.model.tokenizer, stops[place])

        generations = self._sampler(
            self.model.params,
            [requests[i] for i in order],
            self.seed,
            ended if any(stops) else None,
        )
        found = dict(zip(order, generations, strict=True))
        return [found[i] for i in range(len(requests))]

    def check(self, question: Question) -> None:
        """Raises InputError for knobs out of range, or `max_tokens` that leave no room for a
        prompt."""
        check_knobs(question.knobs)
        if self._room(question) < 1:
            raise InputError(
                f"max_tokens is {question.knobs.max_tokens}, {len(question.forced)} ids are "
                "forced, and the model's "
                f"texts have {self.max_length} ids in all; lower max_tokens"
            )

    def _room(self, question: Question) -> int:
        """Ids left for the prompt."""
        return self.max_length - question.knobs.max_tokens - len(question.forced)

    def _request(self, question: Question) -> Request:
        self.check(question)
        knobs = question.knobs if self.model.directives else question.knobs.without_directives()
        knobs = dataclasses.replace(knobs, max_tokens=knobs.max_tokens + len(question.forced))
        ids = question.prompt_ids[-self._room(question) :]
        repeat = self._asked[ids]
        self._asked[ids] += 1
        id_ = zlib.crc32(repr((ids, repeat, question.seed)).encode()) & 0x7FFFFFFF
        return Request(question.text, question.forced, knobs, id_, ids)


def visible_until(generation: Generation, tokenizer: Tokenizer, stops: Sequence[str]) -> str:
    """The visible text of a generation up to the first stop string, forced ids left out.

    A reader who stops at a stop string stops when it first stands in the text, whatever the model
    would have taken back later; so the text before each edit is looked at in turn, then the final
    one.
    """
    shown = ""
    for shown in _shown(generation, tokenizer):
        if (at := _first(shown, stops)) is not None:
            return shown[:at]
    return shown


def is_settled(generation: Generation, tokenizer: Tokenizer, stops: Sequence[str]) -> bool:
    """Whether `visible_until` stays what it is, whatever follows."""
    *before, now = _shown(generation, tokenizer)
    if any(_first(shown, stops) is not None for shown in before):
        return True
    at = _first(now, stops)
    # A longer stop string may have begun before this one and not be complete yet.
    return at is not None and len(now) >= at + max(map(len, stops))


def _shown(generation: Generation, tokenizer: Tokenizer) -> Iterator[str]:
    """What a reader saw before each edit and in the end, forced ids left out."""
    forced = [int(token) for token in generation.trace[: generation.num_forced]]
    opening = tokenizer.decode(forced)
    for text in (*(tokenizer.decode(edit.before) for edit in generation.edits), generation.text):
        # What was forced is the harness's own; where (a part of) it was taken back, all that is
        # left is the answer.
        yield text[len(opening) :] if text.startswith(opening) else text


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=None)
