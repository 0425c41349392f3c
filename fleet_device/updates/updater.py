"""The updater: brings a device to the desired release, one step after the other, and back if its self-test fails.

Each start of the program makes one attempt. It may be killed at any time: before each step the state file says what to
finish. Only the change of a link makes another release run, and until it has passed its self-test, a failure, a
timeout or too many restarts of the service or the machine return to the previous one.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fleet_common.host import sync
from fleet_device.updates.handoff import (
    RESTART,
    STATE,
    TESTED,
    WANTED,
    TrialResult,
    UpdateFolder,
    UpdateState,
    WantedUpdate,
)
from fleet_device.updates.layout import INSTALLED_SHARE, PREFIX, UpdatePaths
from fleet_device.updates.repository import (
    CHUNK_BYTES,
    ReleaseFile,
    Repository,
    StorageFailed,
    UpdateFailed,
    UpdateWaits,
    VerifiedRelease,
)
from schemas.control import UpdateStage
from schemas.fields import MAX_SENTENCE
from schemas.printable import printable_line

_PROGRESS_S: Final = 30.0  # between reports of a download
_LOOK_S: Final = 5.0  # between looks at the limits of a download
_POLL_S: Final = 1.0
_STARTS: Final = 3  # of the updater during one self-test
_CRASHES: Final = 3  # of the service during one self-test
_UNIT: Final = "fleet-device"
_FREE_BYTES: Final = 200_000_000  # that stay free
_FULL_BYTES: Final = 1_000_000  # fewer that are free may have made a self-test fail
_STORAGE_RETRY_S: Final = (300, 3600)  # after the first failure, and at most
_MEGA: Final = 1e6


def service_restarts() -> int | None:
    """Return how often systemd restarted the service since a command did; None if it cannot be asked."""
    command = ("systemctl", "show", "--property=NRestarts", "--value", _UNIT)
    try:
        return int(subprocess.run(command, capture_output=True, timeout=10.0, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


class Updater:
    """Brings one device to its desired release.

    `trial_s` limits a release's self-test; `show` receives each new stage. `clock`, `now` (local time), `sleep` and
    `restarts` are replaced in tests.
    """

    def __init__(
        self,
        folder: UpdateFolder,
        layout: UpdatePaths,
        repository: Repository,
        *,
        trial_s: float,
        show: Callable[[UpdateState], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC).astimezone(),
        sleep: Callable[[float], None] = time.sleep,
        restarts: Callable[[], int | None] = service_restarts,
    ) -> None:
        self.folder = folder
        self._layout = layout
        self._repository = repository
        self._trial_s = trial_s
        self._show = show
        self.clock = clock
        self.now = now
        self.sleep = sleep
        self._restarts = restarts

    def run(self) -> UpdateState | None:
        """Make one attempt, and return the state; None if no release was ever desired."""
        state = self.folder.read(UpdateState, STATE)
        if state is not None:
            state = self._finish(state)
        wanted = self.folder.read(WantedUpdate, WANTED)
        if wanted is None:
            return state
        if wanted.release is None:
            # The next time that it is desired, a release that has failed is tried again.
            return state and self.note(state, UpdateStage.WAITING, "No release is desired.", storage_failures=0)
        if state is None:
            state = UpdateState(release=wanted.release, stage=UpdateStage.WAITING, at=self.now())
        elif state.release != wanted.release:
            state = self.note(state, UpdateStage.WAITING, release=wanted.release, fetched=0, size=0, storage_failures=0)
        if state.stage in {UpdateStage.DONE, UpdateStage.FAILED} or self._too_early(state):
            return state
        return self._try(_Gate(self, state, wanted))

    def _too_early(self, state: UpdateState) -> bool:
        """This machine could not store the release a short while ago."""
        passed_s = (self.now() - state.at).total_seconds()  # negative if the clock was set back
        failures = state.storage_failures if state.stage is UpdateStage.WAITING else 0
        return failures > 0 and 0 <= passed_s < _retry_s(failures)

    def _try(self, gate: "_Gate") -> UpdateState:
        try:
            return self._update(gate)
        except UpdateWaits as reason:
            gate.note(UpdateStage.WAITING, str(reason), storage_failures=0)
        except UpdateFailed as reason:
            gate.note(UpdateStage.FAILED, str(reason), storage_failures=0)
        except (StorageFailed, OSError) as error:
            failures = gate.state.storage_failures + 1
            gate.note(UpdateStage.WAITING, _again(_sentence(error), failures), storage_failures=failures)
        return gate.state

    def _update(self, gate: "_Gate") -> UpdateState:
        number, layout = gate.state.release, self._layout
        if number < gate.state.highest:
            raise UpdateFailed(
                f"Release {number} is older than {gate.state.highest}, which has run here: publish it again under "
                "a new number."
            )
        if layout.running == f"{PREFIX}{number}":
            return self.note(gate.state, UpdateStage.DONE, "It runs already.")
        gate.look()
        release = self._repository.release(number, gate.look_sometimes)
        store = self.folder.path / "wheels"
        wheels = {wheel: store / wheel.digest / wheel.name for wheel in release.wheels}
        files = {} if (layout.program(release) / "complete").exists() else dict(wheels)
        if release.model is not None:
            files[release.model] = layout.model(release.model)
        missing = {file: path for file, path in files.items() if not path.exists()}
        self._require_space(release, missing)
        gate.note(UpdateStage.FETCHING, size=sum(file.size for file in missing))
        for file, path in missing.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = _part(path)
            try:
                self._repository.fetch(file, part, gate, self.sleep)
            except OSError:
                _make_room(part)
                raise
            part.chmod(0o644)
            part.replace(path)
            sync(path.parent)
            gate.begin_next(file.size)
        gate.note(UpdateStage.INSTALLING)
        name = layout.prepare(release, list(wheels.values()))
        for folder in store.glob("*") if wheels else ():
            if folder not in {path.parent for path in wheels.values()}:
                shutil.rmtree(folder, ignore_errors=True)
        sentence = (
            f"Waiting up to {self._trial_s:.0f} s for the self-test of the restarted service. Where systemd does not "
            f"watch {self.folder.path / RESTART}, restart the service yourself: systemctl restart {_UNIT}."
        )
        trial = {"trial": secrets.token_hex(8), "previous": layout.running, "link": name, "starts": 0}
        gate.note(UpdateStage.TESTING, sentence, **trial)
        return self._finish(gate.state)

    def _finish(self, state: UpdateState) -> UpdateState:
        """Finish a change of the running release, and its self-test, from the start."""
        if state.stage is not UpdateStage.TESTING:
            if state.link:
                self._layout.switch(state.link)
                self._restart()
                state = self.note(state, state.stage, state.sentence, link="")
            return state
        if state.link:
            self._layout.switch(state.link)
            state = self.note(state, UpdateStage.TESTING, state.sentence, link="")
        else:
            state = self.note(state, UpdateStage.TESTING, state.sentence, starts=state.starts + 1)
            if state.starts >= _STARTS:
                return self._return(state, f"The machine or the updater was restarted {_STARTS} times during its test.")
        self._restart()
        return self._test(state)

    def _test(self, state: UpdateState) -> UpdateState:
        """Wait for the self-test of the started release, and keep the release or return to the previous one."""
        began, fewest = self.clock(), None
        while (passed_s := self.clock() - began) < self._trial_s:
            result = self.folder.read(TrialResult, TESTED)
            if result is not None and result.trial == state.trial:
                if not result.ok:
                    return self._return(state, f"Its self-test failed: {result.sentence}")
                self._layout.prove(f"{PREFIX}{state.release}", previous=state.previous)
                state = self.note(state, UpdateStage.DONE, result.sentence, highest=state.release, storage_failures=0)
                self._layout.remove_old()
                return state
            if (restarts := self._restarts()) is not None:
                fewest = restarts if fewest is None else min(fewest, restarts)  # our restart begins at zero
                if restarts - fewest >= _CRASHES:
                    why = f"Its service ended {_CRASHES} times within {passed_s:.0f} s: journalctl -u {_UNIT} says why."
                    return self._return(state, why)
            self.sleep(_POLL_S)
        return self._return(
            state,
            f"Its self-test did not end within {self._trial_s:.0f} s: the service was not restarted, did not start, or "
            "reached no edge.",
        )

    def _return(self, state: UpdateState, why: str) -> UpdateState:
        stage, failures = UpdateStage.FAILED, 0
        sentence = f"Release {state.release} was rolled back to {state.previous}. {why}"
        places = (self._layout.models, self._layout.programs, self.folder.path)
        if full := [place for place in places if shutil.disk_usage(place).free < _FULL_BYTES]:
            stage, failures = UpdateStage.WAITING, state.storage_failures + 1
            sentence = _again(f"{sentence} {full[0]} is full: make room.", failures)
        return self._finish(self.note(state, stage, sentence, link=state.previous, storage_failures=failures))

    def _restart(self) -> None:
        (self.folder.path / RESTART).write_text(f"{self.now()}\n", encoding="utf-8")

    def note(self, state: UpdateState, stage: UpdateStage, sentence: str = "", **changes: object) -> UpdateState:
        """Write the state, if anything but its time changes, and return it."""
        said = {"stage": stage, "sentence": printable_line(sentence)[:MAX_SENTENCE], "running": self._layout.running}
        new = UpdateState.model_validate({**state.model_dump(), **said, **changes, "at": self.now()})
        if new != state.model_copy(update={"at": new.at}):
            self.folder.write(STATE, new)
        if (new.stage, new.sentence) != (state.stage, state.sentence):
            self._show(new)
        return new

    def _require_space(self, release: VerifiedRelease, missing: Mapping[ReleaseFile, Path]) -> None:
        rest = {file: file.size - _size(_part(path)) for file, path in missing.items()}
        model = sum(size for file, size in rest.items() if file == release.model)
        wheels = sum(rest.values()) - model
        places = (
            (self._layout.models, model),
            (self.folder.path, wheels),
            (self._layout.programs, INSTALLED_SHARE * sum(file.size for file in release.wheels) if wheels else 0),
        )
        needed = Counter[int]()
        for place, size in places:
            needed[place.stat().st_dev] += size
        for place, size in places:
            free, need = shutil.disk_usage(place).free, needed[place.stat().st_dev] + _FREE_BYTES
            if size and free < need:
                raise StorageFailed(
                    f"Release {release.number} needs {need / _MEGA:,.0f} MB in {place}, and {free / _MEGA:,.0f} are "
                    "free: make room."
                )


class _Gate:
    """Limits and progress of the downloads of one attempt: called with the bytes of the file that are present."""

    def __init__(self, updater: Updater, state: UpdateState, wanted: WantedUpdate) -> None:
        self._updater = updater
        self.state = state
        self._wanted = wanted
        self._before = 0  # bytes of earlier files
        self._at: int | None = None  # bytes of this file
        self._due = self._looked = self._noted = updater.clock()

    def __call__(self, at: int) -> None:
        now, new = self._updater.clock(), 0 if self._at is None else max(0, at - self._at)
        self._at = at
        if self._wanted.kbyte_per_s is not None:
            self._due = max(self._due, now) + new / (1000 * self._wanted.kbyte_per_s)
            if self._due > now:
                self._updater.sleep(self._due - now)
        self.look_sometimes()
        if now - self._noted >= _PROGRESS_S:
            self._noted = now
            self.note(UpdateStage.FETCHING)

    def look_sometimes(self) -> None:
        """Read what is desired now, if that was a while ago, and look."""
        now = self._updater.clock()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            self._wanted = self._updater.folder.read(WantedUpdate, WANTED) or WantedUpdate()
            self.look()

    def look(self) -> None:
        """Raise `UpdateWaits` if nothing may be downloaded now."""
        if self._wanted.release != self.state.release:
            raise UpdateWaits(f"Release {self.state.release} is not desired any more.")
        if not self._wanted.allows(self._updater.now()):
            raise UpdateWaits(f"The download waits for its time window, {self._wanted.window}.")

    def begin_next(self, size: int) -> None:
        """Count a file of `size` bytes as complete."""
        self._before, self._at = self._before + size, None

    def note(self, stage: UpdateStage, sentence: str = "", **changes: object) -> None:
        fetched = self._before + (self._at or 0) or self.state.fetched
        self.state = self._updater.note(self.state, stage, sentence, fetched=fetched, **changes)


def _retry_s(failures: int) -> float:
    first, last = _STORAGE_RETRY_S
    return float(min(first << min(failures - 1, 10), last))


def _again(sentence: str, failures: int) -> str:
    return f"{sentence} It is tried again in {_retry_s(failures) / 60:.0f} minutes."


def _sentence(error: StorageFailed | OSError) -> str:
    if isinstance(error, StorageFailed):
        return str(error)
    place = f" ({error.filename})" if error.filename else ""
    return f"This machine cannot store the release: {error.strerror or error}{place}."


def _make_room(part: Path) -> None:
    """Remove a part's last chunk, so that a full file system has space for the state, which says why."""
    with contextlib.suppress(OSError):
        os.truncate(part, max(0, part.stat().st_size - CHUNK_BYTES))


def _part(path: Path) -> Path:
    """Return where a file is while it is incomplete."""
    return path.with_name(f".{path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
