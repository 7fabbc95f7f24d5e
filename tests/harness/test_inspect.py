"""Our models inside inspect_ai; skips where the extra `eval` is not installed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

inspect_ai = pytest.importorskip(
    "inspect_ai", reason="inspect_ai is not installed: pip install 'rlbf_jax[eval]'"
)

import anyio  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402
from inspect_ai.tool import ToolInfo  # noqa: E402

from rlbf_jax.errors import InputError, UserError  # noqa: E402
from rlbf_jax.harness import inspect_registry  # noqa: E402, F401
from rlbf_jax.harness.inspect_provider import RlbfAPI  # noqa: E402
from rlbf_jax.models.weights.write import write_checkpoint  # noqa: E402
from rlbf_jax.tokenizers import import_tokenizer  # noqa: E402
from tests.runs import tiny_checkpoint as tiny  # noqa: E402
from tests.tokenizers import families  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that takes things back all the time."""
    folder = families.llama(tmp_path_factory.mktemp("eager"))
    tokenizer = import_tokenizer(folder, ("rude", "private"), 8, tiny.ROWS)
    tokenizer.save(folder)
    params = tiny.params()
    loud = (
        np.random.default_rng(0).standard_normal((tiny.ROWS, tiny.CONFIG.width)).astype(np.float32)
    )
    params["unembedding"][list(tokenizer.new_ids)] = loud[list(tokenizer.new_ids)] * 1.5
    write_checkpoint(folder, tiny.CONFIG, params)
    return folder


@pytest.fixture(scope="module")
def api(folder) -> RlbfAPI:
    return RlbfAPI(str(folder), batch_size=4, semantics="rewind")


def ask(api, messages, **config):
    return anyio.run(
        lambda: api.generate(messages, [], "none", GenerateConfig(**{"max_tokens": 32} | config))
    )


def test_a_task_from_end_to_end(folder, tmp_path):
    """Found by name; concurrent samples; only visible text; the trace in the metadata."""
    model = get_model(f"rlbf/{folder}", batch_size=4, semantics="rewind", memoize=False)
    samples = [
        Sample(input=f"Tell me of {what}", target="moon")
        for what in ("tea", "hills", "stones", "birds", "7")
    ]
    task = inspect_ai.Task(dataset=samples, solver=generate(), scorer=includes())
    (log,) = inspect_ai.eval(
        task,
        model=model,
        log_dir=str(tmp_path),
        epochs=2,
        max_tokens=32,
        display="none",
        log_format="json",
    )
    assert log.status == "success" and len(log.samples) == 10
    directives = 0
    for sample in log.samples:
        trace = sample.output.metadata["rlbf"]
        assert sample.output.completion == trace["visible"]
        assert not any(
            word in sample.output.completion for word in ("[BACKTRACK", "[CATEGORY", "[RESET")
        )
        directives += len(trace["edits"])
        assert 0 < sample.output.usage.output_tokens <= 32
    assert directives >= 10
    assert len({(s.id, s.output.completion) for s in log.samples}) == 10  # epochs are other draws


def test_answers_do_not_depend_on_who_asks_beside(folder, api):
    texts = ["tea", "old stones and birds", "hills", "a river", "7", "12"]

    async def together(api):
        found = {}

        async def one(text):
            output = await api.generate(
                [ChatMessageUser(content=text)], [], "none", GenerateConfig(max_tokens=24)
            )
            found[text] = output.completion

        async with anyio.create_task_group() as group:
            for text in texts:
                group.start_soon(one, text)
        return found

    crowd = anyio.run(together, RlbfAPI(str(folder), batch_size=4, semantics="rewind"))
    fresh = RlbfAPI(str(folder), batch_size=4, semantics="rewind")
    alone = {
        text: ask(fresh, [ChatMessageUser(content=text)], max_tokens=24).completion
        for text in reversed(texts)
    }
    assert crowd == alone


def test_messages_and_parameters(api):
    messages = [
        ChatMessageSystem(content="be nice"), ChatMessageUser(content="hi [RESET]"),
        ChatMessageAssistant(content="so"), ChatMessageUser(content="and"),
    ]  # fmt: skip
    config = GenerateConfig(max_tokens=9, temperature=0.0, top_k=3, seed=5)
    question = api._question(messages, [], config)
    plain = [{"role": m.role, "content": m.content} for m in messages]
    assert (
        question.prompt_ids == tuple(api._policy.tokenizer.encode_chat(plain))
        and question.forced == ()
    )
    assert (question.knobs.temperature, question.knobs.top_k, question.knobs.max_tokens) == (
        0.0,
        3,
        9,
    )
    assert question.seed == 5
    begun = api._question([*messages, ChatMessageAssistant(content="the moon")], [], config)
    assert begun.prompt_ids == question.prompt_ids
    assert begun.forced == tuple(api._policy.tokenizer.encode("the moon"))
    default = api._question(messages[1:2], [], GenerateConfig(max_tokens=64))
    assert (
        dataclasses.replace(default.knobs, max_tokens=64) == default.knobs
        and default.knobs.temperature == 1.0
    )


def test_stop_strings_and_reasons(api):
    whole = ask(api, [ChatMessageUser(content="tea")], temperature=0.0)
    assert whole.choices[0].stop_reason == "max_tokens"
    stop = whole.completion[-1]
    cut = ask(api, [ChatMessageUser(content="tea")], temperature=0.0, stop_seqs=[stop])
    assert stop not in cut.completion and cut.choices[0].stop_reason == "stop"
    json.dumps(cut.metadata)


def test_arguments_that_no_model_of_ours_has(folder):
    with pytest.raises(UserError, match=r"-M batchsize: no such argument \(did you mean batch_si"):
        get_model(f"rlbf/{folder}", batchsize=4, memoize=False)


def test_what_cannot_be_done(api, tmp_path):
    user = ChatMessageUser(content="tea")
    tool = ToolInfo(name="t", description="d")
    image = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA==")])
    refused = [
        ([user], [tool], {}, "no tools"),
        ([user, ChatMessageTool(content="x")], [], {}, "no tools"),
        ([image], [], {}, "reads text only"),
        ([user], [], {"num_choices": 2}, "num_choices"),
        (
            [user],
            [],
            {"frequency_penalty": 0.5},
            "frequency_penalty: our sampler has no such parameter",
        ),
        ([user], [], {"max_tokens": 256}, "the model's texts have 256 ids in all"),
        ([ChatMessageAssistant(content="x")], [], {}, "needs a message of the user"),
    ]
    for messages, tools, config, said in refused:
        with pytest.raises(InputError, match=said):
            anyio.run(
                lambda m=messages, t=tools, c=config: api.generate(
                    m, t, "auto", GenerateConfig(**c)
                )
            )
    with pytest.raises(UserError, match="no model here"):
        RlbfAPI(str(tmp_path))


def test_an_error_while_answering_reaches_everyone_who_waits(folder, monkeypatch):
    api = RlbfAPI(str(folder), batch_size=4)

    def fails(questions):
        raise RuntimeError("out of tea")

    monkeypatch.setattr(api._sampler, "answer", fails)

    async def both():
        said = []

        async def one():
            with pytest.raises(RuntimeError, match="out of tea"):
                await api.generate(
                    [ChatMessageUser(content="x")], [], "none", GenerateConfig(max_tokens=8)
                )
            said.append(1)

        async with anyio.create_task_group() as group:
            group.start_soon(one)
            group.start_soon(one)
        return said

    assert anyio.run(both) == [1, 1]
