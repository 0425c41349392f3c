"""What needs no network: the draft model alone on the device, and both models together at the edge."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dssd.distribution import shape
from dssd.sampling import coupled_token
from fleet_device.drafters.contract import Drafter
from fleet_edge.verifiers.contract import Item, Verifier
from schemas.policy import SamplingPolicy

__all__ = ["Timed", "write_alone", "write_together"]


@dataclass(frozen=True, slots=True)
class Timed:
    """A text and its times.

    Attributes:
        text: Token ids.
        first_s: From the request to the first.
        seconds: From the first to the last.
        after: Tokens in that time.
        up_bytes: Payload from the device.
        down_bytes: Payload to it.
    """

    text: tuple[int, ...]
    first_s: float
    seconds: float
    after: int
    up_bytes: int = 0
    down_bytes: int = 0

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.text)

    @property
    def pace(self) -> float:
        """Tokens a second behind the first piece."""
        return self.after / self.seconds if self.seconds > 0.0 else 0.0


def write_alone(drafter: Drafter, prompt: Sequence[int], *, policy: SamplingPolicy, tokens: int) -> Timed:
    """Let the draft model write: what a device does without any edge. Its text is the small model's."""
    started = time.monotonic()
    drafter.reset(prompt)
    first_at, text = 0.0, list[int]()
    while len(text) < tokens:
        dist = drafter.next(policy)
        assert dist is not None
        token = coupled_token(dist, policy.seed, len(text))
        text.append(token)
        first_at = first_at or time.monotonic()
        if token in drafter.codec.end_tokens:
            break
        drafter.extend((token,))
    return Timed(tuple(text), first_at - started, time.monotonic() - first_at, len(text) - 1)


def write_together(
    drafter: Drafter,
    verifier: Verifier,
    prompt: Sequence[int],
    *,
    policy: SamplingPolicy,
    tokens: int,
    length: int,
    limit_s: float,
) -> Timed:
    """Let both models write on one machine: speculative decoding as an inference server does it.

    Args:
        drafter: The draft model.
        verifier: The target.
        prompt: Token ids.
        policy: Coupled.
        tokens: Most tokens.
        length: Of a draft.
        limit_s: The text ends after so many seconds.
    """
    started = time.monotonic()
    verifier.open(0)
    drafter.reset(prompt)
    text: list[int] = []
    new: list[int] = list(prompt)
    first_at, at_first, ended = 0.0, 0, False
    while not ended and len(text) < tokens and time.monotonic() - started < limit_s:
        draft: list[int] = []
        while len(draft) < length and len(text) + len(draft) + 1 < tokens:
            dist = drafter.next(policy)
            assert dist is not None
            draft.append(coupled_token(dist, policy.seed, len(text) + len(draft)))
            drafter.extend((draft[-1],))
        rows = verifier.score([Item(0, (*new, *draft), len(draft) + 1)])
        base = len(text)
        for place, row in enumerate(rows):
            token = coupled_token(shape(row, policy), policy.seed, base + place)
            text.append(token)
            ended = token in verifier.info.end_tokens
            if ended or place == len(draft) or draft[place] != token:
                break
        if not first_at:
            first_at, at_first = time.monotonic(), len(text)
        known = len(prompt) + len(text) - 1
        verifier.truncate(0, known)
        drafter.truncate(known)
        drafter.extend((text[-1],))
        new = [text[-1]]
    verifier.close(0)
    return Timed(tuple(text), first_at - started, time.monotonic() - first_at, len(text) - at_first)
