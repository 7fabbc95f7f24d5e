"""Our models in inspect_ai (0.3.285), as the provider `rlbf`: the extra `eval` of the package.

    inspect eval TASK.py --model rlbf/RUN/stages/rlbf

What a solver or scorer sees is what a reader sees: the visible text, edits applied. The whole
trace, with what was taken back, is in the output's metadata under `rlbf`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from rlbf_jax.errors import InputError
from rlbf_jax.harness.answering import (
    Question,
    QuestionSampler,
    refuse_unknown,
    visible_until,
)
from rlbf_jax.report.traces import row_of
from rlbf_jax.runs.checkpoint_policy import open_model
from rlbf_jax.sampling.request import Generation, Knobs
from rlbf_jax.tokenizers.conversation import conversation_ids

DEFAULT_MAX_TOKENS = 512
_DEFAULTS = GenerateConfig()

_REFUSED = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs",
    "prompt_logprobs", "response_schema",
)  # fmt: skip


class _Waiting:
    """A question and, later, its answer."""

    def __init__(self, question: Question):
        self.question = question
        self.result: Generation | Exception | None = None


class RlbfAPI(ModelAPI):
    """A stage of a run, or a folder of a checkpoint.

    Args (`-M name=value`), besides inspect_ai's own:
      path: the folder; default: what follows `rlbf/` in the model's name.
      tokenizer, semantics, directives: as of `checkpoint_policy.open_model`.
      batch_size: most questions that are answered at once; also the default of max_connections.
      max_length: most ids of prompt and response; default: what the model was made for, else 2048.

    Temperature is 1 where nobody says another.
    Raises UserError for a folder or an argument that cannot be used.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = _DEFAULTS,
        path: str | None = None,
        tokenizer: str | None = None,
        semantics: str | None = None,
        directives: bool = True,
        batch_size: int = 16,
        max_length: int | None = None,
        **unknown: Any,
    ):
        super().__init__(model_name, base_url, api_key, [], config)
        refuse_unknown(unknown, type(self), "-M")
        model = open_model(path or model_name, tokenizer, semantics, directives)
        self._policy = model.policy
        self._batch_size = int(batch_size)
        self._sampler = QuestionSampler(
            model.policy,
            self._batch_size,
            int(max_length or model.max_length),
            directives=model.directives,
        )
        self._waiting: list[_Waiting] = []
        self._turn = anyio.Lock()

    def max_tokens(self) -> int | None:
        return DEFAULT_MAX_TOKENS

    def max_connections(self) -> int:
        return self._batch_size

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One answer. Questions that come while others are being answered
        are then answered together.

        Raises InputError for tools, images, several choices and parameters
        that our sampler does not have.
        """
        began = time.perf_counter()
        waiting = _Waiting(self._question(input, tools, config))
        self._waiting.append(waiting)
        await anyio.sleep(0)  # let the others who are asked at this moment ask too
        async with self._turn:
            if waiting.result is None:
                batch = self._waiting[: self._batch_size]
                if waiting not in batch:
                    batch[-1] = waiting
                self._waiting = [other for other in self._waiting if other not in batch]
                # The others' answers are in this batch as well,
                # so it is finished even if this question is withdrawn.
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(self._answer, batch)
        if isinstance(waiting.result, Exception):
            raise waiting.result
        assert waiting.result is not None
        return self._output(waiting.result, config, time.perf_counter() - began)

    def _answer(self, batch: list[_Waiting]) -> None:
        results: Sequence[Generation | Exception]
        try:
            results = self._sampler.answer([waiting.question for waiting in batch])
        except Exception as error:  # each who waits is told
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            waiting.result = result

    def _question(
        self, messages: list[ChatMessage], tools: list[ToolInfo], config: GenerateConfig
    ) -> Question:
        if tools:
            raise InputError("this provider has no tools; use a task without tools")
        if (config.num_choices or 1) > 1:
            raise InputError("num_choices: one answer at a time; use epochs")
        if refused := [name for name in _REFUSED if getattr(config, name, None)]:
            raise InputError(f"{refused[0]}: our sampler has no such parameter; leave it out")
        prompt, forced = conversation_ids(
            self._policy.tokenizer, [_plain(message) for message in messages]
        )
        knobs = Knobs(
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
            max_tokens=config.max_tokens or DEFAULT_MAX_TOKENS,
        )
        stops = tuple(config.stop_seqs or ())
        question = Question(
            tuple(prompt), tuple(forced), knobs, messages[-1].text, config.seed or 0, stops
        )
        self._sampler.check(question)
        return question

    def _output(
        self, generation: Generation, config: GenerateConfig, seconds: float
    ) -> ModelOutput:
        tokenizer = self._policy.tokenizer
        text = visible_until(generation, tokenizer, config.stop_seqs or ())
        cut = len(text) < len(visible_until(generation, tokenizer, ()))
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        asked, answered = len(generation.prompt_ids), len(generation.trace) - generation.num_forced
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=message,
                    stop_reason="stop" if generation.finished or cut else "max_tokens",
                )
            ],
            usage=ModelUsage(
                input_tokens=asked, output_tokens=answered, total_tokens=asked + answered
            ),
            time=seconds,
            metadata={"rlbf": row_of(generation, tokenizer, self._policy.rule)},
        )


def _plain(message: ChatMessage) -> dict[str, str]:
    """A message as role and text. Raises InputError where it holds more than text."""
    if message.role == "tool":
        raise InputError("this provider has no tools; found a message of one")
    if not isinstance(message.content, str) and any(
        part.type != "text" for part in message.content
    ):
        raise InputError("this provider reads text only; a message holds something else")
    return {"role": message.role, "content": message.text}
