"""The configuration file of rumqttd, the broker that the `iotcore` wheel carries."""

from broker_config.broker import Broker

__all__ = ["render_rumqttd"]


def render_rumqttd(broker: Broker) -> str:
    """Return rumqttd.toml for a loopback broker. It has no access rules: anybody may do everything.

    Raises:
        ValueError: The port is 0.
    """
    if broker.port == 0:
        raise ValueError("Choose the broker's port before its configuration is written.")
    return f"""\
# The broker of the fleet {broker.fleet}, for this machine alone. Generated.
id = 0

[router]
id = 0
max_connections = {broker.max_connections}
max_outgoing_packet_count = {broker.max_unanswered}
max_segment_size = {100 << 20}
max_segment_count = 10

[v5.1]
name = "fleet"
listen = "127.0.0.1:{broker.port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {broker.max_packet_bytes}
max_inflight_count = {broker.max_unanswered}
dynamic_filters = true
"""
