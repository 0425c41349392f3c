"""Echo: answers each draft with its own bytes on the device's verdict topic, and does nothing else.

It is what paho-mqtt alone needs for that, without a line of the link of ours: a bare echo.
"""

import argparse
import signal
import socket
import sys
from typing import Any, Final

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fleet_common.logs import Event, EventStream
from schemas.topics import Topic, build, parse, wildcard

_EXPIRY_S: Final = 30


def main() -> None:
    """Serve until SIGTERM; writes the event `online` when ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--edge", required=True)
    arguments = parser.parse_args()
    events = EventStream(sys.stdout)
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=arguments.edge,
        protocol=MQTTProtocolVersion.MQTTv5,
    )
    client.username_pw_set(arguments.edge)
    expiry = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    expiry.MessageExpiryInterval = _EXPIRY_S

    def send_at_once(_client: Client, _userdata: object, sock: Any) -> None:  # noqa: ANN401 - paho's
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def subscribe(*_: object) -> None:
        client.subscribe(wildcard(Topic.DRAFT, fleet=arguments.fleet, edge=arguments.edge), qos=1)

    def ready(*_: object) -> None:
        events.write(Event.ONLINE, fleet=arguments.fleet, edge=arguments.edge)

    def echo(_client: Client, _userdata: object, message: MQTTMessage) -> None:
        topic = build(Topic.VERDICT, fleet=arguments.fleet, device=parse(message.topic).device)
        client.publish(topic, message.payload, qos=1, properties=expiry)

    client.on_socket_open = send_at_once
    client.on_connect = subscribe
    client.on_subscribe = ready
    client.on_message = echo
    signal.signal(signal.SIGTERM, lambda *_: client.disconnect())
    client.connect("127.0.0.1", arguments.port)
    client.loop_forever()


if __name__ == "__main__":
    main()
