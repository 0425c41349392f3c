"""Steering: how soon a setting has reached a whole fleet and is reported, and how soon a command is answered (seconds).

Real devices over a toy draft model, a real mosquitto and a session log in SQLite; the administrator is what `fleet
admin set` and `fleet admin command` run. All of them share this process. Takes half a minute.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from benchmarks.harness import Bench, SuiteReport, at_most, number_of, table
from fleet_admin.settings import AdminSettings
from fleet_admin.steering import Actor, CommandResult, DeviceSettingsView, Selection, Steering
from fleet_common.mqtt.settings import BrokerSettings
from fleet_edge.session_log.database import open_store
from tests.support.steered_devices import steered_devices

_GOAL_S: Final = 2.0
_PATIENCE_S: Final = 60.0
_ALL: Final = Selection(everything=True)
_ACTOR: Final = Actor("bench")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=number_of(int, 1), default=100, help="at most 300 (default: %(default)s)")
    parser.add_argument("--rounds", type=number_of(int, 1), default=5, help="settings, and commands")


def run(bench: Bench) -> SuiteReport:
    devices: int = bench.options.devices
    names = [f"device-{number:04}" for number in range(devices)]
    db = f"sqlite:///{bench.folder / 'fleet.sqlite3'}"
    open_store(db).close()
    rows = []
    with bench.broker() as broker:
        place = BrokerSettings(port=broker.port)
        with (
            steered_devices(names, fleet=bench.fleet, brokers=dict.fromkeys(names, place), folder=bench.folder),
            Steering.open(AdminSettings(fleet=bench.fleet, broker=place), db) as steering,
        ):
            _await_all(steering, devices)
            for number in range(bench.options.rounds):
                wanted = {"temperature": (number + 1) / 100, "draft_length": 3}
                rows.append(_timed("set", partial(steering.set, wanted, _ALL, actor=_ACTOR, wait_s=_PATIENCE_S)))
                rows.append(
                    _timed("command", partial(steering.command, "resume", _ALL, actor=_ACTOR, timeout_s=_PATIENCE_S))
                )
    table(rows, {"what": "", "devices": "d", "done": "d", "first_s": ".3f", "half_s": ".3f", "last_s": ".3f"})
    wrong = [f"{row['what']}: {row['done']} of {devices} devices." for row in rows if row["done"] < devices]
    last = max(row["last_s"] for row in rows)
    return SuiteReport(rows, [at_most("seconds until all devices have answered", last, _GOAL_S)], wrong=wrong)


def _await_all(steering: Steering, devices: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while sum(each.reports for each in steering.wanted_and_reported()) < devices:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{devices} devices were not there within {_PATIENCE_S:.0f} s.")
        time.sleep(0.05)


def _timed(what: str, act: Callable[[], Iterable[DeviceSettingsView | CommandResult]]) -> dict[str, Any]:
    began = time.perf_counter()
    times, done = [], 0
    for result in act():
        times.append(time.perf_counter() - began)
        done += result.ok if isinstance(result, CommandResult) else result.state == "in force"
    last = time.perf_counter() - began
    return {
        "what": what,
        "devices": len(times),
        "done": done,
        "first_s": times[0],
        "half_s": times[len(times) // 2],
        "last_s": last,
    }
