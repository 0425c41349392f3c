"""Failure of a text: what its Close says of the exception that has ended it."""

import re
from typing import Final

from fleet_device.errors import SessionRefused
from schemas.bounds import MAX_CODE, MAX_SENTENCE
from schemas.errors import FleetError
from schemas.messages import Close
from schemas.printable import printable_line
from schemas.reasons import EndReason

__all__ = ["UNFINISHED", "with_cause"]

_WORDS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")

UNFINISHED: Final = {"code": "process-ended", "sentence": "The device's program ended while the text was written."}
"""What is said of a text that is never ended."""


def with_cause(close: Close, error: BaseException | None) -> Close:
    """Return the Close of a failed text with the reason; any other as it is."""
    if error is None or close.reason is not EndReason.FAILED:
        return close
    return close.model_copy(update={"code": _code(error), "sentence": _sentence(error)})


def _code(error: BaseException) -> str:
    if isinstance(error, SessionRefused):
        return error.code.value
    return _WORDS.sub("-", type(error).__name__).lower()[:MAX_CODE]


def _sentence(error: BaseException) -> str:
    if isinstance(error, FleetError):
        return printable_line(str(error))[:MAX_SENTENCE]
    # What other exceptions say may quote anything.
    return f"The device's program has failed ({type(error).__name__}); its own log says more."
