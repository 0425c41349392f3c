"""Configuration and access rules of mosquitto, and the janitor that clears unwanted retained messages.

mosquitto checks a publish when it arrives and answers "not authorized" at QoS 1. It never refuses a SUBSCRIBE: a
subscriber simply does not get what it may not read, so a wildcard or a `$share` prefix needs no rule of its own.

A user's name replaces one level of a topic. mosquitto refuses a name with wildcards but not one with a slash: as
`_edge/edge-1` a client would get into that edge's own topic. The certificate authority signs no such name. In case it
ever does, the edges' topics are denied here by name, and a list of devices excludes every other name.

mosquitto retains messages wherever their publisher may write, and has no rule against it. The janitor is a client on
the broker's machine, started by a systemd timer: it reads retained messages and removes them.
"""

import re
import subprocess
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

from broker_config.broker import CIPHERS_TLS12, CIPHERS_TLS13, Broker, BrokerFailed, Tls
from schemas.topics import HOME_ASSISTANT, ROOT, TREE, Access, ClientRole, Topic, build, rules_for, wildcard

_BANNER = re.compile(r"mosquitto version (\d+)\.(\d+)")
TIMEOUT_S = 10.0


class MosquittoVersion(StrEnum):
    """Minor series of mosquitto; 2.1 deprecates some options and replaces them."""

    V2_0 = "2.0"
    V2_1 = "2.1"


def installed_version(program: Path) -> MosquittoVersion:
    """Return mosquitto's version; a later 2.x counts as 2.1, whose options it keeps."""
    try:
        # Its help has a non-zero exit status.
        answer = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokerFailed(f"{program} cannot be run: {error}.") from error
    found = _BANNER.search(answer.stdout)
    if found is None:
        raise BrokerFailed(f"{program} does not report its version; is it mosquitto?")
    major, minor = int(found[1]), int(found[2])
    if major != 2:  # noqa: PLR2004 - the series whose options are known
        raise BrokerFailed(f"mosquitto {major}.{minor} is not known here: use version 2.0 or 2.1.")
    return MosquittoVersion.V2_1 if minor else MosquittoVersion.V2_0


JANITOR_UNIT: Final = "systemd/fleet-broker-janitor.service"
TIMER_UNIT: Final = "systemd/fleet-broker-janitor.timer"
MOSQUITTO_SUB: Final = "/usr/bin/mosquitto_sub"
JANITOR_FILES: Final = {"--cafile": "ca.pem", "--cert": "janitor.pem", "--key": "janitor.key"}
_LASTS_S: Final = 5  # at most; it ends at the first message that was not retained
_EVERY: Final = "10min"


def janitor_rights(broker: Broker) -> tuple[Access, ...]:
    """Return the rights of the janitor: read and clear what devices write and nothing should retain."""
    filters = [
        wildcard(rule.topic, fleet=broker.fleet, edge=edge)
        for rule in TREE
        if rule.writers == {ClientRole.DEVICE} and not rule.retained
        for edge in (broker.edges if "{edge}" in rule.template else ("",))
    ]
    return tuple(Access(each, write=write) for each in filters for write in (True, False))


def janitor_command(broker: Broker, *, folder: str, program: str = MOSQUITTO_SUB) -> list[str]:
    """Return the command that clears once; `folder` holds `ca.pem`, `janitor.pem` and `janitor.key`."""
    where = [program, "-V", "5", "-q", "0", "-h", broker.public_name, "-p", str(broker.edge_port or broker.port)]
    credentials = [word for flag, name in JANITOR_FILES.items() for word in (flag, f"{folder}/{name}")]
    topics = [word for access in janitor_rights(broker) if access.write for word in ("-t", access.filter)]
    return [*where, *credentials, "--retained-only", "--remove-retained", "-W", str(_LASTS_S), "-F", "%t", *topics]


def render_janitor_unit(broker: Broker, *, home: Path) -> str:
    """Return the systemd service that clears once; `render_timer` schedules it."""
    # systemd expands percent signs.
    command = " ".join(word.replace("%", "%%") for word in janitor_command(broker, folder=str(home)))
    return f"""\
# Clears what devices leave at the broker of the fleet {broker.fleet}. Generated; goes to /etc/systemd/system/.
[Unit]
Description=Clears what devices leave at the fleet's broker
After=mosquitto.service

[Service]
Type=oneshot
ExecStart={command}
# Its time was up: nothing came that was not kept.
SuccessExitStatus=27
# A line for each topic that was cleared, in the journal.
StandardOutput=journal
User=mosquitto
Group=mosquitto
ProtectSystem=strict
ProtectHome=true
PrivateDevices=true
NoNewPrivileges=true
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6
MemoryMax=64M
"""


def render_timer(broker: Broker) -> str:
    return f"""\
# When the janitor of the broker of the fleet {broker.fleet} works. Generated; goes to /etc/systemd/system/.
[Timer]
OnBootSec={_EVERY}
OnUnitInactiveSec={_EVERY}

[Install]
WantedBy=timers.target
"""


USERNAME = "%u"  # mosquitto inserts the client's name
SYS = "$SYS/#"


def render_access(broker: Broker) -> str:
    return "\n".join(_access_lines(broker)) + "\n"


def _access_lines(broker: Broker) -> Iterator[str]:
    yield f"# Who may publish (write) and receive (read) what in the fleet {broker.fleet}. Generated."
    if broker.banned:
        yield ""
        yield "# Banned: a denial goes before every right."
        for name in broker.banned:
            yield from _denial(name)
            if name in broker.monitors:
                yield f"topic deny {SYS}"
    everyone = () if broker.devices is not None else _of_device(broker, USERNAME)
    for name, rights in _of_names(broker):
        yield ""
        yield f"user {name}"
        # Without the rights that everyone has.
        yield from _rules("topic", tuple(right for right in rights if right not in everyone))
    if everyone:
        yield ""
        yield "# Names with a slash that would become an edge's topic in the patterns below."
        for edge in broker.edges:
            topic = build(Topic.EDGE_STATE, fleet=broker.fleet, edge=edge)
            yield from _denial(topic.removeprefix(f"{ROOT}/{broker.fleet}/").removesuffix("/state"))
        yield ""
        # Patterns apply to every user, those above included: an edge may also act as a device with its name.
        yield "# Devices: every user, under its own name."
        yield from _rules("pattern", everyone)


def _of_names(broker: Broker) -> Iterator[tuple[str, tuple[Access, ...]]]:
    for edge in broker.edges:
        yield edge, rules_for(ClientRole.EDGE, fleet=broker.fleet, edge=edge)
    shows = home_assistant_rights(reads=False) if broker.home_assistant is not None else ()
    for monitor in broker.monitors:
        yield monitor, (*rules_for(ClientRole.MONITOR, fleet=broker.fleet), Access(SYS, write=False), *shows)
    if broker.janitor is not None:
        yield broker.janitor, janitor_rights(broker)
    if broker.home_assistant is not None:
        yield broker.home_assistant, home_assistant_rights(reads=True)
    for device in broker.devices or ():
        yield device, _of_device(broker, device)


def home_assistant_rights(*, reads: bool) -> tuple[Access, ...]:
    """Return the rights of Home Assistant, or of a monitor, which shows it the devices."""
    if reads:
        return Access(f"{HOME_ASSISTANT}/#", write=False), Access(f"{HOME_ASSISTANT}/status", write=True)
    return tuple(Access(f"{HOME_ASSISTANT}/device/+/{level}", write=True) for level in ("config", "state"))


def _of_device(broker: Broker, name: str) -> tuple[Access, ...]:
    # Each edge by name: retained messages under another name would stay there, and nobody would read them.
    return rules_for(ClientRole.DEVICE, fleet=broker.fleet, device=name, edges=broker.edges)


def _denial(name: str) -> Iterator[str]:
    yield f"user {name}"
    yield "topic deny #"


def _rules(keyword: str, rights: tuple[Access, ...]) -> Iterator[str]:
    for topic_filter in dict.fromkeys(right.filter for right in rights):
        ways = {right.write for right in rights if right.filter == topic_filter}
        access = "readwrite" if len(ways) > 1 else "write" if True in ways else "read"
        yield f"{keyword} {access} {topic_filter}"


CONF_FILE = "mosquitto.conf"
ACCESS_FILE = "access.acl"


def render_conf(broker: Broker, *, home: Path, version: MosquittoVersion = MosquittoVersion.V2_0) -> str:
    """Return mosquitto.conf for the absolute folder `home`; raise ValueError if the port is 0 or the path unusable."""
    if broker.port == 0:
        raise ValueError("Choose the broker's port before its configuration is written.")
    if not home.is_absolute() or not str(home).isprintable():
        raise ValueError(f"{str(home)!r} is not an absolute path that {CONF_FILE} can hold.")
    return "\n".join(_conf_lines(broker, home, version)) + "\n"


def _conf_lines(broker: Broker, home: Path, version: MosquittoVersion) -> Iterator[str]:
    clients = "this machine alone" if broker.tls is None else "clients with a certificate of the fleet"
    yield f"# The broker of the fleet {broker.fleet}, for {clients}. Generated for mosquitto {version}."
    if version is MosquittoVersion.V2_0:
        yield "per_listener_settings false"  # the default, and deprecated from 2.1 on
    if broker.user is not None:
        yield f"user {broker.user}"
    if broker.pid_file is not None:
        yield f"pid_file {home / broker.pid_file}"
    yield from _conf_access(broker, home, version)
    yield from _limits(broker)
    yield from _storage(broker, home)
    yield from _logging(broker)
    if broker.edge_port:
        yield from _listener(broker, home, broker.port, broker.max_connections, broker.max_device_aliases)
        yield from _listener(broker, home, broker.edge_port, broker.max_edge_connections, broker.max_aliases)
    else:
        yield from _listener(broker, home, broker.port, broker.max_connections, broker.max_aliases)


def _conf_access(broker: Broker, home: Path, version: MosquittoVersion) -> Iterator[str]:
    if broker.tls is None:
        yield "# No password file: the name that a client gives is believed, and the access rules apply to it."
        yield "allow_anonymous true"
    else:
        yield "allow_anonymous false"
    access = home / ACCESS_FILE
    if broker.acl_plugin is not None and version is MosquittoVersion.V2_1:
        yield f"global_plugin {broker.acl_plugin}"
        yield f"plugin_opt_acl_file {access}"
    else:
        yield f"acl_file {access}"


def _limits(broker: Broker) -> Iterator[str]:
    yield "# Without this a QoS 1 round trip costs 40 to 80 ms."
    yield "set_tcp_nodelay true"
    yield f"max_packet_size {broker.max_packet_bytes}"
    yield f"max_inflight_messages {broker.max_unanswered}"
    yield f"max_queued_messages {broker.max_queued}"
    yield f"max_queued_bytes {broker.max_queued_bytes}"
    yield "# At QoS 0 messages would fill the queue of packets through which a client's acknowledgements leave, and"
    yield "# those would be dropped; at QoS 1 they wait in the queue that the limits above bound."
    yield "upgrade_outgoing_qos true"
    yield f"max_keepalive {broker.max_keepalive_s}"
    yield f"sys_interval {broker.sys_interval_s}"


def _storage(broker: Broker, home: Path) -> Iterator[str]:
    if broker.storage is None:
        yield "persistence false"
        return
    yield "persistence true"
    yield f"persistence_location {home / broker.storage}/"
    yield "autosave_interval 300"
    yield "# Our links keep no session at the broker; those of others may not pile up."
    yield "persistent_client_expiration 1d"


def _logging(broker: Broker) -> Iterator[str]:
    yield "log_dest stderr"
    if broker.sys_interval_s:
        yield "# Below $SYS too: only the log reports a full queue or a refused client."
        yield "log_dest topic"
    yield from (f"log_type {kind}" for kind in ("error", "warning", "notice"))
    if broker.log_subscriptions:
        yield "log_type subscribe"
    yield "connection_messages true"
    yield "log_timestamp_format %Y-%m-%dT%H:%M:%S"


def _listener(broker: Broker, home: Path, port: int, connections: int, aliases: int) -> Iterator[str]:
    yield ""
    if broker.edge_port:
        yield ("# Only for edges and monitors: block other addresses." if port == broker.edge_port else "# Devices.")
    # What follows belongs to this listener until the next one.
    yield f"listener {port}" + ("" if broker.host is None else f" {broker.host}")
    yield f"max_connections {connections}"
    yield f"max_topic_alias {aliases}"
    yield "max_qos 1"
    if broker.tls is not None:
        yield from _tls(broker.tls, home)


def _tls(tls: Tls, home: Path) -> Iterator[str]:
    yield "# The authority in this file can create identities: use only the fleet's authority."
    yield f"cafile {home / tls.ca}"
    yield f"certfile {home / tls.certificate}"
    yield f"keyfile {home / tls.key}"
    yield f"crlfile {home / tls.crl}"
    yield "require_certificate true"
    yield "# The name in the certificate is the user and the client id: nobody takes over another's session."
    yield "use_identity_as_username true"
    yield "use_username_as_clientid true"
    yield "tls_version tlsv1.2"
    yield f"ciphers {':'.join(CIPHERS_TLS12)}"
    yield f"ciphers_tls1.3 {':'.join(CIPHERS_TLS13)}"
