"""Exactness, end to end: texts through a real mosquitto follow the target's distribution (chi-square p-values).

A toy target and draft have a joint distribution over three tokens that is known: of a Markov language in closed form,
of a transformer of one layer computed apart in float64. Many short sessions run through the real device, link, broker
and edge; what comes out is compared with that distribution, for each mode, each downlink form, drafting ahead, draft
lengths that devices choose, a draft model of another vocabulary, grammars, and with the transformer in llama.cpp, in
int8 (whose rows are then computed alone), and at inference servers that answer as vLLM and SGLang do. Then the same
test must catch planted faults that published code really has. Takes 20 minutes and more.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.exactness.cases import CASES, FAULTS, LENGTH, Case, law
from benchmarks.harness import Bench, Report, number_of
from fleet_common.logs import Event, wait_for_event
from fleet_edge.verifiers.contract import VerifierError
from tests.support.sabotage import Sabotage
from tests.support.statistics import ALARM, p_value, total_variation, total_variation_noise
from tests.support.toy_devices import run_sessions
from tests.support.toy_pair import policy

FLEET: Final = "proof"


@dataclass(frozen=True, slots=True)
class CaseResult:
    case: Case
    sessions: int
    p: float
    tv: float
    noise: float
    acceptance: float
    wall_s: float

    @property
    def follows(self) -> bool:
        return self.p > ALARM and self.tv < self.noise

    @property
    def passed(self) -> bool:
        return self.follows if self.case.sabotage is Sabotage.NONE else self.p < ALARM

    def json(self) -> dict[str, Any]:
        case = asdict(self.case)
        return {
            "case": self.case.name,
            "fault": case.pop("sabotage"),
            **case,
            "sessions": self.sessions,
            "p_value": self.p,
            "total_variation": self.tv,
            "total_variation_noise": self.noise,
            "acceptance": self.acceptance,
            "wall_s": self.wall_s,
            "passed": self.passed,
        }


def prove(
    case: Case,
    *,
    port: int,
    sessions: int,
    first_seed: int,
    devices: int,
    on_progress: Any = None,  # noqa: ANN401
) -> CaseResult:
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
    return CaseResult(
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
        "--guesses", str(LENGTH - 1 if case.guessed else 0), *(["--blocks"] if case.blocks else []),
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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=number_of(int, 1), default=20_000, help="a case (default: %(default)s)")
    parser.add_argument("--fault-sessions", type=number_of(int, 1), help="a fault (default: a tenth)")
    parser.add_argument("--devices", type=number_of(int, 1), default=16, help="agents that share the work")
    parser.add_argument("--seed", type=int, default=1, help="of the first session")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="cases with these; repeatable")


def run(bench: Bench) -> Report:
    options = bench.options
    bench.fleet = FLEET
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: list[CaseResult] = []
    with bench.broker() as broker, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for number, case in enumerate((*CASES, *FAULTS)):
            if options.only and not any(words in case.name for words in options.only):
                continue
            sessions = case.share(options.sessions)
            if case.sabotage is not Sabotage.NONE and options.fault_sessions is not None:
                sessions = options.fault_sessions
            task = progress.add_task(case.name, total=sessions)
            result = prove(
                case,
                port=broker.port,
                sessions=sessions,
                first_seed=options.seed + number * 10_000_000,
                devices=options.devices,
                on_progress=lambda done, task=task: progress.update(task, completed=done),
            )
            progress.remove_task(task)
            results.append(result)
            print(_line(result), flush=True)
    wrong = [f"{result.case.name}: NOT as it should be." for result in results if not result.passed]
    return Report([result.json() for result in results], wrong=wrong)


def _line(result: CaseResult) -> str:
    verdict = "follows the target" if result.follows else "does not follow the target"
    mark = "ok " if result.passed else "BAD"
    return (
        f"{mark} {result.case.name:<46} {result.sessions:>7} sessions  chi-square p {result.p:<10.3g} "
        f"TV {result.tv:.4f} (noise below {result.noise:.4f})  acceptance {result.acceptance:.2f}  "
        f"{result.wall_s:5.1f} s  {verdict}"
    )
