import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.exactness.history import append


def run(number: int, value: float) -> dict[str, object]:
    return {"case": f"case-{number % 4}", "first_seed": number, "p_values": {"joint": value, "score": None}}


def test_uniform_p_values_pass_and_small_ones_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None of them is below the alarm of a single run."""
    history, values = tmp_path / "history.jsonl", np.random.default_rng(1).random(60)
    append(history, [run(number, value) for number, value in enumerate(values.tolist())])
    assert main(["exactness", "history", str(history)]) == 0
    append(history, [run(100 + number, value) for number, value in enumerate((0.02 + values / 4).tolist())])
    assert main(["exactness", "history", str(history)]) == 1
    assert "all cases, joint" in capsys.readouterr().out


def test_a_run_that_is_repeated_with_the_same_seeds_counts_once(tmp_path: Path) -> None:
    history, report = tmp_path / "history.jsonl", tmp_path / "report.json"
    for _ in range(30):
        append(history, [run(1, 0.01)])
    assert main(["exactness", "history", str(history), "--json", str(report)]) == 0
    assert [row["values"] for row in json.loads(report.read_text())["rows"]] == [1]


def test_a_file_that_is_no_history_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("{}\n")
    assert main(["exactness", "history", str(tmp_path / "other")]) == 2
    assert main(["exactness", "history", str(tmp_path / "missing")]) == 2
