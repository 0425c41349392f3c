"""Checklist: runs checks in order and tells each as it ends; what needs a check that has failed is not tried."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

from fleet_device.client.inbox import EdgePresences
from fleet_device.errors import EdgeUnavailable
from schemas.errors import FleetError
from schemas.version import VERSION


class NotApplicable(FleetError):  # noqa: N818 - reads as what it says
    """There is nothing to check here. Its text says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        name: What was checked.
        ok: Whether it is as it should be, or there is nothing to check.
        ms: Time taken; 0 if it was not tried.
        sentence: For the operator: what was found, or what to do.
        skipped: Whether it was not tried, for the reason in the sentence.
    """

    name: str
    ok: bool
    ms: float
    sentence: str
    skipped: bool = False

    @property
    def status(self) -> Literal["ok", "failed", "skipped"]:
        """What became of it, in a word."""
        return "skipped" if self.skipped else "ok" if self.ok else "failed"

    def json(self) -> dict[str, Any]:
        found = {name: value for name, value in asdict(self).items() if name != "skipped"}
        return {**found, "ms": round(self.ms, 1), "status": self.status}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What all checks found; a report of one kind adds what it is about.

    Attributes:
        checks: In order.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def json(self) -> dict[str, Any]:
        about = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "checks"}
        return {"ok": self.ok, "software": VERSION, **about, "checks": [check.json() for check in self.checks]}


@dataclass(slots=True)
class Checklist:
    """One run of checks.

    Attributes:
        names: What will be checked, in order.
        on_check: Told of every check as it ends.
        clock: Monotonic seconds.
    """

    names: tuple[str, ...]
    on_check: Callable[[Check], None] = lambda _check: None
    clock: Callable[[], float] = time.monotonic
    _done: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether none has failed so far."""
        return all(check.ok for check in self._done)

    def check(self, probe: Callable[[], str], *, needs: Collection[str] | None = None) -> None:
        """Do the next check, unless one that it needs has failed.

        Args:
            probe: Returns what it found, or raises what is wrong, or `NotApplicable`.
            needs: Names of those before it that it needs; None for all of them.
        """
        if self._failed(needs) is not None:
            self._skip(needs)
            return
        started = self.clock()
        ok, skipped = True, False
        try:
            sentence = probe()
        except NotApplicable as error:
            sentence, skipped = str(error), True
        except FleetError as error:
            sentence, ok = str(error), False
        self._tell(ok=ok, ms=(self.clock() - started) * 1e3, sentence=sentence, skipped=skipped)

    def finish(self) -> tuple[Check, ...]:
        """Say of the rest that it was not tried, and return all checks."""
        while len(self._done) < len(self.names):
            self._skip()
        return tuple(self._done)

    def _failed(self, needs: Collection[str] | None) -> str | None:
        """Return the first that has failed, of those needed."""
        wanted = (check for check in self._done if needs is None or check.name in needs)
        return next((check.name for check in wanted if not check.ok), None)

    def _skip(self, needs: Collection[str] | None = None) -> None:
        self._tell(ok=False, ms=0.0, sentence=f"Not tried, since {self._failed(needs)} failed.", skipped=True)

    def _tell(self, *, ok: bool, ms: float, sentence: str, skipped: bool = False) -> None:
        check = Check(self.names[len(self._done)], ok, ms, sentence, skipped)
        self._done.append(check)
        self.on_check(check)


class EdgeVocabulary(Protocol):
    """An edge that is online, as its state tells it."""

    @property
    def edge(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def vocabulary(self) -> str | None:
        """Size and the head of the fingerprint; None if that is not known."""


def check_online(edges: EdgePresences, fleet: str, *, wait_s: float) -> str:
    """Wait for an edge, and return which are online.

    Args:
        edges: What has been heard.
        fleet: The fleet's name.
        wait_s: Longest wait (seconds).

    Raises:
        EdgeUnavailable: None is.
    """
    if not edges.wait_online(wait_s):
        known = [f"{state.edge} is {state.presence.value}" for state in edges.known()]
        heard = f"edge {', '.join(known)}" if known else "none has been heard of"
        raise EdgeUnavailable(f"No edge of fleet {fleet!r} is online ({heard}); start one with `fleet edge run`.")
    online = [f"{state.edge} with {state.target}, software {state.software}" for state in edges.online()]
    return f"Online: {'; '.join(online)}. This device has software {VERSION}."


def check_vocabulary(ours: str, edges: Sequence[EdgeVocabulary], *, drafter: str) -> str:
    """Return which edges have the draft model's vocabulary.

    Args:
        ours: The draft model's vocabulary, or the one that it drafts for: size and the head of the fingerprint.
        edges: Those that are online.
        drafter: The draft model's name.

    Raises:
        EdgeUnavailable: One has another; it will refuse this device's texts.
    """
    for state in edges:
        if state.vocabulary != ours:
            raise EdgeUnavailable(
                f"Edge {state.edge} has the vocabulary of {state.target} ({state.vocabulary}), and the draft model "
                f"{drafter} has {ours}: use a draft model of the target's family, or set 'target_vocabulary' to a file "
                "made by `fleet models vocabulary`."
            )
    return f"{ours}, at {', '.join(state.edge for state in edges)} too."
