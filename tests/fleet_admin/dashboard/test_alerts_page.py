import re
from datetime import timedelta

import pytest

from fleet_admin.dashboard.services import Services
from fleet_admin.steering.log import SteeringLog
from fleet_edge.alerts import alerts as book
from fleet_edge.alerts.alerts import Alerts, RuleReading
from tests.fleet_admin.dashboard.conftest import NOW, Browser, Clock


def alert(services: Services, subject: str) -> str:
    return next(each.id for each in services.alerts.open() if each.subject == subject)


def states(url: str) -> dict[str, str]:
    with Alerts(url) as alerts:
        found = alerts.list(limit=1000)
    return {each.subject: f"by {each.acknowledged_by}" if each.open else "cleared" for each in found}


def test_alerts_of_a_condition_are_one_row_and_chosen_together(operator: Browser, services: Services, url: str) -> None:
    with services.alerts.connection() as connection:
        names = [f"gateway-{number}" for number in range(250)]
        ending = [
            ("certificate-ends", RuleReading(subject=name, device=name, sentence="It ends."), NOW) for name in names
        ]
        book.note_wrong(connection, ending, held={}, now=NOW)
    page = operator.get("/alerts").text
    assert page.count("<td>certificate-ends</td>") == 1
    assert "250 certificates" in page
    assert "50 more are in the CSV." in page
    assert "250 certificates" in operator.get("/").text
    answer = operator.post(
        "/alerts/acknowledge", of="/alerts", alert=["certificate-ends", alert(services, "gateway-7")]
    )
    assert "250 acknowledged." in operator.get(answer.headers["location"]).text
    assert states(url)["gateway-249"] == "by olga"


@pytest.mark.parametrize("path", ["/", "/alerts"])
def test_without_a_recent_evaluation_the_pages_say_so(viewer: Browser, clock: Clock, path: str) -> None:
    assert "ot evaluated since" not in viewer.get(path).text
    clock.now += timedelta(minutes=2)
    page = viewer.get(path).text
    assert "ot evaluated since 2026-03-05 12:00:00" in page
    assert not re.search(r'<div class="tile \w+"><dt>(<a[^>]*>)?(open alerts|open|critical|unacknowledged)<', page)


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
    assert re.search(r"class=\"said\"[^>]*>0 cleared", operator.get(answer.headers["location"]).text)
    assert states(url) == {"evil": "by None", "edge-2": "by None"}
