"""Exactness, end to end: texts through a real mosquitto follow the target's distribution (chi-square p-values).

A toy target and draft have a joint distribution over three tokens that is known: of a Markov language in closed form,
of a transformer of one layer computed apart in float64. Many short sessions run through the real device, link, broker
and edge; what comes out is compared with that distribution, for each mode, each downlink form, drafting ahead, draft
lengths that devices choose, a draft model of another vocabulary, grammars, and with the transformer in llama.cpp and
at inference servers that answer as vLLM and SGLang do. Then the same test must catch planted faults that published
code really has. Takes 20 minutes and more.
"""

import argparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.exactness.cases import CASES, FAULTS
from benchmarks.exactness.proof import FLEET, Result, prove
from benchmarks.harness import Bench, Report, number_of
from tests.support.sabotage import Sabotage


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=number_of(int, 1), default=20_000, help="a case (default: %(default)s)")
    parser.add_argument("--fault-sessions", type=number_of(int, 1), help="a fault (default: a tenth)")
    parser.add_argument("--devices", type=number_of(int, 1), default=16, help="agents that share the work")
    parser.add_argument("--seed", type=int, default=1, help="of the first session")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="cases with these; repeatable")


def run(bench: Bench) -> Report:
    """Prove all cases and catch all faults."""
    options = bench.options
    bench.fleet = FLEET
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: list[Result] = []
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


def _line(result: Result) -> str:
    verdict = "follows the target" if result.follows else "does not follow the target"
    mark = "ok " if result.passed else "BAD"
    return (
        f"{mark} {result.case.name:<46} {result.sessions:>7} sessions  chi-square p {result.p:<10.3g} "
        f"TV {result.tv:.4f} (noise below {result.noise:.4f})  acceptance {result.acceptance:.2f}  "
        f"{result.wall_s:5.1f} s  {verdict}"
    )
