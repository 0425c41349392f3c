"""Drafts as they are here: a draft token's time, its acceptance and the round trip, each with where it comes from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleet_cli.errors import CommandError
from fleet_edge.session_log import SessionLog
from schemas.errors import FleetError
from schemas.policy import Mode

_SINCE: Final = "7d"
_SESSIONS: Final = 2000
_LEAST_TESTED: Final = 200
_LEAST_SESSIONS: Final = 5
_ROUND_TRIP_MS: Final = 20.0
_MOST_MS: Final = 60_000.0
_MOST_BYTES: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Given:
    """What the user has said; None where he has not.

    Attributes:
        draft_ms: Time of a draft token (milliseconds).
        acceptance: Chance of a draft token to be accepted.
        round_trip_ms: Between device and edge (milliseconds).
        pair: Output of `fleet models check --measure --json`.
    """

    draft_ms: float | None = None
    acceptance: float | None = None
    round_trip_ms: float | None = None
    pair: Path | None = None


@dataclass(frozen=True, slots=True)
class Drafts:
    """What drafting is like.

    Attributes:
        draft_ms: Time of a draft token (milliseconds).
        acceptance: Chance of a draft token to be accepted, those before it taken as accepted.
        round_trip_ms: Between device and edge (milliseconds).
        sources: By name of the three, where it comes from.
    """

    draft_ms: float
    acceptance: float
    round_trip_ms: float
    sources: Mapping[str, str]


def find_drafts(given: Given, *, db: str, mode: Mode) -> Drafts:
    """Return what the user has said, or else the pair's measurement, or else the session log of the last week.

    Raises:
        CommandError: A figure is absurd, or there is none.
    """
    _check(given)
    found: dict[str, tuple[float, str]] = {}
    if given.pair is not None:
        found["acceptance"] = (_of_pair(given.pair, mode), f"{mode.value} acceptance in {given.pair}")
    flags = (("draft_ms", given.draft_ms), ("acceptance", given.acceptance), ("round_trip_ms", given.round_trip_ms))
    found |= {name: (value, "as given") for name, value in flags if value is not None}
    reason = ""
    if len(found) < len(flags):
        try:
            found = _of_log(db) | found
        except FleetError as error:
            reason = f" ({error})"
    found.setdefault("round_trip_ms", (_ROUND_TRIP_MS, "assumed; give --rtt-ms"))
    for name, flag in (("draft_ms", "--draft-ms"), ("acceptance", "--acceptance")):
        if name not in found:
            raise CommandError(
                f"It is not known how devices draft: give {flag}, or with --db a session log in which devices have "
                f"drafted within the last week{reason}."
            )
    return Drafts(
        draft_ms=found["draft_ms"][0],
        acceptance=found["acceptance"][0],
        round_trip_ms=found["round_trip_ms"][0],
        sources={name: source for name, (_, source) in found.items()},
    )


def _check(given: Given) -> None:
    for flag, value in (("--draft-ms", given.draft_ms), ("--rtt-ms", given.round_trip_ms)):
        if value is not None and not 0.0 <= value <= _MOST_MS:
            raise CommandError(f"{flag} is {value:g}; give milliseconds, from 0 to {_MOST_MS:,.0f}.")
    if given.acceptance is not None and not 0.0 <= given.acceptance <= 1.0:
        raise CommandError(
            f"--acceptance is {given.acceptance:g}; give the share of draft tokens that is accepted, from 0 to 1."
        )


def _of_pair(path: Path, mode: Mode) -> float:
    """Return the acceptance that `fleet models check --measure --json` has written."""
    try:
        with path.open("rb") as file:
            content: Any = json.loads(file.read(_MOST_BYTES))
        value = content["measured"][mode.value]["acceptance"]
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror or error}; correct --pair.") from error
    except (ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value <= 1.0:
        raise CommandError(
            f"{path} holds no measured acceptance; write it with `fleet models check DRAFT TARGET --measure --json`."
        )
    return float(value)


def _of_log(db: str) -> dict[str, tuple[float, str]]:
    """Return what the devices of the last week have told, as far as it says something."""
    with SessionLog(db) as log:
        sessions = log.sessions(since=_SINCE, limit=_SESSIONS)
    closed = [each for each in sessions if each.device_drafted is not None]
    drafted = sum(each.device_drafted or 0 for each in closed)
    tested = sum(each.device_tested or 0 for each in closed)
    said = f"the last {len(closed)} sessions of a week in the session log"
    found: dict[str, tuple[float, str]] = {}
    if tested >= _LEAST_TESTED:
        found["acceptance"] = (sum(each.device_accepted or 0 for each in closed) / tested, said)
        found["draft_ms"] = (sum(each.device_draft_ms or 0.0 for each in closed) / drafted, said)
    # Who has the edge write waits all the time; the others wait once for each verdict, and once for the Open.
    waiting = [each for each in closed if not each.counted.streamed and each.network_ms is not None]
    rounds = sum((each.device_rounds or 0) + 1 for each in waiting)
    if len(waiting) >= _LEAST_SESSIONS:
        found["round_trip_ms"] = (sum(each.network_ms or 0.0 for each in waiting) / rounds, said)
    return found
