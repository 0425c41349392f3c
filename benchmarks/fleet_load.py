"""Load of a fleet: devices of one process that replay recorded drafts against a real edge.

Each device has its own connection, pacing and thread. Its draft model uses no processor of this machine, only the time
that it would take on its own processor.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

from benchmarks.harness import connected, together
from fleet_device.drafters.contract import TextCodec
from fleet_device.pacing.contract import Pacing
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from schemas.policy import Mode
from schemas.vocabulary import Vocabulary
from tests.support.recorded_drafter import RecordedDrafter, RecordedText


@dataclass(slots=True)
class Written:
    """A device's output: time of the request, and times and numbers of the tokens (monotonic seconds)."""

    asked_at: float
    pieces: list[tuple[float, int]] = field(default_factory=list)
    generation: Generation | None = None

    @property
    def tokens(self) -> int:
        return sum(number for _, number in self.pieces)


@dataclass(frozen=True, slots=True)
class WrittenTexts:
    """Outputs of concurrent requests, in the seconds from the first request to the last token."""

    texts: tuple[Written, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(text.tokens for text in self.texts)

    @property
    def tokens_per_s(self) -> float:
        """Return the rate of all devices together, including the prompts' time."""
        return self.tokens / self.seconds


def mean_pace(written: Iterable[WrittenTexts]) -> float:
    """Return the tokens per second of one device without prompts: all tokens over the time from first to last piece."""
    texts = [text for each in written for text in each.texts if len(text.pieces) > 1]
    seconds = sum(text.pieces[-1][0] - text.pieces[0][0] for text in texts)
    return sum(text.tokens - text.pieces[0][1] for text in texts) / seconds if seconds else 0.0


class FleetLoad(AbstractContextManager["FleetLoad"]):
    """Devices, connected while the context lasts; a draft token takes `token_s` seconds."""

    def __init__(
        self,
        port: int,
        fleet: str,
        codec: TextCodec,
        vocabulary: Vocabulary,
        *,
        devices: int,
        token_s: float,
        draft: str = "none",
    ) -> None:
        self._drafters = [
            RecordedDrafter(codec, vocabulary, token_s=token_s, quantization=draft) for _ in range(devices)
        ]
        self._connect = partial(connected, port, fleet, self._drafters)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._agents = self._stack.enter_context(self._connect())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def pace(self, pacings: Sequence[Pacing]) -> None:
        for agent, pacing in zip(self._agents, pacings, strict=True):
            agent.pacing = pacing

    def write(self, texts: Sequence[RecordedText], *, mode: Mode = Mode.COUPLED) -> WrittenTexts:
        """Let device n generate output n, all at once; in residual mode outputs differ from the recorded ones."""

        def write(number: int) -> Written:
            text, mine = texts[number], Written(time.monotonic())
            self._drafters[number].play(text)
            policy = text.policy.model_copy(update={"mode": mode})
            mine.generation = self._agents[number].generate(
                GenerateRequest(text.prompt, policy, len(text.tokens)),
                RequestContext(on_tokens=lambda new: mine.pieces.append((time.monotonic(), len(new)))),
            )
            return mine

        written = together([partial(write, number) for number in range(len(texts))])
        first = min(text.asked_at for text in written)
        last = max(text.pieces[-1][0] for text in written)
        return WrittenTexts(tuple(written), last - first)
