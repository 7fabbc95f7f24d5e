"""What the parts of `sampler.py` share: models, requests, alternated calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from common import seconds

from rlbf_jax.directives import Controls, EditRule, Semantics
from rlbf_jax.models import transformer
from rlbf_jax.models.config import ModelConfig
from rlbf_jax.models.families import styled
from rlbf_jax.sampling.request import Generation, Knobs, Request
from rlbf_jax.sampling.sampler import Sampler, SamplerConfig

NEW = 128
"""Ids of an answer."""
SHAPES = {
    "small": dict(
        num_layers=4, width=256, num_heads=4, head_dim=64, mlp_width=704, vocab_size=8192
    ),
    "large": dict(
        num_layers=12, width=768, num_heads=12, head_dim=64, mlp_width=2048, vocab_size=32_000
    ),
}


class Ids:
    """A tokenizer of nothing but ids; the last 42 are control ids."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.controls = Controls(vocab_size - 42, ("a", "b"), 39)
        self.pad_id, self.eos_id, self.eos_ids = 0, 1, (1,)

    def encode_prompt(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids) -> str:
        return ""


class NoRule(EditRule):
    """A vocabulary without control ids."""

    kind = "none"

    @property
    def num_retractions(self) -> int:
        return 0

    def amount(self, token, copied=0):
        return token * 0


class Model:
    """A random model of a shape, and prompts for it."""

    def __init__(self, name: str, prompt: int):
        shape = SHAPES[name]
        self.name, self.prompt = name, prompt
        self.config = styled(
            ModelConfig(
                family="llama",
                **shape,
                num_kv_heads=shape["num_heads"],
                tied_embeddings=False,
                max_positions=2048,
                rope_theta=1_000_000.0,  # tunix 0.1.7 has this one, whatever is configured
            )
        )
        self.params = jax.jit(transformer.init, static_argnums=0)(self.config, jax.random.key(0))
        self.tokenizer = Ids(self.config.vocab_size)
        self.rule = self.tokenizer.controls.rule("backtrack")

    def prompts(self, count: int) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return rng.integers(2, 1000, (count, self.prompt)).tolist()

    def sampler(
        self,
        batch: int,
        semantics: Semantics = Semantics.REWIND,
        rule: EditRule | None = None,
        room: int = NEW,
    ) -> Callable[..., list[Generation]]:
        shapes = SamplerConfig(semantics, batch, min_context=self.prompt, min_room=room)
        sampler = Sampler(self.config, self.tokenizer, shapes, rule=rule or self.rule)  # type: ignore[arg-type]
        return lambda requests: sampler(self.params, requests, 0)

    def requests(self, count: int, knobs: Knobs | Sequence[Knobs]) -> list[Request]:
        many = [knobs] * count if isinstance(knobs, Knobs) else knobs
        prompts = self.prompts(count)
        return [Request("", (), k, None, tuple(p)) for p, k in zip(prompts, many, strict=True)]


PLAIN = Knobs(max_tokens=NEW, stop_ids=()).without_directives()
GREEDY = dataclasses.replace(PLAIN, temperature=0.0)


def compared(
    name: str, ours: Callable[[], object], peers: dict[str, Callable[[], float]], repeats: int
) -> Iterator[dict]:
    """One line a peer, from alternated calls. A peer tells its own seconds."""
    for run in (lambda: seconds(ours), *peers.values()):
        run()
    times = []
    for _ in range(repeats):
        times.append([seconds(ours), *(run() for run in peers.values())])
    table = np.asarray(times)
    for column, peer in enumerate(peers, 1):
        ratios = table[:, column] / table[:, 0]
        yield {
            "name": name,
            "ours": float(np.median(table[:, 0])),
            "peer": float(np.median(table[:, column])),
            "peer_name": peer,
            "ratio": float(np.median(ratios)),
            "ratio_low": float(ratios.min()),
            "ratio_high": float(ratios.max()),
        }
