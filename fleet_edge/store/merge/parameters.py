"""Parameters of a merge: what each record fills into its statement."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, Final, TypeVar, get_args

from fleet_edge.store.merge.statements import DEVICE_COUNTERS, DEVICE_STATE, EDGE_LOAD, EDGE_STATE
from fleet_edge.store.records.events import EventLogged
from fleet_edge.store.records.fences import DeviceFenced
from fleet_edge.store.records.record import Record
from fleet_edge.store.records.segments import RoundJudged, SegmentLeft, SegmentProgress, segment_time
from fleet_edge.store.records.sessions import CloseReported, SessionClosed, SessionOpened
from fleet_edge.store.records.sightings import DeviceSeen, DeviceTold, EdgeLoad, EdgeSeen
from fleet_edge.store.records.texts import TextWritten

Parameters = dict[str, Any]
_MILLISECOND: Final = timedelta(milliseconds=1)

K = TypeVar("K")


def spans(sightings: Iterable[tuple[K, datetime]]) -> dict[K, tuple[datetime, datetime]]:
    """Return for each key when it was first and last seen."""
    spans: dict[K, tuple[datetime, datetime]] = {}
    for key, at in sightings:
        first, last = spans.get(key, (at, at))
        spans[key] = (min(first, at), max(last, at))
    return spans


def seen(key: str, spans: dict[str, tuple[datetime, datetime]]) -> list[Parameters]:
    """Return the rows of what was seen, by name."""
    return [{key: name, "first_seen_at": first, "seen_at": last} for name, (first, last) in sorted(spans.items())]


def since_open(segment: int, at: datetime) -> float:
    """Return the milliseconds from a segment's Open to a time."""
    return max((at - segment_time(segment)) / _MILLISECOND, 0.0)


def bound(record: SessionOpened | SegmentLeft | SessionClosed, names: Iterable[str]) -> Parameters:
    """Return the named fields as parameters, whose names must differ from the columns' in an update."""
    key = {"b_session": record.session, "b_device": record.device, "b_segment": record.segment}
    when = {"b_at": record.at} if isinstance(record, SegmentLeft | SessionClosed) else {}
    return key | when | {f"b_{name}": getattr(record, name) for name in names}


def state(record: DeviceSeen | EdgeSeen, key: str) -> Parameters:
    """Return a state as parameters of `set_latest`."""
    names = DEVICE_STATE if isinstance(record, DeviceSeen) else EDGE_STATE
    return {"b_key": key, "b_at": record.at, **{f"b_{name}": getattr(record, name) for name in names}}


def presence_since(record: DeviceSeen) -> Parameters:
    """Return since when a device has its presence."""
    return {"b_key": record.device, "b_presence_since": record.presence_since}


def telemetry(record: DeviceTold) -> Parameters:
    """Return what a device tells of itself."""
    told = _values(record)
    key = {"b_key": told.pop("device"), "b_told_acceptance": told.pop("acceptance")}
    return key | {f"b_{name}": value for name, value in told.items()}


def load(record: EdgeLoad) -> Parameters:
    return {"b_key": record.edge, "b_at": record.at, **{f"b_{name}": getattr(record, name) for name in EDGE_LOAD}}


def progress(record: SegmentProgress) -> Parameters:
    values = _values(record)
    at = values.pop("at")
    return values | {"duration_ms": since_open(record.segment, at)}


def judged_round(record: RoundJudged) -> Parameters:
    values = _values(record)
    del values["device"]  # its segment tells
    return values


def text(record: TextWritten) -> Parameters:
    """Return a piece of a text."""
    values = _values(record)
    del values["device"]  # its segment tells
    return values


def event(record: EventLogged) -> Parameters:
    return _values(record) | {"last_at": record.last_at or record.at}


def fence(record: DeviceFenced) -> Parameters:
    values = _values(record)
    return values | {"fenced_by": values.pop("by"), "since_at": values.pop("at"), "until_at": values.pop("until")}


def closed_by_device(record: SessionClosed) -> Parameters:
    """Return how a session ended, with its device's own counters."""
    counters = {f"b_device_{name}": getattr(record.counters, name) for name in DEVICE_COUNTERS}
    return {**bound(record, ("reason", "tokens", "code", "sentence")), **counters}


def reported(record: CloseReported) -> Parameters:
    """Return a Close that waits for its session."""
    counters = {f"device_{name}": getattr(record.counters, name) for name in DEVICE_COUNTERS}
    why = {"end_code": record.code, "end_sentence": record.sentence}
    told = {"reason": record.reason, "tokens": record.tokens, "closed_at": record.at, **why}
    return {"session": record.session, "device": record.device, **told, **counters}


def written_alone(record: CloseReported) -> Parameters:
    """Return the session of a text that was written without an edge; no segment is older than its own."""
    opened_at = record.at - _MILLISECOND * record.counters.wall_ms
    key = {"session": record.session, "device": record.device}
    return key | {"app": record.app, "opened_at": opened_at, "last_at": record.at, "last_segment": 0}


def _values(record: Record) -> Parameters:
    """Return a record's fields: they are immutable, and so need not be copied as `dataclasses.asdict` does."""
    names, values = _READERS[type(record)]
    return dict(zip(names, values(record), strict=True))


def _read_by(kind: type[Record]) -> tuple[tuple[str, ...], Callable[[Record], tuple[Any, ...]]]:
    names = tuple(field.name for field in fields(kind))
    return names, attrgetter(*names)


_READERS: Final = {kind: _read_by(kind) for kind in get_args(Record)}
