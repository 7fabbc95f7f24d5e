"""What nanoGCG needs around it so that it works on ids alone:
a tokenizer whose words are numbers, and taps.

Needs torch, transformers <= 4.47.1 and nanogcg 0.3.0;
imported by `make_gcg.py` and by benchmarks' peers.
"""

from __future__ import annotations

import json
import pathlib

import nanogcg.gcg as nano
import numpy as np
import torch
import transformers


class Numbers:
    """Text is ids in decimal: "3 4 5". Ids from `forbidden` on decode to what is not printable."""

    bos_token = bos_token_id = eos_token_id = pad_token_id = unk_token_id = None
    chat_template = "numbers"

    def __init__(self, vocab_size: int, forbidden: int, after: tuple[int, ...]):
        self.vocab_size, self.forbidden, self.after = vocab_size, forbidden, after

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        return messages[-1]["content"] + " " + " ".join(map(str, self.after))

    def __call__(self, text, **_):
        rows = [text] if isinstance(text, str) else text
        return {"input_ids": torch.tensor([[int(word) for word in row.split()] for row in rows])}

    def decode(self, ids):
        return "\x01" if int(ids[0]) >= self.forbidden else str(int(ids[0]))

    def batch_decode(self, rows):
        return [" ".join(str(int(i)) for i in row) for row in rows]


def load(folder: pathlib.Path):
    """Model, its case and a tokenizer."""
    case = json.loads((folder / "case.json").read_text())
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        .eval()
        .float()
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, case, Numbers(case["vocab"], case["forbidden"], tuple(case["after"]))


def words(ids) -> str:
    return " ".join(map(str, ids))


def run(model, case: dict, tokenizer: Numbers, seed: int, steps: int | None = None, **options):
    """nanoGCG's own `run`, filter off. Returns its result."""
    config = nano.GCGConfig(
        num_steps=steps or case["steps"], optim_str_init=words(case["init"]),
        search_width=case["width"], topk=case["topk"], filter_ids=False, seed=seed,
        verbosity="ERROR", **options,
    )  # fmt: skip
    return nano.run(
        model, tokenizer, words(case["prefix"]) + " {optim_str}", words(case["target"]), config
    )


def recorded(model, case: dict, tokenizer: Numbers, seed: int, **options) -> dict[str, np.ndarray]:
    """A run with its draws, gradients and candidate losses."""
    log: dict[str, list] = {
        name: [] for name in ("gradient", "best", "positions", "ranks", "candidates", "losses")
    }
    sample, evaluate = nano.sample_ids_from_grad, nano.GCG._compute_candidates_loss_original

    def sampling(ids, grad, search_width, topk=256, n_replace=1, not_allowed_ids=False):
        log["gradient"].append(grad.numpy().copy())
        state = torch.get_rng_state()
        positions = torch.argsort(torch.rand((search_width, len(ids))))[..., :n_replace]
        ranks = torch.randint(0, topk, (search_width, n_replace, 1))[..., 0]
        torch.set_rng_state(state)
        made = sample(ids, grad, search_width, topk, n_replace, not_allowed_ids=not_allowed_ids)
        log["best"].append(
            (-grad).topk(topk, dim=1).indices.numpy()
        )  # forbidden columns are set by now
        for name, value in (("positions", positions), ("ranks", ranks), ("candidates", made)):
            log[name].append(value.numpy().copy())
        return made

    def evaluating(self, search_batch_size, input_embeds):
        losses = evaluate(self, search_batch_size, input_embeds)
        log["losses"].append(losses.numpy().copy())
        return losses

    nano.sample_ids_from_grad, nano.GCG._compute_candidates_loss_original = sampling, evaluating
    try:
        result = run(model, case, tokenizer, seed, **options)
    finally:
        nano.sample_ids_from_grad, nano.GCG._compute_candidates_loss_original = sample, evaluate
    start, *losses = log.pop("losses")
    return {
        "start_loss": start,
        "gradient": log["gradient"][0],
        "best": log["best"][0],
        **{name: np.stack(log[name]) for name in ("positions", "ranks")},
        "candidate_losses": np.stack(losses),
        "history": np.asarray([[int(w) for w in text.split()] for text in result.strings]),
        "step_losses": np.asarray(result.losses, np.float32),
    }
