"""Queries of steps to the inference server: retries, health, and waiting while it is away.

Everything runs in one event loop. A step ends in bounded time, with all its rows or with an error. Several servers are
the business of a router or load balancer at the one address; a retry may reach another of them.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Mapping
from typing import Final

from fleet_edge.settings import InferenceServerSettings
from fleet_edge.verifiers.contract import SequenceFailed, TargetAway, VerifierError
from fleet_edge.verifiers.remote.dialect import EndpointBusy, EndpointFailed, LogprobsQuery, QueryRefused, TopRows
from fleet_edge.verifiers.remote.endpoint import Expected, Identity, RemoteEndpoint

_log = logging.getLogger(__name__)

_FIRST_BACKOFF_S: Final = 0.02
_LONGEST_BACKOFF_S: Final = 1.0
_AWAY_S: Final = 0.25
_BRIDGED_S: Final = 1.0  # an absence that a step survives
_FAILURES: Final = 3  # in a row, of all queries, after which the server is away
_MOST_SUSPICIONS: Final = 3  # failures of a healthy server on one sequence after which the sequence is at fault
_HEALTH_S: Final = 2.0
_HEALTH_TIMEOUT_S: Final = 2.0
_FIRST_TRIAL_S: Final = 0.5
_LONGEST_TRIAL_S: Final = 15.0


class Queries:
    """Queries to one endpoint. `away` says why none is sent; only a trial of our own ends that."""

    def __init__(self, endpoint: RemoteEndpoint, expected: Expected, settings: InferenceServerSettings) -> None:
        self.away = ""  # read by any thread
        self._endpoint = endpoint
        self._expected = expected
        self._settings = settings
        self._rng = random.Random()  # noqa: S311 - spreads retries, no secret
        self._failures = 0
        self._suspicions: dict[int, int] = {}
        self._back = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._asked: set[asyncio.Task[TopRows]] = set()

    async def start(self) -> Identity:
        """Identify the server, and start the health checks; raises `VerifierError` if it cannot be used."""
        identity = await self._endpoint.identify(self._expected, timeout_s=self._settings.request_s)
        self._task = asyncio.create_task(self._look_after(identity))
        return identity

    async def close(self) -> None:
        tasks = [*self._asked] if self._task is None else [self._task, *self._asked]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def score(self, questions: Mapping[int, LogprobsQuery]) -> dict[int, TopRows]:
        """Return the rows of every sequence's query.

        Raises `TargetAway` if the server is away or has not answered in time, `SequenceFailed` if it rejects one query,
        or fails on it again and again while it is healthy.
        """
        deadline = time.monotonic() + self._settings.step_s
        tasks = {
            sequence: asyncio.create_task(self._ask(sequence, question, deadline))
            for sequence, question in questions.items()
        }
        self._asked = set(tasks.values())
        try:
            await asyncio.wait(tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
        errors = [error for task in tasks.values() if (error := task.exception()) is not None]
        for error in errors:  # a sequence at fault first: the others are tried again
            if isinstance(error, SequenceFailed):
                raise error
        for error in errors:
            raise error
        return {sequence: task.result() for sequence, task in tasks.items()}

    def forget(self, sequence: int) -> None:
        self._suspicions.pop(sequence, None)

    async def _ask(self, sequence: int, question: LogprobsQuery, deadline: float) -> TopRows:
        attempt, last, suspected = 0, "", False
        while (left := deadline - time.monotonic()) > 0:
            if self.away and not await self._is_back(min(left, _BRIDGED_S)):
                break
            try:
                rows = await self._endpoint.compute(
                    question,
                    vocabulary=len(self._expected.strings),
                    timeout_s=min(left, self._settings.request_s),
                )
            except QueryRefused as error:
                raise SequenceFailed(str(error), sequence=sequence) from error
            except EndpointBusy as error:
                last, wait_s = str(error), error.retry_s
            except EndpointFailed as error:
                last, wait_s = str(error), 0.0
                suspected = suspected or error.suspect
                self._fail(last)
            else:
                self._failures = 0
                self._suspicions.pop(sequence, None)
                return rows
            attempt += 1
            backoff_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt, 10))
            await asyncio.sleep(max(wait_s, backoff_s * self._rng.uniform(0.5, 1.0)))
        self._suspect(sequence, suspected, last)
        raise TargetAway(self.away or last or "The inference server does not answer in time.", retry_s=_AWAY_S)

    async def _is_back(self, patience_s: float) -> bool:
        self._back.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._back.wait(), patience_s)
        return not self.away

    def _fail(self, sentence: str) -> None:
        self._failures += 1
        if self._failures >= _FAILURES and not self.away:
            self.away = sentence
            _log.warning("The inference server is away: %s", sentence)

    def _suspect(self, sequence: int, suspected: bool, last: str) -> None:
        """Count failures of the server on a sequence; after several in a row the sequence is at fault."""
        if not suspected:
            return
        self._suspicions[sequence] = self._suspicions.get(sequence, 0) + 1
        if self._suspicions[sequence] >= _MOST_SUSPICIONS:
            del self._suspicions[sequence]
            raise SequenceFailed(last, sequence=sequence)

    async def _look_after(self, first: Identity) -> None:
        """Check the server's health; while it is away, try to identify it now and then."""
        trial_s = _FIRST_TRIAL_S
        while True:
            if not self.away:
                trial_s = _FIRST_TRIAL_S
                await asyncio.sleep(_HEALTH_S * self._rng.uniform(0.75, 1.25))
                try:
                    await self._endpoint.client.get(self._endpoint.url, "/health", timeout_s=_HEALTH_TIMEOUT_S)
                except VerifierError as error:
                    self._fail(str(error))
                continue
            await asyncio.sleep(trial_s * self._rng.uniform(0.75, 1.25))
            trial_s = min(_LONGEST_TRIAL_S, 2.0 * trial_s)
            try:
                identity = await self._endpoint.identify(self._expected, timeout_s=self._settings.request_s)
                self._endpoint.check_same(identity, first)
            except VerifierError as error:
                if str(error) != self.away:
                    _log.warning("%s", error)
                self.away = str(error)
            else:
                self.away, self._failures = "", 0
                self._back.set()
                _log.info("The inference server at %s is back.", self._endpoint.url)
