"""Two edges on one database: one evaluates the alerts, and the other when that one has been killed."""

import json
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from broker_config.broker import Broker
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.views import EDGE_SILENT_AFTER
from tests.fleet_edge.alerts.test_delivery import Received, server
from tests.support.brokers import StartBroker
from tests.support.databases import PostgresServer
from tests.support.offset_clock import VARIABLE, OffsetClock
from tests.support.processes import BrokerClient, Program, scripted_edge
from tests.support.waiting import until

LEASE_S = 30.0
FLEET = "north"


def edge(name: str, folder: Path, *, url: str, port: int, clock: Path) -> Program:
    own = folder / name
    own.mkdir()
    settings = {"db": url, "alerts": str(folder / "alerts.toml"), "drain_s": 0.1}
    identity, words = BrokerClient(name, "127.0.0.1", port), ["--alerts-s", "0.2"]
    return scripted_edge(identity, fleet=FLEET, folder=own, words=words, environment={VARIABLE: str(clock)}, **settings)


@pytest.mark.broker
@pytest.mark.slow
def test_a_killed_edge_is_an_alert_of_the_other(
    start_mosquitto: StartBroker, database_url: str, tmp_path: Path
) -> None:
    received, clock = Received(), tmp_path / "clock"
    broker = start_mosquitto(Broker(fleet=FLEET, edges=("edge-1", "edge-2")))
    with ExitStack() as stack:
        hook = stack.enter_context(server(received))
        (tmp_path / "alerts.toml").write_text(f'hold_s = 0\nwebhook = "http://127.0.0.1:{hook}/"\n')
        site = {"url": database_url, "port": broker.port, "clock": clock}
        edges = {name: stack.enter_context(edge(name, tmp_path, **site)) for name in ("edge-1", "edge-2")}
        log = stack.enter_context(SessionLog(database_url))
        until(lambda: [each.edge for each in log.edges()] == sorted(edges))
        until(lambda: log.evaluation().recent)
        killed = log.evaluation().holder
        assert killed in edges
        (other,) = edges.keys() - {killed}
        edges[killed].kill()
        stepped = datetime.now(UTC) + timedelta(seconds=1.5 * LEASE_S)
        OffsetClock(clock).set(1.5 * LEASE_S)
        until(lambda: log.evaluation().holder == other)
        # The other one is seen by the new time, so that it is not silent too after the next step.
        until(lambda: any(each.edge == other and each.seen_at > stepped for each in log.edges()))
        OffsetClock(clock).set(1.5 * EDGE_SILENT_AFTER.total_seconds())
        until(lambda: bool(received.requests))
        notice = json.loads(received.requests[0][2])
        assert (notice["rule"], notice["severity"], notice["state"]) == ("edge-silent", "critical", "open")
        assert [each["subject"] for each in notice["alerts"]] == [killed]
        assert [each.subject for each in log.alerts(open=True)] == [killed]


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.postgres
def test_an_edge_with_a_wrong_clock_leaves_the_alerts_to_the_other(
    start_mosquitto: StartBroker, postgres: PostgresServer, tmp_path: Path
) -> None:
    url, broker = postgres.database(), start_mosquitto(Broker(fleet=FLEET, edges=("edge-1", "edge-2")))
    (tmp_path / "alerts.toml").write_text("hold_s = 0\n")
    clocks = {"edge-1": tmp_path / "wrong", "edge-2": tmp_path / "right"}
    OffsetClock(clocks["edge-1"]).set(400 * 86_400.0)
    with ExitStack() as stack:
        for name, clock in clocks.items():
            stack.enter_context(edge(name, tmp_path, url=url, port=broker.port, clock=clock))
        log = stack.enter_context(SessionLog(url))
        until(lambda: log.evaluation().recent)
        assert log.evaluation().holder == "edge-2"
        assert log.alerts(open=True) == []
