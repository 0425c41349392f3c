"""Settings of alerts, from flags, the environment (`FLEET_ALERTS_…`) and TOML: thresholds, and who is told."""

import ipaddress
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator

from fleet_common.fields import Settings, setting
from fleet_common.mqtt.settings import BrokerSettings
from schemas.names import Name

_MOST: Final = 1e9


class AlertSettings(Settings):
    """When something is an alert, and who is told. A threshold of 0 turns its rule off."""

    variable_prefix: ClassVar[str] = "FLEET_ALERTS_"

    every_s: float = setting(15.0, "Time between two looks.", unit="seconds", rare=True, ge=1, le=3600)
    hold_s: float = setting(
        60.0, "Time for which something must be wrong to be an alert.", unit="seconds", ge=0, le=86_400
    )
    clear_s: float = setting(
        120.0, "Time for which it must be right for the alert to be over.", unit="seconds", ge=0, le=86_400
    )
    slack: float = setting(
        0.1,
        "How far on the right side of its threshold a value must be to count as right, as a share of the threshold.",
        rare=True,
        ge=0,
        le=0.9,
    )
    window_min: float = setting(
        15.0, "Time over which refusals and faults are counted.", unit="minutes", rare=True, ge=1, le=1440
    )
    offline_min: float = setting(
        15.0,
        "Time after which a device that is offline is an alert.",
        unit="minutes",
        ge=0,
        le=100_000,
    )
    silent_h: float = setting(
        24.0,
        "Time after which a silent device is an alert; an idle device is silent too.",
        unit="hours",
        ge=0,
        le=100_000,
    )
    gone_days: float = setting(
        14.0,
        "Time after which a device or an edge of which nothing comes is no alert any more.",
        unit="days",
        ge=0,
        le=36_500,
    )
    edge_away_s: float = setting(
        60.0, "Time after which an edge that is offline is an alert.", unit="seconds", ge=0, le=_MOST
    )
    acceptance_share: float = setting(
        0.7,
        "Share of its own acceptance rate over 24 hours below which a device's rate of the latest hour is an alert.",
        ge=0,
        le=1,
    )
    acceptance_tokens: int = setting(
        500,
        "Fewest draft tokens of the hour that say something about a device's acceptance rate.",
        unit="tokens",
        rare=True,
        ge=1,
        le=1 << 40,
    )
    queue_p95_ms: float = setting(
        500.0,
        "Wait of drafts for a step, 95th percentile of five minutes, above which an edge is an alert.",
        unit="milliseconds",
        ge=0,
        le=_MOST,
    )
    step_p95_ms: float = setting(
        1000.0,
        "Time of a step, 95th percentile of five minutes, above which an edge is an alert.",
        unit="milliseconds",
        ge=0,
        le=_MOST,
    )
    kv_share: float = setting(
        0.9,
        "Share of its memory for keys and values above which an edge is an alert.",
        ge=0,
        le=1,
    )
    spool_records: int = setting(
        1000,
        "Records in an edge's spool from which on they are an alert.",
        unit="records",
        ge=0,
        le=1 << 40,
    )
    lag_s: float = setting(
        120.0,
        "Time for which an edge that is online has written nothing to the database that is an alert.",
        unit="seconds",
        ge=0,
        le=_MOST,
    )
    certificate_days: float = setting(
        30.0, "Time before a certificate's end from which on it is an alert.", unit="days", ge=0, le=3650
    )
    certificate_critical_days: float = setting(
        7.0, "Time before its end from which on that is critical.", unit="days", ge=0, le=3650
    )
    refusals: int = setting(
        20,
        "Refused sessions of one code at one edge within `window_min` from which on they are an alert.",
        unit="sessions",
        ge=0,
        le=1 << 40,
    )
    faults: int = setting(
        50,
        "Faults of one code at one edge within `window_min` from which on they are an alert.",
        unit="faults",
        ge=0,
        le=1 << 40,
    )
    clocks: bool = setting(
        True,  # noqa: FBT003 - a default
        "Whether a device's clock that is more than 30 s ahead of an edge's, or has gone back, is an alert.",
    )
    keep_days: float = setting(
        365.0, "How long alerts that are over are kept.", unit="days", rare=True, gt=0, le=36_500
    )
    webhook: str = setting("", "URL that alerts are posted to as JSON, https beyond this machine; empty posts none.")
    webhook_secret_file: Path | None = setting(
        None, "File whose one line is the secret that what is posted is signed with.", rare=True
    )
    fleet: Name | None = setting(
        None, "Fleet on whose broker alerts are published too, as `name` in the role monitor; none if left out."
    )
    name: Name = setting("monitor", "Name to publish alerts under.", rare=True)
    broker: BrokerSettings = Field(default_factory=BrokerSettings)

    @field_validator("webhook")
    @classmethod
    def _check_webhook(cls, url: str) -> str:
        if url:
            check_url(url)
        return url


def check_url(url: str) -> SplitResult:
    """Parse the URL of a webhook.

    Raises:
        ValueError: Alerts cannot be posted to it. The message completes a sentence.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("it must be a URL such as https://hooks.example/fleet") from None
    if not host or parts.scheme not in {"http", "https"} or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it must be a URL such as https://hooks.example/fleet")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a user or a password has no place in it: what is posted is signed with `webhook_secret_file`")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("beyond this machine it must begin with https://")
    return parts


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
