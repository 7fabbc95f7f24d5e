"""A run's own SentencePiece vocabulary in the form of published tokenizers:
tokenizer.json and what belongs to it.

The pieces become a BPE of the `tokenizers` library whose spaces are real spaces,
not U+2581, so nothing normalizes a text and U+2581 itself goes by its bytes, as in `own`.
A merge has the rank of the piece that it makes, as in SentencePiece, which looks
at the joined text only. Of two ways to make one piece SentencePiece takes the leftmost in the text;
the library knows one rank each, so ids may differ where two such ways are possible *side by side
at one time*, as a repeated syllable could make them.

Control tokens stand in the vocabulary under a name that no merge leads to (`controls`). `<pad>`,
`<s>`, `</s>`, `<unk>`, `[USER]` and `[MODEL]` are special tokens: the chat template has to spell
them, so other programs find them in any text unless special-token parsing is off. `load_tokenizer`
reads the files as a `FamilyTokenizer`; no text finds them there.
"""

from __future__ import annotations

import json
from typing import Any

from rlbf_jax.tokenizers import files, folder, published_sentencepiece
from rlbf_jax.tokenizers.chat import DATE
from rlbf_jax.tokenizers.huggingface import SPACE
from rlbf_jax.tokenizers.own import BOS, EOS, PAD, UNK, SentencePieceTokenizer

TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
[USER]{{ message['content'] }}{% elif message['role'] == 'assistant' %}\
[MODEL]{{ message['content'] }}{{ eos_token }}{% else %}\
{{ raise_exception('this model knows the roles user and assistant') }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}[MODEL]{% endif %}"""
"""For one message of a user exactly `encode_prompt`."""


def published_files(tokenizer: SentencePieceTokenizer) -> files.Files:
    """tokenizer.json, its configuration, a chat template and our control tokens,
    with the ids that they have here."""
    controls = tokenizer.controls
    meta = folder.Meta(
        categories=controls.categories,
        x_max=controls.x_max,
        first_id=controls.first_id,
        vocab_size=tokenizer.vocab_size,
        stop_ids=(EOS,),
        template="default",
        date=DATE.isoformat(),
        source="own",
        kinds=controls.kinds,
    )
    turns = {
        tokenizer.name(i): i for i in (PAD, BOS, EOS, UNK, tokenizer.user_id, tokenizer.model_id)
    }
    document = _document(tokenizer, turns, {name: i for i, name in meta.names().items()})
    roles = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    config: dict[str, Any] = {role: tokenizer.name(i) for role, i in roles.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_input_names": folder.MODEL_INPUTS}
    config |= {
        "additional_special_tokens": [
            tokenizer.name(i) for i in (tokenizer.user_id, tokenizer.model_id)
        ]
    }
    content = {
        files.JSON_FILE: _dump(document),
        files.CONFIG_FILE: _dump(config),
        files.TEMPLATE_FILE: TEMPLATE.encode(),
        files.META_FILE: _dump(meta.fields()),
    }
    return files.Files(content, "the exported tokenizer")


def _document(
    tokenizer: SentencePieceTokenizer, turns: dict[str, int], controls: dict[str, int]
) -> dict[str, Any]:
    """tokenizer.json: pieces and merges, turn tokens as added ones, control tokens in the
    vocabulary."""
    vocab, merges = _pieces(tokenizer)
    vocab |= turns | controls
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict(
                id=i,
                content=name,
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
                special=True,
            )
            for name, i in sorted(turns.items(), key=lambda turn: turn[1])
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.name(UNK),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda entry: entry[1])),
            "merges": merges,
        },
    }


def _pieces(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges, best first: every way to make each piece of two others."""
    document = published_sentencepiece.parse(tokenizer.model, "this run's tokenizer.model")
    kinds = type(document).SentencePiece.Type
    vocab = {piece.piece.replace(SPACE, " "): i for i, piece in enumerate(document.pieces)}
    normal = [
        (-piece.score, i) for i, piece in enumerate(document.pieces) if piece.type == kinds.NORMAL
    ]
    texts = {i: document.pieces[i].piece.replace(SPACE, " ") for _, i in normal}
    known = set(texts.values())
    merges = []
    for _, i in sorted(normal):
        text = texts[i]
        merges += [
            [text[:k], text[k:]]
            for k in range(1, len(text))
            if text[:k] in known and text[k:] in known
        ]
    return vocab, merges


def _dump(document: dict) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()
