"""The peers of `sampler.py` in a process of their own: `transformers`, or tunix's sampler.

sampler_peer.py {transformers|tunix} FOLDER THREADS

FOLDER holds a Llama-type model. Reads lines of JSON on stdin, answers each with one:

    {"prompts": [[id]], "new": n, "greedy": false}  ->  {"seconds": s, "ids": [[id]]}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable


def transformers_sampler(folder: str, threads: int) -> Callable:
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], new: int, greedy: bool) -> list[list[int]]:
        rows = torch.tensor(prompts)
        out = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=not greedy,
            max_new_tokens=new,
            pad_token_id=0,
            **({} if greedy else {"top_k": 0, "temperature": 1.0}),
        )
        return out[:, rows.shape[1] :].tolist()

    return run


def tunix_model(folder: str) -> tuple:
    """(model, its mesh of one device, its config.json), in tunix's classes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tunix.models.llama3 import model as llama3
    from tunix.models.llama3 import params

    with open(f"{folder}/config.json") as file:
        c = json.load(file)
    config = llama3.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=int(c.get("rope_theta") or c["rope_parameters"]["rope_theta"]),
        norm_eps=c["rms_norm_eps"],
        weight_tying=c["tie_word_embeddings"],
    )
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    return params.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32), mesh, c


class Ids:
    """A tokenizer for tunix: texts are lists of ids in JSON."""

    def __init__(self, vocab_size: int):
        self.size = vocab_size

    def encode(self, text, **_):
        return json.loads(text)

    def decode(self, ids, **_):
        return json.dumps([int(i) for i in ids])

    def bos_id(self):
        return None

    def eos_id(self):
        return self.size - 1

    def pad_id(self):
        return 0


def tunix_sampler(folder: str, threads: int) -> Callable:
    import numpy as np
    from tunix.generate import sampler as tunix

    model, _, c = tunix_model(folder)
    samplers: dict = {}

    def run(prompts: list[list[int]], new: int, greedy: bool) -> list[list[int]]:
        length = len(prompts[0])
        if (length, new) not in samplers:
            cache = tunix.CacheConfig(
                cache_size=length + new,
                num_layers=c["num_hidden_layers"],
                num_kv_heads=c["num_key_value_heads"],
                head_dim=c["head_dim"],
            )
            samplers[length, new] = tunix.Sampler(model, Ids(c["vocab_size"]), cache)
        out = samplers[length, new](
            input_strings=[json.dumps(p) for p in prompts],
            max_generation_steps=new,
            max_prompt_length=length,
            temperature=0.0 if greedy else 1.0,
            top_p=None if greedy else 1.0,
            eos_tokens=[c["vocab_size"] - 1],
            seed=0,
        )
        return [np.asarray(x).tolist() for x in out.tokens]

    return run


def main() -> None:
    name, folder, threads = sys.argv[1:]
    makers = {"transformers": transformers_sampler, "tunix": tunix_sampler}
    run = makers[name](folder, int(threads))
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        ids = run(**asked)
        print(json.dumps({"seconds": time.perf_counter() - began, "ids": ids}), flush=True)


if __name__ == "__main__":
    main()
