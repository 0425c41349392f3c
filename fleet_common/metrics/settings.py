"""Settings of the metrics' endpoint."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from fleet_common.fields import setting
from fleet_common.metrics.errors import MetricsError

_LEAST_TOKEN: Final = 16
_MOST_TOKEN: Final = 4096
_MOST_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.

    Attributes:
        host: An IP address, or `localhost`.
        port: 0 takes any that is free.
    """

    host: str
    port: int

    @classmethod
    def read(cls, text: str) -> "Address":
        """Read `HOST:PORT`; an IPv6 address stands in brackets.

        Raises:
            ValueError: It is none. The text is a sentence's end.
        """
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > _MOST_PORT:
            raise ValueError("it must be an address and a port, such as 127.0.0.1:9464 or [::1]:9464")
        if host != "localhost":
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise ValueError(f"{host[:60]!r} is no IP address; 0.0.0.0 listens on all of this machine's") from None
        return cls(host, int(port))

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback


class MetricsSettings(BaseModel):
    """Where metrics, `/healthz` and `/readyz` are served, and to whom."""

    model_config = ConfigDict(extra="forbid")

    listen: str = setting(
        "",
        "Address and port of `/metrics`, `/healthz` and `/readyz`, such as `127.0.0.1:9464`; beyond loopback only "
        "with `metrics.token_file`. Empty for none.",
        rare=True,
        in_flags=False,
    )
    token_file: Path | None = setting(
        None,
        "File with the bearer token for reading metrics.",
        rare=True,
        in_flags=False,
    )

    traces: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether to send a span per session and step by OTLP (variables `OTEL_…`).",
        rare=True,
        in_flags=False,
    )

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, text: str) -> str:
        if text:
            Address.read(text)
        return text

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.address is not None and not self.address.loopback and self.token_file is None:
            raise ValueError(
                "beyond loopback metrics need a bearer token: name its file in 'metrics.token_file', or listen on "
                "127.0.0.1"
            )
        return self

    @property
    def address(self) -> Address | None:
        """Where to listen; None if nowhere."""
        return Address.read(self.listen) if self.listen else None

    def token(self) -> bytes | None:
        """Return the token to ask for, read now; None if none is asked for.

        Raises:
            MetricsError: Its file cannot be used.
        """
        return None if self.token_file is None else read_token(self.token_file.expanduser())


def read_token(path: Path) -> bytes:
    """Read a token's file.

    Raises:
        MetricsError: It cannot be read, or what stands in it is no token.
    """
    try:
        with path.open("rb") as file:
            token = file.read(_MOST_TOKEN + 1).strip()
    except OSError as error:
        raise MetricsError(f"The token's file {path} cannot be read ({error.strerror}).") from error
    if not _LEAST_TOKEN <= len(token) <= _MOST_TOKEN or not all(33 <= byte < 127 for byte in token):  # noqa: PLR2004
        raise MetricsError(
            f"The token in {path} must be {_LEAST_TOKEN} to {_MOST_TOKEN} printable characters without spaces: make "
            "one with `openssl rand -hex 32`."
        )
    return token
