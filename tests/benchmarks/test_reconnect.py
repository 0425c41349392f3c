import json
from pathlib import Path

import pytest

from benchmarks import reconnect


def test_the_figures_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert reconnect.main(["--devices", "50", "--outage", "30", "--json", str(file)]) == 0
    answering, silent = json.loads(file.read_text())["simulated"]
    assert (answering["outage_s"], answering["silent"], silent["silent"]) == (30.0, False, True)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.broker
def test_a_real_broker_that_is_killed_is_found_again(mosquitto: object, tmp_path: Path) -> None:
    del mosquitto  # it is asked for only to skip where there is none
    file = tmp_path / "figures.json"
    arguments = ["--devices", "50", "--outage", "1", "--real", "--links", "2", "--kills", "1", "--json", str(file)]
    assert reconnect.main(arguments) in {0, 1}  # 1 on a busy machine
    real = json.loads(file.read_text())["real"]
    assert (real["links"], real["kills"]) == (2, 1)
    assert 0.0 < real["broker_ms_per_connect"] < 1000.0
