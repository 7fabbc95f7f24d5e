"""What `transformers` makes of exported folders; started by test_export_peers.py with another
interpreter.

python export_child.py CASES.json FOUND.json
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList


class Eager(LogitsProcessor):
    """Makes a random model start directives often enough for a test."""

    def __init__(self, ids: list[int], bias: float):
        self.ids, self.bias = ids, bias

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.ids] += self.bias
        return scores


def look(case: dict) -> dict:
    folder = case["folder"]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in case["prompts"]
    ]
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0].tolist() for ids in prompts]
    eager = LogitsProcessorList([Eager(case["eager"], case["bias"])])
    knobs = dict(do_sample=False, logits_processor=eager, max_tokens=case["max_tokens"])
    recipe = dict(custom_generate=folder, trust_remote_code=True)
    answers = [
        model.generate(torch.tensor([ids]), **knobs, **recipe)[0, len(ids) :] for ids in prompts
    ]
    # As the folder's README has it, and without any limit.
    messages = [{"role": "user", "content": text} for text in case["prompts"][:1]]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    unlimited = model.generate(**inputs, do_sample=False, return_trace=True, **recipe)
    generation = model.generation_config
    return dict(
        ids=prompts,
        logits=logits,
        visible=[ids.tolist() for ids in answers],
        answers=[tokenizer.decode(ids, skip_special_tokens=True) for ids in answers],
        text_ids=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in case["texts"]],
        ends=generation.eos_token_id,
        special=[tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        kind=type(model).__name__,
        inputs=sorted(inputs),
        unlimited=[len(unlimited.traces[0]), unlimited.finished[0]],
    )


def main() -> None:
    cases = json.load(open(sys.argv[1], encoding="utf-8"))
    json.dump([look(case) for case in cases], open(sys.argv[2], "w", encoding="utf-8"))


if __name__ == "__main__":
    main()
