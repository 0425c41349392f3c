"""Encoding, topics and repeats, written from docs/protocol.md alone; nothing of this project is imported."""

import json
import queue
import socket
import time
from typing import Any

import cbor2
import numpy as np
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

Map = dict[str, Any]

ITEMS = {69: "<u2", 70: "<u4", 85: "<f4"}  # of typed arrays, by tag
VERDICT = ("handle", "round", "accepted", "next", "finish")
NOBODY = 0x10  # reason of a PUBACK: no matching subscribers
PASSING = {
    "draining": 1.0,
    "other-target": 1.0,
    "busy": 5.0,
}  # seconds after which an Open that was refused so is worth another try


def pack(items: list[int]) -> cbor2.CBORTag:
    """Return token ids, or counts less one, as a typed array."""
    tag = 70 if max(items, default=0) >= 1 << 16 else 69
    return cbor2.CBORTag(tag, np.array(items, ITEMS[tag]).tobytes())


def read(topic: str, payload: bytes) -> Map:
    """Return a message as a map, its typed arrays as lists."""
    if topic.endswith("/state"):
        return dict(json.loads(payload or b"{}"))
    found = cbor2.loads(payload, tag_hook=lambda tag, _: np.frombuffer(tag.value, ITEMS[tag.tag]).tolist())
    return found if isinstance(found, dict) else {"kind": "verdict", **dict(zip(VERDICT, found, strict=False))}


class SessionLostError(Exception):
    """The session has to be opened again."""


class ReferenceLink:
    """A device's way to its broker and back, for one session at a time.

    Attributes:
        ours: `session`, `attempt` and `handle` of the session, which identify replies to others.
    """

    def __init__(self, host: str, port: int, fleet: str, name: str) -> None:
        """Connect and subscribe."""
        self.root, self.heard, self.ours = f"dssd/v1/{fleet}/{name}/", queue.Queue[Map](), Map()
        topics = (self.root + "down/session", self.root + "down/verdict", f"dssd/v1/{fleet}/_edge/+/state")
        self.mqtt = Client(CallbackAPIVersion.VERSION2, name, protocol=MQTTProtocolVersion.MQTTv5)
        self.mqtt.username_pw_set(name)
        self.mqtt.on_socket_open = lambda _, __, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.mqtt.on_connect = lambda client, *_: client.subscribe([(topic, 1) for topic in topics])
        self.mqtt.on_subscribe = lambda *_: self.heard.put({"kind": "connected"})
        self.mqtt.on_publish = lambda _, __, ___, reason, ____: (
            reason.value == NOBODY and self.heard.put({"kind": "nobody"})
        )
        self.mqtt.on_message = lambda _, __, message: self.heard.put(read(message.topic, message.payload))
        self.mqtt.connect(host, port)
        self.mqtt.loop_start()
        self.heard.get(timeout=10.0)

    def ask(self, topic: str, message: object, wanted: Map, *, again_s: float, max_s: float = 120.0) -> Map:
        """Send a message, and again when nothing comes, until the answer comes that is wanted."""
        end, tries = time.monotonic() + max_s, 0
        while time.monotonic() < end:
            self.mqtt.publish(self.root + topic, cbor2.dumps(message), qos=1)
            again = time.monotonic() + max(again_s, min(again_s * 2.0 ** (tries - 3), 8.0))
            tries += 1
            while (left := again - time.monotonic()) > 0:
                try:
                    reply = self.heard.get(timeout=left)
                except queue.Empty:
                    break
                if wanted.items() <= reply.items():
                    return reply
                if reply.get("kind") == "connected":
                    break
                if (wait_s := self.obey(reply, topic)) > 0.0:
                    again, end = time.monotonic() + wait_s, end + wait_s
        raise TimeoutError("No edge answers.")

    def obey(self, reply: Map, topic: str) -> float:
        """Do what another reply asks for; return the seconds after which to ask again, 0 if it changes nothing."""
        if any(reply.get(key, value) != value for key, value in self.ours.items()):
            return 0.0
        match reply:
            case {"presence": "offline", "edge": edge} if topic.endswith(f"/{edge}"):
                raise SessionLostError
            case {"kind": "nobody"} if topic.startswith("up/draft/"):
                raise SessionLostError
            case {"kind": "closed"} | {"kind": "fault", "action": "resume"}:
                raise SessionLostError
            case {"kind": "fault", "action": "wait"}:
                return max(reply.get("retry_s", 0.0), 0.25 if "handle" in reply else 1.0)
            case {"kind": "refused", "code": code} if "retry_s" in reply or code in PASSING:
                return max(reply.get("retry_s", PASSING.get(code, 0.0)), 0.25)
            case {"kind": "refused" | "fault", "sentence": sentence}:
                raise ValueError(sentence)
        return 0.0
