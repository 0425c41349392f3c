"""A peer of the next minor release: messages are rewritten on their way through the broker."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import cbor2

from fleet_common.mqtt.outbox import Outgoing
from schemas.topics import Topic, parse
from tests.support.memory_broker import MemoryBroker

UP: Final = (Topic.STATE, Topic.OPEN, Topic.DRAFT, Topic.CLOSE, Topic.TELEMETRY)
DOWN: Final = (Topic.SESSION, Topic.VERDICT, Topic.EDGE_STATE, Topic.EDGE_CHAT)
JSON: Final = (Topic.STATE, Topic.TELEMETRY, Topic.EDGE_STATE, Topic.EDGE_CHAT)

DRAFT_FIELDS: Final = 11
VERDICT_FIELDS: Final = 13
"""Trailing fields may be omitted, but not when later ones follow."""

SAMPLES: Final = 9
"""Index of a draft's request for more samples."""

PLAIN: Final[dict[str, Any]] = {"text": "é", "list": [None, True, 0.5, -1], "deep": {"a": {"b": [1]}}}
BINARY: Final[dict[str, Any]] = PLAIN | {"bytes": b"\x00\xff", "ids": cbor2.CBORTag(70, b"\x01\x00\x00\x00")}
"""Content of a new field: everything in the agreed part of CBOR."""


def rewrite(broker: MemoryBroker, change: Callable[[Topic, Any], Any]) -> None:
    """Pass every message through `change` on its way to the broker: topic and content in, content out."""
    accept = broker.accept

    def changed(message: Outgoing) -> int:
        topic = parse(message.topic).topic
        if topic in JSON:
            payload = json.dumps(change(topic, json.loads(message.payload))).encode()
        else:
            payload = cbor2.dumps(change(topic, cbor2.loads(message.payload)))
        return accept(replace(message, payload=payload))

    broker.accept = changed  # type: ignore[method-assign]


@dataclass
class NewerRelease:
    speaks: tuple[Topic, ...]
    seen: Counter[str] = field(default_factory=Counter)

    def __call__(self, topic: Topic, content: Any) -> Any:
        if topic not in self.speaks:
            return content
        if topic is Topic.DRAFT:
            self.seen[
                "request for samples" if len(content) > SAMPLES and content[SAMPLES] is not None else "draft"
            ] += 1
            return [*content, *[None] * (DRAFT_FIELDS - len(content)), BINARY, "new"]
        if topic is Topic.VERDICT:
            self.seen["verdict"] += 1
            content[3] = self._form(content[3])
            return [*content, *[None] * (VERDICT_FIELDS - len(content)), BINARY, "new"]
        if topic in JSON:
            self.seen[topic.value] += 1
            return {"new": PLAIN, **content, "": 1}
        self.seen["resume" if "resume" in content else content["kind"]] += 1
        if topic is Topic.OPEN:
            content["vocabulary"] = {"new": BINARY, **content["vocabulary"]}
        return {"new": BINARY, **content, "": 1}  # in front and behind: an order of keys was never promised

    def _form(self, following: Any) -> Any:
        if not isinstance(following, list):
            return following
        self.seen[f"form {following[0]}"] += 1
        return [*following, BINARY]
