"""Kept standings: what devices have used of their quotas, and their strikes, from one run of an edge to the next.

Otherwise a device that can make an edge restart begins again with full quotas and without a strike. Fences are in the
session log.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet_edge.guard.guard import Guard
from fleet_edge.guard.standing import KeptStanding

_log = logging.getLogger(__name__)

_MOST: Final = 4096
"""Devices, those with strikes first."""


class _File(BaseModel):
    """The file's content."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    at: datetime
    devices: Annotated[dict[str, KeptStanding], Field(max_length=_MOST)]


@dataclass(frozen=True, slots=True)
class KeptStandings:
    """Writes the standings of a guard into a file, and reads them back.

    Attributes:
        guard: Of this edge.
        path: The file; its folder exists.
        now: The wall clock (UTC).
    """

    guard: Guard
    path: Path
    now: Callable[[], datetime]

    def read(self) -> None:
        """Take what is in the file, if there is one that can be read."""
        try:
            found = _File.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            _log.warning("The quotas of all devices are full again: %s cannot be read: %s.", self.path, reason)
            return
        ago_s = max(0.0, (self.now() - found.at).total_seconds())
        self.guard.restore(found.devices, ago_s=ago_s)

    def write(self) -> None:
        """Replace the file. A machine that fails within seconds may lose that."""
        kept = self.guard.kept(_MOST)
        content = {"at": self.now().isoformat(), "devices": {name: each.model_dump() for name, each in kept.items()}}
        new = self.path.with_suffix(".new")
        try:
            new.write_text(json.dumps(content), encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            _log.warning("The quotas of devices cannot be kept in %s: %s.", self.path, error.strerror or error)
