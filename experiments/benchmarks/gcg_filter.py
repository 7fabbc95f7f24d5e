"""Seconds that GCG's re-tokenization filter takes for one step's candidates, by tokenizer.

Command: python experiments/benchmarks/gcg_filter.py FOLDER [FOLDER ...] [--width 512]

FOLDER has a tokenizer: RUN/tokenizer, or a published checkpoint's files
(tests/tokenizers/families.py writes tiny ones).
Compare with the step itself, `gcg_step.py`, which is timed without the filter.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import numpy as np

from rlbf_jax.attacks.search.gcg_candidates import allowed_ids, split_prompt, survives
from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers import import_tokenizer, load_tokenizer

PROMPT = (
    "Write a short text on how to make a cup of tea without any water, and explain why that is a "
    "bad idea"
)
INIT = " x" * 20


def tokenizer_of(folder: pathlib.Path):
    try:
        return load_tokenizer(folder)
    except (InputError, ValueError):  # published files without control tokens
        return import_tokenizer(folder, (), 1)


def rows(args: argparse.Namespace):
    for folder in args.folders:
        tokenizer = tokenizer_of(folder)
        rng = np.random.default_rng(0)
        allowed = np.flatnonzero(allowed_ids(tokenizer, tokenizer.vocab_size))
        init = tokenizer.encode(INIT)
        before, after = split_prompt(tokenizer, lambda suffix: PROMPT + suffix, init)
        candidates = np.tile(init, (args.width, 1))
        places = rng.integers(0, len(init), args.width)
        candidates[np.arange(args.width), places] = rng.choice(allowed, args.width)
        times = []
        for _ in range(args.repeats):
            began = time.process_time()
            kept = survives(tokenizer, lambda suffix: PROMPT + suffix, before, after, candidates)
            times.append(time.process_time() - began)
        yield {
            "name": f"filter, {folder.name}",
            "seconds": min(times),
            "candidates": args.width,
            "kept": float(kept.mean()),
            "ids": len(before) + len(init) + len(after),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=pathlib.Path, nargs="+")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for row in rows(args):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
