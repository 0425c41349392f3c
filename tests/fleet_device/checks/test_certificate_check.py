from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleet_common.checks import NotApplicable
from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.mqtt.tls import certificate_end
from fleet_device.checks.doctor import check_certificate, check_clock, moments_of
from fleet_device.errors import ConfigurationError
from tests.support.memory_fleet import edge_state
from tests.support.tls_fleet import enrol, new_authority


@pytest.fixture
def broker(tmp_path: Path) -> BrokerSettings:
    files = enrol(new_authority(tmp_path / "ca"), "device-1", tmp_path / "files")
    return BrokerSettings(ca=files.ca, certificate=files.certificate, key=files.key)


def test_a_certificate_that_is_the_device_s_own_is_told_with_its_end(broker: BrokerSettings) -> None:
    end = certificate_end(broker.certificate)
    assert end is not None
    now = datetime.now(UTC)
    said = check_certificate(broker, "device-1", now)
    assert said == f"That of device-1, valid for {(end - now).days} days more, until {end:%Y-%m-%d %H:%M} UTC."
    assert "10 days more" in (said := check_certificate(broker, "device-1", end - timedelta(days=10, hours=1)))
    assert "soon" in said


def test_one_that_has_ended_or_has_not_begun_or_is_another_s_is_told(broker: BrokerSettings) -> None:
    end = certificate_end(broker.certificate)
    assert end is not None
    with pytest.raises(ConnectFailed):
        check_certificate(broker, "device-1", end + timedelta(days=1))
    with pytest.raises(ConnectFailed):
        check_certificate(broker, "device-1", datetime(2001, 1, 1, tzinfo=UTC))
    with pytest.raises(ConfigurationError, match="device-1"):
        check_certificate(broker, "device-2", datetime.now(UTC))


def test_files_that_are_missing_or_do_not_fit_are_told(broker: BrokerSettings, tmp_path: Path) -> None:
    now, other = datetime.now(UTC), enrol(new_authority(tmp_path / "other"), "device-1", tmp_path / "others")
    with pytest.raises(ConnectFailed, match=r"none\.pem"):
        check_certificate(broker.model_copy(update={"certificate": tmp_path / "none.pem"}), "device-1", now)
    with pytest.raises(ConnectFailed, match="key"):
        check_certificate(broker.model_copy(update={"key": other.key}), "device-1", now)


def test_without_tls_or_without_a_certificate_there_is_nothing_to_check(broker: BrokerSettings) -> None:
    now = datetime.now(UTC)
    with pytest.raises(NotApplicable, match="TLS"):
        check_certificate(BrokerSettings(), "device-1", now)
    with pytest.raises(NotApplicable, match="certificate"):
        check_certificate(BrokerSettings(ca=broker.ca), "device-1", now)


def test_a_clock_is_held_against_the_latest_thing_that_has_happened(broker: BrokerSettings) -> None:
    since = datetime(2026, 1, 2, tzinfo=UTC)
    moments = moments_of(broker, [edge_state(since=since)])
    assert [what for _, what in moments] == [
        "the certificate ca.pem became valid", "the certificate device-1.pem became valid", "edge edge-1 connected"
    ]  # fmt: skip
    edge_only = [moments[-1]]
    assert "edge edge-1 connected 40 minutes ago" in check_clock(since + timedelta(minutes=40), edge_only)
    assert "connected 0 s ago" in check_clock(since - timedelta(seconds=4), edge_only)  # clocks differ by seconds
    with pytest.raises(ConfigurationError):
        check_clock(since - timedelta(days=10), [(datetime(2025, 1, 1, tzinfo=UTC), "it was new year"), *edge_only])
    with pytest.raises(NotApplicable):
        check_clock(since, [])
