"""Files that a device's service and its updater exchange. Neither can write the other's.

::

    state.json          of the updater: the update, as it is reported, and what it needs after a power cut
    restart             of the updater: systemd restarts the service when it is written
    inbox/wanted.json   of the service: the desired release and the limits of its download
    inbox/tested.json   of the service: the result of its self-test
"""

import logging
import os
from collections.abc import Mapping
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import Field, field_validator

from fleet_common.host import write_atomically
from schemas.control import (
    MAX_CONTROL_BYTES,
    ControlMessage,
    Release,
    SettingValue,
    UpdateReport,
    UpdateStage,
    decode_json,
    encode_json,
)
from schemas.errors import CodecError
from schemas.fields import MAX_SENTENCE, Sentence
from schemas.printable import printable_line

_log = logging.getLogger(__name__)

_READABLE: Final = 0o644

Trial = Annotated[str, Field(pattern=r"^[0-9a-f]{0,32}$", strict=True)]


class WantedUpdate(ControlMessage):
    """Desired release, and limits of its download.

    Attributes:
        window: Local time of the download, such as `01:00-05:00`; None allows any time.
    """

    release: Release | None = None
    kbyte_per_s: Annotated[int, Field(ge=1, le=10_000_000, strict=True)] | None = None
    window: Annotated[str, Field(max_length=11, strict=True)] | None = None

    @field_validator("window")
    @classmethod
    def _check_window(cls, window: str | None) -> str | None:
        if window is not None:
            try:
                _times(window)
            except ValueError:
                raise ValueError("it must be two local times, such as 01:00-05:00") from None
        return window

    def allows(self, now: datetime) -> bool:
        """The window is open at a local time."""
        if self.window is None:
            return True
        begin, end = _times(self.window)
        at = now.time()
        return begin <= at < end if begin <= end else at >= begin or at < end


def _times(window: str) -> tuple[time, time]:
    begin, end = (datetime.strptime(each, "%H:%M").time() for each in window.split("-"))  # noqa: DTZ007 - local
    return begin, end


class TrialResult(ControlMessage):
    trial: Trial
    ok: Annotated[bool, Field(strict=True)]
    sentence: Sentence


class UpdateState(UpdateReport):
    """State of the updater, which it continues from after a power cut.

    Attributes:
        trial: Random id of the self-test.
        previous: Release folder to return to.
        link: Release folder that `current` is about to be linked to; empty if no change is pending.
        starts: Starts of the updater since the self-test began.
        highest: Highest release that has passed its self-test; older ones are refused.
        storage_failures: Attempts in a row that this machine could not store.
    """

    trial: Trial = ""
    previous: str = ""
    link: str = ""
    starts: Annotated[int, Field(ge=0)] = 0
    highest: Annotated[int, Field(ge=0)] = 0
    storage_failures: Annotated[int, Field(ge=0)] = 0


M = TypeVar("M", bound=ControlMessage)

WANTED: Final = "inbox/wanted.json"
TESTED: Final = "inbox/tested.json"
STATE: Final = "state.json"
RESTART: Final = "restart"

UPDATE_SETTINGS: Final = {f"update.{name}": name for name in WantedUpdate.model_fields}
"""Remote settings of the updater, and the field of each."""


class UpdateFolder:
    """The shared folder; the service and the updater each have an object."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, model: type[M], name: str) -> M | None:
        """Return a file's content; None if it is missing, or cannot be used."""
        try:
            # The other side may have put anything there; opening a pipe must not block.
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                return decode_json(model, file.read(MAX_CONTROL_BYTES + 1) or b"")
        except FileNotFoundError:
            return None
        except (OSError, CodecError) as error:
            _log.warning("%s cannot be used: %s", self.path / name, error)
            return None

    def write(self, name: str, message: ControlMessage) -> None:
        write_atomically(self.path / name, encode_json(message), mode=_READABLE)

    # Of the service

    def want(self, values: Mapping[str, SettingValue]) -> None:
        """Hand the remote settings of the updater over to it."""
        wanted = WantedUpdate.model_validate({UPDATE_SETTINGS[name]: value for name, value in values.items()})
        if wanted == (self.read(WantedUpdate, WANTED) or WantedUpdate()):
            return
        try:
            self.write(WANTED, wanted)
        except OSError as error:
            _log.warning("The updater does not get its settings: %s: %s.", self.path / WANTED, error.strerror)

    def report(self) -> UpdateReport | None:
        state = self.read(UpdateState, STATE)
        return None if state is None else UpdateReport.model_validate(state.model_dump())

    def trial(self) -> str | None:
        """Return the id of the self-test that this release has to pass, if it was just installed."""
        state = self.read(UpdateState, STATE)
        if state is None or state.stage is not UpdateStage.TESTING or state.link:
            return None
        done = self.read(TrialResult, TESTED)
        return None if done is not None and done.trial == state.trial else state.trial

    def end_trial(self, trial: str, *, ok: bool, sentence: str) -> None:
        try:
            self.write(TESTED, TrialResult(trial=trial, ok=ok, sentence=printable_line(sentence)[:MAX_SENTENCE]))
        except OSError as error:
            _log.warning("The updater does not get the result: %s: %s.", self.path / TESTED, error.strerror)
