"""Dataclasses <-> JSON."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.plain import (
    DECIDES_NOTHING,
    FLAT,
    PATH,
    differences,
    digest,
    field_names,
    plain,
    restore,
    same_path,
)


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True)
class Inner:
    DECIDE_NOTHING: ClassVar[frozenset[str]] = frozenset({"patience"})

    rate: float = 0.5
    names: tuple[str, ...] = ()
    patience: int = 3


@dataclasses.dataclass(frozen=True)
class Beside:
    width: int = 4
    deep: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Outer:
    color: Color
    beside: Beside = dataclasses.field(default=Beside(), metadata=FLAT)
    inner: Inner = Inner()
    most: int | None = None
    bias: Mapping[str, float] = dataclasses.field(default_factory=dict)
    label: str = dataclasses.field(default="x", metadata=DECIDES_NOTHING)
    on: bool = True


INNERS = st.builds(Inner, st.floats(allow_nan=False), st.lists(st.text()).map(tuple), st.integers())
OUTERS = st.builds(
    Outer,
    color=st.sampled_from(Color),
    beside=st.builds(Beside, st.integers(), INNERS),
    inner=INNERS,
    most=st.none() | st.integers(),
    bias=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    label=st.text(),
    on=st.booleans(),
)


@given(OUTERS)
def test_what_is_plain_is_json_and_comes_back(value):
    stored = plain(value)
    assert json.loads(json.dumps(stored)) == stored
    assert restore(Outer, stored) == value
    assert set(stored) == {"color", "width", "deep", "inner", "most", "bias", "label", "on"}


def test_fields_that_are_missing_keep_their_defaults_or_are_told():
    assert restore(Outer, {"color": "blue"}) == Outer(Color.BLUE)
    assert restore(Outer, {"color": "blue", "deep": {"rate": 1}, "other": 3}).beside == Beside(
        deep=Inner(rate=1)
    )
    with pytest.raises(TypeError, match="color"):
        restore(Outer, {"width": 3})


@pytest.mark.parametrize(
    "wrong",
    [
        {"color": "green"},
        {"color": "red", "width": "wide"},
        {"color": "red", "inner": {"rate": "fast"}},
        {"color": "red", "label": 3},
        {"color": "red", "on": "yes"},
        {"color": "red", "most": "all"},
    ],
)
def test_values_of_the_wrong_type_are_refused(wrong):
    with pytest.raises(ValueError, match="expected|is not a valid"):
        restore(Outer, wrong)


def test_decisive_fields():
    """By metadata, and by a class that names them."""
    decisive = plain(Outer(Color.RED), decisive=True)
    assert "label" not in decisive and decisive["color"] == "red"
    assert set(decisive["inner"]) == set(decisive["deep"]) == {"rate", "names"}
    assert set(field_names(Outer, decides_nothing=True)) == {
        *("label", "inner.patience", "deep.patience")
    }


@dataclasses.dataclass(frozen=True)
class Placed:
    file: str = dataclasses.field(default="", metadata=PATH)
    other: str = ""


def test_a_path_decides_by_what_it_names(tmp_path, monkeypatch):
    """A file by its content, so that a copy elsewhere is the same; a folder by its spelling."""
    monkeypatch.chdir(tmp_path)
    for name, content in (("a.csv", "x"), ("copy.csv", "x"), ("b.csv", "y")):
        (tmp_path / name).write_text(content)

    def of(path):
        return plain(Placed(path, path), decisive=True)["file"]

    assert of("a.csv") == of("./a.csv") == of(str(tmp_path / "a.csv")) == of("copy.csv")
    assert of("a.csv") != of("b.csv") and of("a.csv").startswith("sha256 ")
    assert of("") == "" and of("folder") == of("./folder/") == "folder"
    assert plain(Placed("./a.csv", "./a.csv")) == {"file": "./a.csv", "other": "./a.csv"}
    assert plain(Placed("", "./a.csv"), decisive=True)["other"] == "./a.csv"
    assert list(field_names(Placed, paths=True)) == ["file"]


def test_one_path_in_many_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for other in ("./real", "real/", "link", str(tmp_path / "real"), "x/../real"):
        assert same_path("real", other)
    assert not same_path("real", "other") and not same_path("real", None)


@given(OUTERS)
def test_field_names_are_where_plain_puts_them(value):
    stored = plain(value)
    for name in field_names(Outer):
        part = stored
        for piece in name.split("."):
            part = part[piece]
        assert not isinstance(part, dict) or name == "bias"


@given(OUTERS, OUTERS)
def test_differences_are_what_turns_one_into_the_other(one, other):
    old, new = plain(one), plain(other)
    changed = differences(old, new)
    assert (changed == []) == (old == new)
    mended = json.loads(json.dumps(old)) | {"bias": new["bias"]}
    for name, before, after in changed:
        if name == "bias" or name.startswith("bias."):
            continue
        *parents, last = name.split(".")
        part = mended
        for parent in parents:
            part = part[parent]
        assert part[last] == before
        part[last] = after
    assert mended == new


def test_differences_name_both_values_and_what_is_missing():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        ("a.b", 1, 3),
        ("c", 2, None),
        ("d", None, 4),
    ]
    assert differences({"a": {"b": 1}}, {"a": 3}) == [("a", {"b": 1}, 3)]


def test_digests_do_not_depend_on_the_order_of_names():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1, "b": [2, 3]}) != digest({"a": 1, "b": [3, 2]})
    assert len(digest({})) == 64
