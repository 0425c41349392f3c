"""Newcomer: a device that connects for the first time, and how long it waits for an answer to its Open."""

import secrets
import time
from collections.abc import Callable
from typing import Final

from benchmarks.client_process import Identity
from benchmarks.hostile.mqtt_client import ConnectRefused, RawClient
from benchmarks.hostile.payloads import DEFAULT_POLICY, close_of, open_of
from benchmarks.hostile.place import Place
from schemas.codec import decode_reply
from schemas.errors import CodecError
from schemas.fields import SESSION_BYTES
from schemas.messages import Opened, Refused
from schemas.policy import Grammar
from schemas.topics import Topic
from tests.support.mqtt_packets import publish_packet

PATIENCE_S: Final = 30.0
_ASK_AGAIN_S: Final = 2.0
_RETRY_S: Final = 0.2


def wait_for_answer(
    place: Place,
    identity: Identity,
    *,
    grammar: Grammar | None = None,
    patience_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Connect, open a session, close it, and return the seconds from the first try to the edge's answer.

    The Open is repeated as a device repeats it. A refusal is an answer too.

    Returns:
        Seconds; `patience_s` if there was no answer by then.
    """
    session = secrets.token_bytes(SESSION_BYTES)
    answers: list[Opened | Refused] = []

    def take(_topic: bytes, payload: bytes) -> None:
        try:
            reply = decode_reply(payload)
        except CodecError:
            return
        if isinstance(reply, Opened | Refused) and reply.session == session:
            answers.append(reply)

    client = RawClient(identity, on_publish=take, clock=clock, retry_s=_RETRY_S)
    policy = DEFAULT_POLICY.model_copy(update={"grammar": grammar})
    opening = publish_packet(
        place.topic(Topic.OPEN, identity), open_of(place.vocabulary, session=session, policy=policy)
    )
    client.on_connect = lambda: client.subscribe([place.topic(Topic.SESSION, identity)])
    began, asked = clock(), 0.0
    try:
        while not answers and clock() - began < patience_s:
            if not client.connected:
                asked = 0.0
                try:
                    client.connect()
                except ConnectRefused:
                    time.sleep(_RETRY_S)
                    continue
            if clock() - asked > _ASK_AGAIN_S:
                client.send(opening)
                asked = clock()
            client.pump(0.01)
        waited_s = min(clock() - began, patience_s)
        for answer in answers[:1]:
            if isinstance(answer, Opened):
                closing = close_of(session=session, handle=answer.handle, edge=answer.edge)
                client.send(publish_packet(place.topic(Topic.CLOSE, identity), closing))
                client.pump(0.1)
    finally:
        client.abort()
    return waited_s
