"""Acts: what an operator can do to devices, each with a preview of whom it meets."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.visit import Visit
from schemas.errors import FleetError

__all__ = ["ACTS", "MOST_DEVICES", "Act", "Outcome", "act_of"]

MOST_DEVICES: Final = 2_000
"""That one act may meet: more is done in pieces, or with `fleet admin`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an act at one device.

    Attributes:
        device: Its name.
        state: In a word: `done`, `failed`, or what the device says.
        sentence: The same in words.
    """

    device: str
    state: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Act:
    """Something to do.

    Attributes:
        key: In forms.
        words: On the button.
        run: Does it to some devices, and tells of each what came of it.
        argument: What has to be told beside, if anything.
        example: Of that.
        dangerous: Whether it takes something away.
    """

    key: str
    words: str
    run: Callable[[Visit, Sequence[str], str], Iterator[Outcome]]
    argument: str = ""
    example: str = ""
    dangerous: bool = False


def _fence(visit: Visit, devices: Sequence[str], argument: str) -> Iterator[Outcome]:
    for device in devices:
        try:
            held = visit.services.log.fence(device, duration=argument or None, reason=f"By {visit.visitor.name}.")
        except FleetError as error:
            yield Outcome(device, "failed", str(error))
            continue
        until = "until it is lifted" if held.until_at is None else f"until {held.until_at:%Y-%m-%d %H:%M} UTC"
        yield Outcome(device, "done", f"It is shut out {until}.")


def _unfence(visit: Visit, devices: Sequence[str], _argument: str) -> Iterator[Outcome]:
    for device in devices:
        try:
            held = visit.services.log.unfence(device)
        except FleetError as error:
            yield Outcome(device, "failed", str(error))
            continue
        yield Outcome(device, "done", "It is let in again." if held else "It was not shut out.")


ACTS: Final = (
    Act("fence", "Shut out", _fence, argument="For how long", example="2h", dangerous=True),
    Act("unfence", "Let in again", _unfence),
)


def act_of(key: str) -> Act:
    """Return an act.

    Raises:
        Problem: There is none of that name.
    """
    found = next((each for each in ACTS if each.key == key), None)
    if found is None:
        raise Problem(400, f"There is nothing called {key[:40]!r} to do.")
    return found
