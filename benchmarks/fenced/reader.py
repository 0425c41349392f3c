"""Bare reader: takes what a broker sends and looks at none of it. What that costs is the least that an edge can pay.

It reads its task (JSON) from standard input, says `reading`, and goes on until SIGTERM. It reads as the link does where
most of what comes is dropped: a few milliseconds' messages at a time.
"""

import json
import sys
import time
from typing import Final

from benchmarks.fenced.connecting import CHUNK, Access, drain
from tests.support.mqtt_packets import subscribe_packet

__all__ = ["main"]

_PAUSE_S: Final = 0.008


def main() -> None:
    """Connect, subscribe, and read."""
    task = json.loads(sys.stdin.readline())
    sock = Access.from_dict(task["access"]).connect()
    sock.sendall(subscribe_packet([task["filter"]], qos=0))
    sock.recv(CHUNK)
    print("reading", flush=True)
    sock.setblocking(False)  # noqa: FBT003 - the standard library's
    while True:
        time.sleep(_PAUSE_S)
        drain(sock)


if __name__ == "__main__":
    main()
