import json
from pathlib import Path

import pytest

from benchmarks.tls_cost import main
from tests.support.brokers import require_mosquitto

RECORD_BYTES = 22  # TLS 1.3: five of head, one of type, sixteen of tag


@pytest.mark.broker
def test_tls_adds_one_records_frame_to_each_packet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_mosquitto()
    report = tmp_path / "cost.json"
    assert main(["--count", "50", "--json", str(report)]) in {0, 1}  # 1 on a busy machine: 5 ms or more
    plain, tls = json.loads(report.read_text())["costs"]
    # Two packets each way; now and then two share a record.
    for way in ("round_up", "round_down"):
        # A byte of slack: a number in a few of the payloads may take one more.
        assert RECORD_BYTES < tls[way] - plain[way] <= 2 * RECORD_BYTES + 1
    assert tls["connect_up"] > 1000, "or no certificate was shown"
    assert "TLS adds" in capsys.readouterr().out
