from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, text

from fleet_edge.session_log.alerts.alerts import Evaluation
from fleet_edge.session_log.alerts.delivery import DeliveryFailed
from fleet_edge.session_log.alerts.evaluator import DATABASE_AWAY, RunningAlerts
from fleet_edge.session_log.alerts.rules import Facts
from fleet_edge.session_log.alerts.settings import AlertSettings
from fleet_edge.session_log.database import Store, open_store, transaction
from fleet_edge.session_log.errors import StoreUnavailable
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.views import AlertView, DeviceSigns, EdgeView, MachineState
from tests.fleet_edge.store import samples

START = datetime(2026, 5, 1, 12, tzinfo=UTC)
SETTINGS = AlertSettings(hold_s=60)
OPEN, CLEARED, CRITICAL = "warning", "cleared", "critical"


class Receiver:
    name = "receiver"

    def __init__(self, send: Callable[[Sequence[AlertView]], None]) -> None:
        self.send = send


@dataclass
class World:
    store: Store
    url: str
    at: datetime = START
    kv: dict[str, float] = field(default_factory=dict)
    certificate: timedelta | None = None
    delivered: list[AlertView] = field(default_factory=list)
    away: bool = False
    silent_since: datetime | None = None

    def __post_init__(self) -> None:
        self.log = SessionLog(self.url, now=lambda: self.at)
        self.receiver = Receiver(self.delivered.extend)
        self.evaluator = self.another("first")

    def another(self, holder: str) -> RunningAlerts:
        return RunningAlerts(
            self.connect,
            SETTINGS,
            channels=[self.receiver],
            holder=holder,
            now=lambda: self.at,
            read=self._read,
        )

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        if self.away:
            raise StoreUnavailable("It is away.")
        with transaction(self.store.engine) as connection:
            yield connection

    def look(self, seconds: float = 0.0, **kv: float) -> list[tuple[str, bool]] | None:
        """Let time pass and evaluate; return the changed alerts, and whether they are open."""
        self.at += timedelta(seconds=seconds)
        self.kv = kv or self.kv
        changed = self.evaluator.step()
        return None if changed is None else [(each.subject, each.open) for each in changed]

    def rows(self, query: str) -> list[Any]:
        engine = create_engine(self.url)
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(text(query))]
        finally:
            engine.dispose()

    def _read(self, _connection: object, *, now: datetime) -> Facts:
        state = MachineState.ONLINE if self.silent_since is None else MachineState.SILENT
        load = {"state": state, "seen_at": self.silent_since or now}
        edges = [
            samples.view(EdgeView, edge=name.replace("_", "-"), kv_usage=value, **load)
            for name, value in self.kv.items()
        ]
        until = None if self.certificate is None else now + self.certificate
        return Facts(now=now, edges=edges, devices=[DeviceSigns("gateway-1", False, now, until)])  # noqa: FBT003


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    with open_store(url) as store:
        world = World(store, url)
        yield world
        world.log.close()


def test_what_is_wrong_for_long_enough_is_one_alert_until_it_is_right_for_long_enough(world: World) -> None:
    assert world.look(edge_1=0.95) == []
    assert world.look(59) == []
    assert world.look(1) == [("edge-1", True)]
    assert world.look(60, edge_1=0.97) == []
    (alert,) = world.log.alerts(open=True)
    assert (alert.rule, alert.since_at, alert.last_at, alert.value) == ("kv-full", START, world.at, 0.97)
    assert world.look(10, edge_1=0.5) == []
    assert world.look(109) == []
    assert world.look(1) == [("edge-1", False)]
    assert world.log.alerts(open=True) == []
    (over,) = world.log.alerts()
    assert (over.id, over.cleared_at) == (alert.id, world.at)
    assert over.sentence != alert.sentence, "the problem is no longer said in the present tense"
    said = dict(world.rows("SELECT code, sentence FROM events WHERE kind = 'alert'"))
    assert said["cleared"] == world.delivered[1].sentence == over.sentence
    found = world.rows("SELECT code, count(*) FROM events WHERE kind = 'alert' GROUP BY code ORDER BY code")
    assert found == [("cleared", 1), ("opened", 1)]
    assert [(each.state, each.id) for each in world.delivered] == [(OPEN, alert.id), (CLEARED, alert.id)]


def test_what_is_wrong_now_and_then_is_no_alert(world: World) -> None:
    for _ in range(10):
        world.look(30, edge_1=0.95)
        world.look(30, edge_1=0.5)
    assert world.log.alerts() == []


def test_what_wavers_at_its_threshold_is_one_alert(world: World) -> None:
    world.look(edge_1=0.95)
    world.look(60)
    for _ in range(20):
        world.look(60, edge_1=0.89)  # below the threshold, and not clearly
        world.look(60, edge_1=0.91)
        world.look(60, edge_1=0.5)  # clearly, and not for long
    assert len(world.delivered) == 1
    (alert,) = world.log.alerts()
    assert alert.open


def test_a_subject_of_which_nothing_can_be_said_is_right(world: World) -> None:
    world.look(edge_1=0.95, edge_2=0.95)
    assert world.look(60) == [("edge-1", True), ("edge-2", True)]
    world.kv = {"edge_2": 0.95}
    assert world.look() == []
    assert world.look(120) == [("edge-1", False)]


def test_what_becomes_graver_is_told_again_and_stays_one_alert(world: World) -> None:
    world.certificate = timedelta(days=20)
    world.look()
    world.look(60)
    world.certificate = timedelta(days=5)
    world.look(60)
    world.look(60)
    found = [(each.subject, each.severity) for each in world.delivered]
    assert found == [("gateway-1", "warning"), ("gateway-1", "critical")]
    assert len({each.id for each in world.delivered}) == len(world.log.alerts()) == 1
    assert world.delivered[0].device == "gateway-1"


def test_one_evaluates_at_a_time_and_another_takes_over(world: World) -> None:
    second = world.another("second")
    world.look(edge_1=0.95)
    assert second.step() is None
    world.look(30)
    assert second.step() is None
    world.look(30)
    world.at += timedelta(seconds=61)
    assert second.step() == []  # the first has not evaluated for more than three times 10 s
    assert world.look() is None
    world.at += timedelta(seconds=20)
    second.step()
    assert len(world.log.alerts()) == len(world.delivered) == 1


def test_a_process_that_ends_lets_another_evaluate_at_once(world: World) -> None:
    second = world.another("second")
    world.look(edge_1=0.95)
    second.close()
    world.at += timedelta(seconds=1)
    assert second.step() is None, "it did not hold the lease"
    world.evaluator.close()
    world.at += timedelta(seconds=1)
    assert second.step() == []
    assert world.look() is None
    second.close()
    assert world.look(60) == [], "what it saw before the other one evaluated does not count"
    world.away = True
    second.close()  # what cannot be given up expires


def test_the_last_evaluation_is_known_and_old_after_a_minute(world: World) -> None:
    assert world.log.evaluation() == Evaluation(None, None, recent=False)
    assert "Never evaluated" in world.log.evaluation().sentence
    world.look()
    world.at += timedelta(seconds=60)
    assert world.log.evaluation() == Evaluation(START, "first", recent=True)
    assert world.log.evaluation().sentence == ""
    world.at += timedelta(seconds=1)
    assert "Not evaluated since 2026-05-01 12:00:00 UTC" in world.log.evaluation().sentence
    world.another("second").step()
    assert world.log.evaluation() == Evaluation(world.at, "second", recent=True)


def test_a_lease_of_a_holder_whose_clock_was_far_ahead_does_not_hold(world: World) -> None:
    ahead = world.another("ahead")
    world.at += timedelta(days=365)
    assert ahead.step() == []
    world.at = START
    assert world.look() == []


STEPS = [timedelta(hours=1), timedelta(days=-365)]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_the_clock_delays_alerts_by_no_more_than_their_holds(world: World, step: timedelta) -> None:
    world.look(edge_1=0.95)
    world.look(step.total_seconds())
    assert world.look(59) == []
    assert world.look(1) == [("edge-1", True)]
    world.look(10, edge_1=0.5)
    world.look(-step.total_seconds())
    assert world.look(119) == []
    assert world.look(1) == [("edge-1", False)]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_the_clock_makes_no_alert_of_silence(world: World, step: timedelta) -> None:
    world.look(edge_1=0.5)
    world.silent_since = world.at
    world.look(step.total_seconds())
    assert world.look(59) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_the_clock_delays_another_attempt_to_deliver_by_no_more_than_its_wait(
    world: World, step: timedelta
) -> None:
    attempts = list[AlertView]()

    def refuse(alerts: Sequence[AlertView]) -> None:
        attempts.extend(alerts)
        raise DeliveryFailed("Not now.")

    world.receiver.send = refuse
    world.look(edge_1=0.95)
    world.look(60)
    assert len(attempts) == 1
    world.look(step.total_seconds())
    world.look(300)
    assert len(attempts) >= 2


@pytest.mark.parametrize("step", [timedelta(), *STEPS])
def test_a_database_that_is_away_is_told_though_it_holds_no_alert(world: World, step: timedelta) -> None:
    world.away = True
    assert world.look() is None
    world.look(step.total_seconds())
    if step <= timedelta():
        assert world.look(59) is None
        assert world.delivered == []
    world.look(60)
    world.away = False
    world.look(60)
    assert [(each.rule, each.state) for each in world.delivered] == [
        (DATABASE_AWAY, CRITICAL),
        (DATABASE_AWAY, CLEARED),
    ]
    assert world.delivered[0].id == world.delivered[1].id


def test_of_several_processes_one_reports_that_the_database_is_away(world: World) -> None:
    second = world.another("second")
    world.look()
    assert second.step() is None
    world.away = True
    for _ in range(4):
        world.look(30)
        second.step()
    assert [each.rule for each in world.delivered] == [DATABASE_AWAY]


def test_what_an_evaluator_has_not_delivered_the_next_one_sends(world: World) -> None:
    world.look(edge_1=0.95)
    lost = list[AlertView]()

    def refuse(alerts: Sequence[AlertView]) -> None:
        lost.extend(alerts)
        raise DeliveryFailed("Not now.")

    world.receiver.send = refuse
    world.look(60)
    world.look(2)
    assert [each.subject for each in lost] == ["edge-1"]
    world.evaluator, world.receiver.send = world.another("second"), world.delivered.extend
    world.look(31)
    world.look(10)
    assert [(each.id, each.state) for each in world.delivered] == [(lost[0].id, OPEN)]
    assert [each.delivered for each in world.log.alerts(open=True)] == ["warning"]


def test_what_is_not_accepted_is_sent_again_and_later_each_time(world: World) -> None:
    attempts = list[float]()

    def refuse(_alerts: Sequence[AlertView]) -> None:
        attempts.append((world.at - START).total_seconds())
        raise DeliveryFailed("Not now.")

    world.receiver.send = refuse
    world.look(edge_1=0.95)
    for _ in range(76):
        world.look(10)
    assert attempts == [60, 70, 90, 130, 210, 370, 670]
    world.receiver.send = world.delivered.extend
    for _ in range(31):
        world.look(10)
    world.look(10, edge_1=0.5)
    world.look(120)
    world.look(10)
    assert [each.state for each in world.delivered] == [OPEN, CLEARED]
    assert [each.delivered for each in world.log.alerts()] == ["cleared"]


def test_alerts_of_one_rule_are_delivered_together(world: World) -> None:
    together = list[int]()
    world.receiver.send = lambda alerts: together.append(len(alerts))
    world.certificate = timedelta(days=5)
    world.look(**{f"edge_{number}": 0.95 for number in range(150)})
    world.look(60)
    assert sorted(together) == [1, 50, 100]


def test_what_has_lasted_by_the_log_is_an_alert_at_once(world: World) -> None:
    world.kv, world.silent_since = {"edge_1": 0.5}, START - timedelta(minutes=2)
    assert world.look() == [("edge-1", True)]
    (alert,) = world.log.alerts(open=True)
    assert (alert.rule, alert.since_at) == ("edge-silent", START - timedelta(minutes=2))


def test_after_an_outage_of_the_database_edges_have_time_to_write_again(world: World) -> None:
    world.kv = {"edge_1": 0.5}
    world.look()
    world.away = True
    world.look(10)
    world.away, world.silent_since = False, START
    assert world.look(120) == []
    assert world.look(59) == []
    assert world.look(1) == [("edge-1", True)]


def test_alerts_about_which_nothing_is_new_are_refreshed_by_one_statement(world: World) -> None:
    world.look(**{f"edge_{number}": 0.95 for number in range(40)})
    world.look(60)
    written = list[Any]()

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if statement.startswith("UPDATE alerts "):
            written.append(parameters)

    event.listen(world.store.engine, "before_cursor_execute", note)
    world.look(10, **world.kv | {"edge_6": 0.97, "edge_7": 0.97, "edge_8": 0.8})
    changed, refreshed = written
    assert len(changed) == 2, "only edge-6 and edge-7 say something new"
    assert not isinstance(refreshed, list), "one statement for all"
    by_subject = {each.subject: each for each in world.log.alerts(open=True)}
    assert by_subject.pop("edge-8").last_at == world.at - timedelta(seconds=10)
    assert {each.last_at for each in by_subject.values()} == {world.at}
    assert (by_subject["edge-7"].value, by_subject["edge-9"].value) == (0.97, 0.95)


def test_no_more_are_open_than_there_is_room_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_edge.session_log.alerts.alerts.MAX_OPEN", 5)
    world.look(**{f"edge_{number}": 0.95 for number in range(40)})
    world.look(60)
    assert len(world.log.alerts(open=True)) == 5
