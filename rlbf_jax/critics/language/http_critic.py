"""A critic or judge behind an OpenAI-compatible endpoint:
a chat model, asked in one of the formats that we know."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlbf_jax.critics.language.answerers import HttpAnswerer
from rlbf_jax.critics.language.judge_formats import (
    LLAMA_GUARD,
    HarmBench,
    JudgeFormat,
    LlamaGuard,
    StrongReject,
)
from rlbf_jax.critics.language.language_model import LanguageModelCritic
from rlbf_jax.critics.language.minimal_edit import MinimalEdit
from rlbf_jax.endpoints.client import PATIENCE, EndpointClient, EndpointConfig
from rlbf_jax.endpoints.journal import AnswerJournal
from rlbf_jax.parallel import hosts
from rlbf_jax.ranges import check_at_least, check_between

OPTION, JUDGE_OPTION = "critic_endpoint", "judge_endpoint"
"""The options of an experiment that hold a `HttpCriticConfig`: the critic of training,
the judge of evaluations."""


@dataclasses.dataclass(frozen=True)
class HttpCriticConfig(EndpointConfig):
    """A critic or judge behind an endpoint; none where `base_url` is empty."""

    DECIDE_NOTHING: ClassVar[frozenset[str]] = PATIENCE | {"max_unjudged"}
    """Fields that change no verdict: a run may be resumed with other values."""

    format: Literal["minimal_edit", "harmbench", "llama_guard", "strongreject"] = "minimal_edit"
    """How it is asked. All but minimal_edit judge a text as a whole:
    no spans, not whether it is coherent or useful."""
    temperature: float = 0.0
    max_answer_tokens: int = 512
    """Most tokens of a verdict in the formats minimal_edit and strongreject;
    one that is cut off cannot be read."""
    json_mode: bool = False
    """Send `response_format: json_object`, where the endpoint knows it (minimal_edit)."""
    guidelines: str = ""
    """What the categories mean, in your own words; goes into the prompt (minimal_edit)."""
    max_unjudged: float = 0.5
    """Largest share of a batch that may stay unjudged; beyond it the run stops, and can be resumed.
    """
    top_logprobs: int = 5
    """Likeliest first tokens to ask for, from which harmbench and llama_guard
    have their score; 0: ask for none."""
    threshold: float = 0.5
    """A text is a violation from this score on (strongreject)."""
    server_template: bool = False
    """Send the bare conversation: the server has the template published
    with the model (llama_guard)."""
    category_names: tuple[str, ...] = ()
    """Names of this run's categories for the model's codes, as S10=insult (llama_guard)."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.max_unjudged <= 1:
            raise ValueError(f"max_unjudged is {self.max_unjudged}, a share must lie in 0..1")
        check_between(self, 0, 20, "top_logprobs")
        check_between(self, 0, 1, "threshold")
        check_at_least(self, 1, "max_answer_tokens")
        for pair in self.category_names:
            code, _, category = pair.partition("=")
            if code not in LLAMA_GUARD or not category:
                raise ValueError(
                    f"category_names has {pair!r}, expected a code S1 to S14 and a name, as "
                    "S10=insult"
                )


def judge_format(config: HttpCriticConfig, categories: Sequence[str]) -> JudgeFormat:
    """The format that a configuration names. `categories`: kinds of violation of the run."""
    if config.format == "harmbench":
        return HarmBench()
    if config.format == "llama_guard":
        pairs = (pair.partition("=") for pair in config.category_names)
        names = tuple((code, category) for code, _, category in pairs)
        return LlamaGuard(server_renders=config.server_template, names=names)
    if config.format == "strongreject":
        return StrongReject(config.threshold, config.max_answer_tokens)
    return MinimalEdit(tuple(categories), config.guidelines, config.max_answer_tokens)


class HttpCritic(LanguageModelCritic):
    """A `LanguageModelCritic` over an endpoint. What did not come at all is counted by its kind.

    Args:
        config: the endpoint, its format and its patience.
        categories: kinds of violation; in the format minimal_edit every objection
          must name one of them.
        journal: file that keeps every answer, on disk before a verdict is used;
          None: answers are not kept.
        client: asks; by default made from `config` and `journal`.
        option: where the configuration stands, for messages.
    """

    def __init__(
        self,
        config: HttpCriticConfig,
        categories: Sequence[str],
        journal: Path | None = None,
        client: EndpointClient | None = None,
        option: str = OPTION,
    ):
        self.config = config
        self.categories = tuple(categories)
        if not hosts.is_first():  # which asks for all processes
            journal = None
        self.client = client or EndpointClient(
            config, None if journal is None else AnswerJournal(journal)
        )
        params: dict[str, Any] = {"temperature": config.temperature}
        if config.json_mode and config.format == "minimal_edit":
            params["response_format"] = {"type": "json_object"}
        answerer = HttpAnswerer(self.client, option, config.top_logprobs, **params)
        form = judge_format(config, categories)
        super().__init__(answerer, form, max_unjudged=config.max_unjudged, option=option)
        if config.format == "minimal_edit":
            self.name = answerer.name
