"""Pieces: a text that both models write at the edge, sent to the device in the messages of an edge that writes alone.

Only the messages are real: the edge that verifies its own drafts is played by a sender, which sends as many tokens at a
time as a verification would have brought.
"""

import queue
from collections.abc import Iterator
from typing import Final

from benchmarks.bytes.counting import Traffic, settled
from benchmarks.shared.laws import RecordedLaw
from dssd.sampling import coupled_token
from fleet_device.pacing.contract import STREAMED
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.codec import encode_draft, encode_verdict
from schemas.messages import Draft, Verdict
from schemas.topics import TREE, Topic, build, wildcard
from tests.support.relay import Relay

__all__ = ["pieces_of", "send_pieces"]

_TIMEOUT_S: Final = 20.0
_EXPIRY_S: Final = next(rule.expiry_s for rule in TREE if rule.topic is Topic.VERDICT)
_COMPUTE_MS: Final = 31.5  # any: a time takes three bytes


def pieces_of(law: RecordedLaw, *, seed: int, length: int, tokens: int) -> Iterator[tuple[int, ...]]:
    """Yield what each verification of a draft of `length` tokens brings, in coupled mode."""
    text = [coupled_token(p, seed, place) for place, p in enumerate(law.target[:tokens])]
    begin = 0
    while begin < len(text):
        end = begin
        while end < min(begin + length, len(text)) and coupled_token(law.draft[end], seed, end) == text[end]:
            end += 1
        yield tuple(text[begin : end + 1])
        begin = end + 1


def send_pieces(
    device: BrokerSettings,
    edge: BrokerSettings,
    *,
    fleet: str,
    names: tuple[str, str],
    laws: list[tuple[RecordedLaw, int]],
    length: int,
    tokens: int,
    handle: int,
) -> Traffic:
    """Send texts, and return what they cost.

    Args:
        device: The broker, and who the device is there.
        edge: Likewise.
        fleet: Topic level.
        names: The device's and the edge's.
        laws: And the seeds of their texts; the first sets the topics' aliases and is not counted.
        length: Of the drafts.
        tokens: Of each text, at most.
        handle: Of the sessions.
    """
    name, edge_name = names
    draft_topic = build(Topic.DRAFT, fleet=fleet, device=name, edge=edge_name)
    verdict_topic = build(Topic.VERDICT, fleet=fleet, device=name)
    total = Traffic()
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with Relay(device.port) as relay:
        writer = PahoLink(device.model_copy(update={"port": relay.port}).link(name, will=None))
        sender = PahoLink(edge.link(edge_name, will=None))
        sender.subscribe(
            wildcard(Topic.DRAFT, fleet=fleet, edge=edge_name), lambda message: arrived.put(message.payload)
        )
        writer.subscribe(verdict_topic, lambda message: arrived.put(message.payload))
        try:
            sender.start(timeout_s=_TIMEOUT_S)
            writer.start(timeout_s=_TIMEOUT_S)
            for number, (law, seed) in enumerate(laws):
                before, found = settled(relay), Traffic()
                asked, base, round_ = 0, 0, 0
                for piece in pieces_of(law, seed=seed, length=length, tokens=tokens):
                    if base >= asked:
                        round_ += 1
                        request = Draft(
                            handle=handle, round=round_, epoch=0, base=base, digest=0xFFFFFFFF, write=STREAMED
                        )
                        payload = encode_draft(request)
                        found.up += len(payload)
                        writer.publish(draft_topic, payload, alias=True, expiry_s=_EXPIRY_S)
                        arrived.get(timeout=_TIMEOUT_S)
                        asked = base + STREAMED // 2
                    verdict = Verdict(
                        handle=handle, round=round_, accepted=0, compute_ms=_COMPUTE_MS, base=base, written=piece
                    )
                    payload = encode_verdict(verdict)
                    found.down += len(payload)
                    sender.publish(verdict_topic, payload, alias=True, expiry_s=_EXPIRY_S, priority=True)
                    arrived.get(timeout=_TIMEOUT_S)
                    base += len(piece)
                found.tokens = base
                counts = [now - then for now, then in zip(settled(relay), before, strict=True)]
                found.packets_up, found.packets_down, found.segments_up, found.segments_down = counts
                if number:
                    total.add(found)
        finally:
            writer.stop()
            sender.stop()
    return total
