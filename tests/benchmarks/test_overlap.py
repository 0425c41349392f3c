import json
from pathlib import Path

import pytest

from benchmarks.overlap import idle, main


def test_only_time_between_steps_for_all_texts_counts() -> None:
    steps = [(0.0, 1.0, 1), (5.0, 6.0, 2), (6.5, 7.5, 2), (7.7, 9.7, 2), (20.0, 21.0, 1), (30.0, 31.0, 2)]
    found = idle(steps, 2)
    assert (found.devices, found.steps) == (2, 2)
    assert found.idle_share == pytest.approx(0.7 / 2.7)
    assert (found.step_ms, found.gap_ms) == (pytest.approx(1000.0), pytest.approx(350.0))
    assert idle(steps, 3).steps == 0


@pytest.mark.broker
@pytest.mark.slow
def test_what_an_edge_s_engine_does_is_written(mosquitto: object, tmp_path: Path) -> None:
    del mosquitto  # it is asked for only to skip where there is none
    file = tmp_path / "idle.json"
    assert main(["--devices", "2", "--tokens", "12", "--step-ms", "5", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["steps"] > 0
    assert row["step_ms"] >= 5.0
    assert 0.0 < row["idle_share"] < 1.0
