"""Truncation: makes a prompt that is too long for a context shorter, as the application has asked."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fleet_device.drafters.contract import TextCodec
from fleet_device.settings import Truncate
from fleet_device.texts.chat import ChatMessage

__all__ = ["Shorten", "shorten_chat", "shorten_text", "shorten_tokens"]

Shorten = Callable[[int], Sequence[int] | None]
"""Returns a prompt of at most so many tokens (at least 1); None if it cannot be made so short."""

Encode = Callable[[Sequence[ChatMessage]], Sequence[int]]

_SYSTEM = "system"
_NEARER = 0.95  # of what should fit: tokens are not all of one length
_CUT = "…"  # stands where something was left out of a message
_TRIES = 12


def shorten_tokens(tokens: Sequence[int], most: int, how: Truncate) -> Sequence[int]:
    """Return tokens without their start or their middle, at most so many."""
    if len(tokens) <= most:
        return tokens
    head = most // 2 if how is Truncate.MIDDLE else 0
    return [*tokens[:head], *tokens[len(tokens) - (most - head) :]]


def shorten_text(codec: TextCodec, text: str, most: int, how: Truncate) -> Sequence[int] | None:
    """Return the tokens of a text without its start or its middle; what stands before every text stays."""
    tokens = codec.encode(text)
    begin = codec.encode("")
    if begin and tokens[: len(begin)] == begin:
        if most <= len(begin):
            return None
        return [*begin, *shorten_tokens(tokens[len(begin) :], most - len(begin), how)]
    return shorten_tokens(tokens, most, how)


def shorten_chat(encode: Encode, messages: Sequence[ChatMessage], most: int, how: Truncate) -> Sequence[int] | None:
    """Return the tokens of a chat without its oldest turns, and if that is not enough without part of the last message.

    The messages of the system stay, and so does the chat template, whole. None if these alone are too long.
    """
    system = [message for message in messages if message.role == _SYSTEM]
    spoken = [message for message in messages if message.role != _SYSTEM]
    asks = next((message.role for message in spoken), _SYSTEM)
    while len(spoken) > 1:
        # A turn is a message and the answers to it: what is left begins with a message that asks.
        del spoken[0]
        while len(spoken) > 1 and spoken[0].role != asks:
            del spoken[0]
        tokens = encode([*system, *spoken])
        if len(tokens) <= most:
            return tokens
    if not spoken:
        return None
    return _cut_last(encode, system, spoken[0], most, how)


def _cut_last(
    encode: Encode, system: Sequence[ChatMessage], last: ChatMessage, most: int, how: Truncate
) -> Sequence[int] | None:
    bare = len(encode([*system, replace(last, content="")]))
    whole = encode([*system, last])
    if len(whole) <= most:
        return whole
    keep, count = len(last.content), len(whole)
    for _ in range(_TRIES):
        # Characters that should fit, from how many tokens the present ones take.
        keep = min(keep - 1, int(_NEARER * keep * max(0, most - bare) / max(1, count - bare)))
        if keep < 1:
            break
        tokens = encode([*system, replace(last, content=_cut(last.content, keep, how))])
        if len(tokens) <= most:
            return tokens
        count = len(tokens)
    tokens = encode([*system, replace(last, content="")])
    return tokens if len(tokens) <= most else None


def _cut(text: str, keep: int, how: Truncate) -> str:
    head = keep // 2 if how is Truncate.MIDDLE else 0
    return f"{text[:head]}{_CUT}{text[len(text) - (keep - head) :]}"
