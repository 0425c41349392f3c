from dataclasses import replace
from datetime import datetime
from typing import Any

from fleet_edge.store import rollouts
from fleet_edge.store.database import Store
from fleet_edge.store.event_codes import EVENT_CODES, EventKind
from fleet_edge.store.rollouts import RolloutOutcome
from fleet_edge.store.views import MachineRollout
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows
from tests.fleet_edge.store.samples import after

OLD, NEW = "0.1.0-aaaaaaaa", "0.2.0-bbbbbbbb"


def waiting(name: str = "sensor-1", **changes: Any) -> MachineRollout:
    return replace(
        MachineRollout(
            rollout="r1",
            host=f"host-of-{name}",
            kind="device",
            name=name,
            action="rollout",
            wanted=NEW,
            found=OLD,
            running=None,
            started_at=after(0),
            ended_at=None,
            outcome="waiting",
            sentence="",
            who="ada",
        ),
        **changes,
    )


def done(name: str = "sensor-1", *, at: datetime, outcome: RolloutOutcome, **changes: Any) -> MachineRollout:
    running = NEW if outcome is RolloutOutcome.PROVEN else OLD
    return waiting(name, outcome=outcome, ended_at=at, **{"running": running, **changes})


def write(store: Store, *machines: MachineRollout, stopped: bool = False) -> None:
    with store.engine.begin() as connection:
        rollouts.record_rollouts(connection, machines, stopped=stopped)


def releases(store: Store) -> dict[str, tuple[str | None, str | None, bool]]:
    with store.engine.connect() as connection:
        return {each.name: (each.wanted, each.running, each.drift) for each in rollouts.releases(connection)}


def test_a_machine_is_written_as_it_begins_and_completed_as_it_ends(store: Store) -> None:
    write(store, waiting(), waiting("sensor-2"))
    assert releases(store) == {"sensor-1": (NEW, OLD, True), "sensor-2": (NEW, OLD, True)}
    write(store, done(at=after(60), outcome=RolloutOutcome.PROVEN))
    assert releases(store) == {"sensor-1": (NEW, NEW, False), "sensor-2": (NEW, OLD, True)}
    with store.engine.connect() as connection:
        [whole] = rollouts.rollouts(connection, since=None, limit=9)
        assert (whole.machines, whole.outcomes, whole.ended_at) == (2, {"proven": 1, "waiting": 1}, None)
        assert (whole.wanted, whole.who, whole.started_at) == (NEW, "ada", after(0))


def test_a_row_that_is_written_again_changes_nothing(store: Store) -> None:
    rows = [waiting(), done(at=after(60), outcome=RolloutOutcome.PROVEN)]
    write(store, *rows)
    before = all_rows(store)
    write(store, *rows)
    write(store, waiting())  # late, and true no longer
    assert all_rows(store) == before
    assert len(before["events"]) == 1


def test_a_rollout_that_stops_leaves_the_others_untouched(store: Store) -> None:
    write(store, waiting(), waiting("sensor-2"), waiting("sensor-3"))
    write(store, done(at=after(30), outcome=RolloutOutcome.PROVEN))
    failed = done("sensor-2", at=after(60), outcome=RolloutOutcome.WENT_BACK, sentence="It drafts nonsense.")
    write(store, failed, stopped=True)
    with store.engine.connect() as connection:
        [whole] = rollouts.rollouts(connection, since=None, limit=9)
        last = rollouts.machines_of(connection, "r1")[-1]
    assert whole.outcomes == {"proven": 1, "went-back": 1, "untouched": 1}
    assert whole.ended_at == after(60)
    assert (last.name, last.outcome, last.running) == ("sensor-3", "untouched", OLD)
    assert [name for name, (_, _, drift) in releases(store).items() if drift] == ["sensor-2", "sensor-3"]


def test_each_machine_that_is_done_is_an_event_of_its_device_or_edge(store: Store) -> None:
    edge = done("edge-1", at=after(5), outcome=RolloutOutcome.PROVEN, kind="edge")
    device = done(at=after(6), outcome=RolloutOutcome.WENT_BACK, sentence="It drafts nonsense.")
    write(store, waiting("sensor-2"), edge, device)
    events = sorted(all_rows(store)["events"], key=lambda row: row["at"])
    assert [(row["edge"], row["device"], row["kind"], row["code"], row["who"], row["severity"]) for row in events] == [
        ("edge-1", None, "rollout", "proven", "ada", "info"),
        ("the administrator", "sensor-1", "rollout", "went-back", "ada", "error"),
    ]
    assert events[1]["sentence"] == f"{NEW} failed its tests; {OLD} runs again. It drafts nonsense."


def test_the_latest_rollout_says_what_a_machine_should_run(store: Store) -> None:
    write(store, done(at=after(9), outcome=RolloutOutcome.PROVEN))
    back = {"rollout": "r2", "action": "rollback", "started_at": after(100), "wanted": OLD, "found": NEW}
    write(store, done(at=after(109), outcome=RolloutOutcome.PROVEN, running=OLD, **back))
    assert releases(store) == {"sensor-1": (OLD, OLD, False)}
    with store.engine.connect() as connection:
        assert [each.rollout for each in rollouts.rollouts(connection, since=None, limit=9)] == ["r2", "r1"]
        assert [each.rollout for each in rollouts.rollouts(connection, since=after(50), limit=9)] == ["r2"]


def test_a_machine_that_says_another_version_than_it_should_run_drifts(store: Store) -> None:
    write(store, done(at=after(9), outcome=RolloutOutcome.PROVEN))
    store.apply([samples.device_seen(software="0.2.0")])
    assert releases(store)["sensor-1"] == (NEW, NEW, False)
    store.apply([samples.device_seen(software="0.1.9", at=after(50))])
    assert releases(store)["sensor-1"] == (NEW, NEW, True)


def test_a_machine_that_the_fleet_was_taken_off_does_not_drift(store: Store) -> None:
    gone = {"action": "decommission", "wanted": None, "running": None}
    write(store, done(at=after(9), outcome=RolloutOutcome.REMOVED, **gone))
    assert releases(store) == {"sensor-1": (None, None, False)}


def test_old_rollouts_are_deleted_as_new_ones_are_written(store: Store) -> None:
    for number in range(503):
        write(store, waiting(rollout=f"r{number}", started_at=after(number)))
    with store.engine.connect() as connection:
        kept = [each.rollout for each in rollouts.rollouts(connection, since=None, limit=1000)]
    assert kept == [f"r{number}" for number in range(502, 2, -1)]


def test_each_outcome_is_an_event_code() -> None:
    codes = {each.code for each in EVENT_CODES if each.kind is EventKind.ROLLOUT}
    assert codes == {outcome.value for outcome in RolloutOutcome} - {"waiting"}
