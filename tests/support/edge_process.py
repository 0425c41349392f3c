"""Edge processes: `fleet edge run`, and test doubles of it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fleet_common.logs import Event, read_events
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import VerifierError
from tests.support.edge_thread import NO_QUOTAS

EDGE_PROGRAM = "fleet_cli.main"
_DRAIN_S = 20.0
_STOP_S = 60.0


def quota_variables() -> dict[str, str]:
    prefix = f"{EdgeSettings.variable_prefix}QUOTAS__"
    return {f"{prefix}{name.upper()}": f"{NO_QUOTAS.model_dump()[name]:.0f}" for name in NO_QUOTAS.model_fields_set}


@contextmanager
def edge_process(arguments: Sequence[str], *, module: str = EDGE_PROGRAM) -> Iterator["subprocess.Popen[str]"]:
    """Run `fleet edge run` with the arguments; on entry it is online, on exit it has ended."""
    with online_process(module, "edge", "run", "--events", *arguments) as process:
        yield process


@contextmanager
def toy_edge_process(port: int, fleet: str, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """Run an edge over the toy target; see `tests.support.toy_edge` for `words`."""
    with online_process("tests.support.toy_edge", "--port", str(port), "--fleet", fleet, *words) as process:
        yield process


@contextmanager
def online_process(module: str, *words: str) -> Iterator["subprocess.Popen[str]"]:
    environment = os.environ | quota_variables()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        for event in read_events(process.stdout):
            if event["event"] == Event.ERROR:
                raise VerifierError(f"The edge did not start: {event['sentence']}")
            if event["event"] == Event.ONLINE:
                break
        else:
            raise VerifierError("The edge did not start; its complaint is above.")
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_DRAIN_S)
        except subprocess.TimeoutExpired:  # it waits for a session whose Close was lost with its device's line
            process.terminate()
            process.communicate(timeout=_STOP_S)
