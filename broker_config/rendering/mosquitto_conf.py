"""Configuration file of mosquitto, the bridge to an upstream broker included."""

from collections.abc import Iterator
from pathlib import Path

from broker_config.broker import CIPHERS_TLS12, CIPHERS_TLS13, REPORTED, Broker, HeadOffice, Tls
from broker_config.rendering.version import MosquittoVersion
from schemas.topics import TREE, wildcard


def bridge_lines(broker: Broker, office: HeadOffice, *, home: Path) -> Iterator[str]:
    """Yield the lines of the connection: everything goes out and nothing comes in.

    Topics keep their names, so a fleet's name is unique among the sites of a head office.
    """
    where = f"[{office.host}]" if ":" in office.host else office.host
    yield ""
    yield "connection head-office"
    yield f"address {where}:{office.port}"
    yield f"remote_clientid {office.site}"
    yield f"remote_username {office.site}"
    yield f"bridge_cafile {home / office.ca}"
    yield f"bridge_certfile {home / office.certificate}"
    yield f"bridge_keyfile {home / office.key}"
    yield "bridge_tls_version tlsv1.2"
    yield "bridge_protocol_version mqttv50"
    # A message that was queued while the line was down still goes up; the head office needs no session of ours.
    yield "cleansession true"
    yield "local_cleansession false"
    yield "try_private true"
    yield "# The head office's rules let this site write what is below and nothing else."
    yield "notifications_local_only true"
    yield "bridge_attempt_unsubscribe false"
    yield f"bridge_max_packet_size {broker.max_packet_bytes}"
    yield "restart_timeout 5 60"
    qos = {rule.topic: rule.qos for rule in TREE}
    for topic in REPORTED:
        yield f"topic {wildcard(topic, fleet=broker.fleet)} out {qos[topic]}"


CONF_FILE = "mosquitto.conf"
ACCESS_FILE = "access.acl"


def render_conf(broker: Broker, *, home: Path, version: MosquittoVersion = MosquittoVersion.V2_0) -> str:
    """Return mosquitto.conf.

    Args:
        broker: What to describe; its port must be chosen.
        home: The folder, absolute, where this file, the ACL file and the certificates will lie.
        version: Of the mosquitto that will read it.

    Raises:
        ValueError: The port is 0, or the folder cannot be written in such a file.
    """
    if broker.port == 0:
        raise ValueError("Choose the broker's port before its configuration is written.")
    if not home.is_absolute() or not str(home).isprintable():
        raise ValueError(f"{str(home)!r} is not an absolute path that {CONF_FILE} can hold.")
    return "\n".join(_lines(broker, home, version)) + "\n"


def _lines(broker: Broker, home: Path, version: MosquittoVersion) -> Iterator[str]:
    whom = "this machine alone" if broker.tls is None else "clients with a certificate of the fleet"
    yield f"# The broker of the fleet {broker.fleet}, for {whom}. Generated for mosquitto {version}."
    if version is MosquittoVersion.V2_0:
        yield "per_listener_settings false"  # the default, and deprecated from 2.1 on
    if broker.user is not None:
        yield f"user {broker.user}"
    if broker.pid_file is not None:
        yield f"pid_file {home / broker.pid_file}"
    yield from _access(broker, home, version)
    yield from _limits(broker)
    yield from _storage(broker, home)
    yield from _logging(broker)
    if broker.edge_port:
        yield from _listener(broker, home, broker.port, broker.max_connections, broker.max_device_aliases)
        yield from _listener(broker, home, broker.edge_port, broker.max_edge_connections, broker.max_aliases)
    else:
        yield from _listener(broker, home, broker.port, broker.max_connections, broker.max_aliases)
    if broker.head_office is not None:
        yield from bridge_lines(broker, broker.head_office, home=home)


def _access(broker: Broker, home: Path, version: MosquittoVersion) -> Iterator[str]:
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
        yield "# Below $SYS too: a full queue or a refused client is told nowhere else than in the log."
        yield "log_dest topic"
    yield from (f"log_type {kind}" for kind in ("error", "warning", "notice"))
    if broker.log_subscriptions:
        yield "log_type subscribe"
    yield "connection_messages true"
    yield "log_timestamp_format %Y-%m-%dT%H:%M:%S"


def _listener(broker: Broker, home: Path, port: int, connections: int, aliases: int) -> Iterator[str]:
    yield ""
    if broker.edge_port:
        yield (
            "# For edges and monitors alone: let no other address reach it."
            if port == broker.edge_port
            else "# Devices."
        )
    # What follows belongs to this listener until the next one.
    yield f"listener {port}" + ("" if broker.host is None else f" {broker.host}")
    yield f"max_connections {connections}"
    yield f"max_topic_alias {aliases}"
    yield "max_qos 1"
    if broker.tls is not None:
        yield from _tls(broker.tls, home)


def _tls(tls: Tls, home: Path) -> Iterator[str]:
    yield "# Whoever can sign in this file can mint identities: the fleet's authority, alone."
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
