"""States of a device session, and the one table of transitions between them.

::

          open                     granted                          draft sent
    NEW ────────▶ OPENING ──────────────────────▶ DRAFTING ─────────────────────▶ AWAITING_VERDICT
                   │   ▲ │ nobody was subscribed   │ ▲ ▲ └─┐ draft sent ahead       │    │
                   │   │ ├──────▶ UNDELIVERED      │ │ │ ◀─┘ all decided            │    │ rejected
                   │   │ │        (granted)        │ │ └────────────────────────────┘    │
                   │   │ │ refused for now         │ │         all decided               │
                   │   │ └──────▶ POSTPONED        │ │ corrected                         │
                   │   │          (granted)        │ └──────── CORRECTING ◀──────────────┘
                   │   │                           │  rejected     ▲
                   │   │                           └───────────────┘
                   │   │                                   DRAFTING ◀──▶ EDGE_ONLY: requested, ended
                   │   ├── open, from any state but ENDED: again, or to resume, maybe by way of POSTPONED
                   │   ├── went local, from any state but ENDED ──▶ LOCAL
                   └────── ended, from any state ──▶ ENDED

A session that is opened again continues behind the committed tokens; drafts in flight are void.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final


class SessionState(Enum):
    NEW = auto()  # no edge was asked
    OPENING = auto()  # an Open was sent
    UNDELIVERED = auto()  # no edge was subscribed
    POSTPONED = auto()  # an Open was refused for a reason that passes, or the session lost its edge: asked again later
    DRAFTING = auto()  # the next draft may be built and sent
    AWAITING_VERDICT = auto()  # drafts are in flight, and none may follow before a verdict
    EDGE_ONLY = auto()  # edge-only decoding
    CORRECTING = auto()  # a rejected token is not replaced yet
    LOCAL = auto()  # the draft model generates without an edge
    ENDED = auto()


class SessionEvent(Enum):
    OPEN = auto()  # the first or another
    UNDELIVERED = auto()
    POSTPONED = auto()
    GRANTED = auto()
    DRAFT_SENT = auto()
    DRAFT_SENT_AHEAD = auto()  # announcing another before its verdict
    ALL_DECIDED = auto()  # no draft is in flight any more
    REJECTED = auto()
    CORRECTED = auto()
    EDGE_ONLY_REQUESTED = auto()  # the edge was asked to decode on its own, or to stop
    EDGE_ONLY_ENDED = auto()  # it has decoded what it was asked for
    WENT_LOCAL = auto()  # no edge answers, and the generation goes on
    ENDED = auto()


_UNGRANTED: Final = (SessionState.OPENING, SessionState.UNDELIVERED, SessionState.POSTPONED)
_GRANTED: Final = (
    SessionState.DRAFTING,
    SessionState.AWAITING_VERDICT,
    SessionState.CORRECTING,
    SessionState.EDGE_ONLY,
)

TRANSITIONS: Final[dict[tuple[SessionState, SessionEvent], SessionState]] = {
    (SessionState.NEW, SessionEvent.OPEN): SessionState.OPENING,
    **{(state, SessionEvent.OPEN): SessionState.OPENING for state in (*_UNGRANTED, *_GRANTED)},
    **{(state, SessionEvent.WENT_LOCAL): SessionState.LOCAL for state in (SessionState.NEW, *_UNGRANTED, *_GRANTED)},
    **{(state, SessionEvent.UNDELIVERED): SessionState.UNDELIVERED for state in _UNGRANTED},
    **{(state, SessionEvent.POSTPONED): SessionState.POSTPONED for state in (*_UNGRANTED, *_GRANTED)},
    **{(state, SessionEvent.GRANTED): SessionState.DRAFTING for state in _UNGRANTED},
    (SessionState.DRAFTING, SessionEvent.DRAFT_SENT): SessionState.AWAITING_VERDICT,
    (SessionState.DRAFTING, SessionEvent.DRAFT_SENT_AHEAD): SessionState.DRAFTING,
    (SessionState.DRAFTING, SessionEvent.ALL_DECIDED): SessionState.DRAFTING,
    (SessionState.AWAITING_VERDICT, SessionEvent.ALL_DECIDED): SessionState.DRAFTING,
    (SessionState.DRAFTING, SessionEvent.REJECTED): SessionState.CORRECTING,
    (SessionState.AWAITING_VERDICT, SessionEvent.REJECTED): SessionState.CORRECTING,
    (SessionState.CORRECTING, SessionEvent.CORRECTED): SessionState.DRAFTING,
    **{
        (state, SessionEvent.EDGE_ONLY_REQUESTED): SessionState.EDGE_ONLY
        for state in (SessionState.DRAFTING, SessionState.EDGE_ONLY)
    },
    (SessionState.EDGE_ONLY, SessionEvent.EDGE_ONLY_ENDED): SessionState.DRAFTING,
    **{(state, SessionEvent.ENDED): SessionState.ENDED for state in SessionState},
}


def next_state(state: SessionState, event: SessionEvent) -> SessionState:
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"a session that is {state.name} takes no {event.name}") from None


@dataclass(slots=True)
class SessionCounters:
    """What the device counts of a session, as named in `Close`; times are added by the caller.

    Attributes:
        edge_only: Tokens of edge-only decoding.
        quota_wait_ms: Delay that edges asked for because a quota was used up; part of `wait_ms`.
        suffix_drafted: Of the drafted tokens, those that the suffix index proposed; likewise the two below.
    """

    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    rounds: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    draft_ms: float = 0.0
    wait_ms: float = 0.0
    quota_wait_ms: float = 0.0
    edge_only: int = 0
    suffix_drafted: int = 0
    suffix_tested: int = 0
    suffix_accepted: int = 0

    def note_draft(self, tokens: int, *, accepted: int) -> None:
        """Count a verified draft; the tokens behind a rejected one are not tested."""
        self.accepted += accepted
        self.tested += min(tokens, accepted + 1)

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.tested if self.tested else None
