"""Stages of several runs in one table, and each minus the first."""

import json

from experiments import compare_methods
from rlbf_jax.evaluation.columns import metric_names


def write(folder, stage, bad, seed=0):
    """40 attempts of one kind, the first `bad` of which end badly, and as many harmless ones."""
    rows = []
    for attack in ("middle_filling", *compare_methods.BENIGN):
        for i in range(40):
            rate = float(attack == "middle_filling" and i < bad)
            rows.append(
                {
                    "attack": attack,
                    "request_id": len(rows),
                    "prompt_id": f"{seed}/{attack}/{i}",
                    "semantics": "rewind",
                    "edits": [{}],
                    "trace": [{"forced": False}] * 3,
                    "metrics": dict.fromkeys(metric_names(), 0.0) | {"asr": rate, "leak": rate},
                }
            )
    path = folder / "evaluation" / f"{stage}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{folder}:{stage}"


def shown(monkeypatch, capsys, *stages):
    monkeypatch.setattr("sys.argv", ["compare_methods.py", *stages])
    compare_methods.main()
    return capsys.readouterr().out


def test_differences_name_their_methods(tmp_path, monkeypatch, capsys):
    one, two = write(tmp_path / "a", "sft", 20), write(tmp_path / "b", "rlbf", 8)
    text = shown(monkeypatch, capsys, one, two)
    assert "| sft | rewind | 0.50 [0.35, 0.65] W |" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| rlbf − sft | asr |"))
    pairs, difference, p, mde = line.strip("| ").split(" | ")[2:]
    assert (pairs, p, mde) == ("40", "<0.001", "0.24 C")
    assert difference.startswith("-0.30 [-0.4") and difference.endswith("] B")
    assert "C: Connor's formula" in text and "McNemar" in text


def test_other_attempts_are_not_paired(tmp_path, monkeypatch, capsys):
    one, two = write(tmp_path / "a", "sft", 20), write(tmp_path / "b", "rlbf", 8, seed=1)
    assert "| rlbf − sft | asr | 0 | – | – | – |" in shown(monkeypatch, capsys, one, two)
    assert "MDE" not in shown(monkeypatch, capsys, one)
