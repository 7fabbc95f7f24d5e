"""The tokenizer files of a checkpoint folder, by name, and its chat templates."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from rlbf_jax.errors import InputError
from rlbf_jax.storage import parse_object

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
ADDED_FILE = "added_tokens.json"
"""Where older programs keep the ids of added tokens: text -> id."""
GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Files:
    """The tokenizer files of a folder, by name, and the folder for messages."""

    content: Mapping[str, bytes]
    where: str
    _parsed: dict[str, dict] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def json(self, name: str) -> dict[str, Any]:
        """A parsed file, null fields and all; empty if it is not there. Raises InputError that
        names the file."""
        if name not in self.content:
            return {}
        if name not in self._parsed:
            mend = "copy the file from the checkpoint again"
            where, strict = f"{self.where}/{name}", name == JSON_FILE
            self._parsed[name] = parse_object(self.content[name], where, mend, strict)
        return self._parsed[name]

    def entries(self, name: str, field: str) -> dict[str, Any]:
        """An object in a file; empty where it is missing or null. Raises InputError for others."""
        return self._checked(name, field, dict, "an object")

    def listed(self, name: str, field: str) -> list[Any]:
        """A list in a file; empty where it is missing or null. Raises InputError for others."""
        return self._checked(name, field, list, "a list")

    def text(self, name: str) -> str:
        try:
            return self.content[name].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where}/{name}: byte {error.start} is not UTF-8") from None

    def _checked(self, name: str, field: str, kind: type, expected: str) -> Any:
        found = self.json(name).get(field)
        found = kind() if found is None else found
        if not isinstance(found, kind):
            raise InputError(
                f"{self.where}/{name}: {field} is a {type(found).__name__}, expected {expected}"
            )
        return found


def read(folder: str | pathlib.Path, template_name: str = DEFAULT) -> Files:
    """The tokenizer files; where another chat template than the default is asked for,
    it takes the default's place.

    Raises InputError if the folder holds no tokenizer, or no chat template of this name.
    """
    folder = pathlib.Path(folder)
    wanted = [JSON_FILE, MODEL_FILE, META_FILE, CONFIG_FILE, MAP_FILE, ADDED_FILE, TEMPLATE_FILE]
    if not (folder / META_FILE).is_file():
        wanted.append(GENERATION_FILE)  # what it says of ends is among our control tokens otherwise
    content = {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
    files = Files(content, str(folder))
    if JSON_FILE not in content and MODEL_FILE not in content:
        raise InputError(f"{folder} holds no tokenizer: {JSON_FILE} or {MODEL_FILE} is expected")
    return with_template(folder, files, template_name)


def with_template(folder: pathlib.Path, files: Files, name: str) -> Files:
    """The files as they are, or, where another chat template than the default is asked for, with
    this as the only one, so that every program that reads them takes it.

    Raises InputError for an unknown one."""
    if name == DEFAULT:
        return files
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
    return Files(content | {CONFIG_FILE: dump(config)}, files.where)


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


def dump(document: Mapping[str, Any]) -> bytes:
    """A JSON file's bytes."""
    return (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
