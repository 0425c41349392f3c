"""Place of an attack: broker, fleet and edge, and the identities of the attacker's devices; as JSON for processes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from benchmarks.client_process import Identity
from schemas.topics import Topic, build
from schemas.vocabulary import Vocabulary


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
        fields: Mapping[str, Any] = json.loads(text)
        return cls(**{**fields, "identities": tuple(Identity(**each) for each in fields["identities"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def vocabulary(self) -> Vocabulary:
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
