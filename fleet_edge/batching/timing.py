"""Times of a verification: how long a draft queued, what its session's own prompt took meanwhile, and the step.

A device waits for its first verdict while its prompt is computed, and again when its text is computed anew after a
resume or an eviction. That is work of its own: counted as queueing, it would make an idle edge look overloaded.
"""

from dataclasses import dataclass, field

from fleet_edge.sessions.waiting import ReceivedDraft


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass with the decisions on its drafts.

    Attributes:
        started: Monotonic seconds.
        ended: Alike.
        sessions: Number of sessions that it verified.
    """

    started: float
    ended: float
    sessions: int

    @property
    def compute_ms(self) -> float:
        return (self.ended - self.started) * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTiming:
    """What a verdict took.

    Attributes:
        batch: Sessions verified in the same step; 0 if nothing was verified.
        queue_ms: From the draft's arrival to that step, or to the answer, less `prefill_ms`.
        prefill_ms: Of that time, spent in steps that computed the session's own prompt or text.
        compute_ms: Of the step that verified.
        background: Whether the draft might have waited (see `background`).
        chained: Tokens of the session's other drafts that the step verified.
    """

    batch: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    compute_ms: float = 0.0
    background: bool = False
    chained: int = 0


@dataclass(slots=True)
class PrefillLog:
    """When each session's prompt was computed, as far back as a draft may have waited for it."""

    _steps: dict[int, list[Step]] = field(default_factory=dict)

    def computed(self, handle: int, step: Step) -> None:
        """A step has computed a part of a session's prompt or text, and verified nothing of it."""
        self._steps.setdefault(handle, []).append(step)

    def verified(self, handle: int, *, oldest: float) -> None:
        """A step has verified drafts of which the first to arrive did so at `oldest`: later ones waited for less."""
        if handle in self._steps:
            self._steps[handle] = [step for step in self._steps[handle] if step.ended > oldest]

    def forget(self, handle: int) -> None:
        self._steps.pop(handle, None)

    def timing(self, arrived: ReceivedDraft, step: Step) -> DraftTiming:
        """Return what the verdict on a draft took that `step` has verified."""
        prefill_s = sum(
            max(0.0, min(each.ended, step.started) - max(each.started, arrived.at))
            for each in self._steps.get(arrived.draft.handle, ())
        )
        return DraftTiming(
            batch=step.sessions,
            queue_ms=max(0.0, step.started - arrived.at - prefill_s) * 1e3,
            prefill_ms=prefill_s * 1e3,
            compute_ms=step.compute_ms,
        )
