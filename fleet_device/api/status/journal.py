"""Journal of a device: what it has written today and since its start, and its latest texts if they may be shown."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Final

from fleet_device.client.telemetry import DeviceTotals
from fleet_device.texts.generate import GeneratedText
from schemas.control import Telemetry

_SHOWN: Final = 2000
"""Characters of a text that are kept."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A text that has ended."""

    ended: datetime
    session: str
    tokens: int
    tokens_per_s: float
    reason: str
    unverified: int
    text: str


class Journal:
    """Counts texts as they end. Noted on any thread, read on any.

    Args:
        texts: How many of the latest texts are kept, to be shown; 0 keeps none.
        now: The time, with its time zone; days begin at this machine's midnight.
    """

    def __init__(self, *, texts: int, now: Callable[[], datetime]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._totals = DeviceTotals()
        self._latest: Telemetry | None = None
        self._plan_reason: str | None = None
        self._day: date | None = None
        self._texts_today = self._tokens_today = 0
        self._entries: deque[_Entry] | None = deque(maxlen=texts) if texts else None

    def note(self, text: GeneratedText) -> None:
        """Count a text that has ended."""
        ended = self._now().astimezone()
        with self._lock:
            self._begin_day(ended.date())
            self._texts_today += 1
            self._tokens_today += len(text.tokens)
            self._latest = self._totals.add(text.generation)
            self._plan_reason = text.generation.choice.reason if text.generation.choice is not None else None
            if self._entries is not None:
                self._entries.appendleft(
                    _Entry(
                        ended,
                        text.session,
                        len(text.tokens),
                        text.tokens_per_s,
                        text.reason.value,
                        text.unverified,
                        text.text[:_SHOWN],
                    )
                )

    def json(self) -> dict[str, Any]:
        """Return it as JSON values; `last_texts` is None where none may be shown."""
        today = self._now().astimezone().date()
        with self._lock:
            self._begin_day(today)
            latest = self._latest.model_dump() if self._latest is not None else {}
            return {
                "today": {"date": today.isoformat(), "texts": self._texts_today, "tokens": self._tokens_today},
                "acceptance": latest.get("acceptance"),
                "round_trip_ms": latest.get("round_trip_ms"),
                "unverified": latest.get("unverified") or 0,
                "mean_draft": latest.get("mean_draft"),
                "draft_ms_per_token": latest.get("draft_ms_per_token"),
                "plan": latest.get("plan"),
                "plan_reason": self._plan_reason,
                "last_texts": None
                if self._entries is None
                else [
                    {
                        "ended": each.ended.isoformat(timespec="seconds"),
                        "session": each.session,
                        "tokens": each.tokens,
                        "tokens_per_s": each.tokens_per_s,
                        "finish": each.reason,
                        "unverified": each.unverified,
                        "text": each.text,
                    }
                    for each in self._entries
                ],
            }

    def _begin_day(self, today: date) -> None:
        if today != self._day:
            self._day, self._texts_today, self._tokens_today = today, 0, 0
