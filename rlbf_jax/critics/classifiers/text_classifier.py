"""A calibrated linear text classifier: probabilities of categories, in numpy,
kept in a folder without pickle."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlbf_jax.critics.classifiers.text_features import (
    FeatureConfig,
    SparseRows,
    sparse_rows,
    weighted,
)
from rlbf_jax.errors import InputError
from rlbf_jax.storage import parse_json, write_whole

FORMAT = "rlbf_jax text classifier 1"
_ARRAYS = ("known", "idf", "weights", "bias", "scale", "offset")


@dataclasses.dataclass(frozen=True)
class TextClassifier:
    """One calibrated logistic regression a category on shared TF-IDF features.
    F features, C categories."""

    features: FeatureConfig
    categories: tuple[str, ...]
    idf: np.ndarray
    """float32 [F]; 0 for features that were not seen in training."""
    weights: np.ndarray
    """float32 [F, C]"""
    bias: np.ndarray
    """float32 [C]"""
    scale: np.ndarray
    """float64 [C]: probability = sigmoid(scale x logit + offset)."""
    offset: np.ndarray
    """float64 [C]"""

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [N, C], calibrated; NaN for a text without a single known feature."""
        x = weighted(sparse_rows(texts, self.features), self.idf, self.features)
        z = linear_logits(x, self.weights, self.bias) * self.scale + self.offset
        z[np.diff(x.indptr) == 0] = np.nan
        return z

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [N, C] of each category, apart from the others;
        NaN for a text without a single known feature."""
        return sigmoid(self.logits(texts))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that a probability depends on, as hexadecimal digits."""
        found = hashlib.sha256(json.dumps(self._description()).encode())
        for name, array in self._arrays().items():
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `classifier.npz`, then `classifier.json`, which names the other's hash,
        each whole or not at all."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **self._arrays())
        data = buffer.getvalue()
        write_whole(folder / "classifier.npz", data)
        content = self._description() | {"sha256": hashlib.sha256(data).hexdigest()}
        write_whole(
            folder / "classifier.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )

    def _description(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "categories": list(self.categories),
            "features": dataclasses.asdict(self.features)
            | {"word": "crc32", "terms": "1 + ln(count), idf, unit blocks"},
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        known = np.flatnonzero(self.idf).astype(np.int32)
        values = (known, self.idf[known], self.weights[known], self.bias, self.scale, self.offset)
        return dict(zip(_ARRAYS, values, strict=True))


def linear_logits(x: SparseRows, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """float64 [N, C]: rows times weights [F, C], plus bias [C]."""
    owner = x.owner
    columns = [
        np.bincount(owner, x.values * w[x.ids].astype(np.float64), len(x)) for w in weights.T
    ]
    return np.stack(columns, 1) + bias


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) without overflow; NaN stays NaN."""
    return 0.5 * (1 + np.tanh(0.5 * z))


def load_classifier(folder: Path) -> TextClassifier:
    """Reads what `TextClassifier.save` wrote.

    Raises InputError where a file is missing, damaged, or not of this format; the message names it.
    """
    described, stored = folder / "classifier.json", folder / "classifier.npz"
    mend = "train it again with `rlbf critic`"
    content = _read_description(described, mend)
    try:
        data = stored.read_bytes()
    except OSError as error:
        raise InputError(f"{stored}: {error.strerror}; {mend}") from error
    if hashlib.sha256(data).hexdigest() != content.get("sha256"):
        raise InputError(
            f"{stored}: not the file that {described.name} belongs to (damaged, or of another); "
            f"{mend}"
        )
    try:
        kept = {k: content["features"][k] for k in ("word_ngrams", "char_ngrams", "bits")}
        features = FeatureConfig(
            tuple(kept["word_ngrams"]), tuple(kept["char_ngrams"]), kept["bits"]
        )
        categories = tuple(content["categories"])
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            known, *rest = (arrays[name] for name in _ARRAYS)
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{described}: a field is missing or of the wrong type ({error}); {mend}"
        ) from error
    count, width = len(known), len(categories)
    shapes = [(count,), (count, width), (width,), (width,), (width,)]
    fits = all(a.shape == s and np.isfinite(a).all() for a, s in zip(rest, shapes, strict=True))
    if not width or not fits or (count and not 0 <= known.min() <= known.max() < features.size):
        raise InputError(f"{stored}: arrays that do not fit {described.name}; {mend}")
    idf = np.zeros(features.size, np.float32)
    weights = np.zeros((features.size, width), np.float32)
    idf[known], weights[known] = rest[0], rest[1]
    return TextClassifier(features, categories, idf, weights, *rest[2:])


def _read_description(path: Path, mend: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes(), path, mend)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; expected a folder that `rlbf critic` wrote"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: expected format {FORMAT!r}; {mend}")
    return content
