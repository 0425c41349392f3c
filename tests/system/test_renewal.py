import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from fleet_common.identity.authority import Authority
from fleet_common.identity.certificates import IdentityRole
from fleet_common.identity.files import write_atomically
from fleet_common.mqtt.link import LinkCounters, PublishOutcome, Will
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import TlsSettings
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.requests.generate import GenerateRequest, Generation
from fleet_device.service import DeviceService
from fleet_edge.service import EdgeService
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from schemas.topics import Topic, build, wildcard
from tests.support.broker_trial import TrialBroker
from tests.support.links import START_S, Inbox
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tls_fleet import FLEET, TlsFleet, tls_fleet
from tests.support.toy_pair import ToyPair
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import Whole
from tests.system.test_revocation import Chatter

pytestmark = pytest.mark.broker

EDGE = "edge-1"
DEVICES = ("sensor-1", "sensor-2", "sensor-3")
LENGTH = 120
PROMPT = (1, 2)
PAIR = ToyPair.standard()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[TlsFleet]:
    with tls_fleet(tmp_path) as made:
        yield made


def renew(authority: Authority, name: str, tls: TlsSettings) -> None:
    """Replace a certificate as an operator's rollout does."""
    assert tls.certificate is not None
    write_atomically(tls.certificate, authority.renew(name, early=True).pem.encode(), mode=0o644)


@contextmanager
def stopped(broker: TrialBroker) -> Iterator[None]:
    assert broker._process is not None
    os.kill(broker._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker._process.pid, signal.SIGCONT)


def policy(seed: int) -> SamplingPolicy:
    return SamplingPolicy(mode=Mode.COUPLED, temperature=1.0, top_k=0, top_p=1.0, seed=seed)


def whole_of(fleet: TlsFleet, tls: TlsSettings) -> Whole:
    verifier = ScriptedVerifier(PAIR.target, PAIR.target.words, name="toy")
    return Whole(fleet.broker.port, fleet.folder, verifier, {"broker": fleet.settings(tls)})


def device(fleet: TlsFleet, name: str, tls: TlsSettings) -> AbstractContextManager[DeviceService]:
    # A busy machine must not look like a lost verdict.
    drafter = ScriptedDrafter(PAIR.draft, PAIR.draft.words)
    return whole_of(fleet, tls).device(drafter, name, broker=fleet.settings(tls), answer_s=120.0)


class Writer:
    def __init__(self, service: DeviceService, seed: int) -> None:
        self.service, self.seed = service, seed
        self.texts: list[Generation] = []
        self.failure: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        try:
            while not self._ended.is_set():
                agent = self.service.agent
                self.texts.append(
                    agent.generate(GenerateRequest(PROMPT, policy=policy(self.seed), max_new_tokens=LENGTH))
                )
        except Exception as error:  # noqa: BLE001 - for the test's own thread to show
            self.failure = error

    def end(self) -> None:
        self._ended.set()
        self._thread.join(PATIENCE_S)


def counters(service: EdgeService | DeviceService) -> LinkCounters:
    link = service.link if isinstance(service, DeviceService) else service._link
    assert isinstance(link, PahoLink)
    return link.counters


def test_every_certificate_is_renewed_under_load_and_no_session_fails(fleet: TlsFleet) -> None:
    identities = {name: fleet.enrol(name) for name in DEVICES}
    identities[EDGE] = fleet.enrol(EDGE, IdentityRole.EDGE)
    with ExitStack() as stack:
        services: dict[str, EdgeService | DeviceService] = {
            EDGE: stack.enter_context(whole_of(fleet, identities[EDGE]).edge())
        }
        writers = []
        for number, name in enumerate(DEVICES):
            writer = Writer(stack.enter_context(device(fleet, name, identities[name])), seed=number)
            stack.callback(writer.end)
            services[name] = writer.service
            writers.append(writer)
        until(lambda: all(len(writer.texts) >= 1 or writer.failure for writer in writers))
        for times in (1, 2):
            for name, service in services.items():
                renew(fleet.authority, name, identities[name])
                until(lambda: counters(service).renewals == times and counters(service).connects == times + 1)  # noqa: B023
        enough = [len(writer.texts) + 1 for writer in writers]
        until(lambda: all(len(w.texts) >= count or w.failure for w, count in zip(writers, enough, strict=True)))
        for writer in writers:
            writer.end()
        totals = {name: counters(service) for name, service in services.items()}
    for writer in writers:
        assert writer.failure is None
        assert {text.reason for text in writer.texts} == {EndReason.LENGTH}
        assert len({text.tokens for text in writer.texts}) == 1, "the same seed gives the same text, renewed or not"
        assert sum(text.resumes for text in writer.texts) == 0, "a session had to be opened again"
    assert {total.losses for total in totals.values()} == {0}
    assert {total.renewals for total in totals.values()} == {2}
    print(f"{sum(len(writer.texts) for writer in writers)} texts, {2 * len(totals)} renewals")


def test_a_receiver_that_is_renewed_loses_nothing_and_looks_present_throughout(fleet: TlsFleet) -> None:
    # For a sender, an edge without a session at the broker is gone: reason 0x10.
    tls, sender_tls = fleet.enrol(EDGE, IdentityRole.EDGE), fleet.enrol("sensor-1")
    receiver, sender, inbox, told = fleet.link(tls, EDGE), fleet.link(sender_tls, "sensor-1"), Inbox(), list[bool]()
    receiver.subscribe(wildcard(Topic.DRAFT, fleet=FLEET, edge=EDGE), inbox)
    receiver.on_connection(told.append)
    receiver.start(timeout_s=START_S)
    sender.start(timeout_s=START_S)
    chatter = Chatter(sender, build(Topic.DRAFT, fleet=FLEET, device="sensor-1", edge=EDGE))
    try:
        until(lambda: len(inbox) > 50)
        for times in (1, 2, 3):
            renew(fleet.authority, EDGE, tls)
            until(lambda: receiver.counters.connects == times + 1)  # noqa: B023
            heard = len(inbox)
            until(lambda: len(inbox) > heard + 50)  # noqa: B023
    finally:
        chatter.end()
    until(lambda: len(set(inbox.payloads)) == len(chatter.outcomes) == chatter.sent)
    assert set(chatter.outcomes) == {0}
    assert set(inbox.payloads) == {b"%d" % number for number in range(chatter.sent)}
    assert told == [True] * 4
    assert receiver.counters.losses == 0
    assert receiver.counters.renewals == 3


def test_the_others_do_not_hear_that_it_was_away(fleet: TlsFleet) -> None:
    tls = fleet.enrol("sensor-1")
    watcher, states = fleet.link(fleet.enrol(EDGE, IdentityRole.EDGE), EDGE), Inbox()
    watcher.subscribe(wildcard(Topic.STATE, fleet=FLEET), states)
    watcher.start(timeout_s=START_S)
    with device(fleet, "sensor-1", tls) as service:
        until(lambda: len(states) == 1)
        renew(fleet.authority, "sensor-1", tls)
        until(lambda: counters(service).connects == 2 and len(states) == 2)
        assert all(b'"online"' in payload for payload in states.payloads)
    until(lambda: b'"offline"' in states.payloads[-1])


def test_a_renewal_leaves_in_order_although_the_broker_is_late(fleet: TlsFleet) -> None:
    """What is sent before the goodbye is read first: answering it must not make the broker lose the goodbye."""
    tls = fleet.enrol("sensor-1")
    topic = build(Topic.DRAFT, fleet=FLEET, device="sensor-1", edge=EDGE)
    state = build(Topic.STATE, fleet=FLEET, device="sensor-1")
    watcher, heard = fleet.link(fleet.enrol(EDGE, IdentityRole.EDGE), EDGE), Inbox()
    watcher.subscribe(wildcard(Topic.STATE, fleet=FLEET), heard)
    watcher.subscribe(wildcard(Topic.DRAFT, fleet=FLEET, edge=EDGE), heard)
    watcher.start(timeout_s=START_S)
    link = fleet.link(tls, "sensor-1", will=Will(state, b"away"))
    link.start(timeout_s=START_S)
    outcomes: list[PublishOutcome] = []
    with stopped(fleet.broker):
        for number in range(3):
            link.publish(topic, b"%d" % number, on_outcome=outcomes.append)
            until(lambda: link.counters.sent == number + 1)  # noqa: B023 - each in a packet of its own
        renew(fleet.authority, "sensor-1", tls)
        until(lambda: link.counters.renewals == 1)
    until(lambda: link.counters.connects == 2 and len(outcomes) == 3)
    link.publish(topic, b"after")
    until(lambda: b"after" in heard.payloads)
    assert {message.topic for message in heard} == {topic}, "the last will was published"
    assert [outcome.reason for outcome in outcomes] == [0, 0, 0]
