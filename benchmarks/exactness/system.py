"""Exactness, end to end: outputs through a real mosquitto follow the target's distribution (p-values).

The distributions of a toy target and draft are known: of a Markov language in closed form, of a transformer of one
layer computed apart in float64, both shaped by plain Python that shares no code with the product. Many sessions run
through the real device, link, broker and edge, for each mode, each downlink form, drafting ahead, draft lengths that
devices choose, a draft model of another vocabulary or nearly the target, ids above 65,535,
positions up to 1,500, grammars, and with the transformer in llama.cpp, in blocks of 8 and 4 bits, with a hybrid in
llama.cpp and in blocks (whose rows, like those of blocks, are then computed alone), and at an inference server that
answers as vLLM does. Three tests compare the outputs: chi-square
of the joint distribution of three tokens, a score test that finds mistakes of two percent, and one for dependence
between sessions. Then they must find planted faults; of too few sessions, it says the chance that they find one. Takes
two hours; with `--only blocks`, some minutes.
"""

import argparse
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.exactness.cases import CASES, FAULTS, Variant
from benchmarks.exactness.chances import FOUND, chance, sessions_for
from benchmarks.exactness.evidence import Evidence, evidence
from benchmarks.harness import Bench, SuiteReport, number_of
from tests.support.processes import toy_edge_process
from tests.support.sabotage import Sabotage, at_the_device
from tests.support.toy_devices import run_sessions

FLEET: Final = "proof"
EDGES: Final = ("edge-1", "edge-2")
_SEEDS: Final = 10_000_000
"""Distance of the first seeds of two cases."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    case: Variant
    first_seed: int
    sessions: int
    evidence: Evidence
    acceptance: float
    wall_s: float

    @property
    def passed(self) -> bool | None:
        """Whether it is as it should be; None if a mistake was not found, nor to be expected of so few sessions."""
        if self.evidence.follows == (self.case.sabotage is Sabotage.NONE):
            return True
        return None if self.chance < FOUND else False

    @property
    def chance(self) -> float:
        """The chance that as many sessions show the mistake; 1 without one."""
        return 1.0 if self.case.sabotage is Sabotage.NONE else chance(self.case, self.sessions)

    def json(self) -> dict[str, Any]:
        case = asdict(self.case)
        return {
            "case": self.case.name,
            "fault": case.pop("sabotage"),
            **case,
            "first_seed": self.first_seed,
            "sessions": self.sessions,
            "p_values": self.evidence.p_values,
            "impossible": self.evidence.impossible,
            "acceptance": self.acceptance,
            "wall_s": self.wall_s,
            "chance": self.chance,
            "passed": self.passed,
        }


class CaseEdges:
    """The edges of a case, in processes at a broker; the next case has them too if it needs the same.

    Edges with a mistake serve one case, which may have them refuse its devices.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._running = ExitStack()
        self._words: list[list[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def serve(self, case: Variant) -> None:
        words = edge_arguments(case)
        if words == self._words and case.sabotage is Sabotage.NONE:
            return
        self._running.close()
        self._words = words
        for each in words:
            self._running.enter_context(toy_edge_process(self.port, FLEET, *each))


def prove(
    case: Variant,
    *,
    edges: CaseEdges,
    sessions: int,
    first_seed: int,
    devices: int,
    on_progress: Any = None,  # noqa: ANN401
) -> CaseResult:
    started = time.monotonic()
    edges.serve(case)
    tally = run_sessions(
        port=edges.port,
        fleet=FLEET,
        pair=case.pair,
        policy=case.policy,
        pacing=case.pacing,
        sessions=sessions,
        length=case.tokens,
        prompt=case.prompt,
        devices=devices,
        first_seed=first_seed,
        sabotage=case.sabotage,
        on_progress=on_progress or (lambda _done: None),
    )
    with ExitStack() as stack:
        # What is expected must not share a mistake of both ends.
        at_the_device(case.sabotage, stack)
        found = evidence(case, tally)
    return CaseResult(
        case=case,
        first_seed=first_seed,
        sessions=sessions,
        evidence=found,
        acceptance=tally.accepted / max(1, tally.tested),
        wall_s=time.monotonic() - started,
    )


def edge_arguments(case: Variant) -> list[list[str]]:
    """Return the arguments of the case's edges."""
    words = [
        "--form", case.form.value, "--engine", case.engine.value, "--languages", case.languages.value,
        "--sabotage", case.sabotage.value,
        *(["--drafts"] if case.edge_draft else []),
    ]  # fmt: skip
    if not case.two_targets:
        return [words]
    return [[*words, "--edge", EDGES[0], "--forgetful"], [*words, "--edge", EDGES[1], "--forgetful", "--foreign"]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=number_of(int, 1), default=20_000, help="a case (default: %(default)s)")
    parser.add_argument("--fault-sessions", type=number_of(int, 1), help="a fault (default: a tenth)")
    parser.add_argument("--devices", type=number_of(int, 1), default=16, help="agents that share the work")
    today = int(time.strftime("%Y%m%d"))
    parser.add_argument(
        "--seed", type=int, default=today, help="of this run; seeds of sessions follow (default: today)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="cases with these; repeatable")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    bench.fleet = FLEET
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: list[CaseResult] = []
    with (
        bench.broker(*EDGES) as broker,
        CaseEdges(broker.port) as edges,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        for number, case in enumerate((*CASES, *FAULTS)):
            if options.only and not any(words in case.name for words in options.only):
                continue
            sessions = case.share(options.sessions)
            if case.sabotage is not Sabotage.NONE and options.fault_sessions is not None:
                sessions = options.fault_sessions
            task = progress.add_task(case.name, total=sessions)
            result = prove(
                case,
                edges=edges,
                sessions=sessions,
                first_seed=(options.seed * 1_000 + number) * _SEEDS,
                devices=options.devices,
                on_progress=lambda done, task=task: progress.update(task, completed=done),
            )
            progress.remove_task(task)
            results.append(result)
            print(_line(result), flush=True)
    for result in results:
        if result.passed is None:
            print(
                f"{result.case.name}: not found, nor to be expected: {result.sessions:,} sessions find it with a "
                f"chance of {result.chance:.2g}, {sessions_for(result.case):,} with {FOUND:g}."
            )
    wrong = [f"{result.case.name}: NOT as it should be." for result in results if result.passed is False]
    return SuiteReport([result.json() for result in results], wrong=wrong)


def _line(result: CaseResult) -> str:
    verdict = "follows the target" if result.evidence.follows else "does not follow the target"
    mark = {True: "ok ", False: "BAD", None: "few"}[result.passed]
    values = "  ".join(
        f"{name} {'-' if value is None else format(value, '.3g'):<9}"
        for name, value in result.evidence.p_values.items()
    )
    return (
        f"{mark} {result.case.name:<46} {result.sessions:>7} sessions  p-values: {values} "
        f"acceptance {result.acceptance:.2f}  {result.wall_s:5.1f} s  {verdict}"
    )
