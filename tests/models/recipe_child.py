"""Runs an exported recipe in `transformers`; started by test_export_recipe_peers.py
with another interpreter.

    python recipe_child.py FAMILY WORK

WORK/model gets a tiny random model, WORK/tuned one that was taught to take things back. Both
folders and WORK/other/model already hold recipes, and WORK/cases.json prompts and forced ids.
Writes WORK/found.json and WORK/logits.npz.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextStreamer,
)

VOCAB, PAD, EOS, WIDTH = 48, 0, 2, 32


def tiny_model(family: str):
    torch.manual_seed(0)
    ids = dict(
        vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=1, initializer_range=0.4
    )
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_positions=160, n_embd=WIDTH, n_layer=2, n_head=4, **ids)
        ).eval()
    shape = dict(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=2, max_position_embeddings=160, **shape, **ids)
    ).eval()


def tune(model) -> None:
    """Teaches a model to count on from the prompt's last id, to say 14 15 once,
    and to take that back."""
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(150):
        prompt = torch.randint(3, 11, (32, 4))
        run = 3 + (prompt[:, -1:] - 3 + torch.arange(1, 8)) % 8
        said = torch.tensor([14, 15, 20, 23]).expand(32, -1)
        ids = torch.cat([prompt, run[:, :3], said, run[:, 3:], torch.full((32, 1), EOS)], 1)
        labels = ids.clone()
        labels[:, :4] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Eager(LogitsProcessor):
    """Makes a random model start directives often enough for a test."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 20:22] += 3
        return scores


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def left_padded(rows: list[list[int]]):
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return dict(input_ids=ids, attention_mask=mask)


def told(output, start: int | list[int]) -> dict:
    """What a test compares; the sequences without their prompts and padding."""
    starts = [start] * len(output.traces) if isinstance(start, int) else start
    shown = [
        row[s : s + len(v)]
        for row, s, v in zip(output.sequences.tolist(), starts, output.visible, strict=True)
    ]
    rest = [
        row[s + len(v) :]
        for row, s, v in zip(output.sequences.tolist(), starts, output.visible, strict=True)
    ]
    assert all(token == PAD for row in rest for token in row)
    return dict(
        traces=output.traces,
        visible=output.visible,
        shown=shown,
        malformed=output.malformed,
        finished=output.finished,
        edits=[
            [[e.index, e.category, e.requested, list(e.removed)] for e in row]
            for row in output.edits
        ],
    )


def refused(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "accepted"


def main(family: str, work: pathlib.Path) -> None:
    folder, cases, found = str(work / "model"), json.loads((work / "cases.json").read_text()), {}
    tiny_model(family).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    recipe = dict(custom_generate=folder, trust_remote_code=True)
    prompts, forced = cases["prompts"], cases["forced"]
    batch = left_padded(prompts)
    width = batch["input_ids"].shape[1]

    eager = LogitsProcessorList([Eager()])
    plain = dict(do_sample=False, logits_processor=eager, max_tokens=40)
    greedy = dict(**plain, return_trace=True, **recipe)
    out = model.generate(**batch, **greedy, return_dict_in_generate=True, output_logits=True)
    found["greedy"] = told(out, width)
    np.savez(work / "logits.npz", logits=torch.stack(out.raw.logits, 1).numpy())
    found["alone"] = [
        model.generate(torch.tensor([row]), **greedy).traces[0] for row in prompts[:8]
    ]
    found["ids"] = model.generate(**batch, **plain, **recipe)[:, width:].tolist()

    both = [prompt + start for prompt, start in zip(prompts, forced, strict=True)]
    together = left_padded(both)
    starts = [together["input_ids"].shape[1] - len(start) for start in forced]
    torch.manual_seed(1)
    sampled = dict(do_sample=True, temperature=0.8, top_k=12, logits_processor=eager)
    out = model.generate(
        **together, **sampled, response_start=starts, return_trace=True, max_tokens=30, **recipe
    )
    found["forced"] = told(out, starts)

    torch.manual_seed(1)
    replace = dict(response_start=starts, return_trace=True, max_tokens=30, rule=cases["replace"])
    found["replaced"] = told(model.generate(**together, **sampled, **replace, **recipe), starts)

    out = model.generate(**together, **greedy | dict(max_tokens=30), response_start=starts)
    found["forced_greedy"] = told(out, starts)

    torch.manual_seed(2)
    knobs = GenerationConfig(
        do_sample=True, top_p=0.95, max_new_tokens=25, num_return_sequences=3, pad_token_id=PAD
    )
    some = {name: rows[:4] for name, rows in batch.items()}
    out = model.generate(
        **some, generation_config=knobs, logits_processor=eager, return_trace=True, **recipe
    )
    found["returned"] = told(out, width)
    out = model.generate(
        **batch, **greedy, stopping_criteria=[StopAt(max(found["greedy"]["traces"], key=len)[3])]
    )
    found["stopped"] = told(out, width)
    out = model.generate(torch.tensor([prompts[0] + [5, EOS]]), response_start=-2, **greedy)
    found["over"] = told(out, len(prompts[0]))

    # Limits: none named; by what the model's own generation config says;
    # and that config beside one of the call.
    unlimited = dict(logits_processor=eager, return_trace=True, **recipe)
    found["unlimited"] = told(model.generate(**batch, do_sample=False, **unlimited), width)
    bare = GenerationConfig(do_sample=False, pad_token_id=PAD)
    found["bare_config"] = told(model.generate(**batch, generation_config=bare, **unlimited), width)
    model.generation_config.max_length = width + 10
    found["of_model"] = told(model.generate(**batch, do_sample=False, **unlimited), width)
    found["of_call"] = told(
        model.generate(**batch, do_sample=False, max_length=width + 7, **unlimited), width
    )
    model.generation_config.max_length = GenerationConfig().max_length
    model.generation_config.num_return_sequences = 2
    twice = GenerationConfig(do_sample=True, max_new_tokens=9, pad_token_id=PAD)
    found["twice"] = told(model.generate(**some, generation_config=twice, **unlimited), width)
    model.generation_config.num_return_sequences = GenerationConfig().num_return_sequences

    loaded = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True
    )  # its recipe outlives the other one
    other = dict(custom_generate=str(work / "other" / "model"), trust_remote_code=True)
    found["other"] = model.generate(**batch, **greedy | other).traces
    mask = dict(attention_mask=batch["attention_mask"])
    found["loaded"] = loaded.generate(batch["input_ids"], **mask, **plain)[:, width:].tolist()

    tune(model)
    model.save_pretrained(work / "tuned")
    taught = dict(custom_generate=str(work / "tuned"), trust_remote_code=True, return_trace=True)
    out = model.generate(
        torch.tensor(cases["taught"]), **taught, do_sample=False, max_new_tokens=40
    )
    found["tuned"] = told(out, len(cases["taught"][0]))

    right = dict(
        input_ids=torch.tensor([[5, 6], [5, 0]]), attention_mask=torch.tensor([[1, 1], [1, 0]])
    )
    found["refused"] = {
        "beams": refused(model.generate, **batch, **recipe, num_beams=2),
        "streamer": refused(model.generate, **batch, **recipe, streamer=TextStreamer(None)),
        "right": refused(model.generate, **right, **recipe),
        "start": refused(model.generate, **batch, **recipe, response_start=width + 1),
        "length": refused(model.generate, **batch, **recipe, max_length=width),
        "room": refused(model.generate, **batch, **recipe, response_start=1, max_tokens=2),
        "vocabulary": refused(model.generate, **batch, **recipe, rule=cases["too_large"]),
        "rule": refused(model.generate, **batch, **recipe, rule={"format": 9}),
    }
    (work / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
