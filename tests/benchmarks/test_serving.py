import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.processes import BenchError
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
    return SimpleNamespace(options=options, model=lambda name: tmp_path / name)


@pytest.mark.parametrize("errored", [0, 1])
@pytest.mark.parametrize(
    ("load", "script", "more"),
    [("guidellm", GUIDELLM, {}), ("aiperf", AIPERF, {"tested": 20, "accepted": 15, "acceptance": 0.75})],
)
def test_the_figures_are_those_of_the_reports_and_no_request_may_have_failed(
    bench: Any, tmp_path: Path, load: str, script: str, more: dict[str, float], errored: int
) -> None:
    program = tmp_path / load
    program.write_text(script.replace("ERRORED", str(errored)))
    program.chmod(0o755)
    if errored:
        with pytest.raises(BenchError):
            serving._load(bench, load, tmp_path, "1 device", "http://127.0.0.1:1/v1", 4)
        return
    row = serving._load(bench, load, tmp_path, "1 device", "http://127.0.0.1:1/v1", 4)
    assert row == {
        "load": load, "system": "1 device", "clients": 4, "requests": 7, "tokens_per_s": 40.0, "ttft_ms_p50": 5.0,
        "ttft_ms_p95": 9.0, "itl_ms_p50": 5.0, "itl_ms_p95": 9.0, **more,
    }  # fmt: skip
    assert json.loads((tmp_path / "reports" / f"{load}-1-device-4.json").read_text())


def test_a_row_is_compared_with_the_rival_under_the_same_load() -> None:
    rates = {"llama-server": 10.0, "1 device": 30.0, "4 devices": 20.0}
    rows: list[dict[str, Any]] = [
        {"load": load, "clients": 4, "system": system, "tokens_per_s": factor * rate}
        for load, factor in (("guidellm", 1.0), ("aiperf", 0.5))
        for system, rate in rates.items()
    ]
    goals = serving._compared(rows, "4 devices")
    assert [row["ratio"] for row in rows] == [1.0, 3.0, 2.0] * 2
    assert [(goal.value, goal.reached) for goal in goals] == [(3.0, True)] * 2


@pytest.mark.parametrize(("tested", "accepted", "alike"), [(20, 15, True), (20, 14, False), (0, 0, False)])
def test_the_acceptance_of_a_load_generator_must_be_the_session_logs(
    *, tested: int, accepted: int, alike: bool
) -> None:
    logged = view(Tally, tested=tested, accepted=accepted)
    counted = {"tested": 20, "accepted": 15} if tested else {"tested": 0, "accepted": 0}
    assert (serving._unlike(counted, logged) == "") is alike


def test_connections_go_to_the_devices_in_turn() -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    urls = [f"http://127.0.0.1:{listener.getsockname()[1]}/v1" for listener in listeners]
    with serving._Turns(urls) as relay:
        clients = [socket.create_connection(("127.0.0.1", relay.port)) for _ in range(4)]
        for listener in listeners:
            listener.settimeout(5.0)
            for accepted in (listener.accept()[0], listener.accept()[0]):
                accepted.close()
        for each in (*clients, *listeners):
            each.close()
