"""Exactness proof, end to end: what devices write through a real mosquitto follows the target's law.

A toy target and draft have a joint law over three tokens that is known in closed form. Many short sessions run
through the real device, link, broker and edge; what comes out is held against that law by chi-square, for each mode,
each downlink form, with drafting ahead of the verdict, with devices that choose how much to draft, and with a draft
model of another vocabulary than the target's. Then the same test must catch faults that published code really has.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from dssd.downlink import Form
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import Choice, DraftOutcome, FixedPacing, Pacing, Plan
from fleet_edge.verifiers.contract import VerifierError
from fleet_runtime.events import Event, wait_for_event
from fleet_testing.sabotage import UNSURE, Sabotage
from fleet_testing.statistics import ALARM, p_value, total_variation, total_variation_noise
from fleet_testing.toy_devices import run_sessions
from fleet_testing.toy_pair import END_TOKENS, PROMPT, ToyPair, policy
from schemas.policy import Mode

__all__ = ["CASES", "FAULTS", "Case", "Result", "main", "prove"]

Law = np.ndarray[Any, np.dtype[np.float64]]

FLEET = "proof"
LENGTH = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One way through the system.

    Attributes:
        mode: Of verification.
        form: Downlink form.
        draft_length: Tokens in a draft; None lets each device choose, and whether to draft ahead as well.
        ahead: Whether to draft ahead.
        stream: Whether the edge writes by itself, so many tokens at a time.
        unlike: Whether the draft model has another vocabulary than the target.
        stops: Whether a draft ends behind a token of which the draft model was unsure.
        sabotage: What is done wrong.
    """

    mode: Mode
    form: Form
    draft_length: int | None
    ahead: bool = False
    stream: bool = False
    unlike: bool = False
    stops: bool = False
    sabotage: Sabotage = Sabotage.NONE

    @property
    def name(self) -> str:
        """For tables."""
        form = "" if self.mode is Mode.COUPLED or self.stream else f" {self.form.value}"
        ahead = " chosen" if self.draft_length is None else " ahead" if self.ahead else ""
        if self.stream:
            ahead = " drafted and streamed in turns" if self.draft_length is None else " streamed"
        ahead = f" stopped{ahead}" if self.stops else ahead
        unlike = " unlike" if self.unlike else ""
        fault = "" if self.sabotage is Sabotage.NONE else f" fault:{self.sabotage.value}"
        return f"{self.mode.value}{form}{ahead}{unlike}{fault}"

    def pacing(self) -> Pacing:
        """Return the pacing of one device."""
        if self.draft_length is None:
            return TurningPacing() if self.stream else AdaptivePacing()
        if self.stops:
            return StoppingPacing(self.draft_length)
        return FixedPacing(self.draft_length, self.ahead, self.stream)


@dataclass(frozen=True, slots=True)
class StoppingPacing(FixedPacing):
    """Drafts until the draft model is unsure."""

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan."""
        del longest, window
        return Plan(self.tokens, may_stop=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Stop behind a token that was not the likely one."""
        return chances[-1] >= UNSURE


@dataclass(slots=True)
class TurningPacing:
    """Drafts a token and has the edge write one, in turns."""

    _plans: int = 0

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan whose turn it is."""
        del longest, window
        self._plans += 1
        return Plan(1, stream=self._plans % 2 == 0)

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Draft as planned."""
        del chances
        return True

    def choice(self) -> Choice:
        """Return the plan whose turn it was."""
        return Choice("draft" if self._plans % 2 else "stream", "They take turns.")

    def learn(self, outcome: DraftOutcome) -> None:
        """Learn nothing."""

    def streamed(self, tokens: int, seconds: float) -> None:
        """Learn nothing."""


_WAYS = (
    (Mode.RESIDUAL, Form.SPARSE),
    (Mode.RESIDUAL, Form.SAMPLES),
    (Mode.RESIDUAL, Form.DENSE),
    (Mode.COUPLED, Form.AUTO),
)

CASES = (
    *(Case(mode, form, 2) for mode, form in _WAYS),
    *(Case(mode, form, 1, ahead=True) for mode, form in _WAYS),
    Case(Mode.RESIDUAL, Form.AUTO, None),
    Case(Mode.COUPLED, Form.AUTO, None),
    Case(Mode.RESIDUAL, Form.AUTO, 2, stream=True),
    Case(Mode.COUPLED, Form.AUTO, 2, stream=True),
    Case(Mode.RESIDUAL, Form.AUTO, None, stream=True),
    Case(Mode.COUPLED, Form.AUTO, None, stream=True),
    *(Case(mode, Form.AUTO, 2, stops=True) for mode in Mode),
    *(Case(mode, form, 2, unlike=True) for mode, form in _WAYS),
    *(Case(mode, Form.AUTO, 1, ahead=True, unlike=True) for mode in Mode),
)

FAULTS = (
    *(
        Case(Mode.RESIDUAL, form, 2, sabotage=sabotage)
        for form in (Form.SPARSE, Form.SAMPLES)
        for sabotage in (Sabotage.INVERTED, Sabotage.MISREPORTED, Sabotage.NO_RESIDUAL, Sabotage.UNSHAPED)
    ),
    Case(Mode.RESIDUAL, Form.AUTO, 2, stream=True, sabotage=Sabotage.UNSHAPED),
    Case(Mode.RESIDUAL, Form.AUTO, 2, stops=True, sabotage=Sabotage.WITHHELD),
    *(
        Case(Mode.RESIDUAL, form, 2, unlike=True, sabotage=sabotage)
        for form in (Form.SPARSE, Form.SAMPLES)
        for sabotage in (Sabotage.NOT_RENORMALISED, Sabotage.UNMAPPED)
    ),
)


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
        """Whether the target's law stands."""
        return self.p > ALARM and self.tv < self.noise

    @property
    def passed(self) -> bool:
        """Whether the test said what it should."""
        return self.follows if self.case.sabotage is Sabotage.NONE else self.p < ALARM

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "case": self.case.name,
            "mode": self.case.mode.value,
            "form": self.case.form.value,
            "draft_length": self.case.draft_length,
            "ahead": self.case.ahead,
            "stream": self.case.stream,
            "unlike": self.case.unlike,
            "stops": self.case.stops,
            "fault": self.case.sabotage.value,
            "sessions": self.sessions,
            "p_value": self.p,
            "total_variation": self.tv,
            "total_variation_noise": self.noise,
            "acceptance": self.acceptance,
            "wall_s": self.wall_s,
            "passed": self.passed,
        }


def law(mode: Mode) -> Law:
    """Return the joint law of a text."""
    return fold_ends(ToyPair.standard().target.joint(PROMPT, length=LENGTH, policy=policy(mode, 0)), END_TOKENS)


def fold_ends(joint: Law, end_tokens: Sequence[int]) -> Law:
    """Return a joint law with early ends counted under their end token repeated."""
    length = joint.ndim
    for end in end_tokens:
        for position in range(length - 1):
            # All that would follow an end token falls together on one outcome.
            head = (slice(None),) * position + (end,)
            rest = tuple(range(position, length - 1))
            mass = joint[head].sum(axis=rest)
            joint[head] = 0.0
            joint[head + (end,) * (length - 1 - position)] = mass
    return joint


def prove(case: Case, *, port: int, sessions: int, first_seed: int, devices: int, on_progress: Any = None) -> Result:  # noqa: ANN401
    """Run a case through a broker that is already there."""
    started = time.monotonic()
    with _edge(case, port):
        tally = run_sessions(
            port=port,
            fleet=FLEET,
            mode=case.mode,
            pacing=case.pacing,
            sessions=sessions,
            length=LENGTH,
            devices=devices,
            first_seed=first_seed,
            unlike=case.unlike,
            sabotage=case.sabotage,
            on_progress=on_progress or (lambda _done: None),
        )
    expected = law(case.mode).ravel()
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
        sys.executable, "-m", "fleet_testing.toy_edge", "--port", str(port), "--fleet", FLEET,
        "--form", case.form.value, "--sabotage", case.sabotage.value,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Prove all cases and catch all faults; return 0 if all went as it should."""
    parser = argparse.ArgumentParser(prog="fleet bench exactness", description=__doc__)
    parser.add_argument("--sessions", type=int, default=20_000, help="sessions a case (default: 20000)")
    parser.add_argument("--fault-sessions", type=int, default=None, help="sessions a fault (default: a tenth)")
    parser.add_argument("--devices", type=int, default=16, help="agents that share the work")
    parser.add_argument("--seed", type=int, default=1, help="of the first session")
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args(argv)
    if arguments.sessions < 1:
        parser.error("--sessions must be at least 1")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results = []
    with (
        MosquittoProcess(Broker(fleet=FLEET)) as broker,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        for number, case in enumerate((*CASES, *FAULTS)):
            faulty = case.sabotage is not Sabotage.NONE
            sessions = arguments.sessions
            if faulty:
                sessions = arguments.fault_sessions or max(1, sessions // 10)
            task = progress.add_task(case.name, total=sessions)
            result = prove(
                case,
                port=broker.port,
                sessions=sessions,
                first_seed=arguments.seed + number * 10_000_000,
                devices=arguments.devices,
                on_progress=lambda done, task=task: progress.update(task, completed=done),
            )
            progress.remove_task(task)
            results.append(result)
            print(_line(result), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([result.json() for result in results], indent=2) + "\n", encoding="utf-8")
    failed = [result.case.name for result in results if not result.passed]
    print("all as it should be" if not failed else f"NOT as it should be: {', '.join(failed)}")
    return 1 if failed else 0


def _line(result: Result) -> str:
    verdict = "follows the target" if result.follows else "does not follow the target"
    mark = "ok " if result.passed else "BAD"
    return (
        f"{mark} {result.case.name:<34} {result.sessions:>7} sessions  chi-square p {result.p:<10.3g} "
        f"TV {result.tv:.4f} (noise below {result.noise:.4f})  acceptance {result.acceptance:.2f}  "
        f"{result.wall_s:5.1f} s  {verdict}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
