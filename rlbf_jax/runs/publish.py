"""What goes into an exported folder beside the weights: tokenizer, token ids,
and the recipe that edits as we do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlbf_jax.directives import EditRule, Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.export.recipe import ResponseLimits, write_recipe
from rlbf_jax.runs import start
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.files import read_json, write_json
from rlbf_jax.runs.manifest import read_manifest
from rlbf_jax.storage import write_whole
from rlbf_jax.tokenizers import FamilyTokenizer, SentencePieceTokenizer, load_tokenizer
from rlbf_jax.tokenizers.files import GENERATION_FILE
from rlbf_jax.tokenizers.own_export import published_files

POLICY_FILE = "rlbf_policy.json"
"""Edit rule and semantics of an exported stage, for whoever opens it again."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What an export needs to know of the run that a stage belongs to."""

    experiment: Experiment
    tokenizer: FamilyTokenizer
    rule: EditRule
    generation: Mapping[str, Any]
    """generation_config.json of the checkpoint that the run started from;
    empty where there is none."""


def run_of(stage: Path) -> Published | None:
    """The run around a stage's folder (RUN/stages/NAME); None where there is none.

    Raises UserError where its manifest or tokenizer cannot be read.
    """
    folder = stage.absolute().parent.parent
    if not (folder / "manifest.json").is_file():
        return None
    experiment = read_manifest(folder).experiment()
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
    except ValueError as error:
        raise UserError(str(error)) from error
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer = FamilyTokenizer(published_files(tokenizer))
    rule = tokenizer.controls.rule(experiment.rule)
    generation = read_json(folder / start.FOLDER / GENERATION_FILE)
    return Published(experiment, tokenizer, rule, generation)


def token_fields(tokenizer: FamilyTokenizer) -> dict[str, Any]:
    """Token ids of config.json."""
    return {
        "bos_token_id": tokenizer.published_bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.published_pad_id,
    }


def write_generation(
    out: Path, tokenizer: FamilyTokenizer, published: Mapping[str, Any] | None = None
) -> None:
    """Writes generation_config.json: every id that ends a response,
    and padding even where the family has none.

    Args:
      published: the checkpoint's own, whose other fields stay.
    """
    ids = token_fields(tokenizer) | {
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    fields = {**(published or {}), **ids}
    write_whole(
        out / GENERATION_FILE,
        json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
    )


def write_files(
    folder: Path, out: Path, run: Published, model: ModelConfig, max_tokens: int
) -> str:
    """Writes tokenizer, generation_config.json and, for KEEP, the recipe.

    Returns one line about the recipe.

    Args:
      folder: where to.
      out: what it will be called.
      max_tokens: most ids of an answer in the recipe; at most half of a model's learned positions.
    """
    run.tokenizer.save(folder)
    write_generation(folder, run.tokenizer, run.generation)
    semantics, knobs = run.experiment.semantics, run.experiment.evaluation.knobs
    write_json(folder / POLICY_FILE, {"rule": run.experiment.rule, "semantics": semantics.value})
    if semantics is not Semantics.KEEP:
        return (
            "no recipe for transformers and vLLM: this run's semantics is "
            f"{semantics.value}, whose model does not see what it took back, and there it would; "
            "train with --semantics keep for one"
        )
    if model.learned_positions and model.max_positions is not None:
        max_tokens = min(max_tokens, model.max_positions // 2)
    limits = ResponseLimits(max_emitted=max_tokens, budget=knobs.budget)
    write_recipe(folder, run.rule, run.tokenizer.eos_ids, limits)
    return (
        f"recipe for transformers: answers of at most {max_tokens} ids (--max_tokens; the run was "
        f"evaluated on at most {knobs.max_tokens}) and {knobs.budget} directives; see "
        f"{out}/README.md"
    )
