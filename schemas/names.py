"""Names of fleets, devices and edges, each exactly one level of a topic; the package's version.

A certificate carries a name and an ACL pattern substitutes it, so it must not contain the MQTT wildcards or separators,
and must not start with `_` (reserved for our own levels, `_edge`) or `$` (reserved by MQTT).
"""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from pydantic import AfterValidator

from schemas.errors import InvalidName

MAX_NAME_LENGTH = 63  # a DNS label's, so that a host name is always a valid device name

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def model_name(name: str | None, quantization: str | None) -> str | None:
    """Return a draft model's name with its quantization, unless a file's name has it already.

    A drafter without a model has the quantization `none`.
    """
    if quantization == "none" or (name and quantization and name.casefold().endswith(quantization.casefold())):
        quantization = None
    return " ".join(part for part in (name, quantization) if part) or None


def check_name(name: str) -> str:
    """Return `name`, or raise InvalidName if a topic level or certificate cannot have it."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= MAX_NAME_LENGTH else name[:MAX_NAME_LENGTH] + "…"
        raise InvalidName(
            f"{shown!r} is not a valid name: use 1 to {MAX_NAME_LENGTH} letters, digits, '.', '_' or '-', "
            "starting and ending with a letter or digit."
        )
    return name


_PROBE = "probe-"


def probe_name(edge: str) -> str:
    """Return the device name that `fleet edge selftest` uses."""
    return f"{_PROBE}{edge}"


def is_probe(device: str) -> bool:
    """Self-tests have reserved names: they are no devices of the fleet."""
    return device.startswith(_PROBE)


Name = Annotated[str, AfterValidator(check_name)]
"""A pydantic field type for a checked name."""


try:
    VERSION = version("dssd-fleet")
except PackageNotFoundError:
    # Run from a source tree that was never installed.
    VERSION = "0+unknown"
