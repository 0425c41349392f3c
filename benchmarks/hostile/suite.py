"""Attacks: what one device with a good certificate can do to the others of its fleet (shares of their tokens a second).

A real mosquitto with certificates, a real edge, honest devices that write all the time, each in a process of its own,
and one attacker, or several. Every attack meets a new broker and a new edge. In one run are measured: what the honest
devices write without an attack; the same while the attack's messages go to a topic that no edge serves (the control:
how much of the fall is the attacker's and the broker's processor time on the same machine); during the attack; and from
5 s after it (2 s of attacks by requests, whose control is a plain load). Takes 40 minutes, 10 minutes with
`--attack long-resumes many-objects growing-lexers many-grammars long-opens forced-text-1 forced-text-2 forced-text-5`.
"""

import argparse
import json
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import Bench, SuiteReport, add_curve, number_of, say, table
from benchmarks.hostile.attacks import ATTACKS, Attack
from benchmarks.hostile.client import PATIENCE_S, HostileClient, KnownFleet, wait_for_answer
from benchmarks.hostile.fleet import Fleet, Running
from benchmarks.hostile.meters import MemoryMeter, children_mb, rows_beside
from benchmarks.processes import BenchError
from schemas.policy import Grammar
from schemas.topics import Topic, wildcard
from tests.support.processes import BrokerClient, Program, ProgramError, on_cores

_READY_S: Final = 30.0
_ROWS_S: Final = 2.0  # until what was logged last is in the database
_FIRST_NEWCOMER_S: Final = 2.0
_EVERY_NEWCOMER_S: Final = 5.0
_BACK_S: Final = 2.0  # from the end of an attack by requests to what honest devices get after it


@dataclass(frozen=True, slots=True)
class Timing:
    warm_up: float = 4.0
    baseline: float = 10.0
    control: float = 10.0
    attack: float = 20.0
    recovery: float = 5.0
    after: float = 10.0


@dataclass(slots=True)
class AttackResult:
    """Result of an attack.

    Attributes:
        baseline: Tokens per second of all honest devices without an attack.
        honest_control: Share of it that remains in the control; None without control.
        honest_during: Share that remains during the attack.
        honest_during_of_control: The same as a share of the control's tokens.
        honest_after: Share after the attack.
        grammars_mb: Memory of the edge's grammar processes after the attack, less that before.
        edge_rss_mb: Resident memory of the edge after the attack, less that before. Keys and values are left out: what
            is kept of them is bounded by a setting.
        rows: Database rows per hostile device in the attack's first minute, without those of honest work; the rest of a
            shorter attack is extrapolated from its second half.
        fresh_device_s: Longest wait of a new device for the answer to its Open during the attack.
        differing_texts: Outputs of honest devices that differ from those without an attack.
        quota_s: Waits of honest devices for their own quotas. They are slow then without any attack.
    """

    name: str
    baseline: float = 0.0
    honest_control: float | None = None
    honest_during: float = 0.0
    honest_during_of_control: float | None = None
    honest_after: float = 0.0
    edge_rss_mb: float = 0.0
    grammars_mb: float = 0.0
    rows: float = 0.0
    fresh_device_s: float = 0.0
    edge_died: bool = False
    broker_died: bool = False
    attacker: dict[str, Any] = field(default_factory=dict)
    failed_texts: list[str] = field(default_factory=list)
    differing_texts: int = 0
    quota_s: float = 0.0


@dataclass(slots=True)
class Experiment:
    fleet: Fleet
    attack: Attack
    timing: Timing
    seed: int

    def run(self) -> AttackResult:
        result = AttackResult(self.attack.name)
        with (
            self.fleet.running() as running,
            MemoryMeter(running.edge.pid, kept_mb=running.kept_mb) as edge,
        ):
            self._await_tokens(running)
            windows = [self._measure(self.timing.baseline)]
            control: tuple[float, float] | None = None
            if self.attack.control:
                control = self._control(running, result)
                if self.attack.has_plain:
                    time.sleep(self.timing.recovery)
                windows.append(self._measure(self.timing.baseline))
            rates = [running.honest.rate(*window) for window in windows]
            result.baseline = sum(rates) / len(rates)
            if result.baseline <= 0:
                raise BenchError(f"The honest devices write nothing before {self.attack.name}; see the edge's log.")
            if control is not None:
                result.honest_control = running.honest.rate(*control) / result.baseline
            self._attack(running, edge, result)
            if result.honest_control:
                result.honest_during_of_control = result.honest_during / result.honest_control
        return result

    def _await_tokens(self, running: Running) -> None:
        began = time.monotonic()
        while not running.honest.count(began):
            if time.monotonic() - began > _READY_S:
                raise BenchError("The honest devices write nothing; see the logs in the benchmark's folder.")
            time.sleep(0.1)
        time.sleep(self.timing.warm_up)

    @staticmethod
    def _measure(seconds: float) -> tuple[float, float]:
        began = time.monotonic()
        time.sleep(seconds)
        return began, time.monotonic()

    def _control(self, running: Running, result: AttackResult) -> tuple[float, float]:
        plain = self.attack.has_plain
        with nullcontext() if plain else _Sink(running):
            place = running.place if plain else running.place.as_control()
            attacker = self._attacker(place, self.timing.control + PATIENCE_S, *["--plain"] * plain)
            attacker.tell("go")
            window = self._measure(self.timing.control)
            result.attacker["control"] = _account(attacker.end())
        return window

    def _attack(self, running: Running, edge: MemoryMeter, result: AttackResult) -> None:
        timing, honest = self.timing, running.honest
        known = [*self.fleet.honest, *self.fleet.fresh]
        rows = rows_beside(running.database, known)
        failed, differing = len(honest.failed), honest.differing
        attacker = self._attacker(running.place, timing.attack + PATIENCE_S)
        grammars_mb = children_mb(running.edge.pid)
        before = time.monotonic()
        newcomers = _Newcomers(self.fleet, running, self.attack.newcomer)
        attacker.tell("go")
        began = time.monotonic()
        with newcomers:
            time.sleep(timing.attack / 2.0)
            at_half = rows_beside(running.database, known) - rows
            time.sleep(max(0.0, began + timing.attack - time.monotonic()))
            end = time.monotonic()
            newcomers.ask_to_end()
            newcomers.wait()
            result.attacker |= _account(attacker.end())
        time.sleep(timing.recovery if not self.attack.has_plain else _BACK_S)
        after = self._measure(timing.after)
        time.sleep(_ROWS_S)
        result.grammars_mb = children_mb(running.edge.pid) - grammars_mb
        added = rows_beside(running.database, known) - rows
        result.honest_during = honest.rate(began, end) / result.baseline
        result.honest_after = honest.rate(*after) / result.baseline
        result.edge_rss_mb = edge.memory_mb(*after) - edge.memory_mb(before - 1.0, before)
        result.rows = _first_minute(at_half, added, timing.attack) / self.attack.devices
        result.fresh_device_s = max(newcomers.waited_s, default=PATIENCE_S)
        result.edge_died, result.broker_died = not running.edge.lives, not running.mosquitto.running
        result.failed_texts = honest.failed[failed:]
        result.differing_texts = honest.differing - differing
        result.quota_s = honest.quota_s

    def _attacker(self, place: KnownFleet, seconds: float, *more: str) -> Program:
        log = self.fleet.folder / f"attacker-{self.attack.name}.log"
        arguments = [self.attack.name, "--seconds", str(seconds), "--seed", str(self.seed), *more]
        attacker = Program("benchmarks.hostile.attacks", arguments, cores=self.fleet.cores.others, log=log)
        attacker.tell(place.to_json())
        try:
            attacker.wait_for("ready", timeout_s=_READY_S)
        except ProgramError:
            attacker.end()
            raise
        return attacker


class _Sink:
    """An edge that reads drafts and ignores them, in the benchmark's own process; a context manager."""

    def __init__(self, running: Running) -> None:
        place = running.place
        self._client = HostileClient(BrokerClient.at(running.mosquitto, place.sink))
        topic = wildcard(Topic.DRAFT, fleet=place.fleet, edge=place.sink)
        self._client.on_connect = lambda: self._client.subscribe([topic])
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="sink", daemon=True)

    def __enter__(self) -> None:
        self._client.connect()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._client.abort()

    def _read(self) -> None:
        while not self._stopping.is_set():
            self._client.pump(0.05)


class _Newcomers:
    """New devices that arrive one after another during the attack; a context manager."""

    def __init__(self, fleet: Fleet, running: Running, grammar: Grammar | None) -> None:
        self.waited_s: list[float] = []
        self._grammar = grammar
        self._place = running.place
        self._identities = [BrokerClient.at(running.mosquitto, name) for name in fleet.fresh]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._come, name="newcomers", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.ask_to_end()
        self.wait()

    def ask_to_end(self) -> None:
        self._stopping.set()

    def wait(self) -> None:
        self._thread.join()

    def _come(self) -> None:
        self._stopping.wait(_FIRST_NEWCOMER_S)
        for identity in self._identities:
            self.waited_s.append(wait_for_answer(self._place, identity, grammar=self._grammar))
            if self._stopping.wait(_EVERY_NEWCOMER_S):
                return


def _first_minute(at_half: int, at_end: int, seconds: float) -> float:
    """Return the rows of an attack's first minute: bursts as measured, the steady part extrapolated."""
    if seconds >= 60.0:
        return at_end * 60.0 / seconds
    return at_end + (at_end - at_half) * (60.0 - seconds) / (seconds / 2.0)


def _account(lines: Sequence[str]) -> dict[str, Any]:
    """Return the counters of the attacker's last line; empty if it was killed."""
    for line in reversed(lines):
        if line.startswith("{"):
            account: dict[str, Any] = json.loads(line)
            return account
    return {}


_FRESH: Final = 6
_DEVICES: Final = max(attack.devices for attack in ATTACKS.values())
_MIN_DURING: Final = 0.9
_MIN_OF_PLAIN: Final = 0.7
_MIN_AFTER: Final = 0.9  # what is full recovery within the spread of a ten-second window
_MAX_MB: Final = 100.0
_MAX_ROWS: Final = 100.0
_LONGEST_WAIT_S: Final = 1.0
_COLUMNS: Final = {
    "name": "", "baseline": ".1f", "honest_control": ".2f", "honest_during": ".2f", "honest_during_of_control": ".2f",
    "honest_after": ".2f", "edge_rss_mb": ".0f", "grammars_mb": ".0f", "rows": ".0f", "fresh_device_s": ".2f",
    "failed": "d",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "attacks: " + "; ".join(f"{attack.name} ({attack.summary})" for attack in ATTACKS.values())
    parser.add_argument("--attack", nargs="+", choices=list(ATTACKS), metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=number_of(float, 0.1), default=20.0, help="of each attack")
    parser.add_argument("--baseline", type=number_of(float, 0.1), default=10.0, help="seconds of other measurements")
    parser.add_argument("--honest", type=number_of(int, 1), default=3, help="honest devices (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 1), default=192, help="of an honest text, at most")
    parser.add_argument("--scripted", action="store_true", help="a scripted target instead of the real one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep logs and databases there")
    add_curve(parser)


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    _allow_descriptors()
    baseline = options.baseline
    timing = Timing(attack=options.seconds, baseline=baseline, control=baseline, after=baseline)
    folder = options.folder or bench.folder
    folder.mkdir(parents=True, exist_ok=True)
    fleet = Fleet(
        folder=folder.resolve(),
        target=None if options.scripted else bench.model("target"),
        vocabulary=None if options.scripted else bench.model("Q4_0.gguf"),
        honest=[f"device-{number}" for number in range(1, options.honest + 1)],
        hostile=[f"hostile-{number}" for number in range(1, _DEVICES + 1)],
        fresh=[f"fresh-{number}" for number in range(1, _FRESH + 1)],
        cores=bench.cores,
        seed=options.seed,
        tokens=options.tokens,
        edge_program=bench.edge_program,
    )
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    fleets: dict[bool, Fleet] = {}
    with on_cores(bench.cores.others):
        for name in options.attack or ATTACKS:
            attack = ATTACKS[name]
            if attack.has_plain not in fleets:
                fleets[attack.has_plain] = _recorded(fleet, json=attack.has_plain)
            try:
                result = Experiment(fleets[attack.has_plain], attack, timing, seed=options.seed).run()
            except (BenchError, ProgramError) as error:  # the other attacks are measured all the same
                wrong.append(f"{name}: {error}")
                continue
            found = list(wrong_with(result))
            wrong += [f"{name}: {what}." for what in found]
            rows.append({**asdict(result), "met": not found, "failed": len(result.failed_texts)})
            table(rows[-1:], _COLUMNS)
    table(rows, _COLUMNS, title="all attacks; shares are of the same attack's baseline (tokens a second)")
    return SuiteReport(rows, more={"timing_s": asdict(timing)}, wrong=wrong)


def _recorded(fleet: Fleet, *, json: bool) -> Fleet:
    """Return a fleet whose honest devices have recorded their texts; attacks by requests meet short JSON texts."""
    fleet = replace(fleet, folder=fleet.folder / ("json" if json else "plain"), json=json)
    fleet.folder.mkdir(exist_ok=True)
    fleet.make()
    say("recording the honest devices' texts")
    fleet.record()
    return fleet


def wrong_with(result: AttackResult) -> Iterator[str]:
    during = max(result.honest_during, result.honest_during_of_control or 0.0)
    least = _MIN_DURING if not ATTACKS[result.name].has_plain else _MIN_OF_PLAIN
    if during < least:
        yield f"honest devices kept {during:.2f} of their pace ({least} wanted)"
    if result.honest_after < _MIN_AFTER:
        yield f"honest devices came back to {result.honest_after:.2f} of their pace ({_MIN_AFTER} wanted)"
    if result.edge_rss_mb > _MAX_MB:
        yield f"the edge grew by {result.edge_rss_mb:.0f} MB ({_MAX_MB:.0f} allowed)"
    if result.grammars_mb > _MAX_MB:
        yield f"the grammar processes kept {result.grammars_mb:.0f} MB ({_MAX_MB:.0f} allowed)"
    if result.rows > _MAX_ROWS and not ATTACKS[result.name].has_plain:  # a request is a session, plain ones too
        yield f"{result.rows:.0f} database rows a minute ({_MAX_ROWS:.0f} allowed)"
    if result.fresh_device_s > _LONGEST_WAIT_S:
        yield f"a fresh device waited {result.fresh_device_s:.2f} s ({_LONGEST_WAIT_S:g} allowed)"
    yield from _failures(result)


def _failures(result: AttackResult) -> Iterator[str]:
    if result.failed_texts and ATTACKS[result.name].has_plain:
        yield f"{len(result.failed_texts)} honest requests failed"
    if result.differing_texts:
        yield f"{result.differing_texts} honest texts ALTERED"
    if result.quota_s:
        yield f"honest devices waited {result.quota_s:.0f} s for their own quotas"
    if result.edge_died or result.broker_died:
        yield f"the {'edge' if result.edge_died else 'broker'} DIED"


def _allow_descriptors() -> None:
    """Raise the limit of descriptors, which broker and attacker inherit, to the system's maximum."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
