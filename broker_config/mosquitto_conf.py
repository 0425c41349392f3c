"""The configuration file of mosquitto."""

from pathlib import Path

from broker_config.broker import Broker

__all__ = ["render_conf"]


def render_conf(broker: Broker, *, access_file: Path, user: str | None = None) -> str:
    """Return mosquitto.conf for a loopback broker.

    Args:
        broker: What to describe; its port must be chosen.
        access_file: Where the ACL file lies, absolute.
        user: Whom mosquitto becomes when root starts it; None leaves its default.

    Raises:
        ValueError: The port is 0, or the path cannot be written in such a file.
    """
    if broker.port == 0:
        raise ValueError("Choose the broker's port before its configuration is written.")
    if not access_file.is_absolute() or not str(access_file).isprintable():
        raise ValueError(f"{str(access_file)!r} is not an absolute path that mosquitto.conf can hold.")
    lines = [
        f"# The broker of the fleet {broker.fleet}, for this machine alone. Generated.",
        "per_listener_settings false",
        f"listener {broker.port} 127.0.0.1",
        f"max_connections {broker.max_connections}",
        f"max_topic_alias {broker.max_aliases}",
        "max_qos 1",
        "# No password file: the name that a client gives is believed, and the access rules apply to it.",
        "allow_anonymous true",
        f"acl_file {access_file}",
        "# Without this a QoS 1 round trip costs 40 to 80 ms.",
        "set_tcp_nodelay true",
        f"max_packet_size {broker.max_packet_bytes}",
        f"max_inflight_messages {broker.max_unanswered}",
        f"max_queued_messages {broker.max_queued}",
        f"max_keepalive {broker.max_keepalive_s}",
        "persistence false",
        "sys_interval 0",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
    ]
    if user is not None:
        lines.append(f"user {user}")
    return "\n".join(lines) + "\n"
