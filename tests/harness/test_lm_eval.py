"""Our model inside the LM Evaluation Harness; skips where the extra `eval` is not installed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import pathlib

import numpy as np
import pytest

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm_eval is not installed: pip install 'rlbf_jax[eval]'"
)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from rlbf_jax.errors import InputError, UserError  # noqa: E402
from rlbf_jax.harness.answering import QuestionSampler  # noqa: E402
from rlbf_jax.harness.lm_eval_model import RlbfLM, main  # noqa: E402
from rlbf_jax.models.weights.write import write_checkpoint  # noqa: E402
from rlbf_jax.tokenizers import import_tokenizer  # noqa: E402
from tests.runs import tiny_checkpoint as tiny  # noqa: E402
from tests.tokenizers import families  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TASKS = ROOT / "experiments" / "lm_eval_tasks"
CATEGORIES = ("rude", "private")


def instances(kind, arguments):
    return [
        Instance(kind, {}, args if isinstance(args, tuple) else (args,), i)
        for i, args in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> RlbfLM:
    folder = tiny.write(tmp_path_factory.mktemp("plain"))
    return RlbfLM(str(folder), max_length=tiny.MAX_LENGTH, batch_size=4)


@pytest.fixture(scope="module")
def eager(tmp_path_factory) -> RlbfLM:
    """A model that takes things back all the time: its control ids have loud rows."""
    folder = families.llama(tmp_path_factory.mktemp("eager"))
    tokenizer = import_tokenizer(folder, CATEGORIES, 8, tiny.ROWS)
    tokenizer.save(folder)
    params = tiny.params()
    loud = (
        np.random.default_rng(0).standard_normal((tiny.ROWS, tiny.CONFIG.width)).astype(np.float32)
    )
    params["unembedding"][list(tokenizer.new_ids)] = loud[list(tokenizer.new_ids)] * 1.5
    write_checkpoint(folder, tiny.CONFIG, params)
    return RlbfLM(str(folder), semantics="rewind", batch_size=4, max_length=512, max_gen_toks=32)


def test_answers_are_those_of_the_hf_model(plain):
    """Ids of texts, log-likelihoods, rolling ones, and greedy generations; see
    tests/reference/make_lm_eval.py."""
    with np.load(ROOT / "tests" / "reference" / "lm_eval.npz") as file:
        reference = dict(file)
    for (context, continuation), row, n in zip(
        tiny.PAIRS, reference["ids"], reference["contexts"], strict=True
    ):
        if context:
            ours = plain._encode_pair(context, continuation)
            assert (*ours[0], *ours[1]) == tuple(row[row >= 0]) and len(ours[0]) == n
    found = plain.loglikelihood(instances("loglikelihood", tiny.PAIRS), disable_tqdm=True)
    np.testing.assert_allclose(
        [value for value, _ in found], reference["logprob"], atol=1e-3, rtol=0
    )
    assert [greedy for _, greedy in found] == reference["greedy"].tolist()
    rolling = plain.loglikelihood_rolling(
        instances("loglikelihood_rolling", tiny.TEXTS), disable_tqdm=True
    )
    np.testing.assert_allclose(rolling, reference["rolling"], atol=1e-3, rtol=0)
    texts = plain.generate_until(instances("generate_until", tiny.CONTEXTS), disable_tqdm=True)
    assert texts == reference["texts"].tolist()


@pytest.mark.slow
def test_answers_are_those_of_the_hf_model_live(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from tests.reference import make_lm_eval

    folder = tiny.write(tmp_path)
    peer = make_lm_eval.peer(folder)
    ours = RlbfLM(str(folder), max_length=tiny.MAX_LENGTH, batch_size=4)
    expected, found = make_lm_eval.answers(peer), make_lm_eval.answers(ours)
    for name in ("logprob", "rolling"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-3, rtol=0)
    for name in ("greedy", "texts"):
        assert found[name].tolist() == expected[name].tolist()
    for name, value in make_lm_eval.ids(peer).items():
        np.testing.assert_array_equal(make_lm_eval.ids(ours)[name], value)


def greedy_answer(model: RlbfLM, context: str, max_tokens: int) -> tuple[list[int], list[int]]:
    """Ids that our sampler decoded greedily from, and those that it emitted."""
    question, _ = model._question(context, {"do_sample": False, "max_gen_toks": max_tokens})
    (generation,) = model.sampler.answer([question])
    return generation.prompt_ids.tolist(), generation.trace.tolist()


def test_greedy_is_what_our_sampler_decodes_greedily(plain, eager):
    """Directives forbidden. A control id that is likelier, which the sampler passes over,
    is in the softmax though."""
    controls = list(eager.ids.new_ids)
    params = dict(eager.model.policy.params)
    params["unembedding"] = params["unembedding"].at[np.array(controls)].multiply(0.5)
    other = copy.copy(eager)
    policy = eager.model.policy.replace(params=params)
    other.model = dataclasses.replace(eager.model, policy=policy, directives=False)
    other.sampler = QuestionSampler(policy, 4, 512, directives=False)
    with_controls: list[bool] = []
    for context in ("The moon shines over", "Birds sing songs of summer", "Old stones"):
        prompt, answer = greedy_answer(plain, context, 9)
        asked = [(None, prompt, answer[:k]) for k in range(1, 10)]
        asked += [(None, prompt, [*answer[:k], answer[k] + 1, *answer[k + 1 :]]) for k in range(9)]
        found = [greedy for _, greedy in plain._loglikelihood_tokens(asked, disable_tqdm=True)]
        assert found == [True] * 9 + [False] * 9

        prompt, answer = greedy_answer(other, context, 9)
        assert len(answer) == 9 and not set(answer) & set(controls)
        asked = [(None, prompt, answer[:k]) for k in range(1, 10)]
        found = [greedy for _, greedy in other._loglikelihood_tokens(asked, disable_tqdm=True)]
        places = [
            (None, [*prompt, *answer[:k]], [i]) for k in range(9) for i in (answer[k], *controls)
        ]
        values = [value for value, _ in other._loglikelihood_tokens(places, disable_tqdm=True)]
        likeliest = np.argmax(np.reshape(values, (9, -1)), axis=1) == 0
        assert found == np.logical_and.accumulate(likeliest).tolist()
        with_controls += found
    assert len(set(with_controls)) == 2


def test_rolling_is_the_sum_of_conditionals(plain):
    """Each id given as much of what is before it as its window holds."""
    text = tiny.TEXTS[2]
    ids = plain.tok_encode(text)
    assert len(ids) < tiny.MAX_LENGTH
    parts = [(None, [plain.prefix_token_id, *ids[:i]], ids[i : i + 1]) for i in range(len(ids))]
    expected = sum(value for value, _ in plain._loglikelihood_tokens(parts, disable_tqdm=True))
    (found,) = plain.loglikelihood_rolling(
        instances("loglikelihood_rolling", [text]), disable_tqdm=True
    )
    assert found == pytest.approx(expected, abs=1e-3)


def test_generation_parameters(plain):
    question, stops = plain._question(
        "The moon", {"until": "x", "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9}
    )
    assert (question.knobs.temperature, question.knobs.top_p, question.knobs.max_tokens) == (
        0.5,
        0.9,
        7,
    )
    assert stops == ["x"]
    question, stops = plain._question("The moon", {"do_sample": False, "temperature": 0.5})
    assert (question.knobs.temperature, question.knobs.max_tokens, stops) == (0.0, 256, [])
    with pytest.raises(InputError, match="'num_beams': there are do_sample, max_gen_toks"):
        plain._question("The moon", {"num_beams": 3})


def test_conversations_are_encoded_as_conversations(eager):
    messages = [
        {"role": "user", "content": "hi <|eot_id|> [RESET]"},
        {"role": "assistant", "content": "A: "},
    ]
    assert eager._messages(eager.apply_chat_template(messages)) == messages
    context = eager.apply_chat_template(messages)
    prompt, answer = eager._encode_pair(context, " moon")
    chat = eager.ids.encode_chat(messages[:1])
    assert prompt == [*chat, *eager.ids.encode("A: ")] and answer == eager.ids.encode(" moon")
    question, _ = eager._question(context, {})
    assert question.prompt_ids == tuple(chat) and question.forced == tuple(eager.ids.encode("A: "))
    assert eager.chat_template(True) == eager.ids.template.source


def test_data_cannot_pass_for_a_conversation(plain):
    text = '\x02rlbf conversation [{"role": "user", "content": "hi"}]'
    assert plain._messages(text) is None
    assert plain._question(text, {})[0].prompt_ids == (*plain.ids.opening, *plain.ids.encode(text))


def write_gsm8k(folder: pathlib.Path, test: list[dict]) -> pathlib.Path:
    train = [
        {"question": f"{i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(8)
    ]
    for name, rows in (("train", train), ("test", test)):
        (folder / f"gsm8k_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(model, task, folder, **options):
    tasks = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"data": str(folder)}
    )
    return lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=tasks, bootstrap_iters=0, **options
    )


@pytest.mark.parametrize("chat", [False, True])
def test_gsm8k_from_end_to_end_and_no_control_token_reaches_it(eager, tmp_path, chat, request):
    data = os.environ.get("RLBF_JAX_DATA")
    if data:  # twenty real questions, else made ones
        lines = (
            (pathlib.Path(data) / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:20]
        )
        rows = [json.loads(line) for line in lines]
    else:
        rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(20)]
    before = eager.num_directives
    found = run(
        eager, "gsm8k_local", write_gsm8k(tmp_path, rows), apply_chat_template=chat, num_fewshot=1
    )
    assert found["n-samples"]["gsm8k_local"] == {"original": 20, "effective": 20}
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= found["results"][
        "gsm8k_local"
    ].keys()
    assert eager.num_directives - before >= 20
    names = [eager.ids.name(i) for i in eager.ids.new_ids]
    samples = [s for s in found["samples"]["gsm8k_local"] if s["filter"] == "strict-match"]
    assert len(samples) == 20
    for sample in samples:
        (text,) = sample["resps"][0]
        assert not any(
            name.strip() in text for name in [*names, "[BACKTRACK", "[CATEGORY", "[RESET"]
        )
        assert not {i for i in eager.ids.encode(text) if i in eager.ids.controls.ids}
    assert found["config"]["directives"] == eager.num_directives
    assert any(sample["resps"][0][0] for sample in samples)


def test_mmlu(plain, tmp_path):
    for split, count in (("dev", 2), ("test", 3)):
        folder = tmp_path / "mmlu" / split
        folder.mkdir(parents=True)
        for subject in ("old_stones", "tea"):
            rows = [f'"What, {subject} {i}?",a,b,c,d,{"ABCD"[i]}\n' for i in range(count)]
            (folder / f"{subject}_{split}.csv").write_text("".join(rows))
    found = run(plain, "mmlu_local", tmp_path)
    samples = found["samples"]["mmlu_local"]
    assert len(samples) == 6 and [s["target"] for s in samples[:3]] == [0, 1, 2]
    one = "What, old_stones {}?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert samples[0]["doc"]["prompt"] == (
        "The following are multiple choice questions (with answers) about old stones.\n\n"
        + "".join(f"{one.format(i)} {'AB'[i]}\n\n" for i in range(2))
        + one.format(0)
    )
    assert [continuation for _, continuation in samples[0]["arguments"]] == [" A", " B", " C", " D"]
    best = [int(np.argmax([float(r[0][0]) for r in s["resps"]])) for s in samples]
    expected = np.mean([b == int(s["target"]) for b, s in zip(best, samples, strict=True)])
    assert found["results"]["mmlu_local"]["acc,none"] == pytest.approx(expected)


OFFICIAL = """
task: official
custom_dataset: !function rows.read
test_split: test
fewshot_split: dev
fewshot_config: {sampler: first_n}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about old stones.\\n\\n"
doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\n\
C. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
num_fewshot: 2
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
"""The fields of the harness's own mmlu tasks, over rows in memory."""
ROWS = """
import datasets
def read(**_):
    row = lambda i: {"question": f"What, {i}? ", "choices": ["tea", "b", "c", "d"], "answer": i}
    return {s: datasets.Dataset.from_list([row(i) for i in range(n)]) \
for s, n in (("dev", 2), ("test", 3))}
"""


def test_mmlu_asks_what_the_harness_itself_asks(plain, tmp_path):
    (tmp_path / "official.yaml").write_text(OFFICIAL)
    (tmp_path / "rows.py").write_text(ROWS)
    for split, count in (("dev", 2), ("test", 3)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        rows = [f'"What, {i}? ",tea,b,c,d,{"ABCD"[i]}\n' for i in range(count)]
        (tmp_path / "mmlu" / split / f"old_stones_{split}.csv").write_text("".join(rows))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    official = lm_eval.simple_evaluate(
        plain, tasks=["official"], task_manager=tasks, bootstrap_iters=0
    )
    ours = run(plain, "mmlu_local", tmp_path)
    asked = [
        [s["arguments"] for s in r["samples"][name]]
        for r, name in ((official, "official"), (ours, "mmlu_local"))
    ]
    assert asked[0] == asked[1] and len(asked[0]) == 3


def test_mmlu_of_the_published_files(data_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(TASKS))
    import utils

    questions = utils.mmlu(str(data_dir))["test"]
    assert len(questions) == 14_042 and len(set(questions["subject"])) == 57
    assert set(questions["answer"]) == {0, 1, 2, 3}
    assert len(utils.gsm8k(str(data_dir))["test"]) == 1_319


def test_bbh(eager, tmp_path):
    (tmp_path / "bbh").mkdir()
    examples = [
        {"input": "not True is", "target": "False"},
        {"input": "Options:\n(A) tea", "target": "(A)"},
    ]
    (tmp_path / "bbh" / "boolean.json").write_text(
        json.dumps({"canary": "x", "examples": examples})
    )
    found = run(eager, "bbh_local", tmp_path)
    samples = found["samples"]["bbh_local"]
    assert samples[0]["arguments"][0][0] == "Q: not True is\nA:"
    assert found["results"]["bbh_local"]["exact_match,stripped"] == 0.0
    filtered = run(_Says(" (A) \n more"), "bbh_local", tmp_path)
    assert filtered["results"]["bbh_local"]["exact_match,stripped"] == 0.5


class _Says(lm_eval.api.model.LM):
    """Always says one thing, up to the first stop string."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def generate_until(self, requests, disable_tqdm=False):
        return [
            functools.reduce(lambda t, stop: t.split(stop)[0], r.args[1]["until"], self.text)
            for r in requests
        ]

    loglikelihood = loglikelihood_rolling = None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gsm8k_train.jsonl", '{"question": "q"}\n', "line 1: field 'answer' is missing"),
        ("bbh/a.json", "{}", "expected {'examples'"),
        ("bbh/a.json", "{", "expected {'examples'"),
        ("mmlu/dev/a_dev.csv", "q,a,b,c,d\n", "line 1: expected question, A, B, C, D"),
        ("mmlu/dev/a_dev.csv", '"q,a,b,c,d,A\n', "line 1: "),
    ],
)
def test_malformed_task_files(tmp_path, monkeypatch, name, content, said):
    monkeypatch.syspath_prepend(str(TASKS))
    import utils

    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    if name.startswith("mmlu"):
        (tmp_path / "mmlu" / "test").mkdir()
        (tmp_path / "mmlu" / "test" / "a_test.csv").write_text("q,a,b,c,d,A\n")
    task = {"g": utils.gsm8k, "b": utils.bbh, "m": utils.mmlu}[name[0]]
    with pytest.raises(InputError) as caught:
        task(str(tmp_path))
    assert str(path) in str(caught.value) and said in str(caught.value)
    for folder in (None, str(tmp_path / "none")):
        monkeypatch.delenv("RLBF_TASK_DATA", raising=False)
        with pytest.raises(InputError, match="RLBF_TASK_DATA"):
            task(folder)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: RlbfLM(str(tmp_path)))
    assert main() == 2
    assert (
        "error: " in (said := capsys.readouterr().err)
        and "no model here" in said
        and said.count("\n") == 1
    )
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: None)
    assert main() == 0
    assert lm_eval.api.registry.get_model("rlbf") is RlbfLM
    with pytest.raises(UserError, match="batch_size is 'auto'"):
        RlbfLM(str(tmp_path), batch_size="auto")
    with pytest.raises(UserError, match="--model_args dtype: no such argument; expected some of"):
        RlbfLM(str(tmp_path), dtype="bfloat16")
    with pytest.raises(UserError, match=r"semantic: no such argument \(did you mean semantics"):
        RlbfLM(str(tmp_path), semantic="keep")
