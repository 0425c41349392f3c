import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import serving
from fleet_edge.store.views import Tally
from tests.fleet_edge.store.samples import view

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

AIPERF = """#!/usr/bin/env python3
import json, sys
flags = dict(zip(sys.argv, sys.argv[1:]))
figures = {"request_count": 7, "output_token_throughput": 40.0}
figures |= {"total_draft_tokens": 20, "total_accepted_draft_tokens": 15}
metric = {"avg": 3.0, "p50": 5.0, "p95": 9.0}
report = {name: {"avg": value} for name, value in figures.items()} | {"error_request_count": {"avg": ERRORED}}
report |= dict.fromkeys(["time_to_first_token", "inter_token_latency"], metric)
with open(flags["--output-artifact-dir"] + "/" + flags["--profile-export-prefix"] + ".json", "w") as file:
    json.dump(report, file)
"""


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    options = SimpleNamespace(reports=tmp_path / "reports", seconds=5, prompt=8, tokens=8)
    options.reports.mkdir()
    return SimpleNamespace(options=options, model=lambda name: tmp_path / name)


def load(bench: Any, folder: Path, name: str, script: str, system: str = "1 device") -> dict[str, Any]:
    program = folder / name
    program.write_text(script)
    program.chmod(0o755)
    return serving._load(bench, name, folder, system, "http://127.0.0.1:1/v1", 4)


@pytest.mark.parametrize("errored", [0, 1])
@pytest.mark.parametrize(
    ("name", "script", "more"),
    [("guidellm", GUIDELLM, {}), ("aiperf", AIPERF, {"tested": 20, "accepted": 15, "acceptance": 0.75})],
)
def test_the_figures_are_those_of_the_reports(
    bench: Any, tmp_path: Path, name: str, script: str, more: dict[str, float], errored: int
) -> None:
    row = load(bench, tmp_path, name, script.replace("ERRORED", str(errored)))
    report = tmp_path / "reports" / f"{name}-1-device-4.json"
    assert row == {
        "load": name, "system": "1 device", "clients": 4, "report": str(report), "requests": 7, "failed": errored,
        "tokens_per_s": 40.0, "ttft_ms_p50": 5.0, "ttft_ms_p95": 9.0, "itl_ms_p50": 5.0, "itl_ms_p95": 9.0, **more,
    }  # fmt: skip
    assert json.loads(report.read_text())
    assert len(serving._failures([row])) == errored
    assert not serving._failures([row | {"system": "llama-server"}])


@pytest.mark.parametrize(("tested", "accepted", "alike"), [(20, 15, True), (20, 14, False), (0, 0, False)])
def test_the_acceptance_of_a_load_generator_must_be_the_session_logs(
    *, tested: int, accepted: int, alike: bool
) -> None:
    logged = view(Tally, tested=tested, accepted=accepted)
    counted = {"tested": 20, "accepted": 15} if tested else {"tested": 0, "accepted": 0}
    assert (serving._unlike(counted, logged) == "") is alike
