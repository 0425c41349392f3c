import random
from collections.abc import Callable, Iterator

import pytest

from schemas.codec import encode_close, encode_draft, encode_open
from schemas.control import DeviceState, Presence, encode_json
from schemas.messages import Draft, Fault
from schemas.policy import Mode
from schemas.topics import Topic, build
from tests.support.drafts import close
from tests.support.memory_fleet import EDGE, FLEET, START, Device, MemoryFleet, lossless_text, terms
from tests.support.memory_link import MemoryLink

MINUTE_S, STEPS = 60.0, 400
Flood = Callable[[random.Random], tuple[Topic, bytes]]


def draft(rng: random.Random, **fields: object) -> bytes:
    whole = {"handle": 999, "round": rng.getrandbits(31), "epoch": 0, "base": 0, "digest": 0, "tokens": (1,)}
    return encode_draft(Draft.model_validate(whole | {"counts": (9,)} | fields))


def state(rng: random.Random) -> bytes:
    presence = rng.choice((Presence.ONLINE, Presence.OFFLINE))
    return encode_json(
        DeviceState(presence=presence, software="0", draft_model="toy", quantization="none", since=START)
    )


FLOODS: dict[str, Flood] = {
    "random bytes": lambda rng: (Topic.DRAFT, rng.randbytes(40)),
    "drafts of an unknown session": lambda rng: (Topic.DRAFT, draft(rng)),
    "opens": lambda rng: (Topic.OPEN, encode_open(terms(rng.getrandbits(60)))),
    "opens that are none": lambda rng: (Topic.OPEN, rng.randbytes(2000)),
    "closes": lambda rng: (Topic.CLOSE, encode_close(close(session=rng.randbytes(8), handle=None))),
    "states": lambda rng: (Topic.STATE, state(rng)),
    "large opens": lambda rng: (Topic.OPEN, rng.randbytes(1 << 19)),
}


class Attack:
    def __init__(self, flood: Flood, *, a_step: int = 20) -> None:
        self.fleet = MemoryFleet(settings={"quotas": {}})
        self.rng = random.Random(5)
        self.flood, self.a_step = flood, a_step
        self.link = MemoryLink(self.fleet.broker, "hostile")
        self.heard: list[bytes] = []
        for topic in (Topic.SESSION, Topic.VERDICT):
            self.link.subscribe(build(topic, fleet=FLEET, device="hostile"), lambda m: self.heard.append(m.payload))
        self.link.start(timeout_s=1.0)
        self.number = 0

    def honest(self) -> Device:
        self.number += 1
        asked = terms(self.number, mode=Mode.COUPLED, max_new_tokens=20)
        device = Device(self.fleet, f"honest-{self.number}", asked, length=2, ahead=False)
        device.open()
        return device

    def texts(self) -> Iterator[Device]:
        device = self.honest()
        for _ in range(STEPS):
            self.fleet.clock.seconds += MINUTE_S / STEPS
            for _ in range(self.a_step):
                topic, payload = self.flood(self.rng)
                name = build(topic, fleet=FLEET, device="hostile", edge=EDGE if topic is Topic.DRAFT else None)
                self.link.publish(name, payload, retain=topic is Topic.STATE)
            self.fleet.broker.pump()
            self.fleet.step()
            device.act()
            if device.done:
                yield device
                device = self.honest()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in {"random bytes", "opens", "states"} else pytest.mark.slow)
        for name in FLOODS
    ],
)
def test_a_flood_costs_others_nothing_and_the_log_little(name: str) -> None:
    attack = Attack(FLOODS[name], a_step=2 if name == "large opens" else 20)
    texts = list(attack.texts())
    assert len(texts) > 12
    for device in texts:
        assert device.session.committed == lossless_text(device.terms)
        assert (device.faults, device.resumes, device.refused) == ([], 0, None)
    sink = attack.fleet.sink
    attack.fleet.edge.handlers.flush()
    rows = {record.id for record in sink.of("event") if record.device == "hostile"}
    assert len(rows) + len([record for record in sink.of("opened") if record.device == "hostile"]) <= 100
    assert [record.device for record in sink.of("quarantine")] == ["hostile"] * len(sink.of("quarantine"))
    assert sink.of("quarantine"), "it is shut out"
    assert len(attack.heard) <= 64 + 2 * MINUTE_S + 60


def test_who_is_shut_out_has_nothing_left_at_the_edge() -> None:
    attack = Attack(FLOODS["drafts of an unknown session"])
    hostile = Device(attack.fleet, "hostile", terms(77), length=2, ahead=False)
    attack.link = hostile.link  # one name, one connection
    hostile.open()
    attack.fleet.settle()
    assert any(session.device == "hostile" for session in attack.fleet.edge.sessions)
    list(attack.texts())
    assert attack.fleet.sink.of("quarantine")
    assert not any(session.device == "hostile" for session in attack.fleet.edge.sessions)
    told = [message for message in hostile.messages if isinstance(message, Fault)]
    assert any("quarantined" in fault.sentence for fault in told)
