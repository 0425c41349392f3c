"""State folder: what a program keeps from one run to the next, and whose loss changes nothing but its pace.

It is the folder that systemd gives a service for it (`STATE_DIRECTORY`), else `$XDG_STATE_HOME/dssd-fleet`, else
`~/.local/state/dssd-fleet`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from fleet_common.folders import standard_folder


def state_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder, which need not exist; None for a user without a home."""
    return standard_folder(environment, service="STATE_DIRECTORY", user="XDG_STATE_HOME", default=".local/state")
