from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from fleet_admin.steering import SteeringError, SteeringLog
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.engine import parse_url
from fleet_edge.session_log.errors import StoreError, StoreUnavailable
from fleet_edge.session_log.filters import Filter
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.views import AuditEntry
from schemas.control import CommandRequest
from tests.fleet_admin.steering.conftest import ALICE, NOW
from tests.fleet_edge.store import samples


def test_labels_are_given_and_taken_off_and_who_did_it_is_kept(log: SteeringLog) -> None:
    assert log.label(["gw-1", "gw-9"], add=["hall_a", "roof"], actor=ALICE) == {
        "gw-1": ("hall_a", "roof"),
        "gw-9": ("hall_a", "roof"),
    }
    assert log.label(["gw-1"], add=["hall_a"], remove=["roof", "never"], actor=ALICE) == {"gw-1": ("hall_a",)}
    assert log.labels() == {"gw-1": ("hall_a",), "gw-9": ("hall_a", "roof")}
    log.label(["gw-1"], add=["hall_a"], actor=ALICE)  # nothing changes, and nothing is recorded
    found = [(each.who, each.action, each.subject, each.before, each.after, each.source) for each in log.audit()]
    assert sorted(found) == [
        ("alice", "label", "gw-1", "", "hall_a roof", "desk"),
        ("alice", "label", "gw-1", "hall_a roof", "hall_a", "desk"),
        ("alice", "label", "gw-9", "", "hall_a roof", "desk"),
    ]


@pytest.mark.parametrize("word", ["", "a b", "a/b", "+", "#", "a" * 64, "-a", "x\x1b[2J", "'; DROP TABLE labels; --"])
def test_what_cannot_be_a_label_or_a_device_is_refused(log: SteeringLog, word: str) -> None:
    for given in ({"devices": ["gw-1"], "add": [word]}, {"devices": [word], "add": ["a"]}):
        with pytest.raises(SteeringError):
            log.label(actor=ALICE, **given)
    assert log.labels() == {}


def test_a_retired_device_is_out_of_service_until_it_is_put_back(log: SteeringLog) -> None:
    log.retire("gw-1", actor=ALICE)
    assert log.known()["gw-1"].retired_at == NOW
    log.retire("gw-1", undo=True, actor=ALICE)
    assert log.known()["gw-1"].retired_at is None
    with pytest.raises(SteeringError, match="gw-9"):
        log.retire("gw-9", actor=ALICE)
    assert {(each.action, each.after) for each in log.audit()} == {("retire", "retired"), ("restore", "in service")}


def test_an_edge_that_sees_a_retired_device_does_not_put_it_back(log: SteeringLog, url: str) -> None:
    log.retire("gw-1", actor=ALICE)
    with open_store(url) as store:
        store.apply([samples.device_seen(device="gw-1", at=NOW + timedelta(hours=1))])
    assert log.known()["gw-1"].retired_at == NOW


def test_commands_are_kept_with_what_came_of_them(log: SteeringLog) -> None:
    requests = {
        f"gw-{number}": CommandRequest(id=f"{number:016x}", command="log-tail", deadline=NOW, who="alice")
        for number in (1, 2)
    }
    log.keep_commands(requests, [], batch="b")
    log.end_commands({f"{1:016x}": ("ok", "5 lines.")})
    found = {each.device: (each.outcome, each.sentence) for each in log.commands()}
    assert found == {"gw-1": ("ok", "5 lines."), "gw-2": (None, None)}
    assert [each.device for each in log.commands(where=[Filter("device", "=", "gw-2")])] == ["gw-2"]
    assert log.commands(since=NOW + timedelta(seconds=1)) == []


def test_the_audit_log_is_searched_by_who_what_whom_and_when(log: SteeringLog) -> None:
    ids = log.record(
        [
            AuditEntry(who="alice", action="set", subject="gw-1", before="a", after="b", outcome="asked"),
            AuditEntry(who="bob", action="quarantine", subject="gw-2"),
        ]
    )
    log.end_audit({ids[0]: "in force"})
    assert [each.outcome for each in log.audit(where=[Filter("who", "=", "alice")])] == ["in force"]
    assert [each.who for each in log.audit(where=[Filter("subject", "=", "gw-2")])] == ["bob"]
    assert [each.who for each in log.audit(where=[Filter("action", "=", "quarantine")])] == ["bob"]
    assert log.audit(until=NOW) == []
    assert len(log.audit(since="1s")) == 2
    assert len(log.audit(limit=1)) == 1
    with pytest.raises(SteeringError):
        log.audit(since="yesterday")


def test_quarantines_are_in_the_audit_log(log: SteeringLog, url: str) -> None:
    with SessionLog(url) as sessions:
        sessions.quarantine("gw-1", duration="2h", reason="It floods.", who="bob", source="desk")
        sessions.unquarantine("gw-1", who="bob")
        sessions.unquarantine("gw-1")
    last, lifted, quarantined = log.audit()
    assert (quarantined.who, quarantined.action) == ("bob", "quarantine")
    assert (quarantined.subject, quarantined.source) == ("gw-1", "desk")
    assert "It floods." in (quarantined.after or "")
    assert "It floods." in (lifted.before or "")
    assert (last.who, last.before) == ("the administrator", None)


def test_what_cannot_be_recorded_is_told(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError):
        SteeringLog(f"sqlite:///{tmp_path / 'none.sqlite3'}")
    engine = create_engine(parse_url(url))
    with SteeringLog(url) as log:
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE audit"))
        engine.dispose()
        with pytest.raises(StoreUnavailable):
            log.label(["gw-1"], add=["a"], actor=ALICE)
        assert log.labels() == {}, "nothing of it happens"


def test_an_entry_is_one_printable_line_of_bounded_length(log: SteeringLog) -> None:
    log.record([AuditEntry(who="a\nb\x1b[2J", action="set", subject="gw-1", after="x" * 10_000)])
    [found] = log.audit()
    assert found.who.isprintable()
    assert len(found.after or "") == 2001
