"""Description of a fleet's broker, from which everything else is rendered, and its TOML file.

Without `tls` it is a broker for this machine alone, with `tls` a production broker.
"""

import ipaddress
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fleet_common.validation import field_at, plain_sentence
from schemas.errors import FleetError
from schemas.names import Name


class BrokerError(FleetError):
    """Base of all errors of this package. The message is one sentence for the user."""


class BrokerMissing(BrokerError):  # noqa: N818 - reads as what it says
    """The broker's program is not installed."""


class BrokerFailed(BrokerError):  # noqa: N818
    """The broker does not start."""


class BrokerFilesError(BrokerError):
    """A broker's file cannot be read, written or used."""


# Ephemeral keys and authenticated encryption only. The fleet's keys are on P-256, so no RSA suite can ever be used.
CIPHERS_TLS12: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
)
# ChaCha20 for small devices, which often lack AES instructions; the client's order decides.
CIPHERS_TLS13: Final = ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_256_GCM_SHA384")


def _plain(path: Path) -> Path:
    if not str(path).isprintable() or '"' in str(path):
        raise ValueError(f"{str(path)!r} is not a path that a configuration file can hold")
    return path


File = Annotated[Path, AfterValidator(_plain)]


class Tls(BaseModel):
    """PEM files of a TLS listener; relative paths are relative to the configuration.

    Every client must show a certificate signed by `ca`, which holds the fleet's own authority alone: any authority in
    this file can mint identities. The certificate's common name is the user name and the client id. `crl` is read at
    start and at SIGHUP.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: File = Path("ca.pem")
    certificate: File = Path("broker.pem")
    key: File = Path("broker.key")
    crl: File = Path("crl.pem")


_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[?[0-9A-Fa-f:]+\]?")


def _host(name: str) -> str:
    if not _HOST.fullmatch(name):
        raise ValueError(f"{name!r} is neither a host name nor an address")
    return name.strip("[]")


PRODUCTION_PORT: Final = 8883
PRODUCTION_EDGE_PORT: Final = 8884
PRODUCTION_JANITOR: Final = "monitor-janitor"  # no device can have this name
PRODUCTION_STORAGE: Final = Path("/var/lib/mosquitto")
LARGEST_PACKET: Final = 268_435_455  # MQTT's limit


def _writable(path: Path) -> Path:
    # A line break in a path would begin another directive.
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

    Without `tls` there is no authentication: every user of the machine may use any name. The access rules apply anyway,
    so that what works here works where names come from certificates.

    Attributes:
        port: TCP port; 0 for any free port, with another one for edges if they have their own.
        edge_port: TCP port of a second listener, for edges and monitors: if a firewall protects it, devices cannot use
            up its connections. 0 for none: everybody uses `port`.
        edges: Names of the edges. Any other user is a device, or a monitor.
        monitors: User names of administrators.
        janitor: User name of the client that clears unwanted retained messages; None for none.
        home_assistant: User name of a Home Assistant, which may read what monitors show it below `homeassistant/`, and
            publish its status there; None for none.
        devices: Names of the devices. None accepts every name that the certificate authority has signed, so that
            enrolling a device changes nothing here. With names, nobody else has any rights.
        banned: Names without any rights, whatever their certificate.
        tls: Certificates; None for a broker on loopback.
        storage: Folder for retained messages; None forgets them at a restart.
        public_name: Host name or address as in the broker's certificate, for clients on its own machine.
        pid_file: File for mosquitto's process id, to reload it without systemd.
        user: User that mosquitto changes to when started by root; None leaves its default.
        acl_plugin: From mosquitto 2.1 on, the path of `mosquitto_acl_file.so`; None uses the option that 2.0 and 2.1
            both know.
        max_packet_bytes: Largest packet. The default allows the dense form of a large vocabulary.
        max_connections: Most clients at once, including connections that have not identified themselves. Leave room:
            one device can hold many of those.
        max_edge_connections: Likewise, at the edges' own port.
        max_unanswered: Most unacknowledged messages to and from one client. An edge answers a whole batch at once.
        max_queued: Most messages queued for one client; beyond it the broker drops messages and counts them in
            `$SYS/broker/publish/messages/dropped`. More than twice `max_unanswered`: unacknowledged messages to and
            from a client must fit, or acknowledgements are dropped. Never 0, which is broken in 2.0.21.
        max_queued_bytes: Likewise, their bytes.
        max_aliases: Most topic aliases of one client: an edge has one for every device.
        max_device_aliases: Likewise, of a client that is not at the edges' own port; without such a port `max_aliases`
            applies to all. Each may cost the broker 64 KiB, and a device has one for each edge that it uses.
        max_device_connections: Most connections at once from one address, for a firewall.
        max_device_connections_per_minute: Likewise, new ones in a minute.
        max_device_bytes_per_s: Most bytes per second from one address, for a firewall. Twice the edge's quota for a
            device, so that an honest device meets the edge's quota first.
        max_device_burst_bytes: Most bytes at once after silence.
        devices_per_address: Number of devices that share one address: multiplies the firewall's limits.
        edge_networks: Addresses or networks that may reach `edge_port`, for a firewall; empty for no rule.
        max_keepalive_s: Longest keepalive granted. It must exceed that of every client: equal is broken in 2.0.21.
        log_subscriptions: Whether subscriptions are logged, to find the client with too many.
        sys_interval_s: Seconds between updates of the broker's figures below `$SYS`; 0 for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fleet: Name = "home"
    host: Annotated[str, AfterValidator(_address)] | None = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    edge_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    edges: tuple[Name, ...] = ("edge-1",)
    monitors: tuple[Name, ...] = ("monitor",)
    janitor: Name | None = None
    home_assistant: Name | None = None
    devices: tuple[Name, ...] | None = None
    banned: tuple[Name, ...] = ()
    tls: Tls | None = None
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
        """Return a broker with the defaults of production: mutual TLS on all addresses, a separate port for edges."""
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
        names = [*self.edges, *self.monitors, *(self.devices or ()), *filter(None, (self.janitor, self.home_assistant))]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)}: each name is one edge, one monitor or one device")
        return self

    def port_of(self, name: str) -> int:
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
                "else acknowledgements would not fit"
            )
        return self

    @model_validator(mode="after")
    def _no_stranger_without_certificate(self) -> Self:
        if self.tls is None and (self.host is None or not ipaddress.ip_address(self.host).is_loopback):
            raise ValueError("without tls anyone could take any name, so such a broker listens on loopback only")
        return self


_NULLABLE: Final = frozenset({"host", "janitor"})
_SECTIONS: Final[dict[str, type[BaseModel]]] = {"tls": Tls}


def render_description(broker: Broker) -> str:
    values = broker.model_dump(mode="json", exclude_none=True)
    if broker.host is None:
        values["host"] = ""  # TOML has no null
    title = "# The description of the broker that the other files here were rendered from. Generated."
    return "\n".join([title, *toml_lines(values)]) + "\n"


def toml_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield TOML of JSON values; mappings become sections."""
    sections = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    for name, value in values.items():
        if name not in sections:
            yield f"{name} = {json.dumps(value, ensure_ascii=False)}"  # TOML's basic strings escape as JSON's do
    for name, section in sections.items():
        yield from ("", f"[{name}]", *toml_lines(section))


def read_description(path: Path, *, production: bool = True) -> Broker:
    """Read a TOML description; raise BrokerFilesError if it cannot be read or describes no broker.

    `production` chooses the defaults of missing values: those of production rather than loopback's.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokerFilesError(f"The description {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BrokerFilesError(f"The description {path} is not valid TOML: {error}.") from error
    return describe(values, production=production, origin=f" in {path}")


def describe(values: dict[str, Any], *, production: bool, origin: str = "") -> Broker:
    """Validate the values of a description; raise BrokerFilesError with a line for each problem.

    An empty `host` means all addresses, an empty `janitor` none. `origin` says in the message where the values come
    from.
    """
    # TOML has no null.
    values = {key: None if value == "" and key in _NULLABLE else value for key, value in values.items()}
    try:
        return Broker.production(**values) if production else Broker.model_validate(values)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        raise BrokerFilesError("\n".join(dict.fromkeys(_explain(each, origin) for each in wrong))) from error


def _explain(error: ErrorDetails, origin: str) -> str:
    where = field_at(Broker, error)
    what = plain_sentence(error)
    if error["type"] == "extra_forbidden":
        section = _SECTIONS.get(str(where[0]), Broker) if len(where) > 1 else Broker
        what = f"there is no setting of that name; known are {', '.join(sorted(section.model_fields))}"
    subject = f"The setting {'.'.join(map(str, where))!r}{origin}" if where else f"The description{origin}"
    return f"{subject} cannot be used: {what}."
