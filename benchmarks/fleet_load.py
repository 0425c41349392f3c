"""Load of a fleet: devices of one process that play recorded drafts against a real edge, as on processors of their own.

Each device has its own connection, pacing and thread. Its draft model costs no processor of this machine, only the time
that it would take on a processor of its own.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import numpy as np

from fleet_device.client.agent import Agent, Generation
from fleet_device.client.request import GenerateRequest, RequestContext
from fleet_device.drafters.contract import TextCodec
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.policy import Mode
from schemas.vocabulary import Vocabulary
from tests.support.recorded_drafter import RecordedDrafter, RecordedText

__all__ = ["FleetLoad", "Written", "WrittenTexts", "mean_pace"]

_START_S: Final = 20.0


@dataclass(slots=True)
class Written:
    """A text that a device has written.

    Attributes:
        asked_at: When it was asked for (monotonic seconds).
        pieces: When tokens came, and how many.
        generation: The session.
        as_recorded: Whether it is the recorded text.
    """

    asked_at: float
    pieces: list[tuple[float, int]] = field(default_factory=list)
    generation: Generation | None = None
    as_recorded: bool = False

    @property
    def tokens(self) -> int:
        """How many."""
        return sum(number for _, number in self.pieces)


@dataclass(frozen=True, slots=True)
class WrittenTexts:
    """What devices have written at the same time.

    Attributes:
        texts: By device and order.
        seconds: From the first request to the last token.
    """

    texts: tuple[Written, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Of all."""
        return sum(text.tokens for text in self.texts)

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together, the prompts' time counted in."""
        return self.tokens / self.seconds

    @property
    def pace(self) -> float:
        """Tokens a second of one device from first piece to last, prompts left out: all tokens over all the time."""
        return mean_pace([self])

    @property
    def first_token_s(self) -> float:
        """Time to the first token: the median over texts."""
        return float(np.median([text.pieces[0][0] - text.asked_at for text in self.texts if text.pieces]))

    def gap_s(self, quantile: float) -> float:
        """Return a quantile of the time between pieces of a text, each counted once for each of its tokens."""
        gaps: list[float] = []
        for text in self.texts:
            for (before, _), (at, tokens) in zip(text.pieces, text.pieces[1:], strict=False):
                gaps += [at - before] + [0.0] * (tokens - 1)
        return float(np.quantile(gaps, quantile)) if gaps else 0.0

    def bytes_per_token(self) -> tuple[float, float]:
        """Return the payload bytes of drafts and of verdicts, for each token."""
        counters = [text.generation.counters for text in self.texts if text.generation is not None]
        tokens = max(1, self.tokens)
        return sum(c.uplink_bytes for c in counters) / tokens, sum(c.downlink_bytes for c in counters) / tokens

    @property
    def acceptance(self) -> float | None:
        """Accepted of tested draft tokens."""
        counters = [text.generation.counters for text in self.texts if text.generation is not None]
        tested = sum(each.tested for each in counters)
        return sum(each.accepted for each in counters) / tested if tested else None

    @property
    def streamed(self) -> float:
        """Share of the tokens that the edge has written by itself."""
        counters = [text.generation.counters for text in self.texts if text.generation is not None]
        return sum(each.streamed for each in counters) / max(1, self.tokens)

    @property
    def as_recorded(self) -> float:
        """Share of the texts that came out as recorded."""
        return float(np.mean([text.as_recorded for text in self.texts]))


def mean_pace(written: Iterable[WrittenTexts]) -> float:
    """Return the pace of devices that have written at one time and another."""
    texts = [text for each in written for text in each.texts if len(text.pieces) > 1]
    seconds = sum(text.pieces[-1][0] - text.pieces[0][0] for text in texts)
    return sum(text.tokens - text.pieces[0][1] for text in texts) / seconds if seconds else 0.0


class FleetLoad(AbstractContextManager["FleetLoad"]):
    """Devices, connected.

    Args:
        port: The broker's, or a relay's.
        fleet: Topic level.
        codec: Text side of the vocabulary.
        vocabulary: The target's.
        devices: How many.
        token_s: Time of a draft token (seconds).
        draft: Quantization of the draft model that was recorded.
    """

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
        self._devices: list[tuple[PahoLink, Agent, RecordedDrafter]] = []
        for number in range(devices):
            name = f"device-{number}"
            drafter = RecordedDrafter(codec, vocabulary, token_s=token_s, quantization=draft)
            link = PahoLink(BrokerSettings(port=port).link(name, will=None))
            agent = Agent(link, fleet, name, drafter, FixedPacing(), time.monotonic)
            agent.attach()
            self._devices.append((link, agent, drafter))

    def __enter__(self) -> Self:
        for link, _, _ in self._devices:
            link.start(timeout_s=_START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link, _, _ in self._devices:
            link.stop()

    def pace(self, pacings: Sequence[Pacing]) -> None:
        """Give each device its pacing."""
        for (_, agent, _), pacing in zip(self._devices, pacings, strict=True):
            agent.pacing = pacing

    def write(
        self, texts: Sequence[RecordedText], *, mode: Mode = Mode.COUPLED, delays_s: Sequence[float] = ()
    ) -> WrittenTexts:
        """Have device n write text n, all at the same time.

        Args:
            texts: As many as there are devices, or fewer.
            mode: Of verification. In residual mode texts come out otherwise than recorded, and acceptance with them.
            delays_s: How long each waits before it begins.
        """
        written = [Written(0.0) for _ in texts]
        errors: list[BaseException] = []
        gate = threading.Barrier(len(texts) + 1)

        def write(number: int) -> None:
            text, mine, (_, agent, drafter) = texts[number], written[number], self._devices[number]
            drafter.play(text)
            gate.wait()
            time.sleep(delays_s[number] if delays_s else 0.0)
            mine.asked_at = time.monotonic()
            try:
                mine.generation = agent.generate(
                    GenerateRequest(
                        text.prompt,
                        policy=text.policy.model_copy(update={"mode": mode}),
                        max_new_tokens=len(text.tokens),
                    ),
                    RequestContext(on_tokens=lambda new: mine.pieces.append((time.monotonic(), len(new)))),
                )
                mine.as_recorded = mine.generation.tokens == text.tokens
            except BaseException as error:  # noqa: BLE001 - raised below, on the caller's thread
                errors.append(error)

        threads = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(len(texts))]
        for thread in threads:
            thread.start()
        gate.wait()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        first = min(text.asked_at for text in written)
        last = max(text.pieces[-1][0] for text in written)
        return WrittenTexts(tuple(written), last - first)
