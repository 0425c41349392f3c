"""The store against a naive list of what has happened: any order, repetition and batching, with purges between."""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from fleet_edge.session_log import housekeeping
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.housekeeping import Pace
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.periods import BEGINNING, DAY, Grain, ceiling, floor
from fleet_edge.session_log.records import ADMINISTRATOR, LeaveReason, Record, lift_record, minute_of, segment_number
from fleet_edge.session_log.views import DeviceCounters
from schemas.control import Presence
from schemas.reasons import EndReason
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows, clear
from tests.fleet_edge.store.samples import START

SPAN: Final = 12 * DAY
NOW: Final = START + SPAN + DAY
DEVICES: Final = ("a", "b")
EDGES: Final = ("north", "south")
MINUTE: Final = timedelta(minutes=1)
SHORT: Final = ("minute", "5-minutes")
GRAINS: Final = (None, *SHORT, "hour", "day", "month")
LENGTHS: Final = (None, 0.2, 1.5, 5.0, 9.0)
WAYS: Final = ((), ("device",), ("edge",), ("app",), ("device", "app"), ("draft_model", "quantization"))

_OF_SESSION: Final = (
    "reason", "closed_at", "final_tokens", "device_tokens", "edge", "draft_model", "app", "opened_at", "last_at"
)  # fmt: skip

devices, edges = st.sampled_from(DEVICES), st.sampled_from(EDGES)
choices = st.integers(0, 2**16)


@dataclass(frozen=True)
class Happened:
    """What has happened, as the test knows it; `segment` is the time of its Open."""

    kind: str
    at: datetime
    record: Record = field(compare=False, repr=False)
    device: str = ""
    session: str = ""
    segment: datetime | None = None
    values: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def owner(self) -> tuple[str, str]:
        return self.session, self.device


def counters(tokens: int, unverified: int) -> DeviceCounters:
    numbers = {"tokens": tokens, "unverified": unverified, "wall_ms": 2000.0}
    return DeviceCounters(**dict.fromkeys(DeviceCounters.__dataclass_fields__, 1) | numbers)  # type: ignore[arg-type]


class Log(RuleBasedStateMachine):
    """Draws what happens, stores it late, repeated and shuffled, and compares what is asked."""

    store: Store
    log: SessionLog

    def __init__(self) -> None:
        super().__init__()
        clear(self.store)
        self.known: list[Happened] = []  # stored
        self.waiting: list[Happened] = []
        self.open: list[Happened] = []  # Opens, stored or not
        self.begin, self.purged, self.ticks = START, BEGINNING, 0

    # What happens

    def _at(self, place: int, after: datetime | None = None) -> datetime:
        """Return a time that nothing else has."""
        self.ticks += 1
        begin = self.begin if after is None else after
        length = START + SPAN - begin if after is None else timedelta(minutes=20)
        return begin + place / 2**16 * length + timedelta(microseconds=self.ticks)

    def _add(self, kind: str, at: datetime, record: Record, **more: Any) -> Happened:
        happened = Happened(kind, at, record, **more)
        self.waiting.append(happened)
        return happened

    def _of(self, place: int) -> tuple[dict[str, Any], dict[str, Any], datetime]:
        opened = self.open[place % len(self.open)]
        assert opened.segment is not None
        own = {"device": opened.device, "session": opened.session, "segment": opened.segment}
        return own, own | {"segment": segment_number(opened.segment)}, self._at(place, opened.segment)

    @rule(
        session=st.integers(0, 3),
        device=devices,
        edges=st.lists(edges, min_size=1, max_size=3),
        draft=st.sampled_from(["small", "tiny"]),
        place=choices,
    )
    def open_session(self, session: int, device: str, edges: list[str], draft: str, place: int) -> None:
        """Open a session, and resume it at other times, at any edge."""
        name = f"{segment_number(self.begin) % 2**32 + session:016x}"
        for number, edge in enumerate(edges):
            at = self._at((place + number * 2**14) % 2**16)
            key = {"session": name, "device": device, "segment": segment_number(at)}
            values = {"edge": edge, "draft_model": draft, "app": f"app-{(session + number) % 2}"}
            record = samples.opened(**key, **values, at=at)
            self.open.append(self._add("open", at, record, device=device, session=name, segment=at, values=values))

    @precondition(lambda self: self.open)
    @rule(place=choices, tokens=st.integers(0, 30))
    def progress(self, place: int, tokens: int) -> None:
        own, key, at = self._of(place)
        before = [
            each for each in self.known + self.waiting if each.kind == "progress" and each.segment == own["segment"]
        ]
        latest = max(before, key=lambda each: each.values["tokens"], default=None)
        total = tokens + (latest.values["tokens"] if latest else 0)
        told = {"first_token_ms": 30.0 if total else None, "gap_p95_ms": float(total) or None}
        values = {"tokens": total, **told}
        self._add("progress", at, samples.progress(**key, tokens=total, at=at, **told), values=values, **own)

    @precondition(lambda self: self.open)
    @rule(place=choices)
    def judge(self, place: int) -> None:
        own, key, at = self._of(place)
        self._add("round", at, samples.judged(**key, round=self.ticks, at=at), **own)

    @precondition(lambda self: self.open)
    @rule(place=choices, reason=st.sampled_from(LeaveReason))
    def leave(self, place: int, reason: LeaveReason) -> None:
        own, key, at = self._of(place)
        self._add("end", at, samples.left(**key, reason=reason, at=at), values={"reason": reason, "ends": False}, **own)

    @precondition(lambda self: self.open)
    @rule(place=choices, reason=st.sampled_from(EndReason), by_device=st.booleans(), tokens=st.integers(0, 50))
    def close(self, place: int, reason: EndReason, by_device: bool, tokens: int) -> None:
        own, key, at = self._of(place)
        told = counters(tokens, 0) if by_device else None
        record = samples.closed(**key, reason=reason, counters=told, tokens=tokens, at=at)
        values = {"reason": reason, "ends": True, "by_device": by_device, "tokens": tokens}
        self._add("end", at, record, values=values, **own)

    @rule(
        place=choices, device=devices, other=st.integers(0, 4), unverified=st.integers(0, 1), tokens=st.integers(0, 50)
    )
    def report(self, place: int, device: str, other: int, unverified: int, tokens: int) -> None:
        at, name = self._at(place), f"{segment_number(self.begin) % 2**32 + other:016x}"
        told = counters(tokens, unverified)
        record = samples.reported(session=name, device=device, counters=told, tokens=tokens, app="alone", at=at)
        values = {"reason": EndReason.STOP, "tokens": tokens, "alone": bool(unverified)}
        self._add("report", at, record, device=device, session=name, values=values)

    @rule(place=choices, device=devices, presence=st.sampled_from(Presence), sure=st.booleans())
    def see_device(self, place: int, device: str, presence: Presence, sure: bool) -> None:
        at = self._at(place)
        since = at if sure else None
        record = samples.device_seen(device=device, presence=presence, presence_since=since, at=at)
        self._add("state", at, record, device=device, values={"presence": presence.value, "since": since})

    @rule(place=choices, device=devices)
    def tell(self, place: int, device: str) -> None:
        at = self._at(place)
        record = samples.device_told(device=device, plan=f"plan-{self.ticks}", at=at)
        self._add("telemetry", at, record, device=device, values={"plan": f"plan-{self.ticks}"})

    @rule(place=choices, edge=edges)
    def load(self, place: int, edge: str) -> None:
        at = self._at(place)
        record = samples.edge_load(edge=edge, open_sessions=self.ticks, at=at)
        self._add("load", at, record, values={"edge": edge, "open_sessions": self.ticks})

    @rule(place=choices, device=devices, number=st.integers(0, 5), count=st.integers(1, 9))
    def log_event(self, place: int, device: str, number: int, count: int) -> None:
        at = self.begin + number * MINUTE
        name, last = f"{self.begin.isoformat()}-{device}-{number}", self._at(place, at)
        record = samples.event(id=name, device=device, count=count, at=at, last_at=last)
        self._add("event", last, record, device=device, values={"id": name, "count": count})

    @rule(
        place=choices, device=devices, by=st.sampled_from([*EDGES, ADMINISTRATOR]), days=st.sampled_from([None, 1, 30])
    )
    def quarantine(self, place: int, device: str, by: str, days: int | None) -> None:
        at = self._at(place)
        until = None if days is None else at + days * DAY
        record = samples.quarantined(device=device, by=by, since_at=at, until_at=until)
        self._add("quarantine", at, record, device=device, values={"by": by, "until": until})

    @rule(place=choices, device=devices, by=st.sampled_from([*EDGES, ADMINISTRATOR]))
    def lift(self, place: int, device: str, by: str) -> None:
        at = self._at(place)
        self._add("lift", at, lift_record(device, by, at), device=device)

    # Storing

    @precondition(lambda self: self.waiting)
    @rule(seed=choices, size=st.integers(1, 9))
    def store_some(self, seed: int, size: int) -> None:
        """Store a part of what waits, and some of what is known, in any order."""
        chance = random.Random(seed)
        chance.shuffle(self.waiting)
        new = [self.waiting.pop() for _ in range(chance.randint(1, len(self.waiting)))]
        fresh = [each for each in self.known if each.at >= self.purged]
        batch = [each.record for each in new + chance.sample(fresh, min(len(fresh), 3))]
        chance.shuffle(batch)
        for start in range(0, len(batch), size):
            self.store.apply(batch[start : start + size])
        self.known += new

    @precondition(lambda self: len(self.known) > 12)
    @rule()
    def purge(self) -> None:
        """Purge all that ends before a day; what happens from then on is of other sessions."""
        if self.waiting:
            self.store_some(1, 5)
        before = floor(Grain.DAY, self.begin) + 3 * DAY
        if self.waiting or before >= START + SPAN:
            return
        housekeeping.purge_sessions(self.store.engine, before=before, pace=Pace(50))
        self.begin = self.purged = ceiling(Grain.HOUR, before)
        self.open = []
        lasts = {owner: self._last_at(own) for owner, own in self._sessions().items()}
        self.gone = {owner for owner, at in lasts.items() if at < before} | getattr(self, "gone", set())

    # Asking

    def _sessions(self) -> dict[tuple[str, str], list[Happened]]:
        """Return what has happened to each session that there is."""
        found = defaultdict(list)
        for each in self.known:
            if each.session:
                found[each.owner].append(each)
        gone: set[tuple[str, str]] = getattr(self, "gone", set())
        return {
            owner: own
            for owner, own in found.items()
            if owner not in gone and any(each.kind != "report" or each.values["alone"] for each in own)
        }

    @staticmethod
    def _last_at(own: list[Happened]) -> datetime:
        return max(each.at for each in own if each.kind != "report" or each.values["alone"])

    @rule()
    def ask_for_sessions(self) -> None:
        expected = {owner: self._expected_session(own) for owner, own in self._sessions().items()}
        found = {
            (view.session, view.device): (
                *(getattr(view, name) for name in _OF_SESSION),
                *(view.counted.tokens, view.counted.segments, view.first_token_ms),
                len(self.log.rounds(view.session, device=view.device)),
            )
            for view in self.log.sessions(limit=1000)
        }  # fmt: skip
        assert found == expected

    def _expected_session(self, own: list[Happened]) -> tuple[object, ...]:
        of_segments = [each for each in own if each.segment is not None]
        opens = sorted((each for each in own if each.kind == "open"), key=lambda each: each.at)
        ends = [each for each in own if each.kind == "report" or each.values.get("by_device")]
        if not ends and of_segments:
            last = max(each.segment for each in of_segments if each.segment)
            ends = [each for each in of_segments if each.values.get("ends") and each.segment == last]
        end = max(ends, key=lambda each: each.at, default=None)
        by_device = end is not None and (end.kind == "report" or end.values["by_device"])
        alone = [each for each in own if each.kind == "report" and each.values["alone"]]
        begins = [each.segment for each in of_segments if each.segment]
        begins += [each.at - timedelta(seconds=2) for each in alone]
        segments = {each.segment for each in of_segments}
        tokens = {segment: self._tokens(own, segment) for segment in segments}
        return (
            end and end.values["reason"].value,
            end and end.at,
            end and end.values["tokens"],
            end.values["tokens"] if end and by_device else None,
            opens[-1].values["edge"] if opens else None,
            opens[0].values["draft_model"] if opens else None,
            opens[0].values["app"] if opens else "alone" if alone else None,
            min(begins),
            self._last_at(own),
            sum(tokens.values()),
            len(segments),
            30.0 if any(tokens.values()) else None,
            sum(each.kind == "round" for each in own),
        )

    @staticmethod
    def _tokens(own: list[Happened], segment: datetime | None) -> int:
        counted = [each.values["tokens"] for each in own if each.kind == "progress" and each.segment == segment]
        return max(counted, default=0)

    @rule()
    def ask_for_segments(self) -> None:
        expected = {}
        for owner, own in self._sessions().items():
            for segment in {each.segment for each in own if each.segment}:
                of_it = [each for each in own if each.segment == segment]
                end = max((each for each in of_it if each.kind == "end"), key=lambda each: each.at, default=None)
                opened = [each.values["edge"] for each in of_it if each.kind == "open"]
                tokens, length = self._tokens(own, segment), max(each.at for each in of_it) - segment
                values = (end and end.values["reason"].value, end and end.at, tokens, float(tokens) or None)
                expected[*owner, segment_number(segment)] = (*values, opened[0] if opened else None, length)
        names = ("reason", "closed_at", "tokens", "gap_p95_ms", "edge")
        found = {
            (row["session"], row["device"], row["segment"]): (
                *(row[name] for name in names), timedelta(milliseconds=row["duration_ms"])
            )
            for row in all_rows(self.store)["segments"]
        }  # fmt: skip
        assert found == expected

    @rule()
    def ask_for_machines(self) -> None:
        of_devices = defaultdict(list)
        for each in self.known:
            heard = each.kind in {"state", "telemetry"} or each.segment is not None or each.values.get("alone")
            if heard:
                of_devices[each.device].append(each)
        expected = {}
        for name, own in of_devices.items():
            states, told = ([each for each in own if each.kind == kind] for kind in ("state", "telemetry"))
            expected[name] = (
                min(each.at for each in own),
                max(each.at for each in own),
                max(states, key=lambda each: each.at).values["presence"] if states else None,
                max((each.values["since"] for each in states if each.values["since"]), default=None),
                max(told, key=lambda each: each.at).values["plan"] if told else None,
            )
        rows = all_rows(self.store)
        names = ("first_seen_at", "seen_at", "presence", "presence_since", "plan")
        assert {row["device"]: tuple(row[name] for name in names) for row in rows["devices"]} == expected
        loads = [each for each in self.known if each.kind == "load"]
        minutes = {(minute_of(each.at), each.values["edge"]): each for each in sorted(loads, key=lambda each: each.at)}
        found = {(row["minute"], row["edge"]): row["open_sessions"] for row in rows["edge_loads"]}
        assert found == {key: each.values["open_sessions"] for key, each in minutes.items()}
        counts = Counter[str]()
        for each in self.known:
            if each.kind == "event":
                counts[each.values["id"]] = max(counts[each.values["id"]], each.values["count"])
        assert {row["id"]: row["count"] for row in rows["events"]} == counts

    @rule()
    def ask_for_quarantines(self) -> None:
        expected = set()
        for device in DEVICES:
            own = sorted((each for each in self.known if each.device == device), key=lambda each: each.at)
            lifted = max((each.at for each in own if each.kind == "lift"), default=BEGINNING)
            last = {each.values["by"]: each for each in own if each.kind == "quarantine"}
            if any(each.at > lifted and (each.values["until"] or NOW + DAY) > NOW for each in last.values()):
                expected.add(device)
        assert {view.device for view in self.log.quarantines()} == expected

    @rule(
        place=choices,
        early=st.booleans(),
        length=st.sampled_from(LENGTHS),
        by=st.sampled_from(WAYS),
        grain=st.sampled_from(GRAINS),
    )
    def ask_for_totals(
        self, place: int, early: bool, length: float | None, by: tuple[str, ...], grain: str | None
    ) -> None:
        while self.waiting:
            self.store_some(place, 5)
        # Where segments are purged, devices have no hours, and there are no minutes.
        early = early and not (grain in SHORT or (grain == "hour" and "device" in by))
        since = START + place / 2**16 * SPAN if early else self._at(place)
        until = None if length is None else since + length * DAY
        found = {
            (view.start, *(getattr(view, name) for name in by)): (
                view.counted.sessions,
                view.counted.segments,
                view.counted.tokens,
            )
            for view in self.log.usage(since=since, until=until, by=by, grain=grain)
            if view.counted.segments
        }
        assert found == dict(self._expected_totals(since, until, by, grain))

    def _expected_totals(
        self, since: datetime, until: datetime | None, by: tuple[str, ...], grain: str | None
    ) -> Iterator[tuple[Any, tuple[int, int, int]]]:
        of_device, length = "device" in by, (until or NOW) - since
        if not (grain in SHORT or (of_device and grain == "hour")) and (
            since < self.purged or length > (2 * DAY if of_device else DAY / 2)
        ):
            kept = Grain.HOUR if not of_device and (grain == "hour" or length <= 8 * DAY) else Grain.DAY
            since, until = floor(kept, since), None if until is None else ceiling(kept, until)
        sums: dict[Any, list[int]] = {}
        for opened in dict.fromkeys(each for each in self.known if each.kind == "open"):
            if opened.at < since or (until is not None and opened.at >= until):
                continue
            key = None if grain is None else floor(Grain(grain), opened.at)
            values = opened.values | {"device": opened.device, "quantization": "Q4_0"}
            own = [each for each in self.known if each.owner == opened.owner]
            earlier = [
                each
                for each in own
                if each.kind == "open" and each.at < opened.at
                if "edge" not in by or each.values["edge"] == opened.values["edge"]
            ]
            counted = sums.setdefault((key, *(values[name] for name in by)), [0, 0, 0])
            counted[0] += not earlier
            counted[1] += 1
            counted[2] += self._tokens(own, opened.segment)
        for key, counted in sums.items():
            yield key, (counted[0], counted[1], counted[2])

    @rule()
    def ask_for_latencies(self) -> None:
        measured = 0
        for opened in dict.fromkeys(each for each in self.known if each.kind == "open"):
            own = [each for each in self.known if each.owner == opened.owner]
            measured += self._tokens(own, opened.segment) > 0
        found = self.log.latencies()
        assert (found["first_token"].count, found["gap"].count) == (measured, measured)

    @rule(grain=st.sampled_from(["minute", "hour", "day"]))
    def ask_for_active_devices(self, grain: str) -> None:
        since = floor(Grain.DAY, self.begin)
        named = defaultdict(set)
        for each in self.known:
            if each.kind == "open" and each.at >= (since if grain == "day" else max(since, self.purged)):
                named[floor(Grain(grain), each.at)].add(each.device)
        found = self.log.active_devices(grain, since=since)
        assert found == {start: len(names) for start, names in named.items()}

    def teardown(self) -> None:
        while self.waiting:
            self.store_some(7, 4)
        for _ in range(2):
            for ask in (self.ask_for_sessions, self.ask_for_segments, self.ask_for_machines, self.ask_for_quarantines):
                ask()
            self.purge()
        self.ask_for_latencies()
        for place, (by, grain) in enumerate(itertools.product(WAYS, GRAINS)):
            for early in (False, True):
                self.ask_for_totals(place * 2**9, early, LENGTHS[place % len(LENGTHS)], by, grain)
        for grain in ("minute", "hour", "day"):
            self.ask_for_active_devices(grain)


@pytest.mark.slow
def test_a_log_holds_what_has_happened(store: Store, database_url: str) -> None:
    with SessionLog(database_url, now=lambda: NOW) as log:
        machine = type("LogUnderTest", (Log,), {"store": store, "log": log})
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine,
            settings=settings(
                max_examples=40 if store.engine.dialect.name == "sqlite" else 8,  # a server takes much longer
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
