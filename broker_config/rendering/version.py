"""mosquitto versions: from 2.1 on some options are deprecated, and new ones take their place."""

import re
import subprocess
from enum import StrEnum
from pathlib import Path

from broker_config.errors import BrokerFailed

_BANNER = re.compile(r"mosquitto version (\d+)\.(\d+)")
TIMEOUT_S = 10.0


class MosquittoVersion(StrEnum):
    """A minor series of mosquitto."""

    V2_0 = "2.0"
    V2_1 = "2.1"


def installed_version(program: Path) -> MosquittoVersion:
    """Ask mosquitto which it is. A later 2.x is taken for 2.1, whose options it keeps.

    Raises:
        BrokerFailed: It does not say, or it is one that we do not know.
    """
    try:
        # Its help ends with a status of its own.
        answer = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokerFailed(f"{program} cannot be run: {error}.") from error
    found = _BANNER.search(answer.stdout)
    if found is None:
        raise BrokerFailed(f"{program} does not tell its version; is it mosquitto?")
    major, minor = int(found[1]), int(found[2])
    if major != 2:  # noqa: PLR2004 - the series whose options are known
        raise BrokerFailed(f"mosquitto {major}.{minor} is not known here: use version 2.0 or 2.1.")
    return MosquittoVersion.V2_1 if minor else MosquittoVersion.V2_0
