"""Measures a candidate in a process of its own: what it has loaded is gone afterwards, and it may crash."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.auto.candidates import Candidate
from fleet_edge.verifiers.auto.measurement import MEASURED_BY, Report

__all__ = ["measure_apart"]

_PROGRAM: Final = "fleet_edge.verifiers.auto.measurement"

_LONGEST_S: Final = 300.0
"""To load and to measure; a service has fifteen minutes to start in, and there are two engines."""


def measure_apart(
    candidate: Candidate, settings: EdgeSettings, *, longest_s: float = _LONGEST_S, program: str = _PROGRAM
) -> Report:
    """Measure a candidate.

    Args:
        candidate: What is measured.
        settings: The edge's; what else an engine depends on.
        longest_s: Seconds after which it is given up.
        program: Module to run.
    """
    given = settings.model_dump(mode="json", include=set(MEASURED_BY))
    given |= {"engine": candidate.engine, "target": candidate.target}
    # The same modules as this process has, wherever it has them from, and none from a folder that it happens to be in.
    places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    late = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", program, json.dumps(given)],
        stdin=subprocess.PIPE,  # open while we live
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": places},
    ) as process:

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(longest_s, give_up)
        timer.start()
        try:
            assert process.stdout is not None
            answer = process.stdout.read()
            process.wait()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        return Report(sentence=f"It took longer than {longest_s:.0f} s to load and to measure.")
    try:
        return Report.model_validate_json(answer)
    except ValidationError:
        return Report(sentence=_end(process.returncode))


def _end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "Its process was killed, most likely since the machine has too little memory for it."
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"Its process {how} without an answer."
