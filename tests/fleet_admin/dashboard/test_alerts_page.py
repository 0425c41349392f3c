import re
from datetime import timedelta

import pytest

from fleet_edge.session_log.alerts.rules import AlertProblem
from fleet_edge.session_log.database import open_store
from tests.fleet_admin.dashboard.conftest import NOW, Browser, Clock
from tests.fleet_edge.store import samples


def test_alerts_of_a_condition_are_one_row(viewer: Browser, url: str) -> None:
    names = [f"gateway-{number}" for number in range(250)]
    problems = [("certificate-ends", AlertProblem(subject=name, device=name, sentence="It ends.")) for name in names]
    with open_store(url) as store:
        samples.open_alerts(store, problems, since=NOW, now=NOW)
    page = viewer.get("/alerts").text
    assert page.count("<td>certificate-ends</td>") == 1
    assert "250 certificates" in page
    assert "50 more are in the CSV." in page
    assert "250 certificates" in viewer.get("/").text


@pytest.mark.parametrize("path", ["/", "/alerts"])
def test_without_a_recent_evaluation_the_pages_say_so(viewer: Browser, clock: Clock, path: str) -> None:
    assert "ot evaluated since" not in viewer.get(path).text
    clock.now += timedelta(minutes=2)
    page = viewer.get(path).text
    assert "ot evaluated since 2026-03-05 12:00:00" in page
    assert not re.search(r'<div class="tile \w+"><dt>(<a[^>]*>)?(open alerts|open|critical)<', page)
