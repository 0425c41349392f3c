from collections import defaultdict

import pytest

from fleet_common.mqtt.outbox import Outgoing
from sampling.downlink import FormName
from schemas.policy import Mode
from schemas.topics import Topic, parse
from tests.support.memory_fleet import Device, MemoryFleet, terms

DRAFT_BYTES, VERDICT_BYTES = 64, 128


def write(
    mode: Mode, form: FormName, *, padded: bool, packet: int = 1 << 20, bucket: int = VERDICT_BYTES, seed: int = 3
) -> tuple[Device, dict[Topic, set[int]]]:
    fleet = MemoryFleet(form=form, max_packet_bytes=packet, settings={"padding": bucket if padded else 0})
    sizes: dict[Topic, set[int]] = defaultdict(set)
    accept = fleet.broker.accept

    def note(message: Outgoing) -> int:
        sizes[parse(message.topic).topic].add(len(message.payload))
        return accept(message)

    fleet.broker.accept = note  # type: ignore[method-assign]
    asked = terms(seed, mode=mode, max_new_tokens=30, top_k=0, top_p=1.0)
    device = Device(fleet, "device-1", asked, length=3, ahead=True, padding=DRAFT_BYTES if padded else 0)
    while not device.done:
        while device.act():
            pass
        fleet.settle()
    assert device.closed is not None
    counted = fleet.known["device-1", asked.session, 0].counters
    assert (counted.uplink_bytes, counted.downlink_bytes) == (
        device.session.counters.uplink_bytes,
        device.session.counters.downlink_bytes,
    )
    return device, sizes


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("form", FormName)
def test_sizes_tell_nothing_and_the_text_is_the_same(mode: Mode, form: FormName) -> None:
    plain_sizes: dict[Topic, set[int]] = defaultdict(set)
    for seed in range(10):
        plain, before = write(mode, form, padded=False, seed=seed)
        padded, after = write(mode, form, padded=True, seed=seed)
        assert padded.session.committed == plain.session.committed
        for topic in (Topic.DRAFT, Topic.VERDICT):
            plain_sizes[topic] |= before[topic]
        assert after[Topic.DRAFT] == {DRAFT_BYTES}
        assert after[Topic.VERDICT] == {VERDICT_BYTES}
    assert len(plain_sizes[Topic.DRAFT]) > 1
    assert len(plain_sizes[Topic.VERDICT]) > 1


def test_a_verdict_is_filled_no_further_than_a_packet_goes() -> None:
    padded, after = write(Mode.RESIDUAL, FormName.SAMPLES, padded=True, packet=540, bucket=1024)
    assert padded.session.committed
    assert after[Topic.VERDICT] == {540 - 256}
