import re

import pytest

from fleet_admin.dashboard.services import Services
from tests.fleet_admin.dashboard.conftest import BASE, Browser


def fenced(services: Services) -> list[str]:
    return [each.device for each in services.log.fences()]


def test_an_act_on_a_filter_is_previewed_and_meets_exactly_those(operator: Browser, services: Services) -> None:
    shown = operator.post(
        "/devices/act", of="/devices", whom="filter", query="f_device=gateway&f_release=0.1", act="fence", argument="2h"
    )
    assert shown.status_code == 200
    assert "this meets 1 device." in shown.text
    assert fenced(services) == []
    devices = re.search(r'name="devices" value="([^"]*)"', shown.text)
    assert devices
    done = operator.post("/devices/act/do", of="/devices", act="fence", argument="2h", devices=devices[1])
    assert done.status_code == 200
    assert "1 done" in done.text
    assert fenced(services) == ["gateway-2"]


def test_an_act_on_ticked_devices(operator: Browser, services: Services) -> None:
    shown = operator.post("/devices/act", of="/devices", whom="ticked", device=["gateway-1", "gateway-3"], act="fence")
    assert "this meets 2 devices" in shown.text
    operator.post("/devices/act/do", of="/devices", act="fence", devices="gateway-1,gateway-3")
    assert fenced(services) == ["gateway-1", "gateway-3"]
    operator.post("/devices/act/do", of="/devices", act="unfence", devices="gateway-1")
    assert fenced(services) == ["gateway-3"]


def test_the_state_of_a_device_that_is_shut_out_is_shown(operator: Browser) -> None:
    operator.post("/devices/act/do", of="/devices", act="fence", devices="gateway-1")
    assert "state fenced" in operator.get("/devices/gateway-1").text
    assert "1 of 5" in operator.get("/devices?f_state=fenced").text


def test_a_viewer_is_neither_shown_nor_allowed_to_act(viewer: Browser, services: Services) -> None:
    page = viewer.get("/devices").text
    assert "/devices/act" not in page
    assert 'name="device"' not in page
    for path in ("/devices/act", "/devices/act/do"):
        data = {"csrf": viewer.csrf("/account"), "act": "fence", "device": "gateway-1", "devices": "gateway-1"}
        assert viewer.client.post(path, data=data, headers={"origin": BASE}).status_code == 403
    assert fenced(services) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"act": "explode", "device": "gateway-1"}, "nothing called"),
        ({"act": "fence"}, "No device is chosen"),
        ({"act": "fence", "device": "../x"}, "not a valid name"),
        ({"act": "fence", "whom": "filter", "query": "f_sessions=many"}, "chosen by a number"),
        ({"act": "fence", "device": [f"d{number}" for number in range(2_001)]}, "At most 2,000"),
    ],
)
def test_what_cannot_be_done_is_said(operator: Browser, fields: dict[str, str | list[str]], said: str) -> None:
    answer = operator.post("/devices/act", of="/devices", **fields)
    assert answer.status_code == 400
    assert said in answer.text


def test_a_duration_that_is_none_is_told_for_each_device(operator: Browser, services: Services) -> None:
    done = operator.post("/devices/act/do", of="/devices", act="fence", argument="soon", devices="gateway-1")
    assert "state failed" in done.text
    assert fenced(services) == []
