"""Small stand-ins for tests: a tokenizer over letters, and random models
whose logits have some spread."""

from __future__ import annotations

import types

import jax

from rlbf_jax.directives import BacktrackRule, EditRule, ReplaceRule, ResetRule
from rlbf_jax.models import transformer
from rlbf_jax.models.transformer import ModelConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


class OneRule:
    """A vocabulary with the control ids of one rule, as tokenizers say it."""

    rule: EditRule

    @property
    def controls(self):
        rule = self.rule
        return types.SimpleNamespace(
            rule=lambda kind=None: rule,
            first_id=rule.first_id,
            categories=rule.categories,
            ids=range(rule.first_id, rule.end_id),
            never=rule.never,
            kinds=(rule.kind,),
        )


class LetterTokenizer(OneRule):
    """One id a letter; ids 0..4 are pad, bos, eos, user, model; control ids follow the letters."""

    pad_id, bos_id, eos_id, user_id, model_id = range(5)
    eos_ids = (eos_id,)

    def __init__(self, categories=("one", "two"), x_max=6, kind="backtrack"):
        first = 5 + len(LETTERS)
        never = (self.pad_id, self.bos_id, self.user_id, self.model_id)
        rules: dict[str, EditRule] = {
            "backtrack": BacktrackRule(first, tuple(categories), never, x_max=x_max),
            "reset": ResetRule(first, (), never),
            "replace": ReplaceRule(first, tuple(categories), never),
        }
        self.vocab_size = rules[kind].end_id
        # Random models have some rows more, which no id stands for.
        self.rule = rules[kind].within(self.vocab_size)

    def encode(self, text):
        return [5 + LETTERS.index(c) for c in text]

    def decode(self, ids):
        return "".join(LETTERS[i - 5] for i in ids if 5 <= i < 5 + len(LETTERS))

    def offsets(self, ids):
        ends = [len(self.decode(ids[: n + 1])) for n in range(len(ids))]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def encode_prompt(self, text):
        return [self.bos_id, self.user_id, *self.encode(text), self.model_id]


# Not eagerly, which compiles every operation of a forward pass by itself.
init = jax.jit(transformer.init, static_argnums=0)


def random_model(tokenizer, seed=0, spread=2.0, **fields) -> tuple[ModelConfig, dict]:
    """A random decoder whose logits have a standard deviation of about `spread`."""
    vocab_size = tokenizer.vocab_size + 3
    shape = dict(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
    config = ModelConfig(**(dict(vocab_size=vocab_size, tied_embeddings=False) | shape | fields))
    params = init(config, jax.random.key(seed))
    params["unembedding"] = params["unembedding"] * spread
    # Louder keys and values make every step depend on what can be seen.
    return config, jax.tree.map(lambda x: x * 1.5 if x.ndim == 4 else x, params)
