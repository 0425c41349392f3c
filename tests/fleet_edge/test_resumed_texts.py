"""Outputs of sessions that lose their edge, or leave it, at random moments follow the target."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from fleet_device.session.machine import DeviceSession
from schemas.policy import Mode
from tests.support.memory_fleet import DRAFT, END, TARGET, Device, MemoryFleet, Mishaps, run, terms
from tests.support.reference import shaped
from tests.support.score_test import Outcomes, ScoreTest, untested
from tests.support.statistics import ALARM, p_value

SESSIONS = 400
AT_ONCE = 4
JOINT = 3
PROMPT = (1, 2)


def generate(mode: Mode) -> tuple[list[tuple[int, ...]], int]:
    """Return the outputs of all sessions, and how often they were resumed."""
    texts: list[tuple[int, ...]] = []
    resumes = 0
    for first in range(0, SESSIONS, AT_ONCE):
        rng = random.Random(first)
        fleet = MemoryFleet(rng=rng)
        devices = [
            Device(fleet, f"device-{number}", terms(number, mode=mode, prompt=PROMPT), length=3, ahead=number % 2 == 0)
            for number in range(first, first + AT_ONCE)
        ]
        run(fleet, devices, rng, mishaps=Mishaps(restart=0.02, resume=0.04))
        texts += [tuple(device.session.committed) for device in devices]
        resumes += sum(device.resumes for device in devices)
    return texts, resumes


def p_values(texts: Sequence[tuple[int, ...]], mode: Mode) -> tuple[float, float]:
    """Return the p-values of the joint distribution of the first tokens, and of the score test of all."""
    policy, score, known = terms(0, mode=mode).policy, ScoreTest(), dict[object, Outcomes]()
    counts = np.zeros((TARGET.size,) * JOINT, dtype=np.int64)
    for text in texts:
        for place, token in enumerate(text):
            prefix = (*PROMPT, *text[:place])
            state = TARGET.state(prefix)
            if state not in known:
                known[state] = untested(*(shaped(each.logits(prefix), policy) for each in (TARGET, DRAFT)))
            score.add(known[state], (token, None))
        counts[(*text, *[END] * JOINT)[:JOINT]] += 1
    law = TARGET.joint(PROMPT, length=JOINT, policy=policy)
    for place in range(JOINT - 1):
        head = (*[slice(None)] * place, END)
        ended = law[head].sum(axis=tuple(range(place, JOINT - 1)))
        law[head] = 0.0
        law[(*head, *[END] * (JOINT - 1 - place))] = ended
    value = score.p_value()
    assert value is not None
    return p_value(counts.ravel(), law.ravel()), value


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Mode.RESIDUAL, pytest.param(Mode.COUPLED, marks=pytest.mark.exhaustive)])
def test_they_follow_the_target(mode: Mode) -> None:
    """Two assertions for each of two cases, each false once in 10,000 seeds."""
    texts, resumes = generate(mode)
    assert resumes > SESSIONS
    assert min(p_values(texts, mode)) > ALARM


@pytest.mark.exhaustive
def test_a_device_that_resumes_with_an_unverified_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = DeviceSession._let_go

    def let_go_keeping(session: DeviceSession) -> None:
        drafted = session._drafts.tokens if session.open_sent else ()
        if drafted and drafted[0] != END and len(session.committed) < 11:
            session.sequence.commit(drafted[:1])
        let_go(session)

    monkeypatch.setattr(DeviceSession, "_let_go", let_go_keeping)
    assert min(p_values(generate(Mode.RESIDUAL)[0], Mode.RESIDUAL)) < ALARM
