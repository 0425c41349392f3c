"""Diagnosis: which part of a token's time is long on a device or an edge, why, and what to do.

A part is a cause if it takes a large share of the time, and is longer than on the fleet's other machines or than it
ever is on a sound one. Only `diagnose_device` and `diagnose_edge` read the session log.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from operator import attrgetter
from statistics import median
from typing import Final

from fleet_admin.columns import shown
from fleet_admin.token_time import TimePart, TokenTime, token_time
from fleet_edge.session_log import SegmentCounters, SessionLog
from schemas.reasons import RefusalCode


class Cause(StrEnum):
    FULL = "full"
    OVERLOADED = "overloaded"
    OWN_SHARE = "own-share"
    ONE_DEVICE = "one-device"
    SLOW_STEPS = "slow-steps"
    EDGE_ONLY = "edge-only"
    PROMPTS = "prompts"
    KV_MEMORY = "kv-memory"
    GRAMMAR = "grammar"
    QUOTA = "quota"
    LINK = "link"
    SLOW_DRAFTING = "slow-drafting"
    THROTTLED = "throttled"
    REJECTED_DRAFTS = "rejected-drafts"


@dataclass(frozen=True, slots=True)
class Conclusion:
    """A cause, the share of the time that it takes (0 to 1), and what to do."""

    cause: Cause
    share: float
    sentence: str
    advice: str


_MATTERS: Final = 0.2
"""Share of the time from which a part is a cause."""

_LONGER: Final = 1.5
_SLOWER: Final = 1.25
"""How much longer a part and the whole token take on a slow machine than on the median one."""

_PROMPTS: Final = 0.25
"""Share of prompts from which they are a cause; less is usual for chats."""

_MOST: Final = 0.5
"""Share from which something takes most of the time, or a device most of an edge."""

_NOTICED_MS: Final = 30.0
"""Shortest wait for the link or in the queue that is a cause without a comparison."""

_PATIENCE_MS: Final = 250.0
"""Time of a step that readers take for a pause."""

_PAYS: Final = 0.4
"""Time of a draft token, in steps, beyond which drafts do not pay; twice the usual limit, since steps vary."""

_USUAL_ACCEPTANCE: Final = 0.7
"""Acceptance of a fitting draft model, where no other device has one."""

_LOW: Final = 0.6
"""Share of the usual acceptance below which drafts are rejected too often."""

_FULL_KV: Final = 0.9
_SHORT: Final = 32  # tokens of a short answer


@dataclass(frozen=True, slots=True)
class Busiest:
    """The device with the largest share of the tokens that an edge computes, among all `devices` there."""

    device: str
    share: float
    devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodFigures:
    """What conclusions about a device or an edge are drawn from; figures of one period.

    Attributes:
        edge: The edge, or the device's.
        others: The fleet's other devices, or its other edges.
        refused: Sessions that were refused, by code.
        busiest: At the edge.
        earlier_step_ms: Steps of the edge in the days before, with a similar number of sessions.
        kv_usage: Of an edge, from 0 to 1.
    """

    name: str
    edge: str
    own: TokenTime
    others: Sequence[TokenTime] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    busiest: Busiest | None = None
    earlier_step_ms: float | None = None
    kv_usage: float | None = None

    def share(self, part: TimePart) -> float:
        return self.own.share(part)

    def usual(self, figure: Callable[[TokenTime], float | None]) -> float | None:
        """Return the median of the others."""
        return _median(map(figure, self.others))

    def exceeds(self, figure: Callable[[TokenTime], float | None], others: Sequence[TokenTime] | None = None) -> bool:
        """Allow for a machine that is slower as a whole: then its every figure is longer than usual."""
        usual_ms = self.usual(figure) if others is None else _median(map(figure, others))
        total_ms = self.usual(attrgetter("total_ms"))
        own_ms = figure(self.own)
        if total_ms is None or usual_ms is None or not own_ms or self.own.total_ms < _SLOWER * total_ms:
            return False
        return own_ms >= _LONGER * usual_ms

    @property
    def slow_steps(self) -> bool:
        step_ms = self.own.step_ms or 0.0
        earlier = self.earlier_step_ms is not None and step_ms >= _LONGER * self.earlier_step_ms
        alike = [each for each in self.others if _similar(each.batch, self.own.batch)]
        return step_ms >= _PATIENCE_MS or earlier or self.exceeds(attrgetter("step_ms"), alike)

    @property
    def recomputes(self) -> bool:
        """Keys and values of sessions are evicted for others, and computed again."""
        return (self.kv_usage or 0.0) >= _FULL_KV


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts(PeriodFigures):
    """Facts about a device; `alike` are the others with its draft model, what follows is its latest report."""

    alike: Sequence[TokenTime] = ()
    plan: str | None = None
    plan_reason: str | None = None
    throttled: str | None = None
    temperature_c: float | None = None

    def share(self, part: TimePart) -> float:
        return self.own.share(part) * (1.0 - self.lost if part in _OF_ROUNDS else 1.0)

    @property
    def usual_acceptance(self) -> float:
        return self.usual(attrgetter("acceptance")) or _USUAL_ACCEPTANCE

    @property
    def lost(self) -> float:
        """Share of the rounds that usual acceptance would save; 0 if acceptance is not low."""
        own, usual = self.own.acceptance, self.usual_acceptance
        if own is None or own >= _LOW * usual or not self.own.draft_tokens:
            return 0.0
        return 1.0 - _committed(own, self.own.draft_tokens) / _committed(usual, self.own.draft_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeFacts(PeriodFigures):
    def share(self, part: TimePart) -> float:
        return self.own.share(part) * (1.0 - self.taken if part in _OF_EDGE else 1.0)

    @property
    def taken(self) -> float:
        """Share of the edge that one of several devices takes, if that is most of it and they compete."""
        busiest = self.busiest
        if busiest is None or busiest.devices < 3 or (self.own.batch or 0.0) < 2.0:  # noqa: PLR2004 - one of two always has most
            return 0.0
        return busiest.share if busiest.share >= _MOST else 0.0


_OF_ROUNDS: Final = frozenset({TimePart.DRAFTING, TimePart.LINK, TimePart.QUEUE, TimePart.STEPS})
_OF_EDGE: Final = frozenset({TimePart.QUEUE, TimePart.STEPS, TimePart.PROMPT})


def _committed(acceptance: float, draft_tokens: float) -> float:
    """Return the tokens that a draft commits on average, with the correction or bonus token."""
    return (1.0 - acceptance ** (draft_tokens + 1.0)) / (1.0 - acceptance) if acceptance < 1.0 else draft_tokens + 1.0


def _similar(one: float | None, other: float | None) -> bool:
    """Steps with about as many sessions can be compared."""
    return 1.0 / _LONGER <= (one or 1.0) / (other or 1.0) <= _LONGER


def _median(figures: Iterable[float | None]) -> float | None:
    known = [each for each in figures if each is not None]
    return median(known) if known else None


def _ms(value: float | None) -> str:
    return shown(value, "ms")


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _than(usual_ms: float | None) -> str:
    return "" if usual_ms is None else f" (median of the others: {_ms(usual_ms)})"


# Rules for devices and edges


def _full(facts: PeriodFigures) -> Conclusion:
    busy = facts.refused.get(RefusalCode.BUSY, 0)
    if busy:
        why = f"Edges refused sessions {busy:,} times, because the edge or the device has its maximum of open ones."
        advice = "Add an edge, or send fewer requests at once; `max_sessions_per_device` limits a single device."
    else:
        codes = ", ".join(sorted(facts.refused)) or "none was refused"
        why = f"Sessions wait for an edge that grants them (refusals: {codes})."
        advice = "`fleet admin edges` shows whether edges are online; `fleet admin events kind=refused` says why not."
    return Conclusion(Cause.FULL, facts.share(TimePart.SESSION), why, advice)


def _grammar(facts: PeriodFigures) -> Conclusion:
    sentence = "Grammars are compiled before a session, and masks computed in its steps."
    advice = "Use a simpler schema; give the same one again, since a known grammar is not compiled twice."
    return Conclusion(Cause.GRAMMAR, facts.share(TimePart.GRAMMAR), sentence, advice)


def _prompts(facts: PeriodFigures) -> Conclusion | None:
    if facts.own.share(TimePart.PROMPT) < _PROMPTS or facts.recomputes:
        return None
    tokens = facts.own.tokens / facts.own.sessions
    what = f"Answers are short ({tokens:.0f} tokens), so that prompts" if tokens < _SHORT else "Prompts are long: they"
    advice = "Put the common part first, so that it is computed once; shorten the rest."
    return Conclusion(Cause.PROMPTS, facts.share(TimePart.PROMPT), f"{what} take much of the time.", advice)


def _overloaded(facts: PeriodFigures) -> Conclusion | None:
    queue_ms, step_ms, busiest = facts.own.queue_ms or 0.0, facts.own.step_ms or 0.0, facts.busiest
    waits = queue_ms >= max(_LONGER * step_ms, _NOTICED_MS)
    if not waits and not facts.exceeds(attrgetter("queue_ms")):
        return None
    part = facts.share(TimePart.QUEUE)
    sentence = f"Drafts wait {_ms(queue_ms)} at {facts.edge} for a step of {_ms(step_ms)}"
    sentence += f"{_than(facts.usual(attrgetter('queue_ms')))}."
    if busiest is not None and busiest.share >= _MOST and busiest.devices > 1:
        uses = f" computes {_percent(busiest.share)} of its tokens for {busiest.device}."
        if busiest.device == facts.name:
            advice = (
                "Send shorter prompts and fewer requests at once: beyond a fifth of the time, prompts wait for others."
            )
            return Conclusion(Cause.OWN_SHARE, part, f"{sentence} {facts.edge}{uses}", advice)
        sentence = f"{sentence} {facts.edge}{uses}"
    advice = "Add an edge, or limit the busiest devices by quotas (`fleet admin usage --by device --sort -edge_s`)."
    return Conclusion(Cause.OVERLOADED, part, sentence, advice)


def _slow_steps(facts: PeriodFigures) -> Conclusion | None:
    if not facts.slow_steps:
        return None
    before = "" if facts.earlier_step_ms is None else f", {_ms(facts.earlier_step_ms)} in the days before"
    sentence = (
        f"A step of {facts.edge} takes {_ms(facts.own.step_ms)}{before}{_than(facts.usual(attrgetter('step_ms')))}."
    )
    advice = (
        "Look for other work on the edge's machine, heat and swapping; `fleet edge advise` measures what it can do."
    )
    return Conclusion(Cause.SLOW_STEPS, facts.share(TimePart.STEPS), sentence, advice)


# Rules for devices


def _quota(facts: DeviceFacts) -> Conclusion:
    sentence = "The device has used up a quota at the edge, and waits as the edge asks."
    advice = f"`fleet admin events device={facts.name}` names the quota; send less, or raise it for a label of devices."
    return Conclusion(Cause.QUOTA, facts.share(TimePart.QUOTA), sentence, advice)


def _link(facts: DeviceFacts) -> Conclusion | None:
    link_ms = facts.own.link_ms or 0.0
    most = facts.own.share(TimePart.LINK) >= _MOST and link_ms >= _NOTICED_MS
    if not most and not facts.exceeds(_part(TimePart.LINK)):
        return None
    sentence = f"The link takes {_ms(link_ms)} for each answer{_than(facts.usual(attrgetter('link_ms')))}."
    advice = (
        "Check the line. Leave `edge_only` and `ahead` on auto: edge-only decoding and drafting ahead hide a slow link."
    )
    return Conclusion(Cause.LINK, facts.share(TimePart.LINK), sentence, advice)


def _slow_drafting(facts: DeviceFacts) -> Conclusion | None:
    own, part = facts.own, facts.share(TimePart.DRAFTING)
    if facts.throttled:
        rests = facts.plan == "edge-only" and not facts.slow_steps
        advice = "Cool the device, or supply it with more power; until then it drafts little or nothing."
        return Conclusion(Cause.THROTTLED, facts.share(TimePart.STEPS) if rests else part, facts.throttled, advice)
    draft_ms, usual_ms = own.draft_ms or 0.0, _median(each.draft_ms for each in facts.alike)
    heat = "" if facts.temperature_c is None else f" (processor: {facts.temperature_c:.0f} °C)"
    sentence = f"A draft token takes {_ms(draft_ms)}{heat}"
    if facts.exceeds(attrgetter("draft_ms"), facts.alike):
        sentence = f"{sentence}, {_ms(usual_ms)} on other devices with this model."
        advice = "Look for heat, power limits and other programs on the device; compare its `threads`."
        return Conclusion(Cause.SLOW_DRAFTING, part, sentence, advice)
    if own.share(TimePart.DRAFTING) < _MOST or draft_ms < _PAYS * (own.step_ms or 0.0):
        return None
    advice = "Use a smaller draft model or more `threads`; with `edge_only` on auto, devices draft only where it pays."
    return Conclusion(Cause.SLOW_DRAFTING, part, f"{sentence}, a step of the edge {_ms(own.step_ms)}.", advice)


def _rejected(facts: DeviceFacts) -> Conclusion:
    acceptance = facts.own.acceptance or 0.0
    sentence = (
        f"The edge accepts {_percent(acceptance)} of the draft tokens; usual are {_percent(facts.usual_acceptance)}."
    )
    advice = (
        "Compare its draft model with the others' (`fleet admin devices --columns all`), and roll out again. If the "
        "model does not know such text (language, code), `edge_only = true` avoids drafts."
    )
    part = facts.lost * sum(facts.own.share(each) for each in _OF_ROUNDS)
    return Conclusion(Cause.REJECTED_DRAFTS, part, sentence, advice)


def _edge_only(facts: DeviceFacts) -> Conclusion | None:
    if facts.throttled or facts.plan != "edge-only" or facts.slow_steps or not facts.exceeds(_part(TimePart.STEPS)):
        return None
    sentence = f"Each token waits for a step, since the edge decodes alone. {facts.plan_reason or ''}".rstrip()
    advice = "Leave `edge_only` on auto; a faster draft model, or one that is accepted more often, would pay."
    return Conclusion(Cause.EDGE_ONLY, facts.share(TimePart.STEPS), sentence, advice)


# Rules for edges


def _one_device(facts: EdgeFacts) -> Conclusion | None:
    if facts.busiest is None:
        return None
    sentence = (
        f"{facts.edge} computes {_percent(facts.busiest.share)} of its tokens for {facts.busiest.device}, one of "
        f"{facts.busiest.devices} devices."
    )
    advice = f"Limit it by quotas of a label, or ask what it does: `fleet admin device {facts.busiest.device}`."
    part = facts.taken * sum(facts.own.share(each) for each in _OF_EDGE)
    return Conclusion(Cause.ONE_DEVICE, part, sentence, advice)


def _kv_memory(facts: EdgeFacts) -> Conclusion | None:
    if not facts.recomputes:
        return None
    sentence = f"Open sessions hold {_percent(facts.kv_usage or 0.0)} of the memory for keys and values."
    advice = "Evicted tokens are computed again: increase `kv_bytes`, add an edge, or limit devices (`kv_share`)."
    return Conclusion(Cause.KV_MEMORY, facts.share(TimePart.PROMPT), sentence, advice)


def _part(part: TimePart) -> Callable[[TokenTime], float | None]:
    return lambda time: time.parts.get(part)


_ALL_RULES: Final = (_full, _grammar, _prompts, _overloaded, _slow_steps)
_DEVICE_RULES: Final = (_quota, _link, _slow_drafting, _rejected, _edge_only)
_EDGE_RULES: Final = (_one_device, _kv_memory)


def conclude_device(facts: DeviceFacts) -> list[Conclusion]:
    """Return the causes of a device's slowness, the largest share first; none for a device that is as usual."""
    return _ordered([*(rule(facts) for rule in _ALL_RULES), *(rule(facts) for rule in _DEVICE_RULES)])


def conclude_edge(facts: EdgeFacts) -> list[Conclusion]:
    """Return the causes of slow sessions of an edge, like `conclude_device`."""
    return _ordered([*(rule(facts) for rule in _ALL_RULES), *(rule(facts) for rule in _EDGE_RULES)])


def _ordered(found: Iterable[Conclusion | None]) -> list[Conclusion]:
    causes = [each for each in found if each and (each.share >= _MATTERS or each.cause is Cause.THROTTLED)]
    return sorted(causes, key=attrgetter("share"), reverse=True)


# From the session log


@dataclass(frozen=True, slots=True)
class PartTime:
    """A part of a token's time; `usual_ms` is the median of the fleet's other devices or edges."""

    part: TimePart
    ms: float
    share: float
    usual_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """How long tokens take, and why; of sessions that have ended within the last `hours`."""

    hours: int
    sessions: int
    parts: tuple[PartTime, ...] = ()
    conclusions: tuple[Conclusion, ...] = ()

    @property
    def sentence(self) -> str:
        if not self.sessions:
            return "No session with enough tokens has ended within 24 hours."
        period = "the last hour" if self.hours == 1 else f"the last {self.hours} hours"
        found = "Main causes" if self.conclusions else "No main cause"
        return f"{found} in {self.sessions:,} session{'' if self.sessions == 1 else 's'} of {period}."


_PERIODS: Final = (1, 24)  # hours
_BEFORE: Final = timedelta(days=7)
_MIN_ROUNDS: Final = 20  # of an hour that steps are compared with


def diagnose_device(log: SessionLog, device: str) -> Diagnosis:
    """Return why a device is slow; raises `NotFound` if there is none of that name."""
    known = {each.device: each for each in log.devices(counted=False)}
    view = known.get(device) or log.device(device)
    hours, times = _latest_times(log, "device", device, {name: each.round_trip_ms for name, each in known.items()})
    if device not in times:
        return Diagnosis(hours=hours, sessions=0)
    own, age, edge = times.pop(device), timedelta(hours=hours), view.last_edge or ""
    model = attrgetter("draft_model", "quantization")
    facts = DeviceFacts(
        name=device,
        edge=edge,
        own=own,
        others=list(times.values()),
        alike=[time for name, time in times.items() if name in known and model(known[name]) == model(view)],
        refused=_refused(log, age, device=device),
        busiest=_busiest(log, edge, age),
        earlier_step_ms=_earlier_step_ms(log, edge, own, age),
        plan=view.plan,
        plan_reason=view.plan_reason,
        throttled=view.throttled,
        temperature_c=view.temperature_c,
    )
    return _diagnosis(facts, conclude_device(facts), hours)


def diagnose_edge(log: SessionLog, edge: str) -> Diagnosis:
    """Return why the sessions of an edge are slow; raises `NotFound` if there is none of that name."""
    view = log.edge(edge)
    hours, times = _latest_times(log, "edge", edge, {})
    if edge not in times:
        return Diagnosis(hours=hours, sessions=0)
    own, age = times.pop(edge), timedelta(hours=hours)
    facts = EdgeFacts(
        name=edge,
        edge=edge,
        own=own,
        others=list(times.values()),
        refused=_refused(log, age, edge=edge),
        busiest=_busiest(log, edge, age),
        earlier_step_ms=_earlier_step_ms(log, edge, own, age),
        kv_usage=view.kv_usage,
    )
    return _diagnosis(facts, conclude_edge(facts), hours)


def _latest_times(
    log: SessionLog, by: str, name: str, round_trips: Mapping[str, float | None]
) -> tuple[int, dict[str, TokenTime]]:
    """Return the times by device or edge in the shortest period in which `name` has any, and its hours."""
    for hours in _PERIODS:
        spent = log.spent_times(by, since=timedelta(hours=hours))
        divided = ((each, token_time(own, round_trip_ms=round_trips.get(each))) for each, own in spent.items())
        times = {each: time for each, time in divided if time is not None}
        if name in times:
            break
    return hours, times


def _diagnosis(facts: PeriodFigures, conclusions: Sequence[Conclusion], hours: int) -> Diagnosis:
    own = facts.own
    parts = [PartTime(part, ms, own.share(part), facts.usual(_part(part))) for part, ms in own.parts.items()]
    in_order = tuple(sorted(parts, key=attrgetter("share"), reverse=True))
    return Diagnosis(hours=hours, sessions=own.sessions, parts=in_order, conclusions=tuple(conclusions))


def _refused(log: SessionLog, age: timedelta, *, device: str | None = None, edge: str | None = None) -> dict[str, int]:
    counts = log.event_counts(by=("code",), since=age, device=device, edge=edge, kind="refused")
    return {each.code or "": each.times for each in counts}


def _busiest(log: SessionLog, edge: str, age: timedelta) -> Busiest | None:
    computed = {each.device or "": _computed(each.counted) for each in log.usage(since=age, by=("device",), edge=edge)}
    if not (whole := sum(computed.values())):
        return None
    device = max(computed, key=computed.__getitem__)
    return Busiest(device, computed[device] / whole, len(computed))


def _computed(counted: SegmentCounters) -> int:
    """Return roughly how many tokens the target model has computed."""
    rows = max(counted.rounds, counted.edge_only - counted.speculated_accepted)
    return counted.prefill_tokens + counted.drafted + counted.speculated + rows


def _earlier_step_ms(log: SessionLog, edge: str, own: TokenTime, age: timedelta) -> float | None:
    return _median(
        row.counted.compute_ms_per_round
        for row in log.usage(since=_BEFORE, until=age, grain="hour", edge=edge)
        if row.counted.verified >= _MIN_ROUNDS and _similar(row.counted.mean_batch, own.batch)
    )
