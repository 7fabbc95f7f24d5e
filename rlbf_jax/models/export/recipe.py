"""The recipe in an exported folder: how `transformers` and others edit what this checkpoint emits.

    FOLDER/README.md                          for people: transformers, vLLM, untrusted text
    FOLDER/custom_generate/generate.py        for `model.generate(..., custom_generate=FOLDER,
                                              trust_remote_code=True)`
    FOLDER/custom_generate/edits.py           the editor, standard library only (a copy of ours)
    FOLDER/custom_generate/rlbf_rule.json     control ids, limits, ends of a response
    FOLDER/custom_generate/rule.py            the same for generate.py

Why twice: `transformers` runs the recipe from a cache,
where it copies Python modules only and keys them by their contents;
with a JSON file alone two checkpoints in folders of one name would share a rule.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from rlbf_jax.directives import (
    NEVER,
    BacktrackRule,
    EditRule,
    ReplaceRule,
    ResetRule,
    Semantics,
)
from rlbf_jax.errors import InputError, UserError
from rlbf_jax.models.export import edits
from rlbf_jax.storage import write_whole

TEMPLATES = Path(__file__).parent / "templates"
FOLDER, RULE_FILE = "custom_generate", "rlbf_rule.json"


@dataclasses.dataclass(frozen=True)
class ResponseLimits:
    """`directives.Limits` of one response as plain numbers."""

    max_emitted: int = 1024
    budget: int = 4
    forbid_from: int = NEVER
    forbid_to: int = NEVER
    grammar: bool = True


class Recipe(NamedTuple):
    """What `read_recipe` finds."""

    rule: EditRule
    eos_ids: tuple[int, ...]
    limits: ResponseLimits


def write_recipe(
    folder: str | Path,
    rule: EditRule,
    eos_ids: Sequence[int],
    limits: ResponseLimits = ResponseLimits(),
    semantics: Semantics = Semantics.KEEP,
) -> None:
    """Writes the recipe into an exported folder; the same arguments give the same bytes.

    Args:
        folder: made if it is missing; a `README.md` in it is replaced.
        rule: a `BacktrackRule`, `ResetRule` or `ReplaceRule`.
        eos_ids: ids that end a response, at least one.
        limits: of a response, forced ids included.
        semantics: that of the checkpoint's training.
          `transformers` only appends to its cache, so KEEP.

    Raises:
        UserError: REWIND, or limits or ids that no response could follow.
    """
    if semantics is not Semantics.KEEP:
        raise UserError(
            "semantics is rewind, but transformers and vLLM keep what was taken back in their "
            "context; "
            "train with semantics keep to export, or ask for an export without this recipe"
        )
    exported = exported_rule(rule, eos_ids, limits)
    fields = exported.fields()
    place = Path(folder) / FOLDER
    write_whole(place / "generate.py", (TEMPLATES / "generate.py.txt").read_bytes())
    write_whole(place / "edits.py", Path(edits.__file__).read_bytes())
    write_whole(place / "rule.py", _module(fields))
    write_whole(place / RULE_FILE, json.dumps(fields, indent=1) + "\n")
    write_whole(Path(folder) / "README.md", _readme(rule, exported))


def read_recipe(folder: str | Path) -> Recipe:
    """Reads `rlbf_rule.json` of an exported folder. Raises InputError that names file and field."""
    path = Path(folder) / FOLDER / RULE_FILE
    try:
        found = edits.read_rule(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; export the checkpoint again with its recipe"
        ) from None
    except ValueError as error:
        raise InputError(str(error)) from error
    return Recipe(
        _our_rule(found), found.eos_ids, ResponseLimits(**dataclasses.asdict(found.limits))
    )


def _our_rule(found: edits.Rule) -> EditRule:
    common = (found.first_id, found.categories, found.never)
    vocab_size = found.vocab_size
    if found.kind == edits.BACKTRACK:
        return BacktrackRule(*common, x_max=found.x_max, vocab_size=vocab_size)
    other = ResetRule if found.kind == edits.RESET else ReplaceRule
    return other(*common, vocab_size=vocab_size)


def exported_rule(rule: EditRule, eos_ids: Sequence[int], limits: ResponseLimits) -> edits.Rule:
    """Our rule as the exported editor knows it. Raises UserError if it cannot be followed."""
    if not isinstance(rule, (BacktrackRule, ResetRule, ReplaceRule)):
        raise UserError(
            f"a {type(rule).__name__} has no recipe; export with a BacktrackRule, a ResetRule or a "
            "ReplaceRule"
        )
    if not eos_ids:
        raise UserError("eos_ids is empty; name at least one id that ends a response")
    barred = sorted(i for i in eos_ids if i in rule.never or rule.is_control(i))
    if barred:
        raise UserError(
            f"eos_ids: {barred} can never be emitted as an end; take them out of eos_ids or of "
            "rule.never"
        )
    for name in ("max_emitted", "budget", "forbid_from", "forbid_to"):
        if getattr(limits, name) < 0:
            raise UserError(f"limits.{name} is {getattr(limits, name)}, expected 0 or more")
    return edits.Rule(
        kind=rule.kind,
        first_id=int(rule.first_id),
        categories=tuple(rule.categories),
        x_max=int(rule.num_retractions),
        never=tuple(int(i) for i in rule.never),
        eos_ids=tuple(int(i) for i in eos_ids),
        limits=edits.Limits(**dataclasses.asdict(limits)),
        vocab_size=None if rule.vocab_size is None else int(rule.vocab_size),
    )


def _module(fields: dict) -> str:
    """`rule.py`: the fields as a Python literal, one a line."""
    lines = "".join(f"    {name!r}: {value!r},\n" for name, value in fields.items())
    return f'''"""Equal to rlbf_rule.json, for generate.py: \
transformers runs it from a cache of Python modules only.

Change both, or pass rule=PATH_OF_THE_JSON to generate."""

RULE = {{
{lines}}}
'''


def _readme(rule: EditRule, exported: edits.Rule) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    names = rule.names()
    return environment.get_template("README.md.j2").render(
        rule=exported, limits=exported.limits, first=names[0], last=names[-1]
    )
