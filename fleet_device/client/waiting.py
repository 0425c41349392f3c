"""Waiting: why a text does not grow, in a sentence; when to say so, when to go elsewhere, and when to give up."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet_device.client.inbox import EdgePresences
from fleet_device.client.outbound import Outbound
from fleet_device.client.refusals import Refusals
from fleet_device.client.retry import RetryState
from fleet_device.session.machine import DeviceSession

_log = logging.getLogger(__name__)

SAY_AFTER_S: Final = 10.0
"""Seconds without text after which the reason is told."""

_PROMPT_TOKENS: Final = 1024
"""Tokens of a prompt that an edge computes well within the usual time for a verdict; a longer one is given more."""


@dataclass(slots=True)
class Waiting:
    """The waits of one text.

    Attributes:
        session: The text.
        outbound: Knows whether the broker answers.
        edges: Which edges are there.
        retry: How long it has waited.
        refusals: What edges have declined.
        clock: Monotonic seconds.
        tell: Told why no text comes.
    """

    session: DeviceSession
    outbound: Outbound
    edges: EdgePresences
    retry: RetryState
    refusals: Refusals
    clock: Callable[[], float]
    tell: Callable[[str], None] = lambda _sentence: None
    _since: float = field(init=False)
    _told: bool = False

    def __post_init__(self) -> None:
        self._since = self.clock()

    def grown(self) -> None:
        self._since, self._told = self.clock(), False

    def quiet_s(self) -> float:
        """Return how long nothing needs to be said."""
        if self._told or not self._waits:
            return math.inf
        return max(0.0, self._since + SAY_AFTER_S - self.clock())

    def look(self) -> None:
        """Say why no text comes, if it is time to; and give up, if it is time for that.

        Raises:
            SessionRefused: All that there was to wait is over, and the last word of an edge was that it declines.
            EdgeUnavailable: It is over, and no edge has said anything.
        """
        if self.session.ended is not None:
            return
        if (waited_s := self.retry.exhausted_s(opened=self._edge is not None)) is not None:
            raise self.refusals.last or self.outbound.silence(waited_s, edge=self._edge)
        if not self._told and self._waits and self.clock() >= self._since + SAY_AFTER_S:
            self._told = True
            reason = self.reason()
            _log.warning("Waiting: %s", reason)
            self.tell(reason)

    def reason(self) -> str:
        if self.outbound.connected and self.refusals.last is not None:
            return str(self.refusals.last)
        return str(self.outbound.silence(max(1.0, self.clock() - self._since), edge=self._edge))

    def may_go_elsewhere(self) -> bool:
        """Whether the edge that has the session has been silent for too long, and another one is there."""
        opened = self.session.opened
        if opened is None or not self.outbound.connected:
            return False
        if not self.retry.is_silent(longer=self.patience):
            return False
        return any(state.edge != opened.edge for state in self.edges.online())

    @property
    def patience(self) -> float:
        """How many times as long as usual the edge may take: longer for a prompt that it has to compute."""
        opened = self.session.opened
        prompt = len(self.session.request.prompt) + opened.position if opened and self.session.first_under_way else 0
        return max(1.0, prompt / _PROMPT_TOKENS)

    @property
    def _waits(self) -> bool:
        return self.retry.owed or self.retry.holding

    @property
    def _edge(self) -> str | None:
        return None if self.session.opened is None else self.session.opened.edge
