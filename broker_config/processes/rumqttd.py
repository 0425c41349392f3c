"""Embedded broker rumqttd of the `iotcore` wheel: its configuration file, and the child process it runs in.

`python -m broker_config.processes.rumqttd FILE` is that process. rumqttd cannot be shut down from within, so it has a
process to itself, which also ends when the parent's end of the pipe on standard input closes: a parent that was killed
leaves no broker behind.
"""

import os
import sys
import threading

from broker_config.broker import Broker


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


def main() -> None:
    """Run the broker of the configuration file named by the first argument, until the parent is gone."""
    try:
        from iotcore.iotcore import IotCoreBroker  # noqa: PLC0415 - the message is for who lacks it
    except ImportError:
        sys.exit("The embedded broker is not installed: install the extra 'demo' of this package, or mosquitto.")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    IotCoreBroker(config_path=sys.argv[1]).run_forever()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
