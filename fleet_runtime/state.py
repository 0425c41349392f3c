"""State folder: what a program keeps from one run to the next, and whose loss changes nothing but its pace.

It is the folder that systemd gives a service for it (`STATE_DIRECTORY`), else `$XDG_STATE_HOME/dssd-fleet`, else
`~/.local/state/dssd-fleet`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["state_folder"]

_FOLDER: Final = "dssd-fleet"


def state_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder, which need not exist; None for a user without a home."""
    given = environment.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    base = environment.get("XDG_STATE_HOME", "")
    if base and Path(base).is_absolute():  # others are to be ignored, as the XDG specification says
        return Path(base) / _FOLDER
    try:
        return Path.home() / ".local" / "state" / _FOLDER
    except RuntimeError:
        return None
