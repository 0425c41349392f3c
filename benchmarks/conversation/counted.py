"""Counts of the edge beside those of the device, and what they are held against."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from benchmarks.conversation.turns import Written
from fleet_edge.counters import SegmentCounters
from fleet_edge.session_log import SessionLog

__all__ = ["BLOCK", "MOST_SLOWER", "Shared", "Turn", "beyond_new", "counts_of", "first_ratio"]

BLOCK: Final = 16
"""Tokens that may be computed beside those that are new; computing fewer costs hardly more than to copy them."""

MOST_SLOWER: Final = 1.3
"""Time to the first token of the last turn, as a ratio to the second's."""


def counts_of(url: str, sessions: Iterable[str]) -> dict[str, SegmentCounters]:
    """Return what an edge has counted, by session; the edge MUST have ended.

    Raises:
        StoreError: The log cannot be read, or a session is not in it.
    """
    log = SessionLog(url)
    return {session: log.session(session).counted for session in sessions}


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, at both ends.

    Attributes:
        engine: Of the edge.
        conversation: From 0.
        alone: Whether it had its device for itself.
        device: What the device counted.
        edge: What the edge counted.
    """

    engine: str
    conversation: int
    alone: bool
    device: Written
    edge: SegmentCounters

    @property
    def edge_computed(self) -> int:
        """Tokens of the prompt that the edge computed; the last comes with the first draft."""
        return self.edge.prefill_tokens + 1

    @property
    def beyond_new(self) -> int:
        """Tokens that an end has computed beside the new ones, the worse of the two."""
        return max(self.edge_computed, self.device.computed) - self.device.new

    def row(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "engine": self.engine,
            "conversation": self.conversation,
            "alone": self.alone,
            "turn": self.device.turn,
            "prompt_tokens": self.device.prompt,
            "new_tokens": self.device.new,
            "edge_computed_tokens": self.edge_computed,
            "edge_cached_tokens": self.edge.reused_tokens,
            "device_computed_tokens": self.device.computed,
            "device_cached_tokens": self.device.prompt - self.device.computed,
            "written_tokens": self.device.written,
            "first_token_ms": round(self.device.first_ms, 1),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Devices that began with one system prompt at once.

    Attributes:
        engine: Of the edge.
        devices: How many.
        common: Tokens with which all their prompts begin.
        own: Of all of them, the tokens behind those.
        computed: Tokens of all prompts that the edge computed.
        reused: Tokens that it took over.
    """

    engine: str
    devices: int
    common: int
    own: int
    computed: int
    reused: int

    @classmethod
    def of(
        cls, engine: str, prompts: Sequence[Sequence[int]], *, common: int, counts: Iterable[SegmentCounters]
    ) -> "Shared":
        """Sum up what the edge counted."""
        found = list(counts)
        return cls(
            engine=engine,
            devices=len(prompts),
            common=common,
            own=sum(len(prompt) - common for prompt in prompts),
            computed=sum(each.prefill_tokens + 1 for each in found),
            reused=sum(each.reused_tokens for each in found),
        )

    @property
    def allowed(self) -> int:
        """Tokens to compute if what is common is computed once."""
        return self.common + self.own + self.devices * BLOCK

    def row(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "engine": self.engine,
            "devices": self.devices,
            "common_tokens": self.common,
            "own_tokens": self.own,
            "edge_computed_tokens": self.computed,
            "edge_cached_tokens": self.reused,
            "allowed_tokens": self.allowed,
        }


def beyond_new(turns: Iterable[Turn]) -> int:
    """Return the most tokens that a turn has computed beside its new ones."""
    return max(turn.beyond_new for turn in turns)


def first_ratio(turns: Sequence[Turn]) -> float | None:
    """Return the median time to the first token of the last turn, as a ratio to the second's, of those that are alone.

    None where there are no two such turns.
    """
    turns = [turn for turn in turns if turn.alone]
    last = max((turn.device.turn for turn in turns), default=0)
    if last < 3:
        return None
    later, early = (median(turn.device.first_ms for turn in turns if turn.device.turn == which) for which in (last, 2))
    return later / early
