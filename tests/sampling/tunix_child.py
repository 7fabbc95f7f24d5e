"""tunix's sampler as an `Engine`: run by `test_engine_peers.py` under a Python that has tunix.

Prints one JSON object: how far tunix's log-probabilities lie from our scorer's, and what came.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from tunix.generate import sampler as tunix
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params

from rlbf_jax.directives import Semantics
from rlbf_jax.models.families import styled
from rlbf_jax.models.transformer import ModelConfig, init
from rlbf_jax.models.weights.write import write_checkpoint
from rlbf_jax.sampling.engine import Engine, generation_of
from rlbf_jax.sampling.policy import Policy
from rlbf_jax.sampling.program import Single
from rlbf_jax.sampling.request import Knobs, Request
from tests.fakes import LetterTokenizer

TOKENIZER = LetterTokenizer()
RULE = TOKENIZER.controls.rule()


class Texts:
    """Our tokenizer as tunix wants one: texts are prompts of ours, ids in JSON."""

    def encode(self, text, **_):
        return json.loads(text)

    def decode(self, ids, **_):
        return TOKENIZER.decode([int(i) for i in ids])

    def bos_id(self):
        return None

    def eos_id(self):
        return TOKENIZER.eos_id

    def pad_id(self):
        return TOKENIZER.pad_id


class Tunix:
    """Requests by tunix: no directives, since it knows of none."""

    def __init__(self, model, config, width: int, room: int):
        self.tokenizer, self.rule, self.width, self.room = TOKENIZER, RULE, width, room
        cache = tunix.CacheConfig(
            cache_size=width + room,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        self.sampler = tunix.Sampler(model, Texts(), cache)

    def __call__(self, params, prompts, key=0):
        requests = [p if isinstance(p, Request) else Request(p) for p in prompts]
        ids = [TOKENIZER.encode_prompt(r.prompt) for r in requests]
        spare = range(TOKENIZER.vocab_size, self.sampler.transformer.config.vocab_size)
        out = self.sampler(
            input_strings=[json.dumps(i) for i in ids],
            max_generation_steps=self.room,
            max_prompt_length=self.width,
            temperature=1.0,
            top_p=1.0,
            seed=int(key),
            eos_tokens=[TOKENIZER.eos_id],
            forbidden_tokens=[*range(RULE.first_id, RULE.end_id), *RULE.never, *spare],
            return_logprobs=True,
        )
        made = []
        for request, prompt, tokens, logprobs in zip(
            requests, ids, out.tokens, out.logprobs, strict=True
        ):
            trace = np.asarray(tokens, np.int32)
            made.append(
                generation_of(
                    request, prompt, trace, np.asarray(logprobs)[: len(trace)], RULE, TOKENIZER
                )
            )
        return made


def main() -> None:
    config = styled(
        ModelConfig(
            family="llama", vocab_size=64, num_layers=2, width=64, num_heads=4, num_kv_heads=2,
            head_dim=16, mlp_width=96, tied_embeddings=False, max_positions=512,
            rope_theta=1_000_000.0,
        )
    )  # fmt: skip
    params = init(config, jax.random.key(0))
    params["unembedding"] = params["unembedding"] * 2
    theirs = llama3.ModelConfig(
        num_layers=2, vocab_size=64, embed_dim=64, hidden_dim=96, num_heads=4, head_dim=16,
        num_kv_heads=2, rope_theta=1_000_000, norm_eps=config.norm_eps, weight_tying=False,
    )  # fmt: skip
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(pathlib.Path(folder) / "model", config, params)
        model = llama3_params.create_model_from_safe_tensors(
            f"{folder}/model", theirs, mesh, dtype=jnp.float32
        )
    engine = Tunix(model, theirs, 32, 24)
    knobs = Knobs(max_tokens=24).without_directives()
    prompts = ["a", "tell me", "the quick brown fox", "no", "what is it."] * 4
    requests = [Request(p, (), knobs) for p in prompts]
    generations = engine(params, requests, 3)
    policy = Policy(Single(config), params, TOKENIZER, RULE, Semantics.KEEP)
    scored = policy.score(generations)
    off = [float(np.abs(s - g.logprobs).max()) for s, g in zip(scored, generations, strict=True)]
    wrong = policy.replace(params=init(config, jax.random.key(1)))
    other = [
        float(np.abs(s - g.logprobs).max())
        for s, g in zip(wrong.score(generations), generations, strict=True)
    ]
    print(
        json.dumps(
            {
                "is_engine": isinstance(engine, Engine),
                "difference": max(off),
                "control": max(other),
                "finished": sum(g.finished for g in generations),
                "ids": [len(g.trace) for g in generations],
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
