"""Applications that may use the local API, each with a key and quotas.

`fleet device app` writes their file. It has the SHA-256 of each key, not the key, which is 256 random bits and cannot
be guessed. A running device notices when the file changes.
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet_common.host import write_atomically
from fleet_device.errors import ConfigurationError
from schemas.fields import MAX_APP_NAME

_MAX_BYTES: Final = 1 << 20
_PREFIX: Final = "fleet-"

_Rate = Annotated[int, Field(ge=1, le=1_000_000_000, strict=True)]


class Application(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_APP_NAME)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tokens_per_min: _Rate | None = None
    tokens_per_day: _Rate | None = None
    requests_at_once: Annotated[int, Field(ge=1, le=1000, strict=True)] | None = None


class Applications(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    applications: Annotated[tuple[Application, ...], Field(max_length=1000)] = ()


def new_key() -> tuple[str, str]:
    """Return a new key, and its SHA-256 for the file."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, _digest(key.encode())


@dataclass(slots=True)
class ApplicationsFile:
    """The applications file, which may be missing."""

    path: Path
    _seen: tuple[int, int, int] | None = None
    _by_digest: dict[str, Application] | None = None

    def read(self) -> Applications:
        try:
            with self.path.open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
            return Applications.model_validate(json.loads(raw))
        except FileNotFoundError:
            return Applications()
        except OSError as error:
            raise ConfigurationError(
                f"The file of applications {self.path} cannot be read: {error.strerror or error}."
            ) from error
        except (ValidationError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"{self.path} is no file of applications; make one with `fleet device app add`."
            ) from error

    def find(self, key: bytes) -> Application | None:
        """Return the application with a key; a changed file is read again."""
        try:
            found = self.path.stat()
            seen = found.st_mtime_ns, found.st_size, found.st_ino
        except OSError:
            seen = None
        if self._by_digest is None or seen != self._seen:
            self._by_digest = {each.sha256: each for each in self.read().applications}
            self._seen = seen
        return self._by_digest.get(_digest(key))  # in a time that does not depend on the key

    @contextlib.contextmanager
    def changing(self) -> Iterator[list[Application]]:
        """Change the list that is yielded; the file is written atomically if the block succeeds."""
        found = list(self.read().applications)
        yield found
        content = Applications(applications=tuple(found)).model_dump_json(indent=2, exclude_none=True) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, content.encode(), keep_owner=True)  # the device may run as another user
        except OSError as error:
            raise ConfigurationError(
                f"The file of applications {self.path} cannot be written: {error.strerror or error}."
            ) from error


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
