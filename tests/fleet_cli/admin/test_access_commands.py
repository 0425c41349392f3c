from collections.abc import Iterator
from functools import partial

import pytest

from broker_config.broker import Broker
from fleet_admin.steering import access
from fleet_edge.session_log.database import open_store
from tests.fleet_edge.store import samples
from tests.support.brokers import StartBroker
from tests.support.command import Run, as_json, refused
from tests.support.obedient_authority import obedient_authority

LOG = b"""2026-03-04T12:00:00: New client connected from 10.0.0.7:50123 as gw-1 (p5, c1, k10, u'gw-1').
2026-03-04T12:00:01: New client connected from 10.0.0.8:50124 as gw-2 (p5, c1, k10, u'gw-2').
2026-03-04T12:00:09: Client gw-2 closed its connection.
"""


@pytest.fixture
def authority(url: str) -> Iterator[None]:
    with obedient_authority(url):
        yield


@pytest.mark.usefixtures("authority")
def test_what_was_requested_is_audited(admin: Run) -> None:
    results = as_json(admin("suspend", "gw-2", "gw-1", "--as", "grace", "--json"))
    assert [(each["device"], each["outcome"]) for each in results] == [("gw-1", "ok"), ("gw-2", "ok")]
    entries = as_json(admin("audit", "action=suspend", "--json"))
    assert {(each["subject"], each["outcome"]) for each in entries} == {
        ("gw-1", "ok: Proven."),
        ("gw-2", "ok: Proven."),
    }
    assert all(each["who"].startswith("grace") for each in entries)


def test_what_nobody_carries_out_is_no_success(admin: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "request_access", partial(access.request_access, limit_s=-1.0))
    assert as_json(admin("revoke", "gw-1", "--json"), code=1)[0]["outcome"] == "silent"
    assert "not a valid name" in refused(admin("disconnect", "a/b"))


def test_the_brokers_log_gives_the_list_of_clients(admin: Run) -> None:
    found = as_json(admin("clients", "--broker-log", "-", "--json", given=LOG))
    assert {each["client"]: each["state"] for each in found} == {"gw-1": "connected", "gw-2": "not connected"}
    found = as_json(admin("clients", "state=connected", "--broker-log", "-", "--json", given=LOG))
    assert [each["address"] for each in found] == ["10.0.0.7"]


@pytest.mark.broker
def test_the_facts_about_a_device(
    admin: Run, url: str, start_mosquitto: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(url) as store:
        store.apply([samples.device_seen(device="gw-1", presence="online")])
    mosquitto = start_mosquitto(Broker(sys_interval_s=1))
    monkeypatch.setenv("FLEET_ADMIN_BROKER__PORT", str(mosquitto.port))
    monkeypatch.setenv("FLEET_ADMIN_FLEET", "home")
    admin("quarantine", "gw-1")
    found = {each["fact"]: each["state"] for each in as_json(admin("access", "gw-1", "--json"))}
    assert found == {
        "connected": "unknown",
        "at the broker": "accepted",
        "at the edges": "quarantined",
        "certificate": "unknown",
    }
    assert [each["client"] for each in as_json(admin("clients", "--json"))] == ["monitor"]
