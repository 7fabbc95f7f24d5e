"""The peer of `gcg_step.py`: nanoGCG 0.3.0 in its own process.

gcg_peer.py SHAPE      SHAPE: JSON of model and prompt

Reads lines of JSON on stdin, answers with seconds:

    {"width": S, "batch": B, "steps": N}
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "reference"))
import nanogcg_peer as peer
import torch
import transformers


def main() -> None:
    shape = json.loads(sys.argv[1])
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape["config"])).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    case = shape["case"]
    tokenizer = peer.Numbers(case["vocab"], case["forbidden"], tuple(case["after"]))
    began = []
    gradient = peer.nano.GCG.compute_token_gradient

    def noting(self, ids):
        began.append(time.perf_counter())
        return gradient(self, ids)

    peer.nano.GCG.compute_token_gradient = noting
    for line in sys.stdin:
        asked = json.loads(line)
        began.clear()
        options = {"steps": asked["steps"], "batch_size": asked["batch"]}
        peer.run(model, case | {"width": asked["width"]}, tokenizer, 0, **options)
        print(
            json.dumps({"seconds": (time.perf_counter() - began[0]) / asked["steps"]}), flush=True
        )


if __name__ == "__main__":
    main()
