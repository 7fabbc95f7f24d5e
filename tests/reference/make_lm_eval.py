"""Reference numbers of the tiny checkpoint, by the `hf` model of lm_eval 0.4.13
(torch CPU, float32).

    python -m tests.reference.make_lm_eval OUT.npz

`lm_eval.npz` beside this file is its output.
Needs lm_eval, torch and transformers beside the package.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tests.runs import tiny_checkpoint as tiny


def instances(kind: str, arguments) -> list[Instance]:
    return [
        Instance(kind, {}, args if isinstance(args, tuple) else (args,), i)
        for i, args in enumerate(arguments)
    ]


def answers(model) -> dict:
    """What a model of the harness answers to everything that is asked of the tiny checkpoint."""
    found = model.loglikelihood(instances("loglikelihood", tiny.PAIRS), disable_tqdm=True)
    return {
        "logprob": np.asarray([value for value, _ in found]),
        "greedy": np.asarray([bool(greedy) for _, greedy in found]),
        "rolling": np.asarray(
            model.loglikelihood_rolling(instances("loglikelihood_rolling", tiny.TEXTS), True)
        ),
        "texts": np.asarray(
            model.generate_until(instances("generate_until", tiny.CONTEXTS), disable_tqdm=True)
        ),
    }


def peer(folder: pathlib.Path) -> HFLM:
    return HFLM(
        str(folder), device="cpu", dtype="float32", batch_size=4, max_length=tiny.MAX_LENGTH
    )


def ids(model) -> dict:
    """The ids of every pair, in one array with -1 behind the shorter ones."""
    pairs = []
    for context, continuation in tiny.PAIRS:
        if context:
            pairs.append(model._encode_pair(context, continuation))
        else:
            pairs.append(
                ([model.prefix_token_id], model.tok_encode(continuation, add_special_tokens=False))
            )
    width = max(len(context) + len(continuation) for context, continuation in pairs)
    rows = [
        [*context, *continuation] + [-1] * (width - len(context) - len(continuation))
        for context, continuation in pairs
    ]
    return {
        "ids": np.asarray(rows, np.int32),
        "contexts": np.asarray([len(context) for context, _ in pairs], np.int32),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        model = peer(tiny.write(pathlib.Path(name)))
        np.savez_compressed(sys.argv[1], **answers(model), **ids(model))
