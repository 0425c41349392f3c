"""Settings of a connection to the broker: as operators write them, and as the link uses them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationInfo, field_validator, model_validator

from fleet_common.mqtt.link import Will
from fleet_common.settings import setting

TLS_PORT: Final = 8883


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """PEM files of an encrypted connection; our certificate and key where the broker requires them."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """One client's connection to the broker.

    Attributes:
        client_id: Unique at the broker: of two clients with the same one, the older is disconnected.
        username: Identity at a broker without client certificates; None sends none.
        anonymous_too: Whether to connect without the user name if the broker refuses it.
        keepalive_s: Silence after which either side sends a ping. A side that vanished is noticed after 1.5 times this.
        connect_timeout_s: For TCP.
        handshake_s: For TLS, and again for each answer that follows. Longer than the above: a broker to which a whole
            fleet returns at once, or one behind a slow line, needs time.
        answer_s: Timeout for any answer to QoS 1 messages that have reached the broker's machine; then the link
            reconnects.
        packet_bytes: Largest packet that we send or accept. The same for all clients of a broker: it silently drops
            what is too large for a subscriber. Some brokers do not announce their limit; then this one applies.
        min_backoff_s: Longest first delay before reconnecting.
        max_backoff_s: Longest delay while the broker does not answer.
        refused_backoff_s: Longest delay while it refuses us.
    """

    client_id: str
    host: str = "127.0.0.1"
    port: int = 1883
    username: str | None = None
    anonymous_too: bool = False
    password: str | None = dataclasses.field(default=None, repr=False)
    tls: TlsSettings | None = None
    will: Will | None = None
    keepalive_s: int = 10
    connect_timeout_s: float = 4.0
    handshake_s: float = 10.0
    answer_s: float = 5.0
    queue_messages: int = 1000
    queue_bytes: int = 8 << 20
    packet_bytes: int = 1 << 20
    min_backoff_s: float = 0.5
    max_backoff_s: float = 4.0
    refused_backoff_s: float = 30.0
    flush_s: float = 2.0

    @property
    def where(self) -> str:
        return f"{self.host}:{self.port}"


class BrokerSettings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    host: str = setting("127.0.0.1", "Name or address of the broker, as its certificate has it.", min_length=1)
    port: int = setting(1883, "TCP port of the broker; 8883 with `ca` if not set.", ge=1, le=65535)
    ca: Path | None = setting(None, "Certificate authorities (PEM) of the broker; turns TLS on.")
    certificate: Path | None = setting(None, "This program's certificate (PEM); requires `ca`.")
    key: Path | None = setting(None, "Private key (PEM); by default in the certificate's file.")
    username: str | None = setting(
        None,
        "Identity at a broker without client certificates; by default the program's name, or none if the broker "
        "refuses it.",
        rare=True,
    )
    password: SecretStr | None = setting(None, "Password of `username`.", rare=True)
    keepalive_s: int = setting(
        10,
        "Silence after which either side sends a ping; after 1.5 times this the connection ends.",
        unit="seconds",
        rare=True,
        ge=5,
        le=600,
    )

    # An incomplete TLS configuration must not result in a plain connection that looks like an encrypted one.

    @field_validator("certificate")
    @classmethod
    def _encrypted(cls, certificate: Path | None, seen: ValidationInfo) -> Path | None:
        if certificate is not None and seen.data.get("ca", certificate) is None:
            raise ValueError("a certificate without 'broker.ca', which turns TLS on; set it too")
        return certificate

    @field_validator("key")
    @classmethod
    def _with_certificate(cls, key: Path | None, seen: ValidationInfo) -> Path | None:
        if key is not None and seen.data.get("certificate", key) is None:
            raise ValueError("a key without 'broker.certificate'; set it too")
        return key

    @model_validator(mode="after")
    def _usual_port(self) -> Self:
        if self.ca is not None and "port" not in self.model_fields_set:
            self.port = TLS_PORT
        return self

    def link(self, fleet: str, name: str, *, will: Will | None) -> LinkSettings:
        """Return the link settings of the client `name` of `fleet`.

        Equal names in two fleets at one broker must not end each other's connections, so the client id contains both.
        With a client certificate it is the name alone: the fleet's broker takes it from the certificate, and others
        compare.
        """
        return LinkSettings(
            client_id=name if self.certificate else f"{fleet}:{name}",
            host=self.host,
            port=self.port,
            username=self.username or (None if self.certificate else name),
            anonymous_too=self.username is None and self.password is None,
            password=self.password.get_secret_value() if self.password else None,
            tls=TlsSettings(self.ca, self.certificate, self.key) if self.ca else None,
            will=will,
            keepalive_s=self.keepalive_s,
        )
