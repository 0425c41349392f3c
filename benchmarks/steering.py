"""Steering benchmark: how soon a setting has reached a whole fleet and is reported, and how soon a command is answered.

Real devices over a toy draft, a real mosquitto and a session log in SQLite; the administrator is what `fleet admin set`
and `fleet admin command` run. All of them are in this process, and share its processor time.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.shared.conditions import conditions
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_admin.settings import AdminSettings
from fleet_admin.steering import Actor, CommandResult, Selection, SetResult, Steering
from fleet_edge.store.database import open_store
from fleet_link.errors import LinkError
from fleet_link.settings import BrokerSettings
from tests.support.steered_devices import steered_devices

__all__ = ["Reached", "main", "measure"]

FLEET: Final = "home"
GOAL_S: Final = 2.0
PATIENCE_S: Final = 60.0
ALL: Final = Selection(everything=True)


@dataclass(frozen=True, slots=True)
class Reached:
    """What was measured of one change or command.

    Attributes:
        what: Which.
        devices: That it concerned.
        well: That have it, or have done it.
        first_s: Until the first answer was heard.
        half_s: Until half of them were.
        last_s: Until the last was; with what is recorded before and after.
    """

    what: str
    devices: int
    well: int
    first_s: float
    half_s: float
    last_s: float


def measure(devices: int, folder: Path, *, rounds: int) -> list[Reached]:
    """Set and command a fleet.

    Raises:
        BrokerError: There is no mosquitto.
        LinkError: It cannot be reached.
    """
    names = [f"device-{number:04}" for number in range(devices)]
    db = f"sqlite:///{folder / 'fleet.sqlite3'}"
    open_store(db).close()
    found = []
    actor = Actor("bench")
    with MosquittoProcess(Broker(fleet=FLEET)) as broker:
        place = BrokerSettings(port=broker.port)
        with (
            steered_devices(names, fleet=FLEET, brokers=dict.fromkeys(names, place), folder=folder),
            Steering.open(AdminSettings(fleet=FLEET, broker=place), db) as steering,
        ):
            _await_all(steering, devices)
            for number in range(rounds):
                temperature = (number + 1) / 100
                found.append(
                    _timed(
                        "set",
                        lambda temperature=temperature: steering.set(  # type: ignore[misc]
                            {"temperature": temperature, "draft_length": 3}, ALL, actor=actor, wait_s=PATIENCE_S
                        ),
                    )
                )
                found.append(
                    _timed("command", lambda: steering.command("resume", ALL, actor=actor, timeout_s=PATIENCE_S))
                )
    return found


def _await_all(steering: Steering, devices: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while sum(each.reported_version is not None for each in steering.wanted_and_reported()) < devices:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{devices} devices were not there within {PATIENCE_S:.0f} s.")
        time.sleep(0.05)


def _timed(what: str, act: Callable[[], Iterable[SetResult | CommandResult]]) -> Reached:
    began = time.perf_counter()
    times, well = [], 0
    for result in act():
        times.append(time.perf_counter() - began)
        well += result.ok if isinstance(result, CommandResult) else result.state == "in force"
    last = time.perf_counter() - began
    return Reached(what, len(times), well, round(times[0], 3), round(times[len(times) // 2], 3), round(last, 3))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if all have it within two seconds each time, 1 if not, 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="benchmarks steering", description="Settings and commands for a fleet.")
    parser.add_argument("--devices", type=int, default=100, help="in the fleet (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="settings, and commands (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.devices <= 300 or arguments.rounds < 1:
        parser.error("--devices is 1 to 300, --rounds at least 1")
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(arguments.devices, Path(folder), rounds=arguments.rounds)
    except (BrokerError, LinkError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 2
    print("what      devices   well   first s    half s    last s")
    for each in found:
        print(
            f"{each.what:8}  {each.devices:7}  {each.well:5}  "
            f"{each.first_s:8.3f}  {each.half_s:8.3f}  {each.last_s:8.3f}"
        )
    if arguments.json is not None:
        report = {"conditions": conditions(), "goal_s": GOAL_S, "reached": [asdict(each) for each in found]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(each.last_s <= GOAL_S and each.well == each.devices for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
