"""Event records: what happened, when, to whom and by whom, counted."""

from dataclasses import dataclass
from datetime import datetime

from fleet_edge.store.event_codes import Severity


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLogged:
    """Something worth a line, and how often it happened; `fleet_edge.store.event_codes` has all there are.

    Attributes:
        id: Unique for good, so that a replay adds nothing, e.g. a random UUID's hexadecimal form. All records of one id
            are alike but for `count` and `last_at`, of which the greatest hold. What all edges see alike has an id that
            all of them make alike, and is one.
        edge: Who logs it.
        device: Whom it concerns, if anyone.
        session: Which session it concerns, if any; of several, the first.
        kind: What it is about.
        code: Machine-readable cause.
        sentence: The same for a person, as it was said the first time.
        at: When it first happened (UTC, aware).
        count: How often it has happened so far.
        last_at: When it last happened (UTC, aware); None: at `at`.
        who: Which person did it, if one did.
        severity: How grave it is.
    """

    id: str
    edge: str
    device: str | None
    session: str | None
    kind: str
    code: str
    sentence: str
    at: datetime
    count: int = 1
    last_at: datetime | None = None
    who: str | None = None
    severity: Severity = Severity.INFO
