#!/usr/bin/env python3
"""Draws docs/pictures/dashboard-*.png: the dashboard over a generated log of a day; needs Chromium."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.administration.log import Scale, fill
from fleet_admin.dashboard.app import DashboardServer
from fleet_admin.dashboard.services import open_services
from fleet_admin.dashboard.settings import AccountRole, DashboardSettings
from fleet_admin.steering import Actor
from fleet_edge.session_log.alerts.evaluator import RunningAlerts
from fleet_edge.session_log.alerts.settings import AlertSettings
from fleet_edge.session_log.database import open_store
from tests.support.chromium import Chromium

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
PASSWORD = "only for a picture"  # noqa: S105 - of an account that ends with this program
NOW = datetime(2026, 3, 5, 12, 0, tzinfo=UTC)
SCALE = Scale(sessions=20_000, devices=120, days=2, edges=3)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Chromium() as browser:
        url = f"sqlite:///{folder}/fleet.sqlite3"
        with open_store(url) as store:
            fill(store.engine, SCALE, now=NOW, progress=lambda *_: None)
            with RunningAlerts(store.engine.begin, AlertSettings(), now=lambda: NOW) as alerts:
                alerts.step()
        settings = DashboardSettings(db=url, listen="127.0.0.1:0")
        services = open_services(settings, now=lambda: NOW)
        services.accounts.add("anna", role=AccountRole.OPERATOR, password=PASSWORD, actor=Actor("picture"))
        server = DashboardServer(settings, services=services)
        tab = browser.tab(width=1280, height=800)
        tab.goto(f"{server.address}/login")
        fields = "document.querySelector('[name={0}]').value = '{1}';"
        tab.evaluate(fields.format("account", "anna") + fields.format("password", PASSWORD))
        tab.after_load(lambda: tab.evaluate("document.querySelector('form').requestSubmit()"))
        device = services.log.devices()[0].device
        pages = {"overview": "", "device": f"devices/{device}", "edge": "edges/edge-1"}
        for name, path in pages.items():
            tab.goto(f"{server.address}/{path}")
            tab.until("document.querySelectorAll('.chart canvas').length > 1")
            tab.screenshot(PICTURES / f"dashboard-{name}.png")
        tab.goto("about:blank")  # ends its looks
        server.stop()


if __name__ == "__main__":
    main()
