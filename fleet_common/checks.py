"""Checklist: checks that run in order, each with a sentence that says what was found or what to do."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum

from schemas.errors import FleetError


class NotApplicable(FleetError):  # noqa: N818 - reads as what it says
    """There is nothing to check; the message says why."""


class CheckStatus(StrEnum):
    OK = "ok"
    NOTE = "note"  # it works, and there is something to know
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: CheckStatus
    sentence: str


@dataclass(slots=True)
class Checklist:
    """Results of checks, in order; `on_check` receives each as it ends."""

    on_check: Callable[[Check], None] = lambda _check: None
    done: list[Check] = field(default_factory=list)

    def run(self, name: str, probe: Callable[[], str], *, needs: Collection[str] | None = None) -> None:
        """Run a check, unless one of those that it `needs` has failed; None needs all earlier ones.

        `probe` returns what it found, or raises what is wrong, or `NotApplicable`.
        """
        failed = (each.name for each in self.done if each.status is CheckStatus.FAILED)
        if (missing := next((each for each in failed if needs is None or each in needs), None)) is not None:
            status, sentence = CheckStatus.SKIPPED, f"Skipped, because {missing} failed."
        else:
            try:
                status, sentence = CheckStatus.OK, probe()
            except NotApplicable as error:
                status, sentence = CheckStatus.SKIPPED, str(error)
            except FleetError as error:
                status, sentence = CheckStatus.FAILED, str(error)
        self.done.append(Check(name, status, sentence))
        self.on_check(self.done[-1])
