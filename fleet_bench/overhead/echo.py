"""Echo: answers each draft with its own bytes on the device's verdict topic, and does nothing else."""

import argparse
import signal
import sys
import threading
from typing import Final

from fleet_link.link import Message
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from fleet_runtime.events import Event, EventStream
from schemas.topics import Topic, build, parse, wildcard

__all__ = ["main"]

_EXPIRY_S: Final = 30
_START_S: Final = 20.0


def main() -> None:
    """Serve until SIGTERM; writes the event `online` when ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--edge", required=True)
    arguments = parser.parse_args()
    link = PahoLink(BrokerSettings(port=arguments.port).link(arguments.edge, will=None))

    def echo(message: Message) -> None:
        topic = build(Topic.VERDICT, fleet=arguments.fleet, device=parse(message.topic).device)
        link.publish(topic, message.payload, alias=True, expiry_s=_EXPIRY_S)

    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    link.subscribe(wildcard(Topic.DRAFT, fleet=arguments.fleet, edge=arguments.edge), echo)
    link.start(timeout_s=_START_S)
    EventStream(sys.stdout).write(Event.ONLINE, fleet=arguments.fleet, edge=arguments.edge)
    stopping.wait()
    link.stop()


if __name__ == "__main__":
    main()
