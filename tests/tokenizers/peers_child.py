"""What `transformers` makes of tokenizer folders;
started by test_peers.py with another interpreter.

    python peers_child.py CASES.json FOUND.json

Cases: `{"folders": {name: path}, "texts": [...], "conversations": [...], "date": "26 Jul 2024"}`.
"""

import json
import sys

import jinja2
from transformers import AutoTokenizer


def look(folder: str, cases: dict) -> dict:
    """Ids under default loading, of texts and of conversations;
    null where the template refuses one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in cases["texts"]],
        "names": {token: i for token, i in tokenizer.get_vocab().items() if token.startswith(" [")},
        "inputs": sorted(tokenizer("Hello there")),
        "end": tokenizer.eos_token_id,
        "chats": [],
    }
    for messages in cases["conversations"]:
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, date_string=cases["date"]
            )
        except (jinja2.TemplateError, ValueError):
            ids = None
        found["chats"].append(ids)
    return found


def main() -> None:
    cases = json.load(open(sys.argv[1], encoding="utf-8"))
    found = {name: look(folder, cases) for name, folder in cases["folders"].items()}
    json.dump(found, open(sys.argv[2], "w", encoding="utf-8"))


if __name__ == "__main__":
    main()
