"""Alternating measurements of ours and a peer in one run, printed as one JSON object a line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import jax
import numpy as np


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, results waited for."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def compare(
    name: str, ours: Callable[[], object], peer: Callable[[], object], peer_name: str, repeats: int
) -> dict:
    """Medians of alternating calls, and the ratio peer / ours (> 1: ours is faster)
    with its lower quartile."""
    for run in (ours, peer):
        jax.block_until_ready(run())
    times = np.asarray([(seconds(ours), seconds(peer)) for _ in range(repeats)])
    ratios = times[:, 1] / times[:, 0]
    return {
        "name": name,
        "ours": float(np.median(times[:, 0])),
        "peer": float(np.median(times[:, 1])),
        "peer_name": peer_name,
        "ratio": float(np.median(ratios)),
        "ratio_low": float(np.quantile(ratios, 0.25)),
    }


def report(rows, as_json: bool) -> None:
    """Prints rows as they come."""
    for row in rows:
        if as_json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{row['name']:44} ours {row['ours'] * 1e3:8.2f} ms   {row['peer_name']} "
                f"{row['peer'] * 1e3:8.2f} ms   "
                f"ratio {row['ratio']:.2f} (lower quartile {row['ratio_low']:.2f})",
                flush=True,
            )


def arguments(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()
