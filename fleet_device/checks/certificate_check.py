"""Certificate and clock check: is the device's certificate its own and valid, and can the clock be right?"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from fleet_device.checks.checklist import NotApplicable
from fleet_device.errors import ConfigurationError
from fleet_link.settings import BrokerSettings, TlsSettings
from fleet_link.tls.certificate import certificate_end, certificate_name
from fleet_link.tls.context import tls_context
from schemas.control import EdgeState

__all__ = ["Moment", "check_certificate", "check_clock", "moments_of"]

_SOON: Final = timedelta(days=14)
_TOLERANCE: Final = timedelta(seconds=5)
"""Clocks of machines that set them by the network differ by less."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that has happened, so that a clock that is right is behind it.

    Attributes:
        what: A clause, such as `edge edge-1 has connected`.
        at: When, by the clock of whoever tells of it.
    """

    what: str
    at: datetime


def check_certificate(broker: BrokerSettings, device: str, now: datetime) -> str:
    """Return until when the device's certificate is valid.

    Args:
        broker: Has the files.
        device: The device's name.
        now: The time, with its time zone.

    Raises:
        NotApplicable: There is none.
        ConnectFailed: A file cannot be used, or is not valid now.
        ConfigurationError: The certificate is another's.
    """
    if broker.ca is None:
        raise NotApplicable("TLS is off, since the setting 'broker.ca' is left out: everybody on the way can read.")
    tls_context(TlsSettings(broker.ca, broker.certificate, broker.key), now=now)
    if broker.certificate is None:
        raise NotApplicable("The device has no certificate of its own; the broker's is checked by 'broker.ca'.")
    name, end = certificate_name(broker.certificate), certificate_end(broker.certificate)
    assert end is not None
    if name != device:
        raise ConfigurationError(
            f"The certificate {broker.certificate} is that of {name!r}, and this device is {device!r}: set 'device' to "
            f"{name!r}, or enrol this one with `fleet device enroll {device}`."
        )
    left = end - now
    renew = "; have it renewed soon, with `fleet broker renew`" if left < _SOON else ""
    return f"That of {name}, valid for {_span(left)} more, until {end:%Y-%m-%d %H:%M} UTC{renew}."


def moments_of(broker: BrokerSettings, edges: Sequence[EdgeState]) -> list[Moment]:
    """Return what a clock can be held against: when certificates were issued, and when edges have connected."""
    moments = [
        Moment(f"the certificate {path.name} became valid", begin)
        for path in (broker.ca, broker.certificate)
        if path is not None and (begin := _begin(path)) is not None
    ]
    return moments + [Moment(f"edge {each.edge} connected", each.since) for each in edges]


def check_clock(now: datetime, moments: Sequence[Moment]) -> str:
    """Return the time, and how long ago the latest of some moments was.

    A clock that is ahead cannot be told from one that is right, but by certificates that seem to have ended.

    Args:
        now: The time, with its time zone.
        moments: What has happened for certain.

    Raises:
        NotApplicable: There is nothing to hold it against.
        ConfigurationError: It is behind what has happened already.
    """
    if not moments:
        raise NotApplicable(f"{now:%Y-%m-%d %H:%M:%S} UTC; there is neither a certificate nor an edge to compare with.")
    latest = max(moments, key=lambda moment: moment.at)
    if latest.at - now > _TOLERANCE:
        raise ConfigurationError(
            f"It is {now:%Y-%m-%d %H:%M:%S} UTC by this machine's clock, and {latest.what} at "
            f"{latest.at:%Y-%m-%d %H:%M:%S}: the clock is behind by {_span(latest.at - now)} at least; set it (with "
            "systemd: `timedatectl set-ntp true`), or the other machine's if that one is wrong."
        )
    return f"{now:%Y-%m-%d %H:%M:%S} UTC; {latest.what} {_span(max(now - latest.at, timedelta()))} ago."


def _begin(path: Path) -> datetime | None:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_before_utc
    except (OSError, ValueError):
        return None


def _span(span: timedelta) -> str:
    """Return a duration as people say it."""
    seconds = int(span.total_seconds())
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:,} {unit}"
    return f"{seconds} s"
