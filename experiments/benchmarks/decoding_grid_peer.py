"""The peer of `decoding_grid.py`: `transformers` in its own process.

decoding_grid_peer.py SHAPE

Reads lines of JSON on stdin, answers with seconds:

    {"settings": [{"temperature": t, "top_k": k, "top_p": p}], "batch": B}
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers


def main() -> None:
    shape = json.loads(sys.argv[1])
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape["config"])).eval()
    model.generation_config.eos_token_id = None
    prompts = torch.tensor(shape["prompts"])
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        for knobs in asked["settings"]:
            for start in range(0, len(prompts), asked["batch"]):
                rows = prompts[start : start + asked["batch"]]
                out = model.generate(
                    rows,
                    attention_mask=torch.ones_like(rows),
                    do_sample=True,
                    max_new_tokens=shape["tokens"],
                    pad_token_id=0,
                    temperature=knobs["temperature"],
                    top_k=knobs["top_k"],
                    top_p=knobs["top_p"],
                )
                assert out.shape[1] == rows.shape[1] + shape["tokens"]
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
