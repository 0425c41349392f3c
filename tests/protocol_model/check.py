"""Checks the model at length, in rounds of some runs each, and tells how many steps were taken and what was found."""

import argparse
import secrets
import sys
import time

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.protocol_model.machine import ProtocolModel

RUNS, STEPS = 100, 50


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.protocol_model.check", description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000, help="steps to take at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first round; the next ones follow on (default: random)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after so many seconds")
    arguments = parser.parse_args()
    number: int = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    chosen = settings(
        max_examples=RUNS,
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.normal,
        suppress_health_check=list(HealthCheck),
    )
    started, seen = time.monotonic(), ProtocolModel.seen
    while seen["steps"] < arguments.steps and time.monotonic() - started < arguments.seconds:
        try:
            run_state_machine_as_test(seed(number)(ProtocolModel), settings=chosen)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            _tell(number, started)
            print(f"FOUND with --seed {number}: {error!r}", file=sys.stderr)
            raise
        _tell(number, started)
        number += 1
    return 0


def _tell(number: int, started: float) -> None:
    seen = ProtocolModel.seen
    told = ", ".join(f"{seen[what]} {what}" for what in ("steps", "texts", "messages", "decisions"))
    print(
        f"seed {number}: {told}, {time.process_time():.0f} s of processor, {time.monotonic() - started:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
