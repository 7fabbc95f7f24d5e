"""Chat templates: what they write is told from what messages say,
and harmless messages render as ever."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbf_jax.errors import InputError
from rlbf_jax.tokenizers.chat import ChatTemplate
from tests.tokenizers.families import GEMMA_TEMPLATE, LLAMA_TEMPLATE, QWEN_TEMPLATE

TEMPLATES = {"llama": LLAMA_TEMPLATE, "qwen": QWEN_TEMPLATE, "gemma": GEMMA_TEMPLATE}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
content = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def chat(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=150)
@given(contents=st.lists(content, min_size=1, max_size=3))
def test_text_is_the_plain_rendering_and_user_characters_are_marked(name, contents):
    template = ChatTemplate(TEMPLATES[name], VARIABLES)
    text, trusted = template.render(chat(*contents))
    assert text == template.plain(chat(*contents), True)
    users = "".join(c for c, mine in zip(text, trusted, strict=True) if not mine)
    said = "".join(c for text in contents for c in text if not c.isspace())
    assert users == said
    written = "".join(c for c, mine in zip(text, trusted, strict=True) if mine)
    assert written.split() == template.plain(chat(*([" "] * len(contents))), True).split()


def test_a_content_that_spells_a_token_is_opaque_to_the_template():
    template = ChatTemplate(QWEN_TEMPLATE, VARIABLES)
    messages = chat("hi", "so </think> done")
    text, trusted = template.render(messages, is_spelled=lambda content: "</think>" in content)
    assert "so </think> done" in text, "the template would have cut the thoughts away"
    start = text.index("</think>")
    assert not any(trusted[start : start + 8])
    with pytest.raises(InputError, match="changes or inspects"):
        template.render(messages)


@pytest.mark.parametrize(
    "body",
    [
        "{{ content | upper }}",
        "{{ content[:-1] ~ '!' if 'x' in content else content }}",
        "{{ content | tojson }}",
    ],
)
def test_templates_that_change_text_are_refused(body):
    template = ChatTemplate("{% set content = messages[0].content %}" + body, VARIABLES)
    with pytest.raises(InputError, match="only trims"):
        template.render(chat('say "x"'))


@pytest.mark.parametrize(
    "body", ["{{ content | trim }}", "{{ content.split() | join('-') }}", "{{ content | length }}"]
)
def test_templates_that_trim_split_or_measure_are_fine(body):
    template = ChatTemplate("{% set content = messages[0].content %}" + body, VARIABLES)
    for text in (" two  words ", "", "\u00a0x\n"):
        assert template.render(chat(text))[0] == template.plain(chat(text), True)


def test_private_use_characters_of_anybody_stay_what_they_are():
    template = ChatTemplate(
        "\U000f0000{{ messages[0].content }}\U000f0001{{ bos_token }}", {"bos_token": "\U000f0002"}
    )
    text, trusted = template.render(chat("a\U000f0000\U000f0003"))
    assert text == "\U000f0000a\U000f0000\U000f0003\U000f0001\U000f0002"
    assert list(trusted) == [1, 0, 0, 0, 1, 1]


def test_the_sandbox_and_its_functions():
    source = (
        "{% generation %}{{ strftime_now('%d %b %Y') }}{% endgeneration %}"
        "{{ {'a': '<é>'} | tojson }}"
    )
    template = ChatTemplate(source, {}, datetime.date(2025, 3, 1))
    assert template.render(chat("x"))[0] == '01 Mar 2025{"a": "<é>"}'
    loop = (
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    assert ChatTemplate(loop, {}).render(chat("x", "y"))[0] == "x"
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        with pytest.raises(InputError, match="template"):
            ChatTemplate(source, {}).render(chat("x"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "user<|im_end|>", "content": "x"}], "message 0: role .* is not one of"),
        ([{"role": "user"}], "expected the texts"),
        ([{"role": "user", "content": "x", "name": "y"}], "expected the texts"),
        ([{"role": "user", "content": ["x"]}], "expected the texts"),
        ([{"role": "system", "content": "x"}], "System role not supported"),
    ],
)
def test_messages_that_cannot_be_rendered(messages, message):
    with pytest.raises(InputError, match=message):
        ChatTemplate(GEMMA_TEMPLATE, VARIABLES).render(messages)


def test_template_errors_name_the_file_and_line():
    with pytest.raises(InputError, match="here.jinja: not a Jinja chat template .line 2"):
        ChatTemplate("a\n{% if %}", {}, where="here.jinja").render(chat("x"))
    with pytest.raises(InputError, match="here.jinja: the template fails .TypeError"):
        ChatTemplate("{{ messages + 1 }}", {}, where="here.jinja").render(chat("x"))
