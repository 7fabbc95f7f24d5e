"""JSON files of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlbf_jax.errors import UserError
from rlbf_jax.storage import write_whole


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the run; empty where there is no such file.
    Raises UserError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); put the right file back") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, expected an object; put the right file back"
        )
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
