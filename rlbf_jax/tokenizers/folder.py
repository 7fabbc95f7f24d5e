"""The tokenizer files of a checkpoint folder: read, checked, and rewritten with control tokens."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rlbf_jax.directives import DEFAULT_KINDS, Controls
from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import controls, huggingface, published_sentencepiece
from rlbf_jax.tokenizers.added import AddedToken
from rlbf_jax.tokenizers.chat import DATE
from rlbf_jax.tokenizers.protocol import check_categories

JSON_FILE, MODEL_FILE = "tokenizer.json", "tokenizer.model"
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of named templates beside `chat_template.jinja`, one a file."""
DEFAULT = "default"
"""Name of the chat template that programs take unless they are told another."""
META_FILE = "rlbf_controls.json"
"""Not `..._tokenizer.json`: `transformers` would take it for a vocabulary."""
CONFIG_FILE, MAP_FILE, TEMPLATE_FILE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
GENERATION_FILE = "generation_config.json"
MODEL_INPUTS = ["input_ids", "attention_mask"]
"""`model_input_names` where a configuration names none: PreTrainedTokenizerFast of transformers 4
would return `token_type_ids` too, which these models do not take."""
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclasses.dataclass(frozen=True)
class Files:
    """The tokenizer files of a folder, by name, and the folder for messages."""

    content: Mapping[str, bytes]
    where: str
    _parsed: dict[str, dict] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def json(self, name: str) -> dict[str, Any]:
        """A parsed file; empty if it is not there. Raises InputError that names the file."""
        if name not in self.content:
            return {}
        if name in self._parsed:
            return self._parsed[name]
        try:
            found = json.loads(self.content[name])
        except ValueError as error:  # of JSON or UTF-8
            raise InputError(
                f"{self.where}/{name}: not JSON ({error}); copy the file from the checkpoint again"
            ) from None
        if not isinstance(found, dict):
            raise InputError(
                f"{self.where}/{name}: expected a JSON object, found {type(found).__name__}"
            )
        self._parsed[name] = found
        return found

    def text(self, name: str) -> str:
        try:
            return self.content[name].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where}/{name}: byte {error.start} is not UTF-8") from None


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


def read(folder: str | pathlib.Path, template_name: str = DEFAULT) -> Files:
    """The tokenizer files; where another chat template than the default is asked for,
    it takes the default's place.

    Raises InputError if the folder holds no tokenizer, or no chat template of this name.
    """
    folder = pathlib.Path(folder)
    wanted = [JSON_FILE, MODEL_FILE, META_FILE, CONFIG_FILE, MAP_FILE, TEMPLATE_FILE]
    if not (folder / META_FILE).is_file():
        wanted.append(GENERATION_FILE)  # what it says of ends is among our control tokens otherwise
    content = {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
    files = Files(content, str(folder))
    if JSON_FILE not in content and MODEL_FILE not in content:
        raise InputError(f"{folder} holds no tokenizer: {JSON_FILE} or {MODEL_FILE} is expected")
    return files if template_name == DEFAULT else _with_template(folder, files, template_name)


def _with_template(folder: pathlib.Path, files: Files, name: str) -> Files:
    """The files with a named chat template as the only one, so that every program
    that reads them takes it."""
    config = dict(files.json(CONFIG_FILE))
    named = _named_templates(config.pop("chat_template", None))
    beside = {
        file.stem: file.read_bytes() for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    }
    content = {key: value for key, value in files.content.items() if key != TEMPLATE_FILE}
    if name in beside:
        content[TEMPLATE_FILE] = beside[name]
    elif isinstance(named.get(name), str):
        config["chat_template"] = named[name]
    else:
        known = ", ".join(sorted({DEFAULT, *map(str, named), *beside}))
        raise InputError(f"{folder}: no chat template is called {name!r}; found {known}")
    return Files(content | {CONFIG_FILE: _dump(config)}, files.where)


def spellings(files: Files) -> dict[int, str]:
    """Every piece of the vocabulary by its id, without added tokens."""
    if JSON_FILE not in files.content:
        document = published_sentencepiece.parse(
            files.content[MODEL_FILE], f"{files.where}/{MODEL_FILE}"
        )
        return {i: piece.piece for i, piece in enumerate(document.pieces)}
    vocab = (files.json(JSON_FILE).get("model") or {}).get("vocab") or {}
    if isinstance(vocab, dict):
        return {i: piece for piece, i in vocab.items()}
    return {i: entry[0] for i, entry in enumerate(vocab)}


def listed(files: Files) -> list[AddedToken]:
    """Every added, special or user-defined token of vocabulary file and configuration."""
    if JSON_FILE in files.content:
        found = {token.id: token for token in huggingface.added_tokens(files.json(JSON_FILE))}
    else:
        where = f"{files.where}/{MODEL_FILE}"
        document = published_sentencepiece.parse(files.content[MODEL_FILE], where)
        found = {token.id: token for token in published_sentencepiece.listed_tokens(document)}
    names = {field.name for field in dataclasses.fields(AddedToken)}
    for key, entry in files.json(CONFIG_FILE).get("added_tokens_decoder", {}).items():
        token = AddedToken(int(key), **{k: v for k, v in entry.items() if k in names})
        found[token.id] = dataclasses.replace(
            found.get(token.id, token), special=token.special or found.get(token.id, token).special
        )
    named = special_texts(files)
    known = {token.content for token in found.values()}
    for i, piece in spellings(files).items():
        if piece in named and piece not in known:
            found[i] = AddedToken(i, piece, special=True)
    return [
        dataclasses.replace(token, special=token.special or token.content in named)
        for token in found.values()
    ]


def roles(files: Files) -> dict[str, str]:
    """`bos_token` and its like with their text; configuration before special tokens map."""
    merged = _named(files)
    return {role: text for role in ROLES if (text := controls.content_of(merged.get(role)))}


def special_texts(files: Files) -> set[str]:
    """The texts of all tokens that the configuration names as special."""
    merged = _named(files)
    more = [merged[key] for key in _LISTS if key in merged]
    entries = [
        entry for group in more for entry in (group.values() if isinstance(group, dict) else group)
    ]
    return {
        *roles(files).values(),
        *(text for entry in entries if (text := controls.content_of(entry))),
    }


def _named(files: Files) -> dict[str, Any]:
    return files.json(MAP_FILE) | {
        k: v for k, v in files.json(CONFIG_FILE).items() if v is not None
    }


def template(files: Files, name: str = DEFAULT) -> str | None:
    """The chat template: `chat_template.jinja`, else the configuration's
    (a string, or a list of named ones).

    Raises:
        InputError: several templates and none of this name.
    """
    if TEMPLATE_FILE in files.content:
        return files.text(TEMPLATE_FILE)
    found = files.json(CONFIG_FILE).get("chat_template")
    if isinstance(found, list):
        named = _named_templates(found)
        if name not in named:
            raise InputError(
                f"{files.where}/{CONFIG_FILE}: no chat template is called {name!r}; found "
                f"{', '.join(map(str, named))} (in a run, --chat_template chooses)"
            )
        found = named[name]
    if found is not None and not isinstance(found, str):
        raise InputError(
            f"{files.where}/{CONFIG_FILE}: chat_template must be a text or a list of named texts"
        )
    return found


def _named_templates(found: Any) -> dict[Any, Any]:
    """The named chat templates of a configuration's `chat_template`."""
    entries = found if isinstance(found, list) else []
    return {
        entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)
    }


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
        made.controls(())
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    return made


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
    stops = _ids(files.json(GENERATION_FILE).get("eos_token_id"), files.where)
    taken = {*stops, *(token.id for token in tokens if token.content in roles(files).values())}
    texts = spellings(files) | {token.id: token.content for token in tokens}
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
    return _rewritten(files, made, [token for token in tokens if token.id in placed.ids])


def _rewritten(files: Files, made: Meta, gone: Sequence[AddedToken]) -> Files:
    names = made.names()
    content = dict(files.content)
    content.pop(GENERATION_FILE, None)
    if JSON_FILE in content:
        where = f"{files.where}/{JSON_FILE}"
        content[JSON_FILE] = _dump(controls.with_names(files.json(JSON_FILE), names, where))
    if MODEL_FILE in content:
        where = f"{files.where}/{MODEL_FILE}"
        content[MODEL_FILE] = published_sentencepiece.with_names(content[MODEL_FILE], names, where)
    for name in (CONFIG_FILE, MAP_FILE):
        if name in content:
            content[name] = _dump(controls.without_spellings(files.json(name), gone, names))
    if JSON_FILE in content:
        # Classes of families build their tokenizer anew from parts of the file;
        # this one takes it as it stands.
        config = {"model_input_names": MODEL_INPUTS} | json.loads(content.get(CONFIG_FILE, b"{}"))
        content[CONFIG_FILE] = _dump(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    content[META_FILE] = _dump(made.fields())
    return Files(content, files.where)


def _ids(value: Any, where: str) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json: none, one id, or several."""
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and i >= 0 for i in found):
        raise InputError(
            f"{where}/{GENERATION_FILE}: eos_token_id is {value!r}; one id or a list of ids is "
            "expected"
        )
    return tuple(found)


def _dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
