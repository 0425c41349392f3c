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


class EdgeSessionState(Enum):
    """What a session does with drafts."""

    DRAFTING = auto()  # drafts are verified as they arrive
    CORRECTING = auto()  # nothing is verified until the device has sent a correction
    DECODING = auto()  # edge-only decoding
    FINISHED = auto()  # the generation is complete, or the session is closed
    FAILED = auto()  # a fault answers all further drafts


class EdgeSessionEvent(Enum):
    DRAFT = auto()  # a draft was admitted
    REJECTED = auto()  # the device has to draw the correction
    CORRECTED = auto()
    DECODING_REQUESTED = auto()
    ENDED = auto()
    FAILED = auto()


_OVER: Final = (EdgeSessionState.FINISHED, EdgeSessionState.FAILED)

TRANSITIONS: Final[dict[tuple[EdgeSessionState, EdgeSessionEvent], EdgeSessionState]] = {
    (EdgeSessionState.DRAFTING, EdgeSessionEvent.DRAFT): EdgeSessionState.DRAFTING,
    (EdgeSessionState.DECODING, EdgeSessionEvent.DRAFT): EdgeSessionState.DRAFTING,
    (EdgeSessionState.CORRECTING, EdgeSessionEvent.DRAFT): EdgeSessionState.CORRECTING,
    (EdgeSessionState.DRAFTING, EdgeSessionEvent.REJECTED): EdgeSessionState.CORRECTING,
    (EdgeSessionState.CORRECTING, EdgeSessionEvent.CORRECTED): EdgeSessionState.DRAFTING,
    (EdgeSessionState.DRAFTING, EdgeSessionEvent.DECODING_REQUESTED): EdgeSessionState.DECODING,
    (EdgeSessionState.DECODING, EdgeSessionEvent.DECODING_REQUESTED): EdgeSessionState.DECODING,
    **{(state, EdgeSessionEvent.ENDED): EdgeSessionState.FINISHED for state in EdgeSessionState},
    **{(state, EdgeSessionEvent.FAILED): EdgeSessionState.FAILED for state in EdgeSessionState},
    **{(state, EdgeSessionEvent.CORRECTED): state for state in _OVER},
    **{(state, EdgeSessionEvent.DECODING_REQUESTED): state for state in _OVER},
    (EdgeSessionState.FAILED, EdgeSessionEvent.ENDED): EdgeSessionState.FAILED,
}


def next_state(state: EdgeSessionState, event: EdgeSessionEvent) -> EdgeSessionState:
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"a session that is {state.name} takes no {event.name}") from None
