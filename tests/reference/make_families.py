"""Reference numbers of the models of `family_cases.py`, by transformers on torch (CPU, float32).

    python make_families.py make OUT.npz [--seed S] [--save DIR]
        logits, gradients, greedy ids; checkpoints in DIR
    python make_families.py read DIR OUT.npz [--seed S]
        logits of the checkpoint folders in DIR
    python make_families.py half DIR OUT.npz [--seed S]
        the same in bfloat16, and as `exact` the float32 logits of the weights that bfloat16 leaves

`families.npz` beside this file is `make families.npz`.
Needs torch and transformers, which the package does not.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import family_cases as cases


def build(case: str, seed: int):
    kind, fields = cases.CASES[case]
    config = getattr(transformers, kind)(**fields)
    # torch gives a padding id no gradient through the embedding, which nobody else does.
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(cases.weight(name, tuple(parameter.shape), seed))
    model.tie_weights()
    return model.eval()


def logits_of(model, seed: int) -> torch.Tensor:
    ids, real = (torch.from_numpy(x) for x in cases.rows(seed))
    position = (real.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=real, position_ids=position).logits


def gradients(case: str, model, seed: int) -> dict[str, np.ndarray]:
    """Of the mean negative log-likelihood of the next ids, where both ids are real."""
    ids, real = (torch.from_numpy(x) for x in cases.rows(seed))
    logp = torch.log_softmax(logits_of(model, seed)[:, :-1], -1)
    nll = -logp.gather(-1, ids[:, 1:, None])[..., 0]
    both = (real[:, 1:] * real[:, :-1]).float()
    ((nll * both).sum() / both.sum()).backward()
    named = dict(model.named_parameters())
    return {name: named[name].grad.numpy() for name in cases.gradient_tensors(case)}


def greedy(model, seed: int) -> np.ndarray:
    ids, _ = cases.rows(seed)
    prompt = torch.from_numpy(ids[:1, : cases.PROMPT] % cases.FIRST_CONTROL)
    never = list(range(cases.FIRST_CONTROL, cases.VOCAB))
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=cases.DRAWN,
        suppress_tokens=never, pad_token_id=0,
    )  # fmt: skip
    return out[0, cases.PROMPT :].numpy().astype(np.int32)


def make(args: argparse.Namespace) -> None:
    out = {}
    for case in cases.CASES:
        model = build(case, args.seed)
        out[f"{case}.config"] = np.asarray(model.config.to_json_string())
        with torch.no_grad():
            out[f"{case}.logits"] = logits_of(model, args.seed).numpy()
            out[f"{case}.greedy"] = greedy(model, args.seed)
        for number, gradient in enumerate(gradients(case, model, args.seed).values()):
            # A corner is enough to tell a wrong one, and small enough to keep.
            out[f"{case}.gradient{number}"] = gradient[:12, :12] if args.save is None else gradient
        if args.save is not None:
            model.save_pretrained(args.save / case, max_shard_size="20KB")
    np.savez_compressed(args.out, **out)


def read(args: argparse.Namespace) -> None:
    out = {}
    for folder in sorted(args.folder.iterdir()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            out[folder.name] = logits_of(model, args.seed).float().numpy()
    np.savez_compressed(args.out, **out)


def half(args: argparse.Namespace) -> None:
    out = {}
    for folder in sorted(args.folder.iterdir()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.bfloat16
        ).eval()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            out[folder.name] = logits_of(model, args.seed).float().numpy()
            out[f"{folder.name}.exact"] = logits_of(model.float(), args.seed).numpy()
    np.savez_compressed(args.out, **out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("make")
    command.add_argument("out", type=pathlib.Path)
    command.add_argument("--save", type=pathlib.Path)
    command.set_defaults(run=make)
    for name, run in (("read", read), ("half", half)):
        command = commands.add_parser(name)
        command.add_argument("folder", type=pathlib.Path)
        command.add_argument("out", type=pathlib.Path)
        command.set_defaults(run=run)
    for each in commands.choices.values():
        each.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.run(args)


if __name__ == "__main__":
    main()
