"""States of an edge session, and the one table of transitions between them.

::

                  decoding requested
              ┌───────────────────────▶ DECODING ──┐ requested again
    DRAFTING ─┤ ◀────────────────────── (draft) ◀──┘
      ▲       │ rejected
      │       └───────────────────────▶ CORRECTING ──┐ draft that overtook the correction
      └──────────────────────────────── (corrected) ◀┘

    ended, from any state ──▶ FINISHED
    failed, from any state ──▶ FAILED

A session begins in DRAFTING, also if it resumes. In coupled mode the edge draws the correction itself, so that a
rejection changes no state. A device that requests decoding instead of a correction sends both in one message. What
arrives after the end changes no state: verdicts and tokens are sent again, and a Close may bring the last correction.
"""

from enum import Enum, auto
from typing import Final


class SessionState(Enum):
    """What a session does with drafts."""

    DRAFTING = auto()  # drafts are verified as they arrive
    CORRECTING = auto()  # nothing is verified until the device has sent a correction
    DECODING = auto()  # edge-only decoding
    FINISHED = auto()  # the generation is complete, or the session is closed
    FAILED = auto()  # a fault answers all further drafts


class SessionEvent(Enum):
    DRAFT = auto()  # a draft was admitted
    REJECTED = auto()  # the device has to draw the correction
    CORRECTED = auto()
    DECODING_REQUESTED = auto()
    ENDED = auto()
    FAILED = auto()


_OVER: Final = (SessionState.FINISHED, SessionState.FAILED)

TRANSITIONS: Final[dict[tuple[SessionState, SessionEvent], SessionState]] = {
    (SessionState.DRAFTING, SessionEvent.DRAFT): SessionState.DRAFTING,
    (SessionState.DECODING, SessionEvent.DRAFT): SessionState.DRAFTING,
    (SessionState.CORRECTING, SessionEvent.DRAFT): SessionState.CORRECTING,
    (SessionState.DRAFTING, SessionEvent.REJECTED): SessionState.CORRECTING,
    (SessionState.CORRECTING, SessionEvent.CORRECTED): SessionState.DRAFTING,
    (SessionState.DRAFTING, SessionEvent.DECODING_REQUESTED): SessionState.DECODING,
    (SessionState.DECODING, SessionEvent.DECODING_REQUESTED): SessionState.DECODING,
    **{(state, SessionEvent.ENDED): SessionState.FINISHED for state in SessionState},
    **{(state, SessionEvent.FAILED): SessionState.FAILED for state in SessionState},
    **{(state, SessionEvent.CORRECTED): state for state in _OVER},
    **{(state, SessionEvent.DECODING_REQUESTED): state for state in _OVER},
    (SessionState.FAILED, SessionEvent.ENDED): SessionState.FAILED,
}


def next_state(state: SessionState, event: SessionEvent) -> SessionState:
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"a session that is {state.name} takes no {event.name}") from None
