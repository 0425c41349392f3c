"""Who did what with the fleet's identities: one JSON line an action, appended and never changed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fleet_identity.files import append_line

__all__ = ["Audit"]


@dataclass(frozen=True, slots=True)
class Audit:
    """The audit log of an authority.

    Attributes:
        path: The file; an operator may make it append-only for the file system too.
        actor: Who acts, as the system knows him.
        clock: Now, with its time zone.
    """

    path: Path
    actor: str
    clock: Callable[[], datetime]

    def record(self, action: str, *, name: str, role: str, serial: str = "", detail: str = "") -> None:
        """Append a line. What is not recorded does not happen: call it before a certificate is handed out.

        Raises:
            IdentityError: The log cannot be written.
        """
        line = {
            "at": self.clock().isoformat(timespec="seconds"),
            "actor": self.actor,
            "action": action,
            "name": name,
            "role": role,
            "serial": serial,
            "detail": detail,
        }
        append_line(self.path, json.dumps({key: value for key, value in line.items() if value}))
