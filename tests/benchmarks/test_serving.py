import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.processes import BenchError

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
    options = SimpleNamespace(reports=tmp_path / "reports", seconds=5, prompt=8, tokens=8)
    return SimpleNamespace(options=options, model=lambda name: tmp_path / name)


@pytest.mark.parametrize("errored", [0, 1])
def test_the_figures_are_those_of_guidellms_report_and_no_request_may_have_failed(
    bench: Any, tmp_path: Path, errored: int
) -> None:
    program = tmp_path / "guidellm"
    program.write_text(GUIDELLM.replace("ERRORED", str(errored)))
    program.chmod(0o755)
    if errored:
        with pytest.raises(BenchError):
            serving._load(bench, tmp_path, "1 device", "http://127.0.0.1:1/v1", 4)
        return
    row = serving._load(bench, tmp_path, "1 device", "http://127.0.0.1:1/v1", 4)
    assert row == {
        "system": "1 device", "clients": 4, "requests": 7, "tokens_per_s": 40.0, "ttft_ms_p50": 5.0,
        "ttft_ms_p95": 9.0, "itl_ms_p50": 5.0, "itl_ms_p95": 9.0,
    }  # fmt: skip
    assert json.loads((tmp_path / "reports" / "1-device-4.json").read_text())["benchmarks"]
