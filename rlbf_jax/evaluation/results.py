"""`results.json`: a list of records, one a number, that other programs rely on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlbf_jax.errors import InputError
from rlbf_jax.evaluation.intervals import Interval
from rlbf_jax.storage import held, parse_json, write_whole


@dataclasses.dataclass(frozen=True)
class Record:
    """One number with its interval and everything needed to tell it from its neighbors.

    Rates are in 0..1, names lower-case. NaN (no row had this metric) is written as null.
    """

    method: str
    """As the recipe calls it; a stage of supervised training has its own name here."""
    stage: str
    """`base`, `sft`, or another stage of the recipe."""
    benchmark: str
    attack: str
    split: str
    """Form split of the violations, or `all`."""
    data: str
    """`development` or `test`."""
    metric: str
    value: float
    n_prompts: int
    n: int
    """Rows in the denominator."""
    ci_low: float
    ci_high: float
    ci_method: str
    seed: int
    semantics: str
    """`keep` or `rewind`."""
    judge: str
    critic: str
    """Critic of training; empty where there was none."""
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Decoding parameters that differ from the default, or a description of the grid."""

    @property
    def key(self) -> tuple:
        """Two records with one key are the same number, measured again."""
        knobs = json.dumps(self.knobs, sort_keys=True)
        return (*self._about, self.metric, self.seed, self.semantics, knobs)

    @property
    def measurement(self) -> tuple:
        """Records with one measurement come from the same answers and the same judge."""
        return (*self._about, self.seed, self.semantics, json.dumps(self.knobs, sort_keys=True))

    def measured(
        self, metric: str, estimate: Interval, knobs: Mapping[str, Any] | None = None
    ) -> Record:
        """Another metric of the same answers; None: under the same knobs."""
        return dataclasses.replace(
            self,
            metric=metric,
            value=estimate.value,
            n_prompts=estimate.n_prompts,
            n=estimate.n,
            ci_low=estimate.low,
            ci_high=estimate.high,
            ci_method=estimate.method,
            knobs=self.knobs if knobs is None else knobs,
        )

    @property
    def _about(self) -> tuple:
        return (self.method, self.stage, self.benchmark, self.attack, self.split, self.data)


_FLOATS = ("value", "ci_low", "ci_high")


def to_json(record: Record) -> dict[str, Any]:
    """A record as JSON can hold it: non-finite numbers become null."""
    plain = dataclasses.asdict(record)
    for name in _FLOATS:
        plain[name] = float(plain[name]) if math.isfinite(plain[name]) else None
    return plain


def from_json(plain: Mapping[str, Any], where: str = "record") -> Record:
    """The opposite of `to_json`. Raises ValueError naming the unknown or missing fields."""
    names = {field.name for field in dataclasses.fields(Record)}
    if set(plain) != names:
        wrong = f"missing {sorted(names - set(plain))}, unknown {sorted(set(plain) - names)}"
        raise InputError(f"{where}: the fields of a result record do not match: {wrong}")
    values: dict[str, Any] = {
        name: math.nan if name in _FLOATS and value is None else value
        for name, value in plain.items()
    }
    return Record(**values)


def read_results(path: str | os.PathLike) -> list[Record]:
    """Records of a results.json; an empty list where there is no file.
    Raises ValueError for a damaged file."""
    file = Path(path)
    if not file.exists():
        return []
    rows = parse_json(file.read_bytes(), file, "move it away and evaluate again")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: expected a list of records; move it away and evaluate again")
    return [from_json(row, f"{file}, record {i}") for i, row in enumerate(rows)]


def merge(
    old: Iterable[Record],
    new: Iterable[Record],
    outdated: Callable[[Record], bool] = lambda record: False,
) -> list[Record]:
    """Old records in their order, replaced in place by new ones of the same key;
    other new ones at the end.

    What an old measurement says besides goes with it: its answers and its judge may have been
    others. And so do old records that are `outdated`: those whose rows the new ones have replaced.
    """
    new = list(new)
    again, keys = {record.measurement for record in new}, {record.key for record in new}

    def gone(r: Record) -> bool:
        return r.measurement in again or outdated(r)

    merged = {r.key: r for r in old if not gone(r) or r.key in keys}
    merged.update((record.key, record) for record in new)
    return list(merged.values())


def write_results(
    path: str | os.PathLike,
    records: Iterable[Record],
    outdated: Callable[[Record], bool] = lambda record: False,
) -> list[Record]:
    """Merges records into a results.json, replacing the file only when the new one is whole.
    Returns all records.

    `outdated`: see `merge`.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with held(
        file.parent
    ):  # an evaluation beside a run would otherwise lose the run's records, or its own
        merged = merge(read_results(file), records, outdated)
        write_whole(
            file,
            json.dumps([to_json(record) for record in merged], indent=1, allow_nan=False) + "\n",
        )
    return merged
