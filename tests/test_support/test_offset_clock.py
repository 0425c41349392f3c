from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.offset_clock import VARIABLE, OffsetClock


def test_clocks_on_one_file_are_wrong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "clock"))
    one, other = OffsetClock.from_environment(), OffsetClock(tmp_path / "clock")
    assert abs(one() - datetime.now(UTC)) < timedelta(minutes=1)
    other.set(-3600.0)
    assert abs(one() + timedelta(hours=1) - datetime.now(UTC)) < timedelta(minutes=1)
    monkeypatch.delenv(VARIABLE)
    assert abs(OffsetClock.from_environment()() - datetime.now(UTC)) < timedelta(minutes=1)
