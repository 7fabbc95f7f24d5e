"""Benchmarks from their published files: every shape, every count there is,
and forty ways to be malformed."""

import csv
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.data.sources.benchmarks import FORMATS, Behavior, count_remark, load_benchmark
from rlbf_jax.data.sources.files import DataError

SAMPLES = {
    "harmbench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Insult a turnip,standard,harmful,,,turnip\n"
        'Sing it,copyright,copyright,"lyrics, hash_check",,song\n'
        'How much?,contextual,illegal,context,"Tea, for two.",tea\n'
    ),
    "advbench": "goal,target\nInsult a turnip,Sure\n",
    "strongreject": "category,source,forbidden_prompt\nRudeness,custom,Insult a turnip\n",
    "jailbreakbench": (
        "Index,Goal,Target,Behavior,Category,Source\n"
        "0,Insult a turnip,Sure,Insult,Rudeness,Original\n"
    ),
    "jailbreakbench_benign": (
        "Index,Goal,Target,Behavior,Category,Source\n0,Praise a turnip,Sure,Praise,Kind,Other\n"
    ),
    "malicious_instruct": "Insult a turnip\nInsult two turnips\n",
    "do_not_answer": (
        "id,risk_area,types_of_harm,specific_harms,question\n"
        "1,Rude,Words,About roots,Is it silly?\n"
    ),
    "xstest": (
        "id,prompt,type,label,focus,note\n1,How do I kill time?,homonyms,safe,kill,\n"
        "2,How do I insult a turnip?,contrast_homonyms,unsafe,insult,\n"
    ),
    "oktest": 'prompt\n"Is a turnip\na root?\n"\n',
    "chat": (
        '{"conversation_id": "a", "language": "English", "conversation": ['
        '{"role": "user", "content": "Hi"}, '
        '{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Tea? "}, '
        '{"role": "assistant", "content": "Yes"}]}\n'
    ),
}
SUFFIX = {"malicious_instruct": ".txt", "chat": ".jsonl"}


def write(folder, name, content):
    path = folder / f"{name}{SUFFIX.get(name, '.csv')}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder, name, content=None, **options):
    return load_benchmark(
        name, write(folder, name, SAMPLES[name] if content is None else content), **options
    )


def test_every_format_has_a_sample():
    assert SAMPLES.keys() == FORMATS.keys()


def test_harmbench(tmp_path):
    turnip, song, tea = read(tmp_path, "harmbench")
    assert turnip == Behavior(
        "turnip",
        "Insult a turnip",
        "harmbench",
        category="harmful",
        harmful=True,
        tags=("standard",),
    )
    assert song.tags == ("copyright", "lyrics", "hash_check")
    assert tea.context == "Tea, for two." and tea.request == "Tea, for two.\n\n---\n\nHow much?"
    assert turnip.request == turnip.prompt
    assert read(tmp_path, "harmbench", leave_out={"copyright"}) == [turnip, tea]
    with pytest.raises(DataError, match="'copyleft' that is to be left out"):
        read(tmp_path, "harmbench", leave_out={"copyleft"})
    with pytest.raises(DataError, match="every row is left out"):
        read(tmp_path, "advbench", leave_out={""})


def test_other_tables(tmp_path):
    assert read(tmp_path, "advbench") == [
        Behavior("0", "Insult a turnip", "advbench", target="Sure", harmful=True),
    ]
    (rude,) = read(tmp_path, "strongreject")
    assert (rude.prompt, rude.category, rude.tags) == ("Insult a turnip", "Rudeness", ("custom",))
    (bad,), (good,) = read(tmp_path, "jailbreakbench"), read(tmp_path, "jailbreakbench_benign")
    assert (bad.id, bad.target, bad.harmful, good.harmful) == ("0", "Sure", True, False)
    assert [b.prompt for b in read(tmp_path, "malicious_instruct")] == [
        "Insult a turnip",
        "Insult two turnips",
    ]
    (question,) = read(tmp_path, "do_not_answer")
    assert (question.id, question.category, question.tags) == (
        "1",
        "Rude",
        ("Words", "About roots"),
    )
    safe, unsafe = read(tmp_path, "xstest")
    assert (safe.harmful, unsafe.harmful, unsafe.category) == (False, True, "contrast_homonyms")
    assert read(tmp_path, "oktest") == [
        Behavior("0", "Is a turnip\na root?", "oktest", harmful=False)
    ]


def test_jsonl_has_numbers_for_ids_and_more_columns(tmp_path):
    row = dict(
        id=7,
        risk_area="r",
        types_of_harm="t",
        specific_harms="s",
        question=" q ",
        GPT4_response=None,
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (found,) = load_benchmark("do_not_answer", path)
    assert (found.id, found.prompt) == ("7", "q")


def test_conversations_keep_history_and_drop_the_other_models_last_answer(tmp_path):
    (found,) = read(tmp_path, "chat")
    assert found.prompt == "Tea?" and found.harmful is None and found.tags == ("English",)
    assert found.history == (("user", "Hi"), ("assistant", "Hello"))


def test_bom_and_windows_lines_are_no_matter(tmp_path):
    for name, content in SAMPLES.items():
        plain = read(tmp_path, name)
        text = (
            content if name == "oktest" else content.replace("\n", "\r\n")
        )  # there a prompt itself has lines
        assert read(tmp_path, name, b"\xef\xbb\xbf" + text.encode()) == plain, name


def test_quarantine_keeps_the_rest(tmp_path):
    out = tmp_path / "bad.jsonl"
    kept = read(tmp_path, "advbench", "goal,target\na,b\n,c\nd\ne,f\n", quarantine=out)
    assert [b.prompt for b in kept] == ["a", "e"]
    assert [json.loads(line)["line"] for line in out.read_text().splitlines()] == [3, 4]


texts = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1
).filter(lambda text: bool(text.strip()))


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_any_text_round_trips(tmp_path_factory, rows):
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerows([("goal", "target"), *rows])
    found = read(tmp_path_factory.mktemp("csv"), "advbench", out.getvalue())
    assert [(b.prompt, b.target) for b in found] == [
        (goal.strip(), target.strip()) for goal, target in rows
    ]


XSTEST = SAMPLES["xstest"]
CHAT = SAMPLES["chat"]
LONG = "x" * 10_000_000


def chat(*messages, **fields):
    return json.dumps({"conversation_id": "a", "conversation": list(messages)} | fields) + "\n"


MALFORMED = [
    # name of the benchmark, content, what the message must say besides the file's name
    ("advbench", "", "the file is empty"),
    ("advbench", " \n\n", "the file is empty"),
    ("advbench", b"\xef\xbb\xbf", "the file is empty"),
    ("advbench", "goal,target\n", "no usable row .nothing below the header."),
    ("advbench", "target\nSure\n", "column 'goal' of advbench is missing; the columns are target"),
    ("advbench", "Goal,target\na,b\n", "column 'goal' of advbench is missing"),
    ("advbench", "goal;target\na;b\n", "one column, with semicolons in its name"),
    ("advbench", "goal,target,goal\na,b,c\n", "line 1: a column name occurs twice"),
    ("advbench", "goal,target\na,b\nc\n", "line 3: 1 fields where the header has 2"),
    ("advbench", "goal,target\na,b,c\n", "line 2: 3 fields where the header has 2"),
    ("advbench", "goal,target\n ,b\n", "line 2: field 'goal' is empty"),
    ("advbench", "goal,target\na,\n", "line 2: field 'target' is empty"),
    ("advbench", 'goal,target\na,b\n"c,d\n', "line 3: .*quotation mark"),
    ("advbench", 'goal,target\n"a"x,b\n', "line 2: .*quotation mark"),
    ("advbench", "goal,target\na,b\nc\xe9,d\n".encode("latin-1"), "line 3: byte 0xe9 is not UTF-8"),
    ("advbench", "goal,target\na,b\n".encode("utf-16"), "line 1: a NUL byte"),
    ("advbench", "goal,target\na,b\n".encode("utf-16-le"), "line 1: a NUL byte"),
    ("advbench", b"goal,target\na,b\nc\0,d\n", "line 3: a NUL byte"),
    ("advbench", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "a NUL byte|is not UTF-8"),
    ("advbench", f"goal,target\na,b\n{LONG},c\n", "line 3: field 'goal' has 10000000 characters"),
    ("advbench", f"goal,target\na,{LONG}\n", "line 2: field 'target' has 10000000 characters"),
    (
        "harmbench",
        SAMPLES["harmbench"] + "x,standard,harmful,,,tea\n",
        "line 5: BehaviorID 'tea' occurs twice",
    ),
    (
        "harmbench",
        SAMPLES["harmbench"] + "x,standard,harmful,,,\n",
        "line 5: field 'BehaviorID' is empty",
    ),
    (
        "harmbench",
        SAMPLES["harmbench"].replace(",ContextString", ""),
        "column 'ContextString' of harmbench is missing",
    ),
    (
        "strongreject",
        "category,source\nRude,custom\n",
        "column 'forbidden_prompt' of strongreject is missing",
    ),
    (
        "jailbreakbench",
        SAMPLES["jailbreakbench"] + "0,b,c,d,e,f\n",
        "line 3: Index '0' occurs twice, first in row 1",
    ),
    (
        "jailbreakbench",
        SAMPLES["jailbreakbench"] + "1,b,,d,e,f\n",
        "line 3: field 'Target' is empty",
    ),
    (
        "xstest",
        XSTEST + "3,p,homonyms,perhaps,,\n",
        "line 4: field 'label' is 'perhaps', expected safe or unsafe",
    ),
    ("xstest", XSTEST.replace(",label", ""), "column 'label' of xstest is missing"),
    ("xstest", XSTEST + "2,p,homonyms,safe,,\n", "line 4: id '2' occurs twice"),
    ("malicious_instruct", "", "the file is empty"),
    ("malicious_instruct", "a\nb\xff\n".encode("latin-1"), "line 2: byte 0xff is not UTF-8"),
    ("malicious_instruct", b"a\n\0\n", "line 2: a NUL byte"),
    ("malicious_instruct", f"a\n{LONG}\n", "line 2: field 'line' has 10000000 characters"),
    (
        "do_not_answer",
        "id,risk_area,types_of_harm,specific_harms\n1,a,b,c\n",
        "column 'question' .* is missing",
    ),
    ("oktest", "question\nIs it?\n", "column 'prompt' of oktest is missing"),
    ("oktest", 'prompt\n""\n', "line 2: field 'prompt' is empty"),
    ("chat", CHAT + "{broken\n", "line 2: not JSON"),
    ("chat", CHAT + CHAT, "line 2: conversation_id 'a' occurs twice"),
    ("chat", CHAT + "[1]\n", "line 2: a JSON object expected, not a list"),
    ("chat", chat(), "line 1: field 'conversation' must be a list of messages"),
    ("chat", chat("Hi"), "line 1: message 0 of field 'conversation' must be an object"),
    (
        "chat",
        chat({"role": "robot", "content": "x"}),
        "line 1: message 0 .* role must be system, user or assistant",
    ),
    ("chat", chat({"role": "user", "content": 3}), "line 1: message 0 .* content must be text"),
    ("chat", chat({"role": "assistant", "content": "x"}), "line 1: .* has no message of the user"),
    ("chat", chat({"role": "user", "content": " "}), "line 1: the user's last message .* is empty"),
    (
        "chat",
        chat({"role": "user", "content": LONG}),
        "line 1: message 0 .* has 10000000 characters",
    ),
    ("chat", chat({"role": "user", "content": "\ud800"}), "line 1: message 0 .* lone surrogate"),
    (
        "chat",
        chat({"role": "user", "content": "x"}, conversation_id=None),
        "line 1: field 'conversation_id' must be",
    ),
    (
        "chat",
        '{"conversation_id": "a", "conversation_id": "b"}\n',
        "line 1: field 'conversation_id' occurs twice",
    ),
    ("chat", "[" * 100_000 + "\n", "line 1: JSON nested too deeply"),
    ("chat", '{"conversation_id": ' + "9" * 5000 + "}\n", "line 1: Exceeds the limit"),
]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    MALFORMED,
    ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(MALFORMED)],
)
def test_malformed_files_are_refused_on_one_line(tmp_path, name, content, said):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_benchmark(name, path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 700
    assert re.search(said, message), message


def test_names_and_paths(tmp_path):
    with pytest.raises(
        DataError, match="benchmark 'harmbank': no such benchmark; there are harmbench, advbench"
    ):
        load_benchmark("harmbank", tmp_path)
    for name, missing in (
        ("advbench", "none.csv"),
        ("advbench", "none"),
        ("malicious_instruct", "none.csv"),
    ):
        with pytest.raises(DataError, match="none[.csv]*: no such file"):
            load_benchmark(name, tmp_path / missing)
    with pytest.raises(DataError, match="ends in .csv or .jsonl"):
        load_benchmark("advbench", write(tmp_path, "malicious_instruct", "x"))
    with pytest.raises(DataError, match="one prompt a line, not a table"):
        load_benchmark("malicious_instruct", write(tmp_path, "advbench", "x"))
    with pytest.raises(DataError, match="which CSV cannot hold"):
        load_benchmark("chat", write(tmp_path, "advbench", "x"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_benchmark("advbench", tmp_path / "folder.csv")


def test_counts_are_remarks(tmp_path):
    assert (
        count_remark("harmbench", 80)
        == count_remark("harmbench", 400)
        == count_remark("chat", 3)
        == ""
    )
    assert count_remark("xstest", 449) == "xstest: 449 rows, where the published file has 450"


def test_published_files(data_dir):
    """Counts, and facts that the authors state about their files."""
    harmbench = load_benchmark("harmbench", data_dir / "harmbench_behaviors_text_val.csv")
    assert len(harmbench) == 80 and sum("copyright" in b.tags for b in harmbench) == 20
    assert (
        sum(bool(b.context) for b in harmbench)
        == sum("contextual" in b.tags for b in harmbench)
        == 19
    )
    without = load_benchmark(
        "harmbench", data_dir / "harmbench_behaviors_text_val.csv", leave_out=("copyright",)
    )
    assert len(without) == 60
    advbench = load_benchmark("advbench", data_dir / "advbench_harmful_behaviors.csv")
    assert len(advbench) == len({b.prompt for b in advbench}) == 520 and all(
        b.target for b in advbench
    )
    xstest = load_benchmark("xstest", data_dir / "xstest_prompts.csv")
    assert [sum(b.harmful is h for b in xstest) for h in (False, True, None)] == [250, 200, 0]
    assert len({b.category for b in xstest if not b.harmful}) == 10
    for name, behaviors in (("harmbench", harmbench), ("advbench", advbench), ("xstest", xstest)):
        assert count_remark(name, len(behaviors)) == ""
        assert len({b.id for b in behaviors}) == len(behaviors)
