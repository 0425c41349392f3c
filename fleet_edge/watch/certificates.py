"""Certificate expiry: warns of certificates that end soon, as their owners tell it in their states.

A fleet whose renewal stands still must not find out on the day of the first failure.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock
from typing import Final

# A fleet has thousands of machines at most; whoever may publish states must not fill the memory all the same.
_MOST: Final = 100_000


@dataclass(frozen=True, slots=True)
class EndingCertificate:
    """A certificate that ends soon.

    Attributes:
        name: Whose.
        until: Its end (aware).
        days: Whole days left; below 0 when it has ended.
    """

    name: str
    until: datetime
    days: int

    @property
    def sentence(self) -> str:
        """For the operator: what is, and what to do."""
        when = (
            f"ended on {self.until:%Y-%m-%d}" if self.days < 0 else f"ends in {self.days} days ({self.until:%Y-%m-%d})"
        )
        return (
            f"The certificate of {self.name} {when}: renew it, by playbooks/rotate_certs.yml or `fleet broker renew`."
        )


@dataclass(slots=True)
class CertificateWatch:
    """Remembers ends, and tells of each that comes near: once a day.

    Attributes:
        now: The wall clock (UTC).
        warn_before: How near is soon. Renewal is due 30 days before the end, so by then it has failed for a while.
    """

    now: Callable[[], datetime]
    warn_before: timedelta = timedelta(days=14)
    _until: dict[str, datetime] = field(default_factory=dict)
    _told: dict[str, datetime] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def note(self, name: str, until: datetime | None) -> None:
        """Take what a machine says of its certificate; None if it has none, or does not say. From any thread."""
        with self._lock:
            if until is None:
                self._until.pop(name, None)
            elif name in self._until or len(self._until) < _MOST:
                self._until[name] = until

    def due(self) -> list[EndingCertificate]:
        """Return what is to be warned of now, the nearest end first. From any thread."""
        now, day = self.now(), timedelta(days=1)
        with self._lock:
            near = {name: until for name, until in self._until.items() if until - now < self.warn_before}
            self._told = {name: at for name, at in self._told.items() if name in near}
            fresh = [name for name in near if name not in self._told or now - self._told[name] >= day]
            self._told.update(dict.fromkeys(fresh, now))
        endings = [EndingCertificate(name, near[name], (near[name] - now).days) for name in fresh]
        return sorted(endings, key=lambda ending: ending.until)
