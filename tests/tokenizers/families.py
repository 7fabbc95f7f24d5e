"""Small tokenizers in the shapes of published ones: folders of files,
trained on a few lines of text.

What a family has that matters here is kept: kind of model, normalizer, pre-tokenizer, decoder,
post-processor, flags of added tokens, spare tokens, chat template, several ends of sequence.
"""

from __future__ import annotations

import io
import json
import pathlib
import random

import sentencepiece
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = (
    "the moon shines over quiet hills and a river runs past old stones while birds sing songs of "
    "summer user assistant "
    "model system start turn 12 7 é ñ 字"
).split()
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ \
message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_TEMPLATE = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + \
'\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
"""
GEMMA_TEMPLATE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') \
!= (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
MISTRAL_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}\
{{ ' ' + message['content'] + eos_token }}{% endif %}\
{% endfor %}"""


def corpus(seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=10)).capitalize() + ".\nAnd  on.\n\n" for _ in range(200)]


def special(*contents: str, **flags) -> list[AddedToken]:
    return [AddedToken(content, special=True, normalized=False, **flags) for content in contents]


def byte_level(size: int = 500) -> tokenizers.Tokenizer:
    """A byte-level BPE, trained."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(corpus(), trainer)
    return made


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def write(
    folder: pathlib.Path, made: tokenizers.Tokenizer | dict, config: dict, **files
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    document = made if isinstance(made, dict) else json.loads(made.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return write_configs(folder, config, **files)


def write_configs(folder: pathlib.Path, config: dict, **files) -> pathlib.Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def llama(folder: pathlib.Path) -> pathlib.Path:
    """Llama 3: byte-level BPE that takes whole words from its vocabulary, reserved tokens,
    two ends of sequence."""
    made = byte_level()
    made.pre_tokenizer = split_by(LLAMA_SPLIT)
    named = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|start_header_id|>",
    ]
    named += ["<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    made.add_special_tokens(
        special(*named, *(f"<|reserved_special_token_{i}|>" for i in range(1, 40)))
    )
    bos = ("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))
    made.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    document = json.loads(made.to_str())
    document["model"]["ignore_merges"] = True
    config = {"bos_token": bos[0], "eos_token": "<|eot_id|>", "chat_template": LLAMA_TEMPLATE}
    config["added_tokens_decoder"] = {
        str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
        for entry in document["added_tokens"]
    }
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    ends = [made.token_to_id(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    return write(
        folder, document, config, generation_config={"eos_token_id": ends, "bos_token_id": bos[1]}
    )


def qwen(folder: pathlib.Path) -> pathlib.Path:
    """Qwen 3: NFC, no beginning of sequence, tokens that are added but not special,
    rows beyond the tokenizer."""
    made = byte_level()
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = split_by(LLAMA_SPLIT.replace("{1,3}", ""))
    made.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    made.add_tokens(
        [AddedToken(name, normalized=False) for name in ("<tool_response>", "</tool_response>")]
    )
    made.add_tokens(
        [AddedToken(name, normalized=False) for name in ("<|fim_prefix|>", "<think>", "</think>")]
    )
    config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config["tokenizer_class"] = "Qwen2Tokenizer"
    ends = [made.token_to_id("<|im_end|>"), made.token_to_id("<|endoftext|>")]
    write(folder, made, config, generation_config={"eos_token_id": ends})
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE, encoding="utf-8")
    return folder


def gemma_pieces() -> sentencepiece.SentencePieceProcessor:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus() for line in text.split("\n") if line]),
        model_writer=made,
        model_type="bpe",
        vocab_size=560,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[
            *(f"<unused{i}>" for i in range(30)),
            *("<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\n\n\n", "<table>"),
        ],
        minloglevel=2,
    )
    return made.getvalue()


GEMMA_CONFIG = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": {
        "__type": "AddedToken",
        "content": "<unk>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    },
    "add_bos_token": True,
    "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
    "chat_template": [
        {"name": "default", "template": GEMMA_TEMPLATE},
        {"name": "tool_use", "template": "{{ 1 }}"},
    ],
    "tokenizer_class": "GemmaTokenizer",
}


def gemma_sentencepiece(folder: pathlib.Path) -> pathlib.Path:
    """Gemma 2 with tokenizer.model alone."""
    folder.mkdir(parents=True, exist_ok=True)
    model = gemma_pieces()
    (folder / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ends = [processor.piece_to_id("<eos>"), processor.piece_to_id("<end_of_turn>")]
    return write_configs(folder, GEMMA_CONFIG, generation_config={"eos_token_id": ends})


def sentencepiece_document(
    model: bytes, normalizer, pre_tokenizer, decoder
) -> tokenizers.Tokenizer:
    """The BPE of a SentencePiece model as tokenizer.json has it:
    pieces and the merges that their order implies."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    fixed = {
        p for p, i in vocab.items() if not processor.is_byte(i) and not processor.is_control(i)
    }
    merges = []
    for piece in sorted(fixed, key=vocab.__getitem__):
        if len(piece) > 1 and not piece.startswith("<") and "\n" not in piece:
            halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            known = [(a, b) for a, b in halves if a in vocab and b in vocab]
            merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.normalizer, made.decoder = normalizer, decoder
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


def gemma(folder: pathlib.Path) -> pathlib.Path:
    """Gemma 2: SentencePiece pieces as BPE with byte fallback;
    newlines and HTML tags are ordinary added tokens."""
    decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made = sentencepiece_document(
        gemma_pieces(),
        normalizers.Replace(" ", "\u2581"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoder,
    )
    made.add_special_tokens(
        special("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    )
    plain = [*(f"<unused{i}>" for i in range(30)), "\n", "\n\n", "\n\n\n", "<table>"]
    made.add_tokens([AddedToken(name, normalized=False) for name in plain])
    bos = ("<bos>", made.token_to_id("<bos>"))
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    ends = [made.token_to_id("<eos>"), made.token_to_id("<end_of_turn>")]
    return write(folder, made, GEMMA_CONFIG, generation_config={"eos_token_id": ends})


def unigram(folder: pathlib.Path) -> pathlib.Path:
    """A Unigram model (T5, XLM-R) with NFKC and byte fallback,
    whose vocabulary itself holds the special tokens."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]
    )
    markers = [
        "<unk>",
        "<pad>",
        "<s>",
        "</s>",
        "<start_of_turn>",
        "<end_of_turn>",
        *(f"<unused{i}>" for i in range(30)),
    ]
    trainer = trainers.UnigramTrainer(
        vocab_size=500, unk_token="<unk>", special_tokens=markers, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    document = json.loads(made.to_str())
    document["model"]["byte_fallback"] = True
    document["model"]["vocab"] += [[f"<0x{i:02X}>", -20.0] for i in range(256)]
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config |= {"chat_template": GEMMA_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    return write(folder, document, config)


def mistral(folder: pathlib.Path, legacy: bool = False) -> pathlib.Path:
    """Mistral: SentencePiece pieces, a space put before text, `[INST]` (special, or in older files
    plain text)."""
    first = None if legacy else pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    decoder = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    model = gemma_pieces()
    normalizer = normalizers.Sequence(spaces if legacy else [])
    made = sentencepiece_document(model, normalizer, first, decoders.Sequence(decoder))
    made.add_special_tokens(
        special("<unk>", "<bos>", "<eos>", *(() if legacy else ("[INST]", "[/INST]")))
    )
    config = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "chat_template": MISTRAL_TEMPLATE,
    }
    config["tokenizer_class"] = "LlamaTokenizer"
    return write(folder, made, config)


def gpt2(folder: pathlib.Path) -> pathlib.Path:
    """GPT-2: byte-level BPE, one special token, no template and nothing spare."""
    made = byte_level()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=True)])
    end = "<|endoftext|>"
    config = {
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "tokenizer_class": "GPT2Tokenizer",
    }
    return write(folder, made, config)


FAMILIES = {
    "llama": llama,
    "qwen": qwen,
    "gemma": gemma,
    "gemma_sentencepiece": gemma_sentencepiece,
    "unigram": unigram,
    "mistral": mistral,
    "mistral_legacy": lambda folder: mistral(folder, legacy=True),
    "gpt2": gpt2,
}
ROWS = {"qwen": 560}
"""Rows of the embedding, where they are more than the tokenizer's ids."""
