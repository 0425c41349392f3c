import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import round_trip

if TYPE_CHECKING:
    from broker_config.processes.runner import MosquittoProcess


@pytest.mark.broker
def test_a_qos_1_round_trip_does_not_wait_for_a_delayed_acknowledgement(mosquitto: "MosquittoProcess") -> None:
    # With TCP_NODELAY missing on either side the median is above 40 ms, whatever the machine.
    assert round_trip.measure(mosquitto.port, count=100, no_delay=True).p50_ms < 35.0


@pytest.mark.broker
def test_the_figures_are_written(mosquitto: "MosquittoProcess", tmp_path: Path) -> None:
    del mosquitto  # it is asked for only to skip where there is none
    file = tmp_path / "figures.json"
    assert round_trip.main(["--count", "40", "--json", str(file)]) in {0, 1}  # 1 on a busy machine: 10 ms or more
    with_option, without = json.loads(file.read_text())["round_trips"]
    assert with_option["no_delay"] is True
    assert (with_option["count"], without["count"]) == (40, 4)
    assert without["p50_ms"] > with_option["p50_ms"]


def test_median_99th_percentile_and_longest_time_are_told_apart() -> None:
    trips = round_trip.EchoTimes.of([1.0] * 60 + [2.0] * 38 + [50.0, 90.0], no_delay=True)
    assert trips == round_trip.EchoTimes(no_delay=True, count=100, p50_ms=1.0, p99_ms=50.4, max_ms=90.0)


def test_without_mosquitto_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("broker_config.processes.runner.SYSTEM_PATHS", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    assert round_trip.main([]) == 2
    assert "apt install mosquitto" in capsys.readouterr().err
