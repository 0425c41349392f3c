"""Settings of alerts, from flags, the environment (`FLEET_ALERTS_…`) and TOML."""

import ipaddress
from pathlib import Path
from typing import ClassVar, Final, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from fleet_common.metrics import read_token
from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.settings import Settings, load_settings, setting
from schemas.names import Name

EVERY_S: Final = 10.0
"""Seconds between two evaluations."""


class AlertSettings(Settings):
    """When something is an alert, and where it is sent."""

    variable_prefix: ClassVar[str] = "FLEET_ALERTS_"

    hold_s: float = setting(
        60.0,
        "Time for which a condition must hold before the alert opens; it is over after twice that time without it.",
        unit="seconds",
        ge=0,
        le=86_400,
    )
    offline_min: float = setting(
        15.0, "Time offline after which a device is an alert.", unit="minutes", gt=0, le=100_000
    )
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

    def secret(self) -> bytes | None:
        """Read the secret that signs posted alerts; raises `MetricsError` if its file cannot be used."""
        return None if self.webhook_secret_file is None else read_token(self.webhook_secret_file.expanduser())

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


def load_alert_settings(config: Path | None) -> AlertSettings:
    """Read settings from a file, if one is named, and from the environment; also check that the secret can be read."""
    settings = load_settings(AlertSettings, config=None if config is None else config.expanduser(), flags={})
    settings.secret()
    return settings


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
