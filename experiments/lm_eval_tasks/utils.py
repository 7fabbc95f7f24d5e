"""Tasks of the LM Evaluation Harness on files that the user has: no network, no hub.

The folder is named by RLBF_TASK_DATA, or by `--metadata '{"data": "DIR"}'`,
and holds the authors' files:

    gsm8k_train.jsonl, gsm8k_test.jsonl         openai/grade-school-math: question, answer
    mmlu/dev/*_dev.csv, mmlu/test/*_test.csv    hendrycks/test: question, A, B, C, D, answer,
                                                without a header
    bbh/*.json                                  suzgunmirac/BIG-Bench-Hard:
                                                {"examples": [{"input", "target"}]}
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
from typing import Any

import datasets

from rlbf_jax.data.sources.files import DataError, complaint, open_table, read_text, sift

LETTERS = "ABCD"


def folder(data: str | None) -> pathlib.Path:
    found = data or os.environ.get("RLBF_TASK_DATA")
    if not found:
        raise DataError(
            'no folder of task files: set RLBF_TASK_DATA, or pass --metadata \'{"data": "DIR"}\''
        )
    if not pathlib.Path(found).is_dir():
        raise DataError(f"{found}: no such folder (RLBF_TASK_DATA, or data in --metadata)")
    return pathlib.Path(found)


def splits(**rows: list[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    return {name: datasets.Dataset.from_list(found) for name, found in rows.items()}


def gsm8k(data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Questions and worked answers."""
    names = ("question", "answer")

    def rows(split: str) -> list[dict[str, str]]:
        path = folder(data) / f"gsm8k_{split}.jsonl"
        kept = sift(
            path,
            open_table(path)[1],
            lambda r: complaint(r, names),
            None,
            "a question and an answer",
        )
        return [{name: record[name] for name in names} for _, record in kept]

    return splits(train=rows("train"), test=rows("test"))


def mmlu(data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """All subjects in one task; each question comes with the five examples of its subject."""
    tests = sorted((folder(data) / "mmlu" / "test").glob("*_test.csv"))
    if not tests:
        raise DataError(f"{folder(data)}/mmlu/test: no *_test.csv")
    rows: list[dict[str, Any]] = []
    for path in tests:
        subject = path.name.removesuffix("_test.csv")
        examples = questions(path.parent.parent / "dev" / f"{subject}_dev.csv")
        shown = "".join(f"{asked(e)} {LETTERS[e['answer']]}\n\n" for e in examples)
        about = subject.replace("_", " ")
        opening = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        rows += [
            {
                "subject": subject,
                "prompt": opening + shown + asked(question),
                "answer": question["answer"],
            }
            for question in questions(path)
        ]
    return splits(test=rows)


def asked(question: dict[str, Any]) -> str:
    choices = "\n".join(
        f"{letter}. {text}" for letter, text in zip(LETTERS, question["choices"], strict=True)
    )
    return f"{question['question'].strip()}\n{choices}\nAnswer:"


def questions(path: pathlib.Path) -> list[dict[str, Any]]:
    """One subject's questions of one split."""
    found = []
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for fields in reader:
            if len(fields) != 6 or fields[5] not in LETTERS:
                raise DataError(
                    f"{path}, line {reader.line_num}: expected question, A, B, C, D, and one of "
                    f"{LETTERS}"
                )
            found.append(
                {"question": fields[0], "choices": fields[1:5], "answer": LETTERS.index(fields[5])}
            )
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    return found


def bbh(data: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """All tasks in one, without examples."""
    paths = sorted((folder(data) / "bbh").glob("*.json"))
    if not paths:
        raise DataError(f"{folder(data)}/bbh: no *.json")
    rows: list[dict[str, str]] = []
    for path in paths:
        try:
            examples = json.loads(read_text(path))["examples"]
            rows += [
                {"task": path.stem, "input": e["input"].strip(), "target": e["target"].strip()}
                for e in examples
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path}: expected {{'examples': [{{'input': ..., 'target': ...}}]}} "
                f"({type(error).__name__}: {error})"
            ) from None
    return splits(test=rows)
