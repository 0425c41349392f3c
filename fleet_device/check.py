"""One finding of a self-test."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Check"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        name: What was checked.
        ok: Whether it is as it should be.
        ms: Time taken; 0 if it was not tried.
        sentence: For the operator: what was found, or what to do.
    """

    name: str
    ok: bool
    ms: float
    sentence: str

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "ms": round(self.ms, 1)}
