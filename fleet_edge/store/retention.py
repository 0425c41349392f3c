"""Retention: how long the session log keeps what."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Ages in days at which rows are deleted.

    Attributes:
        rounds_days: Of traced rounds.
        texts_days: Of stored texts.
        sessions_days: Of sessions and events, by whole days; rollups stay.
        hourly_days: Of rollups by the hour; those by the day stay.
        daily_days: Of rollups by the day; those by the month stay for good.
    """

    rounds_days: float = 7.0
    texts_days: float = 30.0
    sessions_days: float = 365.0
    hourly_days: float = 14.0
    daily_days: float = 400.0


RETENTION: Final = Retention()
"""Defaults: of an edge's settings and of its jobs."""
