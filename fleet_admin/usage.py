"""Usage: what edges counted, added up by names and by time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any, Final

from fleet_admin.columns import Column, Kind
from fleet_admin.report import Report
from fleet_admin.reports import TALLY
from fleet_edge.session_log import Filter, SessionLog, Tally, UsageView
from schemas.names import model_name

DIMENSIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "app": ("app",),
    "device": ("device",),
    "edge": ("edge",),
    "model": ("draft_model", "quantization"),
    "target": ("target_id",),
    "label": ("device",),
}
"""Dimensions of the log by what usage is added up by."""

HEADINGS: Final = {"app": "application", "model": "draft model", "target": "target identity"}
"""Headings that differ from the dimension."""

_PUSHED: Final = frozenset({"app", "device", "edge", "label"})


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """Sums by what was asked for; latencies by time alone, refusals and errors by device alone."""

    start: datetime | None = None
    app: str | None = None
    device: str | None = None
    edge: str | None = None
    model: str | None = None
    target: str | None = None
    label: str | None = None
    counted: Tally
    first_token_p95_ms: float | None = None
    gap_p95_ms: float | None = None
    refusals: int | None = None
    errors: int | None = None


def usage_report(log: SessionLog, by: Sequence[str], per: str | None, *, now: datetime) -> Report[UsageRow]:
    """Return a report of usage by some of `DIMENSIONS`, and per minute, hour, day or month."""
    kind: Kind = "moment" if per is None else {"day": "day", "month": "month"}.get(per, "moment")  # type: ignore[assignment]
    columns: list[Column[UsageRow]] = [
        *([Column("start" if kind == "moment" else str(per), "start", kind, key="start", rank=0)] if per else ()),
        *(Column(HEADINGS.get(name, name), name, key=name, rank=0) for name in by),
        TALLY[0],
    ]
    if not by:
        columns += [
            Column("first token p95", "first_token_p95_ms", "ms", key="first_token", rank=0),
            Column("gap p95", "gap_p95_ms", "ms", key="gap", rank=1),
        ]
    columns += TALLY[1:]
    columns.append(Column("bytes", lambda row: row.counted.uplink_bytes + row.counted.downlink_bytes, "bytes", rank=2))
    if list(by) == ["device"] and per is None:
        columns += [
            Column("refusals", "refusals", "count", rank=1),
            Column("errors", "errors", "count", rank=1),
        ]
    return Report(
        "usage rows",
        columns,
        lambda where, since, until, **_: _rows(log, by, per, where, since=since, until=until),
        order="" if per else "-tokens",
        stored=lambda each: each.field in _PUSHED and each.operator == "=" and each.value is not None,
        hidden=[Column(name, name) for name in sorted(_PUSHED - set(by))],
        empty="No usage in this time: it is counted when applications generate.",
        now=now,
    )


def _rows(
    log: SessionLog, by: Sequence[str], per: str | None, where: Sequence[Filter], **period: datetime | None
) -> list[UsageRow]:
    chosen: dict[str, Any] = {}
    for name in ("app", "device", "edge"):
        if named := [each.value for each in where if each.field == name]:
            chosen[name] = named
    if wanted := {each.value for each in where if each.field == "label"}:
        labelled = {device for device, labels in log.labels().items() if wanted & {*labels}}
        chosen["device"] = sorted(labelled & {*chosen.get("device", labelled)})
        if not chosen["device"]:
            return []
    found = _added(log, by, per, **period, **chosen)
    if list(by) == ["device"] and per is None:
        return _with_events(log, found, chosen, **period)
    if not by and per and chosen.keys() <= {"edge"} and len(chosen.get("edge", ())) <= 1:  # what latencies are known by
        known = log.latencies_over_time(per, **period, edge=next(iter(chosen.get("edge", ())), None))
        return [
            replace(
                row,
                first_token_p95_ms=own["first_token"].quantile(0.95) if "first_token" in own else None,
                gap_p95_ms=own["gap"].quantile(0.95) if "gap" in own else None,
            )
            for row in found
            for own in [known.get(row.start, {}) if row.start else {}]
        ]
    return found


def _added(log: SessionLog, by: Sequence[str], per: str | None, **chosen: Any) -> list[UsageRow]:  # noqa: ANN401
    """Query and add up; a device with several labels counts for each of them."""
    dimensions = list(dict.fromkeys(each for name in by for each in DIMENSIONS[name]))
    labels = log.labels() if "label" in by else {}
    added: dict[tuple[datetime | None, tuple[str | None, ...]], Tally] = {}
    for view in log.usage(by=dimensions, grain=per, **chosen):
        for label in labels.get(view.device or "", (None,)):
            key = view.start, tuple(_name(view, name, label) for name in by)
            known = added.get(key)
            added[key] = view.counted if known is None else _sum(known, view.counted)
    found = [
        UsageRow(start=start, counted=counted, **dict(zip(by, names, strict=True)))  # type: ignore[arg-type]
        for (start, names), counted in added.items()
    ]
    return sorted(found, key=lambda row: (row.start.timestamp() if row.start else 0.0, -row.counted.tokens))


def _name(view: UsageView, name: str, label: str | None) -> str | None:
    if name == "model":
        return model_name(view.draft_model, view.quantization)
    return label if name == "label" else getattr(view, DIMENSIONS[name][0])


def _sum(one: Tally, other: Tally) -> Tally:
    return replace(one, **{each.name: getattr(one, each.name) + getattr(other, each.name) for each in fields(one)})


def _with_events(
    log: SessionLog, found: Sequence[UsageRow], chosen: Mapping[str, Any], **period: datetime | None
) -> list[UsageRow]:
    """Add how often devices were refused and failed, also of those without a session."""
    where = [Filter(name, "=", each) for name in ("device", "edge") for each in chosen.get(name, ())]

    def times(**kind: str) -> dict[str, int]:
        counts = log.event_counts(by=("device",), where=where, limit=100_000, **period, **kind)  # type: ignore[arg-type]
        return {count.device: count.times for count in counts if count.device is not None}

    refusals, errors = times(kind="refused"), times(severity="error")
    rows = {row.device: row for row in found}
    nothing = Tally(sessions=0, segments=0, duration_ms=0.0)
    for name in sorted({*refusals, *errors} - rows.keys()):
        rows[name] = UsageRow(device=name, counted=nothing)
    return [
        replace(row, refusals=refusals.get(name or "", 0), errors=errors.get(name or "", 0))
        for name, row in rows.items()
    ]
