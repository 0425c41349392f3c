"""Pool of inference servers: assign queries, retry failed ones elsewhere, and check health.

Everything runs in one event loop. A step ends in bounded time, with all its rows or with an error.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from fleet_edge.settings import InferenceServerSettings
from fleet_edge.verifiers.contract import SequenceFailed, TargetAway, VerifierError
from fleet_edge.verifiers.remote.dialect import EndpointBusy, EndpointFailed, LogprobsQuery, QueryRefused, TopRows
from fleet_edge.verifiers.remote.endpoint import Expected, Identity, RemoteEndpoint

_LOAD_FACTOR: Final = 1.25


class Affinity:
    """Assigns sequences to endpoints by rendezvous hashing with bounded loads."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._at: dict[int, str] = {}
        self._loads = dict.fromkeys(endpoints, 0)

    def place(self, sequence: int, *, available: Collection[str]) -> str:
        """Return the endpoint of a sequence, the same as long as it is available: it has the keys and values.

        Raises ValueError if none is available.
        """
        at = self._at.get(sequence)
        if at is not None and at in available:
            return at
        self.forget(sequence)
        if not available:
            raise ValueError("There is no endpoint to choose from.")
        bound = self._bound(available)  # above the mean, so that one is below it
        ranked = sorted(available, key=lambda name: hashlib.blake2b(f"{name} {sequence}".encode()).digest())
        chosen = next(name for name in ranked if self._loads[name] < bound)
        self._at[sequence] = chosen
        self._loads[chosen] += 1
        return chosen

    def follow(self, sequence: int, source: int) -> None:
        """Assign a sequence to the endpoint of another, unless that is full: their prefix is cached there."""
        at = self._at.get(source)
        if at is not None and sequence not in self._at and self._loads[at] < self._bound(self._loads):
            self._at[sequence] = at
            self._loads[at] += 1

    def forget(self, sequence: int) -> None:
        at = self._at.pop(sequence, None)
        if at is not None:
            self._loads[at] -= 1

    @property
    def loads(self) -> dict[str, int]:
        return dict(self._loads)

    def _bound(self, available: Collection[str]) -> int:
        return math.ceil(_LOAD_FACTOR * (1 + sum(self._loads[name] for name in available)) / len(available))


_log = logging.getLogger(__name__)

_FIRST_BACKOFF_S: Final = 0.02
_LONGEST_BACKOFF_S: Final = 1.0
_AWAY_S: Final = 0.25
# A step survives an absence of all servers that is no longer than this.
_BRIDGED_S: Final = 1.0
# Consecutive failures of healthy servers on one sequence after which it is at fault.
_MOST_SUSPICIONS: Final = 3
_UNWELL: Final = 2  # unanswered health checks


class Pool:
    def __init__(
        self,
        endpoints: Sequence[RemoteEndpoint],
        expected: Expected,
        settings: InferenceServerSettings,
        *,
        clock: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        self._endpoints = {endpoint.url: endpoint for endpoint in endpoints}
        self._expected = expected
        self._settings = settings
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - spreads retries, no secret
        self._affinity = Affinity(list(self._endpoints))
        self._identities: dict[str, Identity] = {}
        self._suspicions: dict[int, int] = {}
        self._back = asyncio.Event()  # set when a server comes back
        self._tasks: list[asyncio.Task[None]] = []
        self._asked: set[asyncio.Task[TopRows]] = set()

    @property
    def available(self) -> set[str]:
        return {url for url, endpoint in self._endpoints.items() if endpoint.breaker.closed}

    @property
    def away(self) -> str:
        """Why no server gets work; empty if one does. Thread-safe."""
        reasons = [endpoint.breaker.reason for endpoint in self._endpoints.values()]
        return "" if not all(reasons) else " ".join(reasons)

    # Beginning and end

    async def start(self) -> Identity:
        """Identify all servers, and start the health checks.

        Returns the identity of the first available server, with the smallest context of all. Raises `VerifierError` if
        none can be used, or one serves another model.
        """
        outcomes = await asyncio.gather(
            *(self._identify(endpoint) for endpoint in self._endpoints.values()), return_exceptions=True
        )
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if not isinstance(failure, VerifierError):
                raise failure
        if not self._identities:
            raise VerifierError("\n".join(dict.fromkeys(str(failure) for failure in failures)))
        for endpoint, outcome in zip(self._endpoints.values(), outcomes, strict=True):
            if isinstance(outcome, VerifierError):
                endpoint.breaker.disproved(str(outcome))
                _log.warning("This edge starts without one of its inference servers: %s", outcome)
        first = next(iter(self._identities.values()))
        context = min(identity.context for identity in self._identities.values())
        self._tasks = [asyncio.create_task(self._look_after(endpoint)) for endpoint in self._endpoints.values()]
        return Identity(first.model, context, first.version, first.rows)

    async def close(self) -> None:
        for task in (*self._tasks, *self._asked):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._asked, return_exceptions=True)

    # Steps

    async def score(self, questions: Mapping[int, LogprobsQuery]) -> dict[int, TopRows]:
        """Return the rows of every sequence's query.

        Raises `TargetAway` if no server can be asked or has answered in time, `SequenceFailed` if healthy servers
        reject one query.
        """
        deadline = self._clock() + self._settings.step_s
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

    def follow(self, sequence: int, source: int) -> None:
        self._affinity.follow(sequence, source)

    def forget(self, sequence: int) -> None:
        self._affinity.forget(sequence)
        self._suspicions.pop(sequence, None)

    async def _ask(self, sequence: int, question: LogprobsQuery, deadline: float) -> TopRows:
        attempt, last, suspected, avoided = 0, "", False, ""
        while (left := deadline - self._clock()) > 0:
            available = self.available or await self._wait_for_any(min(left, _BRIDGED_S))
            if not available:
                break
            elsewhere = available - {avoided} or available
            endpoint = self._endpoints[self._affinity.place(sequence, available=elsewhere)]
            try:
                rows = await endpoint.compute(
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
                if endpoint.breaker.failed(last, suspect=error.suspect):
                    _log.warning("An inference server is not used for now: %s", error)
            else:
                endpoint.breaker.succeeded()
                self._suspicions.pop(sequence, None)
                return rows
            attempt += 1
            if available - {endpoint.url}:
                avoided, wait_s = endpoint.url, 0.0
            backoff_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt, 10))
            await asyncio.sleep(max(wait_s, backoff_s * self._rng.uniform(0.5, 1.0)))
        self._suspect(sequence, suspected, last)
        raise TargetAway(self.away or last or "No inference server answers in time.", retry_s=_AWAY_S)

    async def _wait_for_any(self, patience_s: float) -> set[str]:
        """Wait for a server to come back; return the available ones."""
        self._back.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._back.wait(), patience_s)
        return self.available

    def _suspect(self, sequence: int, suspected: bool, last: str) -> None:
        """Count failures of servers on a sequence; after several in a row the sequence is at fault."""
        if not suspected:
            return
        self._suspicions[sequence] = self._suspicions.get(sequence, 0) + 1
        if self._suspicions[sequence] >= _MOST_SUSPICIONS:
            del self._suspicions[sequence]
            raise SequenceFailed(last, sequence=sequence)

    # Health

    async def _look_after(self, endpoint: RemoteEndpoint) -> None:
        """Check a server's health while it is healthy; otherwise try to identify it now and then."""
        unanswered = 0
        while True:
            if endpoint.breaker.closed:
                await asyncio.sleep(self._settings.health_s * self._rng.uniform(0.75, 1.25))
                try:
                    await endpoint.client.get(endpoint.url, "/health", timeout_s=max(2.0, self._settings.health_s))
                except VerifierError as error:
                    unanswered += 1
                    if unanswered >= _UNWELL and endpoint.breaker.failed(str(error)):
                        _log.warning("An inference server is not used for now: %s", error)
                else:
                    unanswered = 0
                continue
            unanswered = 0
            await asyncio.sleep(max(0.01, endpoint.breaker.trial_in_s))
            try:
                await self._identify(endpoint)
            except VerifierError as error:
                if str(error) != endpoint.breaker.reason:
                    _log.warning("%s", error)
                endpoint.breaker.disproved(str(error))
            else:
                endpoint.breaker.proved()
                self._back.set()
                _log.info("The inference server at %s is back.", endpoint.url)

    async def _identify(self, endpoint: RemoteEndpoint) -> None:
        """Identify a server, and check that it computes what the others do."""
        identity = await endpoint.identify(self._expected, timeout_s=self._settings.request_s)
        known = {url: other for url, other in self._identities.items() if url != endpoint.url}
        for url, other in known.items():
            endpoint.check_same(identity, other, other_url=url)
            if identity.context < min(each.context for each in known.values()) and self._tasks:
                raise EndpointFailed(
                    f"The inference server at {endpoint.url} came back with a context of {identity.context} tokens, "
                    "fewer than open sessions may have; start it with the context of the others, or restart this edge."
                )
        self._identities[endpoint.url] = identity
