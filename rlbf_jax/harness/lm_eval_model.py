"""Our models in the LM Evaluation Harness (`lm_eval` 0.4.13), as the model `rlbf`: the extra `eval`
of the package.

    rlbf-lm-eval run --model rlbf --model_args path=RUN/stages/rlbf \\
        --tasks gsm8k --apply_chat_template

`rlbf-lm-eval` is the harness's own command with this model known to it; the harness looks for no
models of others by itself. Log-likelihoods are the plain model's (`likelihood.py`); generations are
our sampler's, and a task sees what a reader sees: the visible text, edits applied.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from rlbf_jax.errors import InputError, UserError
from rlbf_jax.harness.answering import (
    Question,
    QuestionSampler,
    refuse_unknown,
    visible_until,
)
from rlbf_jax.harness.likelihood import log_likelihoods
from rlbf_jax.runs.checkpoint_policy import open_model
from rlbf_jax.sampling.request import Knobs
from rlbf_jax.tokenizers.conversation import conversation_ids

_CHAT = "\x02rlbf conversation "
"""Begins the text that stands for a conversation until it is encoded. Templates place ids, which no
text can spell, so a conversation must not be rendered to text on its way through the harness."""

_GENERATION = frozenset(
    {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"}
)


@register_model("rlbf")
class RlbfLM(TemplateLM):
    """A stage of a run, or a folder of a checkpoint.

    Args (`--model_args name=value,...`):
      path: RUN/stages/STAGE, or a folder that `rlbf import` or `rlbf export` wrote,
        or a published checkpoint.
      tokenizer: its folder, where it is not beside the weights or in the run.
      semantics: `keep` or `rewind`; default: the run's, else `keep`.
      directives: false forbids the model to take anything back.
      max_length: most ids of prompt and response; default: what the model was made for, else 2048.
      max_gen_toks: most ids of an answer where the task does not say,
        directives and erased ids included.
      batch_size: rows of a batch.
      seed: of the answers.

    Raises UserError for a folder, tokenizer or argument that cannot be used.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        semantics: str | None = None,
        directives: bool = True,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        **unknown: Any,
    ):
        """`max_batch_size` and `device` are what the harness passes to every model;
        JAX has its own devices."""
        super().__init__()
        refuse_unknown(unknown, type(self), "--model_args")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(
                f"batch_size is {batch_size!r}, expected a whole number of rows, at least 1"
            )
        self.batch_size = int(batch_size)
        self.model = open_model(path, tokenizer, semantics, directives)
        self.max_length = self.model.max_length if max_length is None else int(max_length)
        self.max_gen_toks = int(max_gen_toks)
        self.sampler = QuestionSampler(
            self.model.policy, self.batch_size, self.max_length, int(seed), self.model.directives
        )
        self.ids = self.model.policy.tokenizer
        self.num_directives = 0
        """Directives carried out in all answers so far."""
        self._chats = False

    # Text and ids ---------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.ids.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a bare text, after the family's opening unless `add_special_tokens` is false."""
        opening = () if add_special_tokens is False else self.ids.opening
        return [*opening, *self.ids.encode(string)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        messages = self._messages(context)
        if messages is None:
            return super()._encode_pair(context, continuation)
        prompt, forced = conversation_ids(self.ids, messages)
        return [*prompt, *forced], self.ids.encode(continuation)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A text that stands for the conversation;
        the last message is continued if it is the assistant's.

        Raises InputError where the tokenizer's template has no place for it.
        """
        self._chats = True
        messages = [
            {"role": message["role"], "content": message["content"]} for message in chat_history
        ]
        try:
            conversation_ids(self.ids, messages)
        except InputError as error:
            raise InputError(
                f"{error} (--fewshot_as_multiturn false puts examples into one message)"
            ) from error
        return _CHAT + json.dumps(messages, ensure_ascii=False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        self._chats = self._chats or bool(chat_template)
        return (
            getattr(getattr(self.ids, "template", None), "source", "one turn")
            if chat_template
            else None
        )

    @property
    def tokenizer_name(self) -> str:
        return f"rlbf-{self.ids.digest()[:16]}"

    def _messages(self, context: str) -> list[dict[str, str]] | None:
        """The conversation a context stands for. Data cannot pass for one: without
        --apply_chat_template none does."""
        if not context.startswith(_CHAT) or not self._chats:
            return None
        return json.loads(context.removeprefix(_CHAT))

    # Requests -------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        size = 64 * self.batch_size  # enough to sort by length, and to show progress
        for part in _parts(
            requests, size, kwargs.get("disable_tqdm", False), "rlbf: log-likelihoods"
        ):
            found = log_likelihoods(
                self.model.policy.program,
                self.model.policy.params,
                [(context, continuation) for _, context, continuation in part],
                batch_size=self.batch_size,
                max_length=self.max_length,
                vocab_size=self.model.vocab_size,
            )
            for (texts, _, _), value in zip(part, found, strict=True):
                results.append((value.logprob, value.is_greedy))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows that predict every id once;
        the last one has a whole window of context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            pairs = lm_eval.utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *lm_eval.utils.make_disjoint_window(pair)) for pair in pairs]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        values = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, values, strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Visible text, cut where a stop string of `until` first stood in it."""
        texts: list[str] = []
        for part in _parts(requests, 4 * self.batch_size, disable_tqdm, "rlbf: answers"):
            asked = [self._question(*request.args) for request in part]
            generations = self.sampler.answer([question for question, _ in asked])
            for request, (_, stops), generation in zip(part, asked, generations, strict=True):
                self.num_directives += len(generation.edits)
                texts.append(visible_until(generation, self.ids, stops))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _question(self, context: str, gen_kwargs: dict[str, Any]) -> tuple[Question, list[str]]:
        """A request's ids and knobs, and its stop strings.
        Raises InputError for a parameter we do not have."""
        kwargs = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        if unknown := sorted(set(kwargs) - _GENERATION):
            raise InputError(
                f"generation parameter {unknown[0]!r}: there are {', '.join(sorted(_GENERATION))}"
            )
        knobs = Knobs(
            temperature=float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0,
            top_k=int(kwargs.get("top_k", 0)),
            top_p=float(kwargs.get("top_p", 1.0)),
            min_p=float(kwargs.get("min_p", 0.0)),
            max_tokens=int(kwargs["max_gen_toks"]),
        )
        messages = self._messages(context)
        prompt, forced = (
            (self.tok_encode(context), [])
            if messages is None
            else conversation_ids(self.ids, messages)
        )
        stops = kwargs["until"]
        return Question(tuple(prompt), tuple(forced), knobs, context, stops=tuple(stops)), stops

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results file."""
        return {
            "path": self.model.policy.name,
            "family": self.model.config.family,
            "semantics": self.model.policy.semantics.value,
            "directives_allowed": self.model.directives,
            "directives": self.num_directives,
            "tokenizer": self.tokenizer_name,
        }


def _parts(items: Sequence[Any], size: int, quiet: bool, name: str) -> Iterator[Sequence[Any]]:
    """Parts of a list, with a progress bar."""
    with tqdm(total=len(items), disable=quiet, desc=name) as bar:
        for start in range(0, len(items), size):
            yield items[start : start + size]
            bar.update(len(items[start : start + size]))


def main() -> int:
    """`lm_eval` with the model `rlbf`. What a user can mend is said on one line, exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
