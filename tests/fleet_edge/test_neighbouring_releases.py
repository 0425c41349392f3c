import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from sampling.downlink import FormName
from schemas.control import DeviceState, Presence, encode_json
from schemas.policy import Mode
from schemas.reasons import EndReason
from schemas.topics import Topic, build
from tests.support.memory_fleet import FLEET, START, Device, MemoryFleet, lossless_text, terms
from tests.support.memory_link import MemoryLink
from tests.support.newer_release import DOWN, UP, NewerRelease, rewrite

SEEDS = range(3)
MIDDLE = 5  # of the requests that have one
MAX_MOVES = 200
FORMS = {FormName.SPARSE: "form 1", FormName.SAMPLES: "form 2", FormName.DENSE: "form 3"}
KINDS_UP, KINDS_DOWN = {"open", "resume", "draft", "close"}, {"opened", "fault", "verdict", "closed"}

each_direction = pytest.mark.parametrize(
    "speaks", [UP, DOWN, UP + DOWN], ids=["newer-device", "newer-edge", "both-newer"]
)
ahead_or_not = pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])


@pytest.fixture(autouse=True)
def _nothing_refused(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail on a message that was dropped and repeated, which only the log shows."""
    yield
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def write(newer: NewerRelease, *, seed: int, mode: Mode, ahead: bool, form: FormName = FormName.AUTO) -> Device:
    """Generate; the edge restarts in the middle, so that there is a fault and a resume."""
    # Room for a few samples, so that often all fail and more are requested.
    packet = 540 if form is FormName.SAMPLES else 1 << 20
    fleet = MemoryFleet(form=form, max_packet_bytes=packet, settings={"window": 3})
    rewrite(fleet.broker, newer)
    asked = terms(seed, mode=mode, max_new_tokens=30, top_k=0, top_p=1.0)
    device = Device(fleet, "device-1", asked, length=2, ahead=ahead)
    restarted = False
    for _ in range(MAX_MOVES):
        if device.done:
            break
        while device.act():
            pass
        if not restarted and device.session.ended is None and len(device.session.committed) > MIDDLE:
            restarted = True
            fleet.restart_edge()
            device.nudge()  # what was on its way to the edge is lost
        fleet.settle()
    assert device.done, "a message was not understood: nothing moves any more"
    assert device.link.counters.handler_errors == 0
    assert bool(device.faults) == restarted
    assert device.resumes == restarted
    edge = fleet.known["device-1", asked.session, device.resumes]
    assert edge.tokens == [*asked.prompt, *device.session.committed]
    return device


def same(newer: NewerRelease, *, seed: int, mode: Mode, ahead: bool, form: FormName = FormName.AUTO) -> None:
    plain = write(NewerRelease(()), seed=seed, mode=mode, ahead=ahead, form=form)
    across = write(newer, seed=seed, mode=mode, ahead=ahead, form=form)
    if mode is Mode.COUPLED:
        assert plain.session.committed == lossless_text(plain.terms)
    assert across.session.committed == plain.session.committed
    assert across.session.ended is plain.session.ended
    assert across.closed == plain.closed
    ours, theirs = (
        {name: count for name, count in asdict(device.session.counters).items() if not name.endswith("_bytes")}
        for device in (across, plain)
    )
    assert ours == theirs
    assert across.resumes == plain.resumes


@each_direction
@ahead_or_not
def test_coupled_text_is_the_same(speaks: tuple[Topic, ...], ahead: bool) -> None:
    newer = NewerRelease(speaks)
    for seed in SEEDS:
        same(newer, seed=seed, mode=Mode.COUPLED, ahead=ahead)
    check_kinds(newer)


@each_direction
@ahead_or_not
@pytest.mark.parametrize("form", FORMS)
def test_residual_text_is_the_same_in_any_form(speaks: tuple[Topic, ...], ahead: bool, form: FormName) -> None:
    newer = NewerRelease(speaks)
    for seed in SEEDS:
        same(newer, seed=seed, mode=Mode.RESIDUAL, ahead=ahead, form=form)
    check_kinds(newer)
    if Topic.VERDICT in speaks:
        assert newer.seen[FORMS[form]] > len(SEEDS)
    if Topic.DRAFT in speaks and form is FormName.SAMPLES:
        assert newer.seen["request for samples"] > 0


def check_kinds(newer: NewerRelease) -> None:
    """Check that exactly the intended kinds of message were rewritten."""
    expected = (KINDS_UP if Topic.OPEN in newer.speaks else set()) | (
        KINDS_DOWN if Topic.SESSION in newer.speaks else set()
    )
    seen = Counter({kind: count for kind, count in newer.seen.items() if "form" not in kind and "request" not in kind})
    assert set(seen) == expected


def test_an_end_that_we_do_not_know_is_logged_as_a_failure_and_confirmed() -> None:
    fleet = MemoryFleet()
    device = Device(fleet, "device-1", terms(4, mode=Mode.COUPLED, max_new_tokens=10), length=2, ahead=False)
    rewrite(fleet.broker, lambda topic, content: content | {"reason": "quota"} if topic is Topic.CLOSE else content)
    while not device.done:
        assert device.act()
        fleet.settle()
    assert [record.reason for record in fleet.sink.of("closed")] == [EndReason.FAILED]
    assert device.closed.tokens == len(device.session.committed)


def test_the_state_of_a_newer_device_is_logged_and_one_that_we_do_not_know_keeps_its_sessions() -> None:
    fleet = MemoryFleet()
    device = Device(fleet, "device-1", terms(4, mode=Mode.COUPLED, max_new_tokens=20), length=2, ahead=False)
    newer = NewerRelease(UP)

    def change(topic: Topic, content: dict[str, object]) -> object:
        return newer(topic, content | {"presence": "on-battery"}) if topic is Topic.STATE else content

    rewrite(fleet.broker, change)
    device.act()
    fleet.settle()
    link = MemoryLink(fleet.broker, "device-1-state")
    link.start(timeout_s=1.0)
    state = DeviceState(presence=Presence.ONLINE, software="9.9", draft_model="toy", quantization="Q4_0", since=START)
    link.publish(build(Topic.STATE, fleet=FLEET, device="device-1"), encode_json(state), retain=True)
    fleet.settle()
    (seen,) = fleet.sink.of("device")
    assert (seen.presence, seen.software) == (Presence.DRAINING, "9.9")
    assert newer.seen["state"] == 1
    fleet.clock.seconds += 2 * fleet.edge.handlers.grace_s
    fleet.edge.handlers.expire()
    assert len(fleet.edge.sessions) == 1  # the grace of a device that is gone has passed, and it is not gone
