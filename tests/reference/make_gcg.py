"""Reference numbers of GCG by nanoGCG 0.3.0 on torch (CPU, float32), model by `gcg_cases.py`.

    python -m tests.reference.gcg_cases FOLDER
        with our package
    python tests/reference/make_gcg.py record FOLDER OUT.npz
        with nanogcg and transformers <= 4.47.1
    python tests/reference/make_gcg.py seeds FOLDER OUT.npz [--seeds N] [--steps N]
        best loss of every seed

`gcg.npz` beside this file is `record`: three runs of 30 steps
(plain, with a buffer, with mellowmax).
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import nanogcg_peer as peer

VARIANTS = {
    "plain": {},
    "buffer": {"buffer_size": 4, "n_replace": 2},
    "mellowmax": {"use_mellowmax": True},
}
SMALL = {"positions": np.uint8, "ranks": np.uint16, "history": np.uint16, "best": np.uint16}


def record(args: argparse.Namespace) -> None:
    model, case, tokenizer = peer.load(args.folder)
    out = {}
    for variant, options in VARIANTS.items():
        if "buffer_size" in options:  # entries beyond the first, which nanoGCG would draw
            rng = np.random.default_rng(1)
            rows = rng.integers(
                0, case["forbidden"], (options["buffer_size"] - 1, len(case["init"]))
            )
            out[f"{variant}.starts"] = np.concatenate([[case["init"]], rows]).astype(np.uint16)
            texts = [peer.words(row) for row in out[f"{variant}.starts"]]
            found = with_starts(model, case, tokenizer, texts, options)
        else:
            found = peer.recorded(model, case, tokenizer, seed=0, **options)
        for name, value in found.items():
            out[f"{variant}.{name}"] = value.astype(SMALL.get(name, np.float32))
    np.savez_compressed(args.out, **out)


def with_starts(model, case, tokenizer, texts, options):
    config, kept = peer.nano.GCGConfig, {}

    def patched(**fields):
        return config(**(fields | {"optim_str_init": texts}))

    peer.nano.GCGConfig = patched
    try:
        kept = peer.recorded(model, case, tokenizer, seed=0, **options)
    finally:
        peer.nano.GCGConfig = config
    return kept


def seeds(args: argparse.Namespace) -> None:
    model, case, tokenizer = peer.load(args.folder)
    best = [
        peer.run(model, case, tokenizer, seed, steps=args.steps).best_loss
        for seed in range(args.seeds)
    ]
    np.savez(args.out, best=np.asarray(best))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("record", "seeds"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # nanoGCG collects garbage after every batch; what was imported need not be looked at each time.
    gc.freeze()
    {"record": record, "seeds": seeds}[args.command](args)


if __name__ == "__main__":
    main()
