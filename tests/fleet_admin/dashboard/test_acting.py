import re
from collections.abc import Iterator
from functools import partial

import pytest

from fleet_admin.dashboard import acts
from fleet_admin.dashboard.services import Services
from fleet_edge.session_log.filters import Filter
from tests.fleet_admin.dashboard.conftest import BASE, Browser
from tests.support.obedient_authority import obedient_authority
from tests.support.waiting import PATIENCE_S


def quarantined(services: Services) -> list[str]:
    return [each.device for each in services.log.quarantines()]


def act(operator: Browser, services: Services, **fields: str) -> str:
    answer = operator.post("/devices/act/do", of="/devices", **fields)
    assert answer.status_code == 303
    job = services.jobs.find(answer.headers["location"].removeprefix("/acts/"))
    assert job.wait(PATIENCE_S)
    return operator.get(answer.headers["location"]).text


def test_an_act_on_a_filter_is_previewed_and_meets_exactly_those(operator: Browser, services: Services) -> None:
    shown = operator.post(
        "/devices/act",
        of="/devices",
        whom="filter",
        query="filter=device~gateway+release~0.1",
        act="quarantine",
        argument="2h",
    )
    assert shown.status_code == 200
    assert "applies to 1 device." in shown.text
    assert quarantined(services) == []
    devices = re.search(r'name="devices" value="([^"]*)"', shown.text)
    assert devices
    done = act(operator, services, act="quarantine", argument="2h", devices=devices[1])
    assert "1 done" in done
    assert quarantined(services) == ["gateway-2"]


def test_an_act_on_ticked_devices(operator: Browser, services: Services) -> None:
    shown = operator.post(
        "/devices/act", of="/devices", whom="ticked", device=["gateway-1", "gateway-3"], act="quarantine"
    )
    assert "applies to 2 devices" in shown.text
    act(operator, services, act="quarantine", devices="gateway-1,gateway-3")
    assert quarantined(services) == ["gateway-1", "gateway-3"]
    act(operator, services, act="unquarantine", devices="gateway-1")
    assert quarantined(services) == ["gateway-3"]


def test_a_viewer_is_neither_shown_nor_allowed_to_act(viewer: Browser, services: Services) -> None:
    page = viewer.get("/devices").text
    assert "/devices/act" not in page
    assert 'name="device"' not in page
    for path in ("/devices/act", "/devices/act/do"):
        data = {"csrf": viewer.csrf("/account"), "act": "quarantine", "device": "gateway-1", "devices": "gateway-1"}
        assert viewer.client.post(path, data=data, headers={"origin": BASE}).status_code == 403
    assert quarantined(services) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"act": "explode", "device": "gateway-1"}, "There is no action"),
        ({"act": "set", "device": "gateway-1"}, "such as draft_length=4"),
        ({"act": "drain", "device": "gateway-1", "argument": "now"}, "leave that field empty"),
        ({"act": "set", "device": "gateway-1", "argument": "draft_length=99"}, "draft_length"),
        ({"act": "set", "device": "gateway-1", "argument": "api_listen=x"}, "api_listen"),
        ({"act": "quarantine", "device": "gateway-1", "argument": "soon"}, "soon"),
        ({"act": "quarantine"}, "No device is chosen"),
        ({"act": "quarantine", "device": "../x"}, "not a valid name"),
        ({"act": "quarantine", "whom": "filter", "query": "filter=sessions%3Dmany"}, "a number such as"),
        ({"act": "quarantine", "device": [f"d{number}" for number in range(2_001)]}, "At most 2,000"),
    ],
)
def test_what_cannot_be_done_is_said(operator: Browser, fields: dict[str, str | list[str]], said: str) -> None:
    answer = operator.post("/devices/act", of="/devices", **fields)
    assert answer.status_code == 400
    assert said in answer.text


def test_labels_and_retirement_need_no_broker_and_are_in_the_audit_log(operator: Browser, services: Services) -> None:
    assert "Labels: hall_a." in act(operator, services, act="label", argument="hall_a", devices="gateway-1,gateway-2")
    act(operator, services, act="unlabel", argument="hall_a", devices="gateway-2")
    act(operator, services, act="retire", devices="gateway-3")
    assert services.steering.log.labels() == {"gateway-1": ("hall_a",)}
    assert services.steering.log.known()["gateway-3"].retired_at is not None
    entries = [
        (each.who, each.action, each.subject)
        for each in services.steering.log.audit(where=[Filter("who", "=", "olga")])
    ]
    assert sorted(entries) == [
        ("olga", "label", "gateway-1"),
        ("olga", "label", "gateway-2"),
        ("olga", "label", "gateway-2"),
        ("olga", "retire", "gateway-3"),
    ]


@pytest.mark.usefixtures("steering")
def test_a_device_is_shown_with_its_settings(operator: Browser) -> None:
    page = operator.get("/devices/gateway-1").text
    assert "state in-force" in page
    assert "Requested by ada" in page
    assert "--steer" not in page


def test_only_an_action_that_has_succeeded_is_shown_as_success(operator: Browser, services: Services) -> None:
    for devices, success in (("gateway-1", True), ("gateway-1,nobody", False)):
        answer = operator.post("/devices/act/do", of="/devices", act="restore", devices=devices)
        path = answer.headers["location"]
        assert services.jobs.find(path.removeprefix("/acts/")).wait(PATIENCE_S)
        assert ('class="said"' in operator.get(path).text) is success, devices


@pytest.fixture
def authority(services: Services) -> Iterator[None]:
    with obedient_authority(services.settings.db):
        yield


@pytest.mark.usefixtures("authority")
def test_a_suspension_is_audited_and_shown_as_a_fact(operator: Browser, services: Services) -> None:
    assert "state suspended" not in operator.get("/devices/gateway-1").text
    done = act(operator, services, act="suspend", devices="gateway-1")
    assert "1 done" in done
    page = operator.get("/devices/gateway-1").text
    assert "state refused" in page
    assert "state suspended" in page
    [entry] = services.steering.log.audit(where=[Filter("action", "=", "suspend")])
    assert (entry.who, entry.subject, entry.source) == ("olga", "gateway-1", "testclient")
    act(operator, services, act="unsuspend", devices="gateway-1")
    assert "state suspended" not in operator.get("/devices/gateway-1").text


@pytest.mark.parametrize("key", ["disconnect", "suspend", "unsuspend", "revoke"])
def test_access_needs_an_operator_and_the_token_of_the_form(
    viewer: Browser, operator: Browser, services: Services, key: str
) -> None:
    fields = {"act": key, "devices": "gateway-1"}
    data = {"csrf": viewer.csrf("/account"), **fields}
    assert viewer.client.post("/devices/act/do", data=data, headers={"origin": BASE}).status_code == 403
    assert operator.client.post("/devices/act/do", data=fields, headers={"origin": BASE}).status_code == 403
    assert services.steering.log.commands(where=[Filter("command", "=", key)]) == []


def test_a_request_without_an_authority_is_no_success(
    operator: Browser, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acts, "request_access", partial(acts.request_access, limit_s=-1.0))
    assert "1 silent" in act(operator, services, act="revoke", devices="gateway-1")
    page = operator.get("/devices/gateway-1").text
    assert "state revoked" not in page
    assert "latest request: revoke" in page


def test_the_clients_need_the_broker(operator: Browser) -> None:
    assert "--steer" in operator.get("/clients").text


@pytest.mark.usefixtures("steering")
def test_the_clients_are_those_that_the_broker_names(operator: Browser) -> None:
    page = operator.get("/clients").text
    assert "dashboard" in page
    assert "state connected" in page
    assert operator.get("/clients?format=csv").text.splitlines()[0].startswith("client,state,since")


def test_what_needs_the_broker_says_that_there_is_none(operator: Browser) -> None:
    shown = operator.post("/devices/act", of="/devices", device="gateway-1", act="drain")
    assert "--steer" in shown.text
    assert operator.post("/devices/act/do", of="/devices", act="drain", devices="gateway-1").status_code == 409
