"""JSON files of a run."""

import pytest

from rlbf_jax.errors import UserError
from rlbf_jax.runs.files import read_json, write_json


def test_what_is_written_is_read_and_what_is_missing_is_empty(tmp_path):
    path = tmp_path / "a" / "b.json"
    assert read_json(path) == {}
    write_json(path, {"word": "é", "path": tmp_path})
    assert read_json(path) == {"word": "é", "path": str(tmp_path)}
    assert "é" in path.read_text(encoding="utf-8") and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("content", "said"), [("[1]", "holds a list"), ("3", "holds a int"), ("{", "not JSON")]
)
def test_damage_is_told(tmp_path, content, said):
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"b.json: {said}.*put the right file back"):
        read_json(path)
