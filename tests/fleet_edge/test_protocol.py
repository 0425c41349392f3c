import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from fleet_device.pacing.contract import FixedPacing
from fleet_edge.verifiers.contract import Item, Logits
from sampling.downlink import FormName
from schemas.policy import Mode
from schemas.reasons import EndReason
from tests.support.memory_broker import Faults
from tests.support.memory_fleet import (
    COUNTED_ALIKE,
    END,
    ChangingPacing,
    Device,
    MemoryFleet,
    Mishaps,
    lossless_text,
    possible,
    run,
    terms,
)

RUNS = 300


@pytest.fixture(autouse=True)
def _no_errors_swallowed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail on logged errors: a handler's exception appears nowhere else."""
    yield
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@dataclass(frozen=True)
class Scene:
    fleet: MemoryFleet
    devices: list[Device]
    rng: random.Random


def scene(seed: int, *, faults: bool) -> Scene:
    rng = random.Random(seed)
    broken = Faults(
        drop=rng.choice((0.0, 0.1, 0.3)),
        duplicate=rng.choice((0.0, 0.2)),
        delay=rng.choice((0.0, 0.3)),
        reorder=rng.choice((0.0, 0.3)),
    )
    fleet = MemoryFleet(
        rng=rng,
        faults=broken if faults else None,
        form=rng.choice(list(FormName)),
        kv_tokens=rng.choice((1 << 20, 60)),
        max_packet_bytes=rng.choice((1 << 20, 540)),  # room for a few samples, so that they often fail
        settings={
            "window": rng.choice((1, 2, 4)),
            "max_draft": 8,
            "step_tokens": rng.choice((4, 16, 512)),
            "prefill_chunk": 2,
        },
    )
    devices = [
        Device(
            fleet,
            f"device-{number}",
            terms(
                seed * 10 + number,
                mode=rng.choice(list(Mode)),
                max_new_tokens=rng.randint(1, 14),
                prompt=[1, *(rng.randrange(6) for _ in range(rng.randint(0, 5)))],
                temperature=rng.choice((0.0, 0.8, 1.5)),
                top_k=rng.choice((0, 5)),
                top_p=rng.choice((0.93, 1.0)),
            ),
            length=rng.randint(0, 8),
            ahead=rng.random() < 0.5,
            pacing=rng.choice((None, FixedPacing(rng.randint(1, 16), edge_only=True), ChangingPacing(rng=rng))),
        )
        for number in range(rng.randint(1, 3))
    ]
    return Scene(fleet, devices, rng)


def check_text(device: Device, seed: int) -> None:
    text = device.session.committed
    assert possible(device.terms, text), (seed, text)
    if device.terms.policy.mode is Mode.COUPLED:
        assert text == lossless_text(device.terms), seed
    assert device.session.ended is (EndReason.STOP if text[-1] == END else EndReason.LENGTH), seed


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=pytest.mark.exhaustive) for start in range(100, RUNS, 100))]
)
def test_without_losses_both_ends_agree_on_the_text_and_on_every_count(start: int) -> None:
    for seed in range(start, start + 100):
        here = scene(seed, faults=False)
        run(here.fleet, here.devices, here.rng)
        for device in here.devices:
            check_text(device, seed)
            edge = here.fleet.known[device.name, device.terms.session, 0]
            assert edge.tokens == [*device.terms.prompt, *device.session.committed], seed
            for count in COUNTED_ALIKE:
                ours, theirs = getattr(edge.counters, count), getattr(device.session.counters, count)
                if count == "downlink_bytes" and device.pacing is not None:
                    # A request for more tokens that crosses the end gets an answer that no device reads.
                    assert ours >= theirs, seed
                else:
                    assert ours == theirs, (seed, count)
            assert (device.closed.tokens, device.closed.rounds) == (edge.committed, edge.counters.rounds), seed
            assert (device.faults, device.resumes) == ([], 0), seed
        assert len(here.fleet.edge.sessions) == 0, seed


@pytest.mark.parametrize(
    "start", [0, 100, *(pytest.param(start, marks=pytest.mark.exhaustive) for start in range(200, 2 * RUNS, 100))]
)
def test_whatever_is_lost_repeated_or_restarted_the_text_is_right(start: int) -> None:
    for seed in range(start, start + 100):
        here = scene(seed, faults=True)
        mishaps = Mishaps(restart=0.005, resume=0.01) if seed % 2 else Mishaps()
        run(here.fleet, here.devices, here.rng, mishaps=mishaps)
        for device in here.devices:
            check_text(device, seed)
            ours = [edge for key, edge in here.fleet.known.items() if key[0] == device.name]
            counted = device.session.counters
            assert counted.accepted <= counted.tested <= counted.drafted, (seed, counted)
            for edge in ours:
                assert edge.counters.accepted <= edge.counters.tested <= edge.counters.drafted, (seed, edge.counters)
            last = max(ours, key=lambda edge: edge.attempt)
            if device.closed.attempt is not None:  # else the edge has restarted and knows only what the device reports
                assert last.tokens == [*device.terms.prompt, *device.session.committed], seed


@pytest.mark.parametrize("mode", Mode)
def test_drafts_ahead_share_a_step_and_a_rejection_voids_them(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting ahead really happens: several drafts of one session share a step, and some are void."""
    fleet = MemoryFleet(settings={"window": 4})
    device = Device(fleet, "device-1", terms(4, mode=mode, max_new_tokens=60, prompt=(1,)), length=2, ahead=True)
    deepest = passes = 0
    score = fleet.verifier.score

    def counted(items: Sequence[Item]) -> Logits:
        nonlocal passes
        passes += any(item.rows for item in items)
        return score(items)

    monkeypatch.setattr(fleet.verifier, "score", counted)
    while not device.done:
        while device.act():
            deepest = max(deepest, len(device.session.unanswered()))
        fleet.settle()
    counters = device.session.counters
    assert deepest == 4
    assert counters.tested < counters.drafted
    assert counters.rounds > passes > 0


def test_on_a_line_slower_than_the_repetition_the_first_answer_to_an_open_counts() -> None:
    fleet = MemoryFleet()
    device = Device(fleet, "device-1", terms(4, mode=Mode.COUPLED), length=3, ahead=False)
    device.open()
    fleet.settle()  # the answer is on its way
    for _ in range(3):
        device.nudge()  # and is not there yet
    device.act()
    assert device.session.opened is not None
    run(fleet, [device], random.Random(0))
    check_text(device, 4)
    assert (device.resumes, device.faults) == (0, [])
    assert len(fleet.sink.of("opened")) == 1


@pytest.mark.parametrize("length", [0, 1, 3, 8])
@pytest.mark.parametrize("ahead", [False, True])
def test_coupled_text_does_not_depend_on_how_it_was_drafted(length: int, ahead: bool) -> None:
    for seed in range(8):
        fleet = MemoryFleet()
        device = Device(
            fleet, "device-1", terms(seed, mode=Mode.COUPLED, max_new_tokens=20), length=length, ahead=ahead
        )
        run(fleet, [device], random.Random(seed))
        assert device.session.committed == lossless_text(device.terms)


def test_a_text_of_eight_tokens_without_drafts_takes_eight_rounds() -> None:
    fleet = MemoryFleet()
    device = Device(fleet, "device-1", terms(4, mode=Mode.COUPLED, max_new_tokens=8), length=0, ahead=True)
    run(fleet, [device], random.Random(0))
    assert device.session.counters.rounds == len(device.session.committed)
    assert device.session.counters.drafted == 0
