"""Verdict goal: how long a verdict may take at this edge, and whether one more session would keep to it.

An edge that is used by more and more devices makes them draft less first (see `step_cost`), and then writes more slowly
for all alike. Where a goal is set, it takes no new text before it would miss it, and says when to come back: so that
those whose texts it has taken are served as they were promised. A text that is resumed was taken before.
"""

import math
from dataclasses import dataclass
from typing import Final

_SMOOTHING: Final = 0.1
"""Of what is known, that each step tells anew."""

_SILENT_S: Final = 2.0
"""After so long without a verdict nothing is known of the load but that there is none."""

_NEW_S: Final = 1.0
"""For so long a session that was granted is not yet in what was measured."""

_GROWING: Final = 0.25
"""Of a verdict's time, what is taken to be due to the tokens of its step while that is not known."""

_PROMPTS_S: Final = 0.25
_PROMPTS_STEPS: Final = 2.0
"""Without a goal, what the prompts of a step may take: so long, or as many times as long as a step without them."""

_LEAST_PROMPTS: Final = 1.0 / 8
"""Part of the goal that the prompts of a step may take, though it is missed already."""

_FIRST_RETRY_S: Final = 5.0
_MOST_RETRY_S: Final = 60.0


@dataclass(slots=True)
class VerdictGoal:
    """Keeps new sessions away from an edge that has enough. Times are monotonic seconds.

    Attributes:
        seconds: Longest mean time from a draft's arrival to its verdict; 0 for no goal.
    """

    seconds: float = 0.0
    _verdict_s: float = 0.0
    _sessions: float = 0.0
    _at: float = -math.inf
    _granted: float = 0.0  # sessions, since shortly, that no step has measured
    _granted_at: float = -math.inf
    _text_s: float | None = None  # between the ends of two texts
    _text_at: float | None = None
    _refused: int = 0  # since a text has ended

    def verified(self, verdict_s: float, *, sessions: int, at: float) -> None:
        """A step has ended.

        Args:
            verdict_s: Mean time of its verdicts.
            sessions: Verified in it.
            at: When.
        """
        if at - self._at > _SILENT_S:
            self._verdict_s, self._sessions = verdict_s, float(sessions)
        else:
            self._verdict_s += _SMOOTHING * (verdict_s - self._verdict_s)
            self._sessions += _SMOOTHING * (sessions - self._sessions)
        self._at = at

    def granted(self, at: float) -> None:
        self._granted = self._unmeasured(at) + 1.0
        self._granted_at = at

    def ended(self, at: float) -> None:
        """A session has ended: there may be room for another."""
        self._refused = 0
        if self._text_at is not None:
            took = at - self._text_at
            self._text_s = took if self._text_s is None else self._text_s + _SMOOTHING * (took - self._text_s)
        self._text_at = at

    def prompts_s(self, step_s: float) -> float:
        """Return how long the prompts of a step may take: a draft waits for the step that is computed, and its own.

        Args:
            step_s: That a step takes without prompts.
        """
        if not self.seconds:
            return max(_PROMPTS_S, _PROMPTS_STEPS * step_s)
        return max(self.seconds / 2.0 - step_s, _LEAST_PROMPTS * self.seconds)

    def retry_s(self, now: float, *, growing_s: float | None = None) -> float:
        """Return after which time to ask for one more session; 0 at once, since the goal would be kept with it.

        Args:
            now: On the clock of the other calls.
            growing_s: Of a mean step, the time that is due to its tokens; None while that is not known.
        """
        if not self.seconds or now - self._at > _SILENT_S:
            return 0.0
        if growing_s is None:
            growing_s = _GROWING * self._verdict_s
        share = growing_s / max(1.0, self._sessions)
        if self._verdict_s + (1.0 + self._unmeasured(now)) * share <= self.seconds:
            return 0.0
        # One text after another ends, and makes room for one of those who ask, in their order.
        self._refused += 1
        between_s = _FIRST_RETRY_S if self._text_s is None else self._text_s
        return min(_MOST_RETRY_S, max(1.0, between_s * self._refused))

    def _unmeasured(self, now: float) -> float:
        return self._granted if now - self._granted_at <= _NEW_S else 0.0
