import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from fleet_common.metrics import MetricsError
from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.link import Message
from fleet_common.mqtt.settings import LinkSettings
from fleet_edge.session_log.alerts.delivery import BrokerChannel, DeliveryFailed
from fleet_edge.session_log.alerts.evaluator import RunningAlerts
from fleet_edge.session_log.alerts.settings import AlertSettings, load_alert_settings
from fleet_edge.session_log.database import Store, open_store, transaction
from fleet_edge.session_log.views import AlertView
from schemas.control import Alert, AlertState, decode_json
from schemas.topics import Topic, build
from tests.fleet_edge.alerts.test_delivery import ALERT
from tests.fleet_edge.store import samples
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.waiting import until


class Ears:
    name = "ears"

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def send(self, alerts: Sequence[AlertView]) -> None:
        self.heard += [(alert.rule, alert.state) for alert in alerts]


@contextmanager
def listening(broker: MemoryBroker) -> Iterator[list[Alert]]:
    heard: list[Alert] = []

    def hear(message: Message) -> None:
        assert not message.retained
        heard.append(decode_json(Alert, message.payload))

    link = MemoryLink(broker, "other-monitor")
    link.subscribe(build(Topic.ALERT, fleet="north"), hear)
    link.start(timeout_s=1.0)
    yield heard
    link.stop()


def test_an_alert_is_published_and_confirmed() -> None:
    broker = MemoryBroker()
    with broker.running(), listening(broker) as heard:
        channel = BrokerChannel(
            AlertSettings(fleet="north"), make_link=lambda link: MemoryLink(broker, link.client_id, will=link.will)
        )
        channel.send([ALERT, replace(ALERT, cleared_at=ALERT.last_at)])
        until(lambda: len(heard) == 2)
        channel.close()
    assert [each.state for each in heard] == [AlertState.OPEN, AlertState.CLEARED]


def test_a_broker_that_is_away_fails_and_is_tried_again() -> None:
    class Away(MemoryLink):
        def start(self, *, timeout_s: float) -> None:
            raise ConnectFailed(f"The broker does not answer within {timeout_s:g} s.")

    def make(link: LinkSettings) -> MemoryLink:
        return Away(MemoryBroker(), link.client_id)

    channel = BrokerChannel(AlertSettings(fleet="north"), make_link=make)
    for _ in range(2):
        with pytest.raises(DeliveryFailed):
            channel.send([ALERT])
    channel.close()


def test_a_database_that_comes_later_is_opened_when_it_is_there(tmp_path: Path) -> None:
    url, ears = f"sqlite:///{tmp_path / 'fleet.sqlite3'}", Ears()
    store = Store(url)
    running = RunningAlerts(lambda: transaction(store.engine), AlertSettings(hold_s=0), channels=[ears])
    try:
        assert running.step() is None
        assert ears.heard == [("database-away", "critical")]
        store.apply([samples.edge_load(at=datetime.now(UTC), kv_usage=0.95)])
        assert [each.rule for each in running.step()] == ["kv-full"]
        assert ears.heard[1:] == [("database-away", "cleared"), ("kv-full", "warning")]
    finally:
        running.close()
        store.close()


def test_a_channel_that_has_accepted_an_alert_is_not_sent_it_again(tmp_path: Path) -> None:
    url, ears, at = f"sqlite:///{tmp_path / 'fleet.sqlite3'}", Ears(), datetime.now(UTC)

    class Fussy(Ears):
        refuses = 1

        def send(self, alerts: Sequence[AlertView]) -> None:
            self.refuses -= 1
            if self.refuses >= 0:
                raise DeliveryFailed("Not now.")
            super().send(alerts)

    fussy = Fussy()
    with open_store(url) as store:
        store.apply([samples.edge_load(at=at, kv_usage=0.95)])
        running = RunningAlerts(
            partial(transaction, store.engine), AlertSettings(hold_s=0), channels=[fussy, ears], now=lambda: at
        )
        running.step()
        assert (fussy.heard, ears.heard) == ([], [("kv-full", "warning")])
        for _ in range(2):
            at += timedelta(seconds=10)
            running.step()
        assert fussy.heard == ears.heard == [("kv-full", "warning")]
        running.close()


def test_it_looks_on_a_thread_until_it_is_closed(tmp_path: Path) -> None:
    url, ears = f"sqlite:///{tmp_path / 'fleet.sqlite3'}", Ears()
    before = threading.active_count()
    with open_store(url) as store:
        store.apply([samples.edge_load(at=datetime.now(UTC), kv_usage=0.95)])
        running = RunningAlerts(partial(transaction, store.engine), AlertSettings(hold_s=0), channels=[ears]).start()
        until(lambda: ("kv-full", "warning") in ears.heard)
        running.close()
    assert threading.active_count() == before


def test_a_secret_that_cannot_be_read_is_told_before_anything_runs(tmp_path: Path) -> None:
    config = tmp_path / "alerts.toml"
    config.write_text(f'webhook = "https://hooks.example/"\nwebhook_secret_file = "{tmp_path}/nowhere"\n')
    with pytest.raises(MetricsError):
        load_alert_settings(config)
