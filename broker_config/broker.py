"""The description of a broker: who speaks through it, and its limits."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.names import Name

__all__ = ["Broker"]

LARGEST_PACKET = 268_435_455 + 5  # MQTT's own bound


class Broker(BaseModel):
    """A broker on the loopback interface, for one fleet on one machine.

    There is no authentication: whoever is on this machine may call himself what he likes. The access rules
    hold all the same, so that what works here works where names come from certificates.

    Attributes:
        fleet: The fleet's name.
        port: TCP port; 0 lets whoever starts the broker choose a free one.
        edges: Names of the edges. Any other user is a device, or a monitor.
        monitors: User names of the administrators' desks.
        max_packet_bytes: Largest packet. The default lets the dense form of a large vocabulary through.
        max_connections: Most clients at once.
        max_unanswered: Most QoS 1 messages under way to and from one client. An edge answers a whole batch at once.
        max_queued: Most QoS 1 messages that wait for one client; beyond it the broker drops silently. Never 0, which is
            broken in 2.0.21.
        max_aliases: Most topic aliases of one client: an edge has one for every device.
        max_keepalive_s: Longest keepalive granted. It must exceed that of every client: equal is broken in 2.0.21.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fleet: Name = "home"
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    edges: tuple[Name, ...] = ("edge-1",)
    monitors: tuple[Name, ...] = ("monitor",)
    max_packet_bytes: Annotated[int, Field(ge=256, le=LARGEST_PACKET)] = 1 << 20
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    max_unanswered: Annotated[int, Field(ge=1, le=65_535)] = 256
    max_queued: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    max_aliases: Annotated[int, Field(ge=0, le=65_535)] = 4096
    max_keepalive_s: Annotated[int, Field(ge=60, le=65_535)] = 3600

    @model_validator(mode="after")
    def _one_role_a_name(self) -> Self:
        names = [*self.edges, *self.monitors]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)}: each name is one edge or one monitor")
        return self
