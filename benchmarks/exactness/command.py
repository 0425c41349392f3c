"""Exactness proof, end to end: what devices write through a real mosquitto follows the target's law.

A toy target and draft have a joint law over three tokens that is known: of a Markov language in closed form, of a
transformer of one layer computed apart in float64. Many short sessions run through the real device, link, broker and
edge; what comes out is held against that law by chi-square, for each mode, each downlink form, with drafting ahead of
the verdict, with devices that choose how much to draft, with a draft model of another vocabulary than the target's, and
with the transformer in llama.cpp and at inference servers that answer as vLLM and SGLang do. Then the same test must
catch faults that published code really has.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.exactness.cases import CASES, FAULTS
from benchmarks.exactness.proof import FLEET, Result, prove
from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from tests.support.sabotage import Sabotage

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Prove all cases and catch all faults; return 0 if all went as it should."""
    parser = argparse.ArgumentParser(prog="benchmarks exactness", description=__doc__)
    parser.add_argument("--sessions", type=int, default=20_000, help="sessions a case (default: 20000)")
    parser.add_argument("--fault-sessions", type=int, default=None, help="sessions a fault (default: a tenth)")
    parser.add_argument("--devices", type=int, default=16, help="agents that share the work")
    parser.add_argument("--seed", type=int, default=1, help="of the first session")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORDS",
        help="cases whose names have these words; repeatable",
    )
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
            if arguments.only and not any(words in case.name for words in arguments.only):
                continue
            sessions = case.share(arguments.sessions)
            if case.sabotage is not Sabotage.NONE and arguments.fault_sessions is not None:
                sessions = arguments.fault_sessions
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
        f"{mark} {result.case.name:<46} {result.sessions:>7} sessions  chi-square p {result.p:<10.3g} "
        f"TV {result.tv:.4f} (noise below {result.noise:.4f})  acceptance {result.acceptance:.2f}  "
        f"{result.wall_s:5.1f} s  {verdict}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
