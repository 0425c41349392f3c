import threading
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from fleet_device.requests.generate import GenerateRequest
from fleet_device.session.machine import DeviceSession
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.housekeeping import close_abandoned
from fleet_edge.session_log.records import segment_time
from schemas.codec import encode_open
from schemas.control import Presence
from schemas.reasons import EndReason
from schemas.topics import Topic, build
from tests.support.memory_edges import DRAIN_S, LENGTH, POLICY, PROMPT, RunningEdge, Site, Writing, undisturbed
from tests.support.memory_fleet import FLEET, terms
from tests.support.memory_link import MemoryLink
from tests.support.waiting import PATIENCE_S, until

AT = 10  # tokens

SEGMENTS = "SELECT edge, reason, tokens, resumed_tokens, rounds, uplink_bytes FROM segments ORDER BY segment"
SESSIONS = "SELECT reason, tokens, device_tokens, device_rounds, device_uplink_bytes FROM sessions"


def drain(site: Site, edge: RunningEdge) -> None:
    edge.drain.set()
    until(lambda: site.state(edge.service.settings.edge) is Presence.DRAINING)


def hold(site: Site, edge: RunningEdge) -> None:
    link = MemoryLink(site.broker, "holder")
    link.start(timeout_s=1.0)
    asked = terms(1)
    link.publish(build(Topic.OPEN, fleet=FLEET, device="holder"), encode_open(DeviceSession(asked).open()))
    until(lambda: edge.sessions == 1)


def test_a_session_that_ends_within_the_drain_is_undisturbed(site: Site) -> None:
    with site.edge() as edge, site.device() as device:
        done = Writing(device, at=AT, disturb=lambda: drain(site, edge)).finish()
        edge.join()  # ends because no session is open
    assert (done.tokens, done.reason, done.resumes) == (undisturbed(), EndReason.LENGTH, 0)
    assert site.states == [("edge-1", each) for each in (Presence.ONLINE, Presence.DRAINING, Presence.OFFLINE)]
    assert site.state("edge-1") is Presence.OFFLINE
    (segment,) = site.rows(SEGMENTS)
    assert (segment["reason"], segment["tokens"]) == ("length", LENGTH)
    assert site.rows("SELECT presence FROM edges") == [{"presence": "offline"}]


def test_a_session_ends_with_its_target_however_long_that_takes_before_an_exchange(site: Site) -> None:
    with site.edge() as edge, site.device() as device:

        def exchange() -> None:
            edge.whole_drain.set()
            drain(site, edge)
            edge.clock.seconds += 2 * DRAIN_S
            for _ in range(2):  # the time limit is behind each step
                edge.calls.clear()
                until(lambda: edge.ended or "step" in edge.calls)

        done = Writing(device, at=AT, disturb=exchange).finish()
        edge.join()
    assert (done.tokens, done.resumes, edge.handed_over) == (undisturbed(), 0, 0)


def test_the_time_of_a_whole_drain_can_be_limited_after_all(site: Site) -> None:
    with site.edge() as edge:
        hold(site, edge)
        edge.whole_drain.set()
        drain(site, edge)
        edge.whole_drain.clear()
        until(lambda: "end" in edge.calls)
        edge.reach_the_deadline()
    assert edge.handed_over == 1


def test_without_another_edge_a_device_waits_until_this_one_is_back(site: Site) -> None:
    with site.device() as device:
        with site.edge() as edge:

            def end() -> None:
                drain(site, edge)
                edge.reach_the_deadline()

            writing = Writing(device, at=AT, disturb=end)
            edge.join()
        until(lambda: site.opens >= 2)  # it has heard, and asks for an edge
        with site.edge():
            done = writing.finish()
    assert (done.tokens, done.resumes) == (undisturbed(), 1)
    assert [(row["edge"], row["reason"]) for row in site.rows(SEGMENTS)] == [
        ("edge-1", "handed-over"),
        ("edge-1", "length"),
    ]
    assert [row["reason"] for row in site.rows(SESSIONS)] == ["length"]


def test_an_edge_that_drains_is_asked_for_nothing_new(site: Site) -> None:
    with site.edge() as edge, site.device() as device:
        hold(site, edge)
        with site.edge("edge-2"):
            drain(site, edge)
            for _ in range(4):  # Opens go round among the edges that take them
                done = device.agent.generate(GenerateRequest(PROMPT, policy=POLICY, max_new_tokens=LENGTH))
                assert done.tokens == undisturbed()
        assert edge.sessions == 1
        edge.reach_the_deadline()
    assert site.rows("SELECT code FROM events WHERE severity != 'info'") == []
    assert {row["edge"] for row in site.rows(SEGMENTS) if row["reason"] == "length"} == {"edge-2"}


def test_an_open_that_finds_only_a_draining_edge_waits_for_the_next_one(site: Site) -> None:
    with ExitStack() as second, site.edge() as edge, site.device() as device:
        hold(site, edge)
        drain(site, edge)
        writing = Writing(device, at=1, disturb=lambda: None)
        until(lambda: site.opens >= 2)
        second.enter_context(site.edge("edge-2"))
        assert writing.finish().tokens == undisturbed()


def test_the_end_is_told_when_it_begins_and_steps_go_on(site: Site) -> None:
    with site.edge() as edge:
        hold(site, edge)
        drain(site, edge)
        until(lambda: edge.calls == ["step", "end", "step"])
        edge.reach_the_deadline()
        assert edge.calls == ["step", "end", "step"]
    with site.edge("edge-2") as edge:
        until(lambda: edge.calls == ["step"])
        edge.stop.set()
        edge.join()
        assert edge.calls == ["step", "end"]
    assert (edge.drained, edge.handed_over) == (None, 0)


def test_a_drain_can_be_cut_short(site: Site) -> None:
    with site.edge() as edge:
        hold(site, edge)
        drain(site, edge)
        edge.stop.set()
        edge.join()
    assert site.states[-1] == ("edge-1", Presence.OFFLINE)
    assert [row["reason"] for row in site.rows(SEGMENTS)] == ["handed-over"]
    assert (edge.drained, edge.handed_over) == (1, 1)


def test_a_session_that_nobody_resumes_is_open_until_it_counts_as_lost(site: Site, tmp_path: Path) -> None:
    with site.edge() as edge:
        hold(site, edge)
        edge.stop.set()
        edge.join()
    assert [row["reason"] for row in site.rows("SELECT reason FROM sessions")] == [None]
    (segment,) = site.rows("SELECT segment FROM segments")
    with open_store(f"sqlite:///{tmp_path / 'fleet.sqlite3'}") as store:
        later = segment_time(segment["segment"]) + timedelta(hours=7)
        assert close_abandoned(store, now=later, abandoned_after=timedelta(hours=6)) == 1
    assert [row["reason"] for row in site.rows("SELECT reason FROM sessions")] == ["lost"]
    assert [row["reason"] for row in site.rows(SEGMENTS)] == ["handed-over"]  # which says when it was, and why


def test_a_reconnect_while_draining_still_announces_draining(site: Site) -> None:
    with site.edge() as edge:
        hold(site, edge)
        drain(site, edge)
        site.broker.kill(f"{FLEET}:edge-1")
        until(lambda: site.state("edge-1") is Presence.OFFLINE)
        site.broker.revive(f"{FLEET}:edge-1")
        until(lambda: site.state("edge-1") is Presence.DRAINING)
        edge.reach_the_deadline()
    assert site.state("edge-1") is Presence.OFFLINE


def test_hanging_jobs_delay_neither_devices_nor_log(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    with site.edge() as edge:
        hold(site, edge)
        monkeypatch.setattr(edge.service._jobs, "stop", lambda: may_end.wait(PATIENCE_S))
        edge.stop.set()
        until(lambda: site.state("edge-1") is Presence.OFFLINE)
        until(lambda: site.rows("SELECT presence FROM edges") == [{"presence": "offline"}])
        until(lambda: not any(thread.name.startswith("store") for thread in threading.enumerate()))
        assert [row["reason"] for row in site.rows(SEGMENTS)] == ["handed-over"]
        assert not edge.ended
        may_end.set()
        edge.join()


def test_an_edge_evaluates_alerts_and_leaves_them_to_another_when_it_ends(site: Site) -> None:
    lease = "SELECT holder FROM alert_leases WHERE evaluated_at IS NOT NULL"
    with site.edge("edge-2") as other:
        with site.edge() as edge:
            for each in (edge, other):
                until(lambda each=each: each.service._jobs.run("evaluate-alerts"))
            assert site.rows(lease) == [{"holder": "edge-1"}]
        until(lambda: other.service._jobs.run("evaluate-alerts") and site.rows(lease) == [{"holder": "edge-2"}])
