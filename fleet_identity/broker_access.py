"""Access to the broker for the authority: where its revocation list goes, how to reload, where to test it."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fleet_identity.errors import CutOffFailed
from fleet_identity.files import PUBLIC, read_bounded, write_atomically

__all__ = ["BrokerAccess"]

PROGRAM: Final = "mosquitto"
RELOAD_S: Final = 10.0

_PROC: Final = Path("/proc")
_UNIT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._-]{0,250}")


class BrokerAccess(BaseModel):
    """Kept beside the authority, so that a revocation needs no more than a name.

    Attributes:
        host: Where clients connect, as the broker's certificate has it; left out, no broker is told.
        port: Its TLS port.
        crl: Where the broker reads the list of revoked certificates; left out, it reads the authority's own file.
        pid_file: The broker's, if it runs on this machine and is reloaded by a signal.
        unit: Or the systemd unit to reload. With neither, somebody else brings the list there and reloads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    port: Annotated[int, Field(ge=1, le=65_535)] = 8883
    crl: Path | None = None
    pid_file: Path | None = None
    unit: str | None = None

    @field_validator("crl", "pid_file")
    @classmethod
    def _from_anywhere(cls, path: Path | None) -> Path | None:
        return None if path is None else path.absolute()  # the next command may be said in another folder

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.pid_file is not None and self.unit is not None:
            raise ValueError("give a pid file or a unit, not both")
        if self.unit is not None and not _UNIT.fullmatch(self.unit):
            raise ValueError("that cannot be the name of a unit")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; an absent file says nothing about a broker.

        Raises:
            IdentityError: It cannot be read.
            CutOffFailed: It is not what `save` wrote.
        """
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(read_bounded(path, "The file"))
        except ValidationError as error:
            raise CutOffFailed(
                f"The file {path} is damaged: remove it, and give `fleet broker revoke` its --host and the rest again."
            ) from error

    def save(self, path: Path) -> None:
        """Write it.

        Raises:
            IdentityError: It cannot be written.
        """
        write_atomically(path, self.model_dump_json(indent=2).encode() + b"\n", mode=PUBLIC)

    def install(self, revocation_list: bytes) -> None:
        """Put a list where the broker reads it.

        Raises:
            IdentityError: It cannot be written.
        """
        if self.crl is not None:
            write_atomically(self.crl, revocation_list, mode=PUBLIC)

    def reload(self) -> bool:
        """Make the broker read its files again; return whether we know a way to.

        Raises:
            CutOffFailed: The way does not work.
        """
        if self.pid_file is not None:
            _signal(self.pid_file)
        elif self.unit is not None:
            _reload_unit(self.unit)
        else:
            return False
        return True


def _signal(pid_file: Path) -> None:
    try:
        pid = int(pid_file.read_text(encoding="ascii").strip())
        # A stale file may name a process that is somebody else's by now, and the signal would end it.
        ours = not _PROC.is_dir() or (_PROC / str(pid) / "comm").read_text(encoding="utf-8").strip() == PROGRAM
        found = pid > 1 and ours
        if found:
            os.kill(pid, signal.SIGHUP)
    except (ProcessLookupError, FileNotFoundError, ValueError):
        found = False
    except OSError as error:
        raise CutOffFailed(
            f"The broker of {pid_file} cannot be told: {error.strerror}; do it as root or as the broker's own user."
        ) from error
    if not found:
        raise CutOffFailed(f"No {PROGRAM} runs by the pid file {pid_file}: start it, or correct --pid-file.")


def _reload_unit(unit: str) -> None:
    program = shutil.which("systemctl")
    if program is None:
        raise CutOffFailed(f"There is no systemctl here to reload {unit}: use --pid-file.")
    try:
        done = subprocess.run([program, "reload", "--", unit], capture_output=True, timeout=RELOAD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CutOffFailed(f"`systemctl reload {unit}` does not come back: look at the broker.") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise CutOffFailed(f"`systemctl reload {unit}` failed ({said or done.returncode}): look at the broker.")
