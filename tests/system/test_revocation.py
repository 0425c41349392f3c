import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_common.identity.certificates import IdentityRole
from fleet_common.identity.enforcement import AccessProof, enforce_change
from fleet_common.identity.files import CutOffFailed
from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.link import PublishOutcome, Will
from fleet_common.mqtt.paho_link import PahoLink
from schemas.topics import Topic, build, wildcard
from tests.support.links import START_S, Inbox
from tests.support.tls_fleet import FLEET, HOST, TlsFleet, tls_fleet
from tests.support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.broker

EDGE = "edge-1"
LOST, OTHER = "sensor-lost", "sensor-kept"
REFUSED = "certificate verify failed"


def state(device: str) -> str:
    return build(Topic.STATE, fleet=FLEET, device=device)


def draft(device: str) -> str:
    return build(Topic.DRAFT, fleet=FLEET, device=device, edge=EDGE)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[TlsFleet]:
    with tls_fleet(tmp_path) as made:
        yield made


@pytest.fixture
def edge(fleet: TlsFleet) -> tuple[PahoLink, Inbox]:
    link, inbox = fleet.link(fleet.enrol(EDGE, IdentityRole.EDGE), EDGE), Inbox()
    link.subscribe(wildcard(Topic.STATE, fleet=FLEET), inbox)
    link.subscribe(wildcard(Topic.DRAFT, fleet=FLEET, edge=EDGE), inbox)
    link.start(timeout_s=START_S)
    return link, inbox


def revoke(fleet: TlsFleet, name: str) -> AccessProof | None:
    return enforce_change(fleet.authority.revoke([name]), fleet.access, timeout_s=PATIENCE_S)


def connected(fleet: TlsFleet, name: str) -> PahoLink:
    link = fleet.link(fleet.enrol(name), name, will=Will(state(name), b"gone"))
    link.start(timeout_s=START_S)
    return link


class Chatter:
    def __init__(self, link: PahoLink, topic: str) -> None:
        self.outcomes: list[int] = []
        self.sent = 0
        self._link, self._topic = link, topic
        self._ended = threading.Event()
        self._answered = threading.Semaphore(16)
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def _talk(self) -> None:
        while not self._ended.is_set():
            if self._answered.acquire(timeout=0.1):
                self._link.publish(self._topic, b"%d" % self.sent, alias=True, on_outcome=self._note)
                self.sent += 1

    def _note(self, outcome: PublishOutcome) -> None:
        self.outcomes.append(outcome.reason)
        self._answered.release()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def test_a_live_session_ends_and_the_others_go_on(fleet: TlsFleet, edge: tuple[PahoLink, Inbox]) -> None:
    link, inbox = edge
    lost, other = connected(fleet, LOST), connected(fleet, OTHER)
    chatter = Chatter(other, draft(OTHER))
    until(lambda: len(chatter.outcomes) > 20)
    done = revoke(fleet, LOST)
    assert done is not None
    assert done.ended == (LOST,)
    until(lambda: not lost.connected)
    until(lambda: (state(LOST), b"gone") in {(message.topic, message.payload) for message in inbox})
    heard = len(chatter.outcomes)
    until(lambda: len(chatter.outcomes) > heard + 20)
    chatter.end()
    until(lambda: inbox.payloads[-1] == b"%d" % (len(chatter.outcomes) - 1))
    drafts = [message.payload for message in inbox if message.topic == draft(OTHER)]
    assert drafts == [b"%d" % number for number in range(len(drafts))], "lost, repeated or out of order"
    assert set(chatter.outcomes) == {0}
    for undisturbed in (link, other):
        assert undisturbed.counters.connects == 1
        assert undisturbed.counters.losses == 0
    assert not lost.connected
    print(f"in force after {done.in_force_s:.3f} s")


def test_it_cannot_come_back_under_any_client_id(fleet: TlsFleet, edge: tuple[PahoLink, Inbox]) -> None:
    tls = fleet.enrol(LOST)
    fleet.link(tls, LOST).start(timeout_s=START_S)
    revoke(fleet, LOST)
    for client_id in (LOST, OTHER, EDGE, ""):
        with pytest.raises(ConnectFailed, match="revoked") as refusal:
            fleet.link(tls, client_id).start(timeout_s=START_S)
        assert refusal.value.final
    assert edge[0].counters.losses == 0


def test_it_cannot_come_back_with_an_older_certificate(fleet: TlsFleet) -> None:
    old = fleet.enrol(LOST)
    newer = fleet.folder / "newer.pem"
    newer.write_text(fleet.authority.renew(LOST, early=True).pem)
    revoke(fleet, LOST)
    for certificate in (old.certificate, newer):
        renewed = type(old)(old.ca, certificate, old.key)
        with pytest.raises(ConnectFailed, match="revoked"):
            fleet.link(renewed, LOST).start(timeout_s=START_S)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_it_cannot_come_back_with_an_earlier_tls_session(fleet: TlsFleet, version: ssl.TLSVersion) -> None:
    # A server that resumes a TLS session does not check the certificate again; the reload ends all sessions.
    tls = fleet.enrol(LOST)
    assert tls.certificate is not None
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.certificate, tls.key)
    context.minimum_version = context.maximum_version = version

    def knock(session: ssl.SSLSession | None) -> ssl.SSLSession | None:
        with (
            socket.create_connection((HOST, fleet.broker.port), timeout=START_S) as sock,
            context.wrap_socket(sock, server_hostname=HOST, session=session) as stream,
        ):
            stream.sendall(b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x0a\x00\x00\x00")
            assert stream.recv(1) == b"\x20"
            assert stream.session_reused == (session is not None)
            return stream.session

    session = knock(None)
    assert session is not None
    session = knock(session)
    revoke(fleet, LOST)
    refused = fleet.broker.log().count(REFUSED)
    with pytest.raises(OSError):  # noqa: PT011 - the alert, or a reset that overtakes it
        knock(session)
    assert fleet.broker.await_log(REFUSED, count=refused + 1)


def test_a_broker_that_was_not_told_is_found_out(fleet: TlsFleet) -> None:
    lost = connected(fleet, LOST)
    untold = fleet.access.model_copy(update={"pid_file": None})
    with pytest.raises(CutOffFailed, match="reload"):
        enforce_change(fleet.authority.revoke([LOST]), untold, timeout_s=1.5)
    done = revoke(fleet, LOST)
    assert done is not None
    until(lambda: not lost.connected)


def test_a_list_that_goes_elsewhere_is_found_out(fleet: TlsFleet) -> None:
    elsewhere = fleet.access.model_copy(update={"crl": fleet.folder / "elsewhere.pem"})
    fleet.enrol(LOST)
    with pytest.raises(CutOffFailed, match="look"):
        enforce_change(fleet.authority.revoke([LOST]), elsewhere, timeout_s=1.5)


def test_it_takes_one_command(fleet: TlsFleet) -> None:
    lost, other = connected(fleet, LOST), connected(fleet, OTHER)
    fleet.access.save(fleet.authority.folder.broker)
    command = [sys.executable, "-m", "fleet_cli.main", "broker", "revoke", LOST, "--json"]
    ran = subprocess.run(
        [*command, "--ca", str(fleet.authority.folder.path)], capture_output=True, text=True, check=False
    )
    until(lambda: not lost.connected)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert (said["in_force"], said["sessions_ended"]) == (True, [LOST])
    assert other.counters.losses == 0
    assert other.connected
