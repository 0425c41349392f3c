"""Proof of one case: many short texts through a real mosquitto, held against the target's law by chi-square."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from benchmarks.exactness.cases import Case
from benchmarks.exactness.laws import LENGTH, law
from fleet_common.logs import Event, wait_for_event
from fleet_edge.verifiers.contract import VerifierError
from tests.support.sabotage import Sabotage
from tests.support.statistics import ALARM, p_value, total_variation, total_variation_noise
from tests.support.toy_devices import run_sessions
from tests.support.toy_pair import policy

FLEET: Final = "proof"


@dataclass(frozen=True, slots=True)
class Result:
    """What the test said of a case.

    Attributes:
        case: Which.
        sessions: How many.
        p: Chi-square p-value under the target's law.
        tv: Total variation distance of what came out.
        noise: Bound on what sampling alone would give.
        acceptance: Accepted of tested draft tokens.
        wall_s: Time taken.
    """

    case: Case
    sessions: int
    p: float
    tv: float
    noise: float
    acceptance: float
    wall_s: float

    @property
    def follows(self) -> bool:
        """Whether texts follow the target's distribution."""
        return self.p > ALARM and self.tv < self.noise

    @property
    def passed(self) -> bool:
        """Whether the test said what it should."""
        return self.follows if self.case.sabotage is Sabotage.NONE else self.p < ALARM

    def json(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "mode": self.case.mode.value,
            "form": self.case.form.value,
            "draft_length": self.case.draft_length,
            "ahead": self.case.ahead,
            "stream": self.case.stream,
            "guessed": self.case.guessed,
            "unlike": self.case.unlike,
            "stops": self.case.stops,
            "suffix": self.case.suffix,
            "engine": self.case.engine.value,
            "greedy": self.case.greedy,
            "constrained": self.case.constrained,
            "fault": self.case.sabotage.value,
            "sessions": self.sessions,
            "p_value": self.p,
            "total_variation": self.tv,
            "total_variation_noise": self.noise,
            "acceptance": self.acceptance,
            "wall_s": self.wall_s,
            "passed": self.passed,
        }


def prove(case: Case, *, port: int, sessions: int, first_seed: int, devices: int, on_progress: Any = None) -> Result:  # noqa: ANN401
    """Run a case through a broker that is already there."""
    started = time.monotonic()
    with _edge(case, port):
        tally = run_sessions(
            port=port,
            fleet=FLEET,
            pair=case.pair,
            policy=partial(policy, case.mode, greedy=case.greedy, grammar=case.grammar),
            pacing=case.pacing,
            sessions=sessions,
            length=LENGTH,
            prompt=case.prompt,
            devices=devices,
            first_seed=first_seed,
            sabotage=case.sabotage,
            on_progress=on_progress or (lambda _done: None),
        )
    expected = law(case.mode, case.pair, greedy=case.greedy, prompt=case.prompt, grammar=case.grammar).ravel()
    counts = tally.counts.ravel()
    return Result(
        case=case,
        sessions=sessions,
        p=p_value(counts, expected),
        tv=total_variation(counts, expected),
        noise=total_variation_noise(expected, sessions),
        acceptance=tally.accepted / max(1, tally.tested),
        wall_s=time.monotonic() - started,
    )


@contextmanager
def _edge(case: Case, port: int) -> Iterator[None]:
    command = [
        sys.executable, "-m", "tests.support.toy_edge", "--port", str(port), "--fleet", FLEET,
        "--form", case.form.value, "--engine", case.engine.value, "--sabotage", case.sabotage.value,
        "--guesses", str(LENGTH - 1 if case.guessed else 0),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if wait_for_event(process.stdout, Event.ONLINE) is None:
            raise VerifierError("The toy edge did not start; its complaint is above.")
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)
