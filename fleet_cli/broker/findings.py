"""Findings of a check: one line each."""

from dataclasses import dataclass
from enum import StrEnum


class Result(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check.

    Attributes:
        check: Its name.
        result: How it ended.
        sentence: What was found, and where it failed, what to do.
    """

    check: str
    result: Result
    sentence: str
