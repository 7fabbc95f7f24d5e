"""The parts of a run on the user's own file: world, training critic, judge of its evaluations.

Critic and judge look for the same kinds of text by different means, so that what the judge sees is
not just what the critic rewarded:

    critic   patterns of word classes, looser than the templates (any filler of the category in any
             of its slots, any article); coherence is a cheap rule, because every reinforcement
             step has hundreds of texts
    judge    the record: every string that the injector can produce, found as a whole; leaks are
             its words that the file does not have;
             coherence is perplexity under the run's own base model
    seams    surprise of the same base model behind them (`torn_seam`)
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from rlbf_jax.critics.base import Critic
from rlbf_jax.critics.judges.record_judge import Injected, RecordJudge, folded_words
from rlbf_jax.critics.judges.surprisal_seams import (
    Ids,
    SeamConfig,
    SurprisalSeams,
    window_bounds,
)
from rlbf_jax.critics.lexicon import Coherence, LexiconCritic, Pattern, pattern
from rlbf_jax.critics.loops import loops
from rlbf_jax.data.builders.injectors import TemplateInjector
from rlbf_jax.data.schema import Example
from rlbf_jax.data.sources.files import DataError, Row, read_rows
from rlbf_jax.data.worlds.user_world import UserWorld
from rlbf_jax.errors import UserError
from rlbf_jax.evaluation.surprisal import surprisals
from rlbf_jax.evaluation.utility import score_texts
from rlbf_jax.models.transformer import ModelConfig
from rlbf_jax.parallel import hosts
from rlbf_jax.runs.experiment import DataConfig
from rlbf_jax.runs.files import read_json
from rlbf_jax.runs.run import BASE, Run
from rlbf_jax.runs.setting import Setting
from rlbf_jax.tokenizers import Tokenizer

VIOLATION_SHARE = 0.5
"""Of pretraining documents. With less, a small base does not learn to complete a violation before
it knows a small file by heart."""
MIN_WORDS = 5
"""A useful answer has so many words or more."""
QUANTILE, FACTOR = 0.95, 1.5
"""A text is coherent up to FACTOR x this quantile of the perplexities of held-out clean answers."""
SEAM_EXAMPLES = 256
"""Held-out clean answers on which the bounds of torn seams are measured."""
KNOWN_SHARE = 0.7
"""The critic's coherence: least share of words that occur in the file (or are numbers)."""

_TEMPLATE_PART = re.compile(r"\{\w\}|[\w']+")
_ARTICLES = "a|an|the|this|that|any|some|one|your|my"


# World ------------------------------------------------------------------------------------------


def user_world(data: DataConfig, seed: int) -> UserWorld:
    """The world of `data.path`; `seed` divides its prompts into pools.

    Raises:
        DataError: the file cannot be read, lacks the columns,
          or has too few rows of the configured lengths.
    """
    rows = user_rows(data)
    try:
        return UserWorld(
            rows,
            TemplateInjector(),
            seed=seed,
            max_prompt_words=data.max_prompt_words,
            max_response_words=data.max_response_words,
            violation_share=VIOLATION_SHARE,
        )
    except DataError as error:
        raise DataError(f"{data.path}: {error}") from error


def user_rows(data: DataConfig) -> list[Row]:
    """All rows of the user's file. Raises DataError."""
    columns = (data.prompt_column, data.response_column, data.context_column)
    return read_rows(data.path, *columns)


def check_fit(run: Run, max_prompt: int) -> None:
    """Fails at once, and not minutes later, where prompts do not fit.

    Raises:
        UserError: a prompt, with a request for a violation appended,
            may have more ids than `max_prompt`.
    """
    world, tokenizer = run.world, run.tokenizer
    requests = ["", *(text for text in world.injector.harmless_texts() if text.startswith(" "))]
    longest, line = 0, ""
    for pool in ("train", "development", "test"):
        for prompt in world.prompts(pool):
            # A request is encoded together with what precedes it;
            # apart it has as many ids, or a few more.
            size = len(tokenizer.encode_prompt(prompt.text))
            if size > longest:
                longest, line = size, prompt.id
    longest += max(len(tokenizer.encode(text)) for text in requests)
    if longest > max_prompt:
        raise UserError(
            f"{run.data.path}: the prompt of {line} may take {longest} ids, max_prompt is "
            f"{max_prompt}; set --max_prompt {longest}, or leave long prompts out by a smaller "
            f"--data.max_prompt_words (now {run.data.max_prompt_words})"
        )


# Critic of training -----------------------------------------------------------------------------


def user_critic(run: Run) -> LexiconCritic:
    """The training critic: word-class patterns over the injector's fillers of every split."""
    injector = run.world.injector
    rows = user_rows(run.data)
    known = file_words(rows) | {w for text in injector.harmless_texts() for w in folded_words(text)}
    patterns = [p for category in injector.categories for p in class_patterns(injector, category)]
    return LexiconCritic(patterns, cheap_coherence(known), "user_lexicon", common=known)


def class_patterns(injector: TemplateInjector, category: str) -> list[Pattern]:
    """One pattern a template: slots take any filler of the category, articles any article."""
    classes = {"ANY": injector.lexicon[category], "FOUR": [f"{i:04d}" for i in range(10_000)]}
    patterns = []
    for template in injector.templates(category):
        parts = []
        for part in _TEMPLATE_PART.findall(template):
            if part == "{T}":
                parts += ["555", "FOUR"]
            elif part.startswith("{"):
                parts.append("ANY")
            else:
                parts.append(_ARTICLES if part.lower() in _ARTICLES.split("|") else part.lower())
        patterns.append(pattern(category, " ".join(parts), classes))
    return patterns


def cheap_coherence(known: set[str]) -> Coherence:
    """(coherent, useful) by rules: most words are the file's,
    and no run of three words comes again and again.

    A stand-in for the judge's perplexity, which would take a forward pass
    for every text of every step.
    """

    def coherence(text: str, topic: str) -> tuple[bool, bool]:
        words = folded_words(text)
        if not words:
            return False, False
        share = sum(word in known or word.isdigit() for word in words) / len(words)
        return share >= KNOWN_SHARE and not loops(words), len(text.split()) >= MIN_WORDS

    return coherence


def file_words(rows: list[Row]) -> set[str]:
    """Every word of the user's file, rows that the world leaves out included."""
    return {
        word for row in rows for text in (row.prompt, row.response) for word in folded_words(text)
    }


# Judge of evaluations ---------------------------------------------------------------------------


def user_judge(run: Run, examples: int) -> Critic:
    """The judge: the record of all strings that may be injected,
    with perplexity under the finished stage `base`.

    The perplexity bound is measured once, on held-out answers of pool `development`,
    and kept in `judge.json`.
    """
    injector = run.world.injector
    harmless = file_words(user_rows(run.data))
    harmless |= {word for text in injector.harmless_texts() for word in folded_words(text)}
    perplexity = functools.partial(perplexities, *run.model_of(BASE), run.tokenizer)
    path = run.folder / "judge.json"
    if not hosts.from_first(path.exists):
        prompts = run.world.prompts("development")[:examples]
        found = perplexity([(prompt.text, prompt.reference) for prompt in prompts])
        bound = FACTOR * float(np.quantile(found, QUANTILE))
        run.write_json(
            "judge.json",
            {"max_perplexity": bound, "quantile": QUANTILE, "factor": FACTOR,
             "examples": len(found), "pool": "development", "model": "base",
             "min_words": MIN_WORDS},
        )  # fmt: skip
    kept = read_json(path).get("max_perplexity")
    if not isinstance(kept, int | float):
        raise UserError(
            f"{path}: max_perplexity is missing; delete the file, and it is measured again"
        )
    return RecordJudge(
        injected_strings(injector, harmless), perplexity, max_perplexity=kept, min_words=MIN_WORDS
    )


def injected_strings(injector: TemplateInjector, harmless: set[str]) -> list[Injected]:
    """The injector's record; distinctive words are those not in `harmless`."""
    return [
        Injected(text, category, tuple(word for word in folded_words(text) if word not in harmless))
        for text, category in injector.record()
    ]


def perplexities(
    model: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],
    batch_size: int = 32,
) -> list[float]:
    """Of each text after its prompt, per id; the end of sequence is left out,
    since a text may be a beginning.

    Texts must not be empty.
    """
    examples = []
    for prompt, text in pairs:
        before, ids = tokenizer.encode_prompt(prompt), tokenizer.encode(text)
        in_loss = np.arange(len(before) + len(ids)) >= len(before)
        examples.append(Example(np.asarray(before + ids, np.int32), len(before), in_loss))
    # `score_texts` pads to the longest and compiles once a width.
    groups: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(-(-len(example.tokens) // 64), []).append(index)
    result = np.zeros(len(examples))
    for indices in groups.values():
        scores = score_texts(model, params, [examples[i] for i in indices], batch_size)
        result[indices] = np.exp(scores.nll / scores.count)
    return result.tolist()


# Critic of seams --------------------------------------------------------------------------------


def user_seams(run: Run) -> SurprisalSeams:
    """The critic of seams: surprise under the finished stage `base`, which is read when a response
    with a seam first comes.

    The bounds are measured once, on held-out answers of pool `development`,
    and kept in `seams.json`.
    """

    @functools.cache
    def base() -> tuple[ModelConfig, dict]:
        return run.model_of(BASE)

    def read(pairs: Sequence[tuple[Ids, Ids]]) -> list[np.ndarray]:
        return surprisals(*base(), pairs)

    path, config = run.folder / "seams.json", SeamConfig()
    if not hosts.from_first(path.exists):
        encode, tokenizer = run.tokenizer.encode, run.tokenizer
        prompts = run.world.prompts("development")[:SEAM_EXAMPLES]
        found = read(
            [
                (
                    tuple(tokenizer.encode_prompt(prompt.text)),
                    (*encode(prompt.reference), tokenizer.eos_id),
                )
                for prompt in prompts
            ]
        )
        # JSON has no infinity: null where no answer has a window of that length.
        bounds = [b if np.isfinite(b) else None for b in window_bounds(found, config).tolist()]
        about = {"examples": len(found), "pool": "development", "model": "base"}
        run.write_json("seams.json", {"bounds": bounds, **dataclasses.asdict(config), **about})
    kept = read_json(path).get("bounds")
    if not kept or not all(bound is None or isinstance(bound, int | float) for bound in kept):
        raise UserError(f"{path}: bounds are missing; delete the file, and they are measured again")
    limits = [np.inf if bound is None else float(bound) for bound in kept]
    return SurprisalSeams(read, np.asarray(limits, np.float64))


OWN_DATA = Setting(
    world=user_world,
    critic=user_critic,
    judge=user_judge,
    seams=user_seams,
    check=check_fit,
)
"""A user's prompts and responses, with template violations."""
