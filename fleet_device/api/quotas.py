"""Quotas of applications, kept on the device: tokens in a minute and in a day, and texts at once.

Tokens are those of prompts and of texts. A text that is begun is written to its end, so that an application may use
more than its quota once; it then waits until that is made up for. They are counted since the device was started.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet_device.api.problems import ApiProblem
from fleet_device.applications import Application
from fleet_device.client.request import Piece
from fleet_device.texts.generate import GeneratedText
from fleet_device.texts.queue import Delayed, Failed

_MINUTE_S: Final = 60.0
_DAY_S: Final = 86_400.0
_TEXT_S: Final = 2  # until a text may have ended


@dataclass(slots=True)
class _Bucket:
    """Tokens that may be used now: never more than in one period, and less than none after a long text."""

    most: float
    left: float
    at: float

    def refill(self, most: float, period_s: float, now: float) -> None:
        self.most = most
        self.left = min(most, self.left + (now - self.at) * most / period_s)
        self.at = now


@dataclass(slots=True)
class _Used:
    """What one application has used."""

    texts: int = 0
    buckets: dict[float, _Bucket] = field(default_factory=dict)


class ApplicationQuotas:
    """The account of all applications. For use from any thread.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._used: dict[str, _Used] = {}
        self._changing = threading.Lock()

    def begin(self, application: Application, *, texts: int) -> None:
        """Count texts as begun.

        Raises:
            ApiProblem: The application is over its quota; the answer says when it is not any more.
        """
        most = application.texts_at_once
        if most is not None and texts > most:
            sentence = f"The application {application.name!r} may have {most} texts at once, {texts} are asked for."
            raise ApiProblem(400, sentence, param="n")
        with self._changing:
            used = self._used.setdefault(application.name, _Used())
            for period, rate, period_s in _rates(application):
                bucket = self._bucket(used, rate, period_s)
                if bucket.left < 1.0:
                    wait_s = (1.0 - bucket.left) * period_s / rate
                    raise _over(f"has used its {rate} tokens per {period}", application, wait_s)
            if most is not None and used.texts + texts > most:
                raise _over(f"has {used.texts} texts at once, and may have {most}", application, _TEXT_S)
            used.texts += texts

    def spend(self, application: Application, tokens: int) -> None:
        with self._changing:
            used = self._used.setdefault(application.name, _Used())
            for _, rate, period_s in _rates(application):
                self._bucket(used, rate, period_s).left -= tokens

    def end(self, application: Application) -> None:
        with self._changing:
            used = self._used.setdefault(application.name, _Used())
            used.texts = max(0, used.texts - 1)

    def _bucket(self, used: _Used, rate: int, period_s: float) -> _Bucket:
        bucket = used.buckets.setdefault(period_s, _Bucket(rate, rate, self._clock()))
        bucket.refill(rate, period_s, self._clock())
        return bucket


@dataclass(frozen=True, slots=True)
class Counted:
    """One request of an application, counted as its texts are written; without an application nothing is.

    Attributes:
        application: Whose.
        quotas: The account.
    """

    application: Application | None
    quotas: ApplicationQuotas

    def begin(self, texts: int) -> None:
        """Count its texts as begun.

        Raises:
            ApiProblem: The application is over its quota.
        """
        if self.application is not None:
            self.quotas.begin(self.application, texts=texts)

    def note(self, event: Piece | Delayed | GeneratedText | Failed) -> None:
        """Count what has become of one of them; on any thread."""
        if self.application is None:
            return
        match event:
            case Piece():
                self.quotas.spend(self.application, event.tokens)
            case GeneratedText():
                self.quotas.spend(self.application, len(event.request.prompt))
                self.quotas.end(self.application)
            case Failed():
                self.quotas.end(self.application)

    def give_back(self, texts: int) -> None:
        """Texts that were counted are not to be written after all."""
        for _ in range(texts):
            if self.application is not None:
                self.quotas.end(self.application)


def _rates(application: Application) -> list[tuple[str, int, float]]:
    rates = [("minute", application.tokens_per_min, _MINUTE_S), ("day", application.tokens_per_day, _DAY_S)]
    return [(period, rate, period_s) for period, rate, period_s in rates if rate is not None]


def _over(what: str, application: Application, wait_s: float) -> ApiProblem:
    seconds = max(1, math.ceil(wait_s))
    return ApiProblem(
        429,
        f"The application {application.name!r} {what}; ask again in {seconds} s.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )
