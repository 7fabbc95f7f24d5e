"""A folder as a policy: a stage of a run, or a checkpoint with its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp

from rlbf_jax.directives import Semantics
from rlbf_jax.errors import UserError
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.runs.files import read_json
from rlbf_jax.runs.manifest import read_manifest
from rlbf_jax.runs.publish import POLICY_FILE
from rlbf_jax.sampling.policy import Policy
from rlbf_jax.sampling.program import Single
from rlbf_jax.tokenizers import Tokenizer, import_tokenizer, load_tokenizer
from rlbf_jax.tokenizers.files import META_FILE
from rlbf_jax.training.model_folder import load_model

_DEFAULT_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """A policy read from a folder, and what the folder says beside it."""

    policy: Policy
    """Its name is the folder's path."""
    config: ModelConfig
    """Of the one decoder that is the policy's program."""
    directives: bool
    """Whether it may take anything back."""
    vocab_size: int
    """Ids that the checkpoint knows; ids beyond were added for a published checkpoint
    without control tokens."""

    @property
    def max_length(self) -> int:
        """Most ids of prompt and response, where nobody says another number."""
        return self.config.max_positions or _DEFAULT_LENGTH


def open_model(
    path: str | Path,
    tokenizer: str | Path | None = None,
    semantics: str | None = None,
    directives: bool = True,
) -> CheckpointPolicy:
    """Reads a model with its tokenizer.

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
    stored, rule = _of_run(run) if in_run else _of_checkpoint(path)
    try:
        chosen = Semantics(semantics) if semantics else stored
    except ValueError:
        raise UserError(
            f"semantics is {semantics!r}, expected {' or '.join(s.value for s in Semantics)}"
        ) from None
    known = config.vocab_size
    read: Tokenizer
    try:
        if _is_ours(folder):
            read = load_tokenizer(folder)
        else:
            read = import_tokenizer(folder, (), 1, config.vocab_size)
            directives = False
            config, params = _with_rows(config, params, read.vocab_size)
    except ValueError as error:
        raise UserError(f"{error}; name the tokenizer's folder as tokenizer=DIR") from error
    if read.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {read.vocab_size} ids, the model in {path} "
            f"{config.vocab_size}; "
            "name the right one as tokenizer=DIR"
        )
    try:
        edit_rule = read.controls.rule(rule)
    except ValueError as error:
        raise UserError(f"{folder}: {error}; the model's rule is {rule}") from error
    if not directives:
        # What was never trained, or may not be used, is never legal, and takes no probability.
        never = (*edit_rule.never, *read.controls.ids)
        edit_rule = dataclasses.replace(edit_rule, never=never)
    policy = Policy(Single(config), params, read, edit_rule, chosen, str(path))
    return CheckpointPolicy(policy, config, directives, known)


def _is_ours(folder: Path) -> bool:
    """Whether a tokenizer has control tokens: those of a run,
    and published ones that were given some."""
    if (folder / META_FILE).is_file():
        return True
    try:
        document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # nested without end: refused where it is read
        return False
    return isinstance(document, dict) and document.get("kind") == "sentencepiece"


def _of_run(run: Path) -> tuple[Semantics, str]:
    """Semantics and kind of edit rule of a run."""
    manifest = read_manifest(run)
    try:
        return Semantics(manifest.config["semantics"]), str(manifest.config["rule"])
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{manifest.path}: cannot be read ({type(error).__name__}: {error}); put the run's "
            "manifest back, or export the stage with `rlbf export`"
        ) from error


def _of_checkpoint(folder: Path) -> tuple[Semantics, str | None]:
    """Semantics and kind of edit rule that an export has noted; KEEP and the vocabulary's first
    rule where it has none."""
    fields = read_json(folder / POLICY_FILE)
    try:
        return Semantics(fields.get("semantics", "keep")), fields.get("rule")
    except ValueError as error:
        raise UserError(f"{folder / POLICY_FILE}: {error}; export the stage again") from error


def _with_rows(config: ModelConfig, params: dict, vocab_size: int) -> tuple[ModelConfig, dict]:
    """Zero rows for ids that the tokenizer has and the checkpoint has not;
    they are never legal and never scored."""
    if vocab_size <= config.vocab_size:
        return config, params
    more = ((0, vocab_size - config.vocab_size), (0, 0))
    tables = {
        name: jnp.pad(params[name], more) for name in ("embedding", "unembedding") if name in params
    }
    return dataclasses.replace(config, vocab_size=vocab_size), params | tables
