"""Settings of alerts, from flags, the environment (`FLEET_ALERTS_…`) and TOML: thresholds and destinations."""

import ipaddress
from pathlib import Path
from typing import ClassVar, Final, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.settings import Settings, setting
from schemas.names import Name

_MOST: Final = 1e9


class AlertSettings(Settings):
    """When something is an alert, and where it is sent. A threshold of 0 turns its rule off."""

    variable_prefix: ClassVar[str] = "FLEET_ALERTS_"

    every_s: float = setting(15.0, "Time between two evaluations.", unit="seconds", rare=True, ge=1, le=3600)
    hold_s: float = setting(
        60.0, "Time for which a condition must hold before the alert opens.", unit="seconds", ge=0, le=86_400
    )
    clear_s: float = setting(
        120.0, "Time without the condition before the alert is over.", unit="seconds", ge=0, le=86_400
    )
    slack: float = setting(
        0.1,
        "Hysteresis: distance from the threshold at which a value counts as normal, as a share of the threshold.",
        rare=True,
        ge=0,
        le=0.9,
    )
    window_min: float = setting(15.0, "Time window for refusals and faults.", unit="minutes", rare=True, ge=1, le=1440)
    offline_min: float = setting(
        15.0, "Time offline after which a device is an alert.", unit="minutes", ge=0, le=100_000
    )
    silent_h: float = setting(
        24.0, "Silence after which a device is an alert; an idle device is silent too.", unit="hours", ge=0, le=100_000
    )
    gone_days: float = setting(
        14.0, "Silence after which a device or an edge is no longer an alert.", unit="days", ge=0, le=36_500
    )
    edge_away_s: float = setting(60.0, "Time offline after which an edge is an alert.", unit="seconds", ge=0, le=_MOST)
    acceptance_share: float = setting(
        0.7,
        "Alert if a device's acceptance rate of the last hour is below this share of its rate over 24 hours.",
        ge=0,
        le=1,
    )
    acceptance_tokens: int = setting(
        500,
        "Minimum draft tokens per hour to judge a device's acceptance rate.",
        unit="tokens",
        rare=True,
        ge=1,
        le=1 << 40,
    )
    queue_p95_ms: float = setting(
        500.0,
        "Alert if drafts wait longer for a step (95th percentile of five minutes).",
        unit="milliseconds",
        ge=0,
        le=_MOST,
    )
    step_p95_ms: float = setting(
        1000.0,
        "Alert if steps take longer (95th percentile of five minutes).",
        unit="milliseconds",
        ge=0,
        le=_MOST,
    )
    kv_share: float = setting(0.9, "Alert if an edge uses more of its memory for keys and values.", ge=0, le=1)
    spool_records: int = setting(
        1000, "Alert if this number of records is in an edge's spool.", unit="records", ge=0, le=1 << 40
    )
    lag_s: float = setting(
        120.0, "Alert if an online edge writes nothing to the database for this time.", unit="seconds", ge=0, le=_MOST
    )
    certificate_days: float = setting(30.0, "Alert this time before a certificate expires.", unit="days", ge=0, le=3650)
    certificate_critical_days: float = setting(
        7.0, "The alert is critical this time before it expires.", unit="days", ge=0, le=3650
    )
    refusals: int = setting(
        20,
        "Alert at this number of refused sessions of one code at one edge within `window_min`.",
        unit="sessions",
        ge=0,
        le=1 << 40,
    )
    faults: int = setting(
        50,
        "Alert at this number of faults of one code at one edge within `window_min`.",
        unit="faults",
        ge=0,
        le=1 << 40,
    )
    clocks: bool = setting(
        True,  # noqa: FBT003 - a default
        "Whether a device's clock that is over 30 s ahead of an edge's, or has gone back, is an alert.",
    )
    keep_days: float = setting(365.0, "Retention of alerts that are over.", unit="days", rare=True, gt=0, le=36_500)
    webhook: str = setting("", "URL to which alerts are posted as JSON, https beyond this machine; empty for none.")
    webhook_secret_file: Path | None = setting(None, "File with the secret that signs posted alerts.", rare=True)
    fleet: Name | None = setting(
        None, "Fleet on whose broker alerts are also published, as `name` in the role monitor; none by default."
    )
    home_assistant: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether Home Assistant is shown the devices of `fleet` by MQTT discovery.",
        rare=True,
    )
    name: Name = setting("monitor", "Name to publish alerts under.", rare=True)
    broker: BrokerSettings = Field(default_factory=BrokerSettings)

    @model_validator(mode="after")
    def _require_fleet(self) -> Self:
        if self.home_assistant and self.fleet is None:
            raise ValueError("home_assistant needs `fleet`, on whose broker the devices are shown")
        return self

    @field_validator("webhook")
    @classmethod
    def _check_webhook(cls, url: str) -> str:
        if url:
            check_url(url)
        return url


def check_url(url: str) -> SplitResult:
    """Parse a webhook's URL; raises ValueError, whose message completes a sentence, if it cannot be used."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("it must be a URL such as https://hooks.example/fleet") from None
    if not host or parts.scheme not in {"http", "https"} or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it must be a URL such as https://hooks.example/fleet")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "it must not contain a user or a password: what is posted is signed with `webhook_secret_file`"
        )
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
