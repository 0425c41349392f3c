"""One description of a broker: who speaks through it, how they prove who they are, and its limits.

What it is follows from what it holds: without `tls` a broker for this machine alone, with `tls` a production broker,
with `head_office` one that bridges what it knows to an upstream broker.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from schemas.names import Name
from schemas.topics import Topic

# Ephemeral keys and authenticated encryption only. The fleet's keys are on P-256, so no RSA suite can ever be used.
CIPHERS_TLS12: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
)
# ChaCha20 counts for small devices, which often lack AES instructions; the client's order decides.
CIPHERS_TLS13: Final = ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_256_GCM_SHA384")


def _plain(path: Path) -> Path:
    if not str(path).isprintable() or '"' in str(path):
        raise ValueError(f"{str(path)!r} is not a path that a configuration file can hold")
    return path


File = Annotated[Path, AfterValidator(_plain)]


class Tls(BaseModel):
    """The PEM files of a TLS listener. Relative paths lie beside the configuration.

    Every client must show a certificate, and its common name is its user name and its client id.

    Attributes:
        ca: The fleet's own certificate authority, alone: any authority in this file can mint identities.
        certificate: The broker's certificate.
        key: Its private key.
        crl: What the authority has revoked. Read at start and at SIGHUP.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: File = Path("ca.pem")
    certificate: File = Path("broker.pem")
    key: File = Path("broker.key")
    crl: File = Path("crl.pem")


REPORTED: Final = (Topic.STATE, Topic.EDGE_STATE, Topic.TELEMETRY, Topic.CLOSE, Topic.SESSION)
"""What goes up: who is there, the counters, and each session's account as both ends give it at its end.

No prompt and no text: those are on `up/open` and the two hot topics.
"""

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[?[0-9A-Fa-f:]+\]?")


def _host(name: str) -> str:
    if not _HOST.fullmatch(name):
        raise ValueError(f"{name!r} is neither a host name nor an address")
    return name.strip("[]")


class HeadOffice(BaseModel):
    """The broker at the head office, as a site's broker reaches it: as a client, over TLS.

    Attributes:
        host: Name or address; the certificate there must carry it.
        port: TCP port.
        site: The name in this site's certificate. Unique at the head office.
        ca: Who may vouch for the head office's broker.
        certificate: This site's certificate, signed by the head office.
        key: Its private key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, AfterValidator(_host)]
    port: Annotated[int, Field(ge=1, le=65_535)] = 8883
    site: Name
    ca: File = Path("head-office-ca.pem")
    certificate: File = Path("site.pem")
    key: File = Path("site.key")


PRODUCTION_PORT: Final = 8883
PRODUCTION_EDGE_PORT: Final = 8884
PRODUCTION_JANITOR: Final = "monitor-janitor"  # a name that no device can get
PRODUCTION_STORAGE: Final = Path("/var/lib/mosquitto")
LARGEST_PACKET: Final = 268_435_455  # MQTT's own bound


def _writable(path: Path) -> Path:
    # A line break in a path would be a directive of its own.
    if not str(path).isprintable():
        raise ValueError(f"{str(path)!r} is not a path that a configuration file can hold")
    return path


def _address(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address to listen on; leave it out for all of them") from None


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise ValueError(f"{text!r} is neither an IP address nor a network such as 10.0.0.0/24") from None


class Broker(BaseModel):
    """A broker for one fleet.

    Without `tls` there is no authentication: whoever is on this machine may call himself what he likes. The access
    rules hold all the same, so that what works here works where names come from certificates.

    Attributes:
        fleet: The fleet's name.
        host: Address to listen on; None for all.
        port: TCP port; 0 lets whoever starts the broker choose a free one, and one for the edges if they have a port.
        edge_port: TCP port of a second listener, for edges and monitors: where a firewall lets nobody else reach it,
            devices cannot take its places. 0 for none: everybody uses `port`.
        edges: Names of the edges. Any other user is a device, or a monitor.
        monitors: User names of administrators.
        janitor: User name of the client that clears what devices leave behind; None for none.
        devices: Names of the devices. None lets every name be a device's that the certificate authority has signed, so
            that enrolling one changes nothing here. With names, nobody else has any right.
        banned: Names that may do nothing, whatever certificate they show.
        tls: Certificates; None for a broker on loopback.
        head_office: Where this site reports to, if anywhere.
        storage: Folder for what is retained; None forgets it at a restart.
        public_name: Host name or address of the broker as its certificate has it, for the clients on its own machine.
        pid_file: Where mosquitto writes its process id, for whoever tells it to reload without systemd.
        user: Whom mosquitto becomes when root starts it; None leaves its default.
        acl_plugin: From mosquitto 2.1 on, the path of its `mosquitto_acl_file.so`; None uses the option that 2.0 and
            2.1 both know.
        max_packet_bytes: Largest packet. The default lets the dense form of a large vocabulary through.
        max_connections: Most clients at once, connections that have not said who they are included. With room to
            spare: one device can hold many of those.
        max_edge_connections: Likewise, at the edges' own port.
        max_unanswered: Most messages on their way to one client, and from it. An edge answers a whole batch at once.
        max_queued: Most messages that wait for one client; beyond it the broker drops and counts them in
            `$SYS/broker/publish/messages/dropped`. More than twice `max_unanswered`: what is under way to and from a
            client must fit, or acknowledgements are dropped. Never 0, which is broken in 2.0.21.
        max_queued_bytes: Likewise, their bytes.
        max_aliases: Most topic aliases of one client: an edge has one for every device.
        max_device_aliases: Likewise, of a client that is not at the edges' own port; without such a port `max_aliases`
            holds for all. Each may cost the broker 64 KiB, and a device has one for each edge that it uses.
        max_device_connections: Most connections at once from one address, for a firewall.
        max_device_connections_per_minute: Likewise, new ones in a minute.
        max_device_bytes_per_s: Most bytes a second from one address, for a firewall. Twice what an edge grants a
            device, so that an honest device hears of it from the edge.
        max_device_burst_bytes: Most at once after silence.
        devices_per_address: Devices behind one address, where they share one: the firewall's limits are that many times
            as high.
        edge_networks: Addresses or networks that may reach `edge_port`, for a firewall; empty leaves that to others.
        max_keepalive_s: Longest keepalive granted. It must exceed that of every client: equal is broken in 2.0.21.
        log_subscriptions: Whether the log says who subscribes to what, to find out whose subscriptions are too many.
        sys_interval_s: Seconds between two updates of `$SYS`; 0 switches it off, and with it what `fleet broker watch`
            sees.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fleet: Name = "home"
    host: Annotated[str, AfterValidator(_address)] | None = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    edge_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    edges: tuple[Name, ...] = ("edge-1",)
    monitors: tuple[Name, ...] = ("monitor",)
    janitor: Name | None = None
    devices: tuple[Name, ...] | None = None
    banned: tuple[Name, ...] = ()
    tls: Tls | None = None
    head_office: HeadOffice | None = None
    storage: Annotated[Path, AfterValidator(_writable)] | None = None
    public_name: Annotated[str, AfterValidator(_host)] = "localhost"
    pid_file: Annotated[Path, AfterValidator(_writable)] | None = None
    user: Name | None = None
    acl_plugin: Annotated[Path, AfterValidator(_writable)] | None = None
    max_packet_bytes: Annotated[int, Field(ge=256, le=LARGEST_PACKET)] = 1 << 20
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    max_edge_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    max_unanswered: Annotated[int, Field(ge=1, le=65_535)] = 256
    max_queued: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    max_queued_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 40)] = 64 << 20
    max_aliases: Annotated[int, Field(ge=0, le=65_535)] = 4096
    max_device_aliases: Annotated[int, Field(ge=0, le=65_535)] = 16
    max_device_connections: Annotated[int, Field(ge=1, le=65_535)] = 8
    max_device_connections_per_minute: Annotated[int, Field(ge=1, le=65_535)] = 60
    max_device_bytes_per_s: Annotated[int, Field(ge=1024, le=1 << 30)] = 512 << 10
    max_device_burst_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 4 << 20
    devices_per_address: Annotated[int, Field(ge=1, le=10_000)] = 1
    edge_networks: tuple[Annotated[str, AfterValidator(_network)], ...] = ()
    max_keepalive_s: Annotated[int, Field(ge=60, le=65_535)] = 3600
    log_subscriptions: bool = False
    sys_interval_s: Annotated[int, Field(ge=0, le=3600)] = 0

    @classmethod
    def production(cls, **values: Any) -> Self:  # noqa: ANN401 - whatever the model takes
        """Return a broker with the defaults of production: mutual TLS on all addresses, a port of the edges' own.

        Raises:
            ValidationError: A value cannot work.
        """
        defaults: dict[str, Any] = {
            "host": None,
            "port": PRODUCTION_PORT,
            "edge_port": PRODUCTION_EDGE_PORT,
            "janitor": PRODUCTION_JANITOR,
            "tls": {},
            "storage": PRODUCTION_STORAGE,
            "user": "mosquitto",
            "sys_interval_s": 10,
        }
        return cls.model_validate(defaults | values)

    @model_validator(mode="after")
    def _one_role_a_name(self) -> Self:
        names = [*self.edges, *self.monitors, *(self.devices or ()), *((self.janitor,) if self.janitor else ())]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)}: each name is one edge, one monitor or one device")
        return self

    def port_of(self, name: str) -> int:
        """Return the port that a client uses."""
        return self.edge_port if self.edge_port and name in (*self.edges, *self.monitors, self.janitor) else self.port

    @model_validator(mode="after")
    def _two_ports(self) -> Self:
        if self.edge_port and self.edge_port == self.port:
            raise ValueError(f"edge_port must be another than port, which is {self.port}, or 0 for none")
        return self

    @model_validator(mode="after")
    def _room_for_acknowledgements(self) -> Self:
        if self.max_queued <= 2 * self.max_unanswered:
            raise ValueError(
                f"max_queued must be more than twice max_unanswered, which is {self.max_unanswered}: "
                "else acknowledgements would find no place"
            )
        return self

    @model_validator(mode="after")
    def _no_stranger_without_certificate(self) -> Self:
        if self.tls is None and (self.host is None or not ipaddress.ip_address(self.host).is_loopback):
            raise ValueError("without tls anybody could take any name, so such a broker listens on loopback only")
        if self.tls is None and self.head_office is not None:
            raise ValueError("a site reports to its head office over TLS: describe tls too")
        return self
