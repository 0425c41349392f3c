import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import serving

GUIDELLM = """#!/usr/bin/env python3
import json, sys
outputs = [json.loads(word) for word in sys.argv if word.startswith("{")]
metric = {"successful": {"mean": 30.0, "percentiles": {"p50": 5.0, "p95": 9.0}}, "total": {"mean": 40.0}}
names = ["output_tokens_per_second", "time_to_first_token_ms", "inter_token_latency_ms"]
totals = {"request_totals": {"successful": 7, "errored": ERRORED}}
report = {"benchmarks": [{"metrics": dict.fromkeys(names, metric) | totals}]}
for output in outputs:
    if output.get("kind") == "json":
        open(output["path"], "w").write(json.dumps(report))
"""


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    options = SimpleNamespace(reports=tmp_path / "reports", seconds=5, prompt=8, tokens=8, target=None, requests=None)
    options.reports.mkdir()
    return SimpleNamespace(options=options, model=lambda name: tmp_path / name)


def load(bench: Any, folder: Path, script: str, system: str = "1 device") -> dict[str, Any]:
    program = folder / "guidellm"
    program.write_text(script)
    program.chmod(0o755)
    return serving._load(bench, program, system, "http://127.0.0.1:1/v1", 4)


@pytest.mark.parametrize("errored", [0, 1])
def test_the_figures_are_those_of_the_reports(bench: Any, tmp_path: Path, errored: int) -> None:
    row = load(bench, tmp_path, GUIDELLM.replace("ERRORED", str(errored)))
    report = tmp_path / "reports" / "guidellm-1-device-4.json"
    assert row == {
        "system": "1 device", "clients": 4, "report": str(report), "requests": 7, "failed": errored,
        "tokens_per_s": 40.0, "ttft_ms_p50": 5.0, "ttft_ms_p95": 9.0, "itl_ms_p50": 5.0, "itl_ms_p95": 9.0,
    }  # fmt: skip
    assert json.loads(report.read_text())
    assert len(serving._failures([row])) == errored
    assert not serving._failures([row | {"system": "llama-server"}])


def test_each_round_is_compared_with_the_rival_of_the_same_round() -> None:
    def row(system: str, turn: int, rate: float, first_ms: float, clients: int = 4) -> dict[str, Any]:
        return {
            "system": system, "clients": clients, "round": turn, "tokens_per_s": rate, "ttft_ms_p50": first_ms,
        }  # fmt: skip

    rows = [
        row("llama-server", 0, 2.0, 100.0),
        row("4 devices", 0, 6.0, 50.0),
        row("llama-server", 1, 4.0, 100.0),
        row("4 devices", 1, 4.0, 150.0),
        {"system": "llama-server", "clients": 8, "error": "It did not start."},
    ]
    goals = serving._compared(rows, serving._TARGET_GOALS)
    assert [each.get("ratio") for each in rows] == [None, 3.0, None, 1.0, None]
    assert [(goal.value, goal.reached) for goal in goals] == [(2.0, True), (1.0, True)]
