"""The tokenizer files of a checkpoint folder, rewritten with control tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rlbf_jax.directives import DEFAULT_KINDS, Controls
from rlbf_jax.errors import InputError
from rlbf_jax.progress import say
from rlbf_jax.tokenizers import controls, published_sentencepiece
from rlbf_jax.tokenizers.added import AddedToken
from rlbf_jax.tokenizers.chat import DATE
from rlbf_jax.tokenizers.files import (
    ADDED_FILE,
    CONFIG_FILE,
    DEFAULT,
    GENERATION_FILE,
    JSON_FILE,
    MAP_FILE,
    META_FILE,
    MODEL_FILE,
    Files,
    dump,
)
from rlbf_jax.tokenizers.listed import (
    check_rows,
    checked_id,
    listed,
    roles,
    spellings,
    stop_ids,
)
from rlbf_jax.tokenizers.protocol import check_categories

MODEL_INPUTS = ["input_ids", "attention_mask"]
"""`model_input_names` where a configuration names none: PreTrainedTokenizerFast of transformers 4
would return `token_type_ids` too, which these models do not take."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What the published files cannot say about a tokenizer with control tokens;
    `rlbf_controls.json`."""

    categories: tuple[str, ...]
    x_max: int
    first_id: int
    vocab_size: int
    stop_ids: tuple[int, ...]
    """Ends of sequence by generation_config.json."""
    template: str
    """Name of the chat template, where there are several."""
    date: str
    """ISO date that templates get."""
    source: str
    kinds: tuple[str, ...] = DEFAULT_KINDS
    """Edit rules that there are control ids for; in the file only where they differ from these."""

    def controls(self, never: Sequence[int]) -> Controls:
        """Where control ids stand; `never` holds illegal ids other than control ids."""
        return Controls(
            self.first_id, self.categories, self.x_max, self.kinds, tuple(never), self.vocab_size
        )

    def names(self) -> dict[int, str]:
        """Id -> name with the leading space that keeps text away; see `controls`."""
        return {i: " " + name for i, name in self.controls(()).names().items()}

    def fields(self) -> dict[str, Any]:
        """What the file holds."""
        fields = dataclasses.asdict(self)
        if self.kinds == DEFAULT_KINDS:
            del fields["kinds"]
        return fields


def meta(files: Files) -> Meta:
    """Reads `rlbf_controls.json`. Raises InputError that names the field."""
    where = f"{files.where}/{META_FILE}"
    found = files.json(META_FILE)
    expected = {field.name for field in dataclasses.fields(Meta)}
    wrong = (set(found) | {"kinds"}) ^ expected
    if wrong:
        raise InputError(f"{where}: fields {sorted(wrong)} are missing or unknown; export it again")
    try:
        lists = ("categories", "stop_ids", "kinds")
        made = Meta(**found | {key: tuple(found[key]) for key in lists if key in found})
        check_categories(made.categories, made.x_max)
        _check_ids(made)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    return made


def _check_ids(made: Meta) -> None:
    """Raises ValueError unless all ids have rows, and no control id ends a sequence."""
    rows = checked_id(made.vocab_size, "vocab_size")
    ids = made.controls(()).ids
    if checked_id(made.first_id, "first_id") != ids.start or ids.stop > rows:
        raise ValueError(f"control ids {ids.start}..{ids.stop - 1} for {rows} rows")
    for i in made.stop_ids:
        if checked_id(i, "stop_ids") >= rows or i in ids:
            raise ValueError(f"stop_ids has {i}, a control id or one of no row ({rows} rows)")


def with_controls(
    files: Files,
    wanted: Controls,
    rows: int = 0,
    template_name: str = DEFAULT,
    date: str = DATE.isoformat(),
) -> Files:
    """The files of a published tokenizer, with control tokens that have rows
    and names and no spelling.

    Args:
        files: as published.
        wanted: control ids from 0 on; they are moved to where there is room for them.
        rows: rows of the checkpoint's embedding (`vocab_size` of its config.json), 0 if not known.
        template_name: what the chat template was called, as `read` was told.
        date: ISO date for templates that ask for it.
    """
    tokens = listed(files)
    texts = spellings(files) | {token.id: token.content for token in tokens}
    check_rows(texts, rows, files.where)
    stops = _with_rows(files, max(rows, max(texts, default=-1) + 1))
    taken = {*stops, *(token.id for token in tokens if token.content in roles(files).values())}
    placed = controls.place(texts, rows, len(wanted.ids), taken)
    made = Meta(
        categories=wanted.categories,
        x_max=wanted.x_max,
        first_id=placed.first_id,
        vocab_size=placed.vocab_size,
        stop_ids=stops,
        template=template_name,
        date=date,
        source=placed.source,
        kinds=wanted.kinds,
    )
    return _rewritten(files, made, tokens)


def _with_rows(files: Files, rows: int) -> tuple[int, ...]:
    """Ends of sequence by generation_config.json. One without a row cannot be sampled: published
    files have such, left over from other checkpoints, and it is left out with a remark."""
    stops = stop_ids(files)
    if beyond := [i for i in stops if i >= rows]:
        say(
            f"{files.where}/{GENERATION_FILE}: eos_token_id {', '.join(map(str, beyond))} is left "
            f"out: the model has {rows} rows"
        )
    return tuple(i for i in stops if i < rows)


def _rewritten(files: Files, made: Meta, tokens: Sequence[AddedToken]) -> Files:
    names = made.names()
    gone = [token for token in tokens if token.id in names]
    content = dict(files.content)
    content.pop(GENERATION_FILE, None)
    if JSON_FILE in content:
        where = f"{files.where}/{JSON_FILE}"
        document = controls.with_tokens(files.json(JSON_FILE), tokens)
        content[JSON_FILE] = dump(controls.with_names(document, names, where))
    if MODEL_FILE in content:
        where = f"{files.where}/{MODEL_FILE}"
        content[MODEL_FILE] = published_sentencepiece.with_names(content[MODEL_FILE], names, where)
    for name in (CONFIG_FILE, MAP_FILE, ADDED_FILE):
        if name in content:
            content[name] = dump(controls.without_spellings(files.json(name), gone, names))
    if JSON_FILE in content:
        # Classes of families build their tokenizer anew from parts of the file;
        # this one takes it as it stands.
        config = {"model_input_names": MODEL_INPUTS} | json.loads(content.get(CONFIG_FILE, b"{}"))
        content[CONFIG_FILE] = dump(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    content[META_FILE] = dump(made.fields())
    return Files(content, files.where)
