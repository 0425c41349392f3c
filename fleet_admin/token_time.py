"""Token time: the parts of the time that a session takes for a token, from what devices and edges count."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fleet_edge.session_log import SpentTime, share


class TimePart(StrEnum):
    """A part of the time between two tokens, as the device that waits for them sees it."""

    DRAFTING = "drafting"
    LINK = "link"  # both ways, with the broker
    QUEUE = "queue"  # of a draft at the edge, until its step begins
    STEPS = "steps"  # without the masks of grammars
    PROMPT = "prompt"  # steps that compute the session's own prompt, or its tokens again
    GRAMMAR = "grammar"
    SESSION = "no session"  # no edge has granted it yet
    QUOTA = "quota"  # an edge has asked the device to wait
    REST = "rest"


_MIN_TOKENS: Final = 16
"""Tokens from which the times of a device or an edge are compared."""

_MIN_TESTED: Final = 50
"""Verified draft tokens from which its acceptance is known well enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTime:
    """Mean times (ms) and counts of a device, or of all sessions at an edge.

    Attributes:
        parts: Of one token.
        draft_ms: Of one draft token.
        queue_ms: Of one draft, as `step_ms` and `link_ms`.
        batch: Sessions per step.
        acceptance: None if little was drafted.
        draft_tokens: Length of a draft; 0 if most tokens are from edge-only decoding.
    """

    sessions: int
    tokens: int
    parts: Mapping[TimePart, float]
    draft_ms: float | None = None
    queue_ms: float | None = None
    step_ms: float | None = None
    link_ms: float | None = None
    batch: float | None = None
    acceptance: float | None = None
    draft_tokens: float = 0.0

    @property
    def total_ms(self) -> float:
        return sum(self.parts.values())

    def share(self, part: TimePart) -> float:
        return share(self.parts.get(part, 0.0), self.total_ms) or 0.0


def token_time(spent: SpentTime, *, round_trip_ms: float | None = None) -> TokenTime | None:
    """Divide the time of sessions into parts; None if they have few tokens.

    `round_trip_ms` is the device's own measurement. A device that drafts ahead waits for less than the sum of all
    answers, so that each of their parts counts in proportion.
    """
    own, counted = spent.reported, spent.counted
    if own.tokens < _MIN_TOKENS or own.wall_ms <= 0.0:
        return None
    wait_ms = min(own.wait_ms, own.wall_ms)
    drafting_ms = min(own.draft_ms, own.wall_ms - wait_ms)
    quota_ms = min(own.quota_wait_ms, wait_ms)
    session_ms = min(max(own.wall_ms - counted.duration_ms - quota_ms, 0.0), wait_ms - quota_ms)
    # An edge counts one step of each piece of edge-only decoding.
    steps = max(counted.verified, counted.edge_only - counted.speculated_accepted)
    repeated = share(steps, counted.verified) or 0.0
    queue_ms, steps_ms = repeated * counted.queue_ms, repeated * counted.compute_ms
    at_edge_ms = queue_ms + steps_ms + counted.prefill_ms
    left_ms = wait_ms - quota_ms - session_ms
    edge_only = 2 * counted.edge_only > counted.tokens
    answers_ms = 0.0 if edge_only or round_trip_ms is None else own.rounds * round_trip_ms
    link_ms = max(max(answers_ms, left_ms) - at_edge_ms, 0.0)
    scale = min(share(left_ms, at_edge_ms + link_ms) or 0.0, 1.0)
    # Compiling comes before the session, masks are part of the steps.
    compiling_ms = min(counted.grammar_ms, session_ms)
    masks_ms = min(scale * (counted.grammar_ms - compiling_ms), scale * steps_ms)
    parts = {
        TimePart.DRAFTING: drafting_ms,
        TimePart.LINK: scale * link_ms,
        TimePart.QUEUE: scale * queue_ms,
        TimePart.STEPS: scale * steps_ms - masks_ms,
        TimePart.PROMPT: scale * counted.prefill_ms,
        TimePart.GRAMMAR: compiling_ms + masks_ms,
        TimePart.SESSION: session_ms - compiling_ms,
        TimePart.QUOTA: quota_ms,
        TimePart.REST: own.wall_ms - wait_ms - drafting_ms,
    }
    return TokenTime(
        sessions=counted.sessions,
        tokens=own.tokens,
        parts={part: ms / own.tokens for part, ms in parts.items()},
        draft_ms=share(own.draft_ms, own.drafted),
        queue_ms=counted.queue_ms_per_round,
        step_ms=counted.compute_ms_per_round,
        link_ms=share(link_ms, own.rounds),
        batch=counted.mean_batch,
        acceptance=counted.acceptance if counted.tested >= _MIN_TESTED else None,
        draft_tokens=0.0 if edge_only else share(own.drafted, own.rounds) or 0.0,
    )
