"""Place of an attack: broker, fleet and edge, and the identities of the attacker's devices; as JSON for processes."""

import json
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from schemas.topics import Topic, build
from schemas.vocabulary import Vocabulary

__all__ = ["Identity", "Place"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A client with a certificate, and the broker that takes it.

    Attributes:
        name: In the certificate.
        host: Of the broker.
        port: Of the broker.
        ca: Who vouches for the broker (PEM).
        certificate: The client's own (PEM).
        key: Its private key (PEM).
    """

    name: str
    host: str
    port: int
    ca: str
    certificate: str
    key: str

    def tls_context(self) -> ssl.SSLContext:
        """Return a context that shows the certificate, and checks the broker's."""
        context = ssl.create_default_context(cafile=self.ca)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments of `Identity`, as JSON values."""
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """Return the section `broker` of a device's or an edge's settings."""
        return {
            "host": self.host,
            "port": self.port,
            "ca": Path(self.ca),
            "certificate": Path(self.certificate),
            "key": Path(self.key),
        }


@dataclass(frozen=True, slots=True)
class Place:
    """What an attacker knows of the fleet; an honest device of it knows the same.

    Attributes:
        fleet: Topic level.
        edge: The edge that serves the fleet.
        sink: Name of an edge that reads its drafts and does nothing with them.
        vocabulary_size: Of the target.
        fingerprint: Of its vocabulary, in hexadecimal.
        context: Most tokens in one sequence of the target.
        max_packet_bytes: Largest packet that the broker takes.
        identities: The attacker's own, one for each device that it plays.
        control: Whether whatever would go to the edge goes to the sink instead.
    """

    fleet: str
    edge: str
    sink: str
    vocabulary_size: int
    fingerprint: str
    context: int
    max_packet_bytes: int
    identities: tuple[Identity, ...]
    control: bool = False

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        fields: Mapping[str, Any] = json.loads(text)
        return cls(**{**fields, "identities": tuple(Identity(**each) for each in fields["identities"])})

    def to_json(self) -> str:
        """Return it on one line."""
        return json.dumps(asdict(self))

    @property
    def vocabulary(self) -> Vocabulary:
        """The target's."""
        return Vocabulary(size=self.vocabulary_size, fingerprint=bytes.fromhex(self.fingerprint))

    def as_control(self) -> Self:
        """Return the same place for a control: nothing reaches the edge."""
        return replace(self, control=True)

    def topic(self, topic: Topic, identity: Identity) -> str:
        """Return a topic of a device; in a control, one that costs the broker the same and the edge nothing."""
        if topic is Topic.STATE and self.control:
            return build(Topic.CONFIG_REPORTED, fleet=self.fleet, device=identity.name)
        if topic is Topic.DRAFT or (self.control and topic in (Topic.OPEN, Topic.CLOSE)):
            edge = self.sink if self.control else self.edge
            return build(Topic.DRAFT, fleet=self.fleet, device=identity.name, edge=edge)
        return build(topic, fleet=self.fleet, device=identity.name)
