from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fleet_admin.steering import SteeringLog
from fleet_admin.steering.access import AccessFact, access_facts, carry_out, record_access, request_access
from fleet_common.identity.authority import Authority
from fleet_common.identity.certificates import AccessAction
from fleet_common.identity.enforcement import BrokerAccess
from fleet_edge.session_log.filters import Filter
from fleet_edge.session_log.log import SessionLog
from schemas.errors import InvalidName
from tests.fleet_admin.steering.conftest import ALICE, NOW
from tests.support.tls_fleet import enrol, new_authority

LATE = -1.0
"""A limit that has passed when a request for one device is stored."""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = new_authority(tmp_path / "ca")
    enrol(made, "gw-1", tmp_path / "identities")
    return made


@pytest.fixture
def live_log(url: str) -> Iterator[SteeringLog]:
    """Return the log with the machine's clock, by which requests have a deadline."""
    with SteeringLog(url) as log:
        yield log


def facts(log: SteeringLog) -> dict[str, AccessFact]:
    found = access_facts(log, "gw-1", client=None, absence="", quarantine=None, certificate_until=None, now=NOW)
    return {each.fact: each for each in found}


def test_a_request_that_nobody_carries_out_ends_and_is_never_carried_out(
    live_log: SteeringLog, authority: Authority
) -> None:
    [result] = request_access(live_log, AccessAction.SUSPEND, ["gw-1"], actor=ALICE, limit_s=LATE)
    assert result.outcome == "silent"
    carry_out(live_log, authority, BrokerAccess(host="127.0.0.1", port=1))
    assert {each.suspended for each in authority.entries()} == {False}
    [entry] = live_log.audit(where=[Filter("action", "=", "suspend")])
    assert (entry.who, entry.source, entry.outcome.partition(":")[0]) == ("alice", "desk", "silent")
    assert facts(live_log)["at the broker"].state == "accepted"
    assert facts(live_log)["latest request: suspend"].state == "silent"


def test_a_request_without_time_to_prove_it_is_not_begun(live_log: SteeringLog, authority: Authority) -> None:
    waiting = request_access(live_log, AccessAction.REVOKE, ["gw-1"], actor=ALICE, limit_s=5.0)
    carry_out(live_log, authority, BrokerAccess(host="127.0.0.1", port=1))
    assert {each.revoked_at for each in authority.entries()} == {None}
    waiting.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", ["", "../x", "a b", "x" * 64])
def test_an_invalid_name_is_not_requested(live_log: SteeringLog, device: str) -> None:
    with pytest.raises(InvalidName):
        request_access(live_log, AccessAction.REVOKE, ["gw-1", device], actor=ALICE)
    assert live_log.commands() == []
    assert live_log.audit() == []


def test_what_was_done_without_a_request_is_a_fact_too(live_log: SteeringLog, url: str) -> None:
    for action, state in (
        (AccessAction.SUSPEND, "refused"),
        (AccessAction.UNSUSPEND, "accepted"),
        (AccessAction.DISCONNECT, "accepted"),
        (AccessAction.REVOKE, "refused"),
    ):
        later = replace(ALICE, who=f"alice for {action}")
        record_access(live_log, action, "gw-1", "done", "Proven.", actor=later)
        assert facts(live_log)["at the broker"].state == state
    assert "alice for revoke" in facts(live_log)["at the broker"].sentence
    assert facts(live_log)["certificate"].state == "revoked"
    with SessionLog(url) as log:
        codes = {each.code for each in log.events(kind="identity")}
    assert codes == {"suspended", "unsuspended", "disconnected", "revoked"}


@pytest.mark.parametrize("outcome", ["failed", "recorded"])
def test_what_no_broker_has_proven_is_no_fact(live_log: SteeringLog, outcome: str) -> None:
    record_access(live_log, AccessAction.REVOKE, "gw-1", outcome, "No broker was notified.", actor=ALICE)
    found = facts(live_log)
    assert (found["at the broker"].state, found["latest request: revoke"].state) == ("accepted", outcome)
