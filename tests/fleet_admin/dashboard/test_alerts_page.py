import re

import pytest

from fleet_admin.dashboard.services import Services
from fleet_admin.steering.log import SteeringLog
from fleet_edge.alerts.alerts import Alerts
from tests.fleet_admin.dashboard.conftest import Browser


def alert(services: Services, subject: str) -> str:
    return next(each.id for each in services.alerts.open() if each.subject == subject)


def states(url: str) -> dict[str, str]:
    with Alerts(url) as alerts:
        return {each.subject: "cleared" if not each.open else f"by {each.acknowledged_by}" for each in alerts.list()}


def test_open_alerts_are_shown_with_what_is_wrong(viewer: Browser) -> None:
    page = viewer.get("/alerts").text
    assert "The edge edge-2 is offline." in page
    assert "<img src=x" not in page
    assert page.index("edge-away") > 0


def test_acknowledging_and_clearing_are_audited(operator: Browser, services: Services, url: str) -> None:
    both = [alert(services, "evil"), alert(services, "edge-2")]
    assert operator.post("/alerts/acknowledge", of="/alerts", alert=both).status_code == 303
    assert states(url) == {"evil": "by olga", "edge-2": "by olga"}
    answer = operator.post("/alerts/clear", of="/alerts", alert=both[0])
    assert "1 cleared." in operator.get(answer.headers["location"]).text
    assert states(url) == {"evil": "cleared", "edge-2": "by olga"}
    audit = SteeringLog(url).audit(who="olga")
    # The clock does not move, so they have no order.
    assert sorted((each.who, each.action) for each in audit) == [
        ("olga", "alert acknowledge"),
        ("olga", "alert acknowledge"),
        ("olga", "alert clear"),
    ]
    assert {each.source for each in audit} == {"unknown"}  # an address, where there is one


@pytest.mark.parametrize("path", ["/alerts/acknowledge", "/alerts/clear"])
def test_a_viewer_changes_no_alert(viewer: Browser, services: Services, url: str, path: str) -> None:
    assert "Acknowledge those" not in viewer.get("/alerts").text
    assert viewer.post(path, of="/alerts", alert=alert(services, "evil")).status_code == 403
    assert states(url) == {"evil": "by None", "edge-2": "by None"}


@pytest.mark.parametrize("chosen", ["", "' OR 1=1 --", "ffffffffffff", "%", "x" * 300, "../"])
def test_what_is_no_alert_is_told(operator: Browser, url: str, chosen: str) -> None:
    answer = operator.post("/alerts/clear", of="/alerts", alert=chosen)
    assert re.search(r"class=\"said\"[^>]*>0 of \d cleared", operator.get(answer.headers["location"]).text)
    assert states(url) == {"evil": "by None", "edge-2": "by None"}


def test_without_a_choice_nothing_is_done(operator: Browser) -> None:
    answer = operator.post("/alerts/clear", of="/alerts")
    assert "None is chosen." in operator.get(answer.headers["location"]).text
