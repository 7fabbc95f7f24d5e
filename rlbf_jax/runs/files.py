"""JSON files of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlbf_jax.storage import parse_object, write_whole


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the run; empty where there is no such file.
    Raises UserError where it is damaged."""
    if not path.is_file():
        return {}
    return parse_object(path.read_bytes(), path, "put the right file back")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
