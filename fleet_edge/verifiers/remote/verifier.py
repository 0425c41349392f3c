"""Remote verifier: the most likely tokens of each row from an inference server; all others count as impossible.

It is exact for policies that keep no more tokens than the server names: greedy, or `0 < top_k <= max_top_k`. Among
equally likely tokens at the last place the server chooses, independently of the draft, so the output still has the
target distribution.

A step ends in bounded time, with all its rows or with an error. Several servers are the business of a router or load
balancer at the one address; a retry may reach another of them.
"""

import logging
import random
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fleet_edge.settings import InferenceServerSettings
from fleet_edge.verifiers.contract import Item, SequenceFailed, TargetAway, TargetInfo, TokenVerifier, VerifierError
from fleet_edge.verifiers.remote.local import LocalTokens
from fleet_edge.verifiers.remote.server import Expected, Identity, QueryRefused, ServerFailed, VllmServer
from fleet_edge.verifiers.remote.vllm import LogprobsQuery, TopRows
from schemas.vocabulary import Vocabulary

_log = logging.getLogger(__name__)

_CONNECTIONS: Final = 256
_LATE_S: Final = 5.0  # added to a step's own limit, since threads may be delayed
_CLOSE_S: Final = 5.0
_START_S: Final = 60.0
_FIRST_BACKOFF_S: Final = 0.02
_MAX_BACKOFF_S: Final = 1.0
_AWAY_S: Final = 0.25
_BRIDGED_S: Final = 1.0  # an absence that a step survives
_FAILURES: Final = 3  # in a row, of all queries, after which the server is away
_MAX_SUSPICIONS: Final = 3  # failures of a healthy server on one sequence after which the sequence is the cause
_HEALTH_S: Final = 2.0
_HEALTH_TIMEOUT_S: Final = 2.0
_FIRST_TRIAL_S: Final = 0.5
_MAX_TRIAL_S: Final = 15.0
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
KNOWN_TOKENS: Final = 1 << 20
"""Maximum tokens of all open sequences. What is not in the server's cache, the server computes again."""


class Queries:
    """Queries to one server, each on a thread. `away` says why none is sent; only a trial of our own ends that."""

    def __init__(self, server: VllmServer, expected: Expected, settings: InferenceServerSettings) -> None:
        self.away = ""
        self._server = server
        self._expected = expected
        self._settings = settings
        self._rng = random.Random()  # noqa: S311 - spreads retries, no secret
        self._failures = 0
        self._suspicions: dict[int, int] = {}
        self._lock = threading.Lock()
        self._back = threading.Event()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="remote")
        self._health: threading.Thread | None = None

    def start(self) -> Identity:
        """Identify the server, and start the health checks; raises `VerifierError` if it cannot be used."""
        request_s = self._settings.request_s
        identified = self._pool.submit(self._server.identify, self._expected, timeout_s=request_s)
        try:
            identity = identified.result(_START_S + request_s * len(self._expected.samples))
        except TimeoutError as error:
            raise ServerFailed(f"The inference server at {self._server.url} did not answer in time.") from error
        self._health = threading.Thread(target=self._look_after, args=(identity,), name="remote-health", daemon=True)
        self._health.start()
        return identity

    def close(self) -> None:
        self._stopped.set()
        self._back.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._health is not None:
            self._health.join(_CLOSE_S)

    def score(self, questions: Mapping[int, LogprobsQuery]) -> dict[int, TopRows]:
        """Return the rows of every sequence's query.

        Raises `TargetAway` if the server is away or has not answered in time, `SequenceFailed` if it rejects one query,
        or fails on it again and again while it is healthy.
        """
        deadline = time.monotonic() + self._settings.step_s
        answers = {
            sequence: self._pool.submit(self._request_rows, sequence, question, deadline)
            for sequence, question in questions.items()
        }
        _, late = wait(answers.values(), self._settings.step_s + _LATE_S)
        if late:
            for answer in late:
                answer.cancel()
            raise TargetAway("The inference server's answers could not be read in time.", retry_s=1.0)
        errors = [error for answer in answers.values() if (error := answer.exception()) is not None]
        # First the sequence that causes its failure: the others are tried again.
        for error in sorted(errors, key=lambda each: not isinstance(each, SequenceFailed)):
            raise error
        return {sequence: answer.result() for sequence, answer in answers.items()}

    def forget(self, sequence: int) -> None:
        with self._lock:
            self._suspicions.pop(sequence, None)

    def _request_rows(self, sequence: int, question: LogprobsQuery, deadline: float) -> TopRows:
        attempt, last, suspected = 0, "", False
        while (left := deadline - time.monotonic()) > 0 and not self._stopped.is_set():
            if self.away and not self._is_back(min(left, _BRIDGED_S)):
                break
            retry_s = 0.0
            try:
                rows = self._server.compute(
                    question,
                    vocabulary=len(self._expected.strings),
                    timeout_s=min(left, self._settings.request_s),
                )
            except QueryRefused as error:
                raise SequenceFailed(str(error), sequence=sequence) from error
            except ServerFailed as error:
                last = str(error)
                if error.retry_s is None:
                    suspected = suspected or error.suspect
                    self._fail(last)
                else:
                    retry_s = error.retry_s
            else:
                with self._lock:
                    self._failures = 0
                    self._suspicions.pop(sequence, None)
                return rows
            attempt += 1
            backoff_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt, 10))
            pause_s = max(retry_s, backoff_s * self._rng.uniform(0.5, 1.0))
            self._stopped.wait(max(0.0, min(pause_s, deadline - time.monotonic())))
        self._suspect(sequence, suspected, last)
        raise TargetAway(self.away or last or "The inference server does not answer in time.", retry_s=_AWAY_S)

    def _is_back(self, patience_s: float) -> bool:
        self._back.wait(patience_s)
        return not self.away

    def _fail(self, sentence: str) -> None:
        with self._lock:
            self._failures += 1
            if self._failures < _FAILURES or self.away:
                return
            self._back.clear()
            self.away = sentence
        _log.warning("The inference server is away: %s", sentence)

    def _suspect(self, sequence: int, suspected: bool, last: str) -> None:
        """Count failures of the server on a sequence; after several in a row the sequence is the cause."""
        if not suspected:
            return
        with self._lock:
            self._suspicions[sequence] = self._suspicions.get(sequence, 0) + 1
            if self._suspicions[sequence] < _MAX_SUSPICIONS:
                return
            del self._suspicions[sequence]
        raise SequenceFailed(last, sequence=sequence)

    def _look_after(self, first: Identity) -> None:
        """Check the server's health; while it is away, try to identify it now and then."""
        trial_s = _FIRST_TRIAL_S
        while not self._stopped.is_set():
            if not self.away:
                trial_s = _FIRST_TRIAL_S
                if self._stopped.wait(_HEALTH_S * self._rng.uniform(0.75, 1.25)):
                    return
                try:
                    self._server.check_health(timeout_s=_HEALTH_TIMEOUT_S)
                except VerifierError as error:
                    self._fail(str(error))
                continue
            if self._stopped.wait(trial_s * self._rng.uniform(0.75, 1.25)):
                return
            trial_s = min(_MAX_TRIAL_S, 2.0 * trial_s)
            try:
                identity = self._server.identify(self._expected, timeout_s=self._settings.request_s)
                self._server.check_same(identity, first)
            except VerifierError as error:
                if str(error) != self.away:
                    _log.warning("%s", error)
                self.away = str(error)
            else:
                with self._lock:
                    self.away, self._failures = "", 0
                    self._back.set()
                _log.info("The inference server at %s is back.", self._server.url)


class RemoteVerifier(TokenVerifier):
    """`Verifier` over an inference server. It stores only the tokens of open sequences.

    `top` is the number of known entries of a row.
    """

    def __init__(
        self, local: LocalTokens, server: VllmServer, queries: Queries, identity: Identity, *, top: int
    ) -> None:
        size = len(local.strings)
        info = TargetInfo(
            name=local.name,
            vocabulary=Vocabulary.of(local.strings),
            context=identity.context,
            end_tokens=tuple(end for end in local.end_tokens if end < size),
            runs_on=f"vLLM {identity.version}".rstrip(),
            max_top_k=top if top < size else None,
        ).identified(identity.model.encode())
        super().__init__(info, KNOWN_TOKENS)
        self._queries = queries
        self._server = server
        self._top = top
        self._namespaces: dict[int, str] = {}
        self._run = secrets.token_hex(4)  # of this process, so that keys of several edges differ
        self._keys: dict[int, str] = {}

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin a sequence with the first tokens of another; a router sends it to the server that has these."""
        super().fork(sequence, source, length)
        self._keys[sequence] = self._key(source)

    def close(self, sequence: int) -> None:
        super().close(sequence)
        self._namespaces.pop(sequence, None)
        self._keys.pop(sequence, None)
        self._queries.forget(sequence)

    def _key(self, sequence: int) -> str:
        return self._keys.get(sequence) or f"{self._run}-{sequence}"

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        self._check(items)
        questions = {
            item.sequence: LogprobsQuery(
                [*self._tokens[item.sequence], *item.tokens],
                item.rows,
                self._top,
                self._namespaces.get(item.sequence, ""),
                self._key(item.sequence),
            )
            for item in items
        }
        logits = np.full((sum(item.rows for item in items), self._info.vocabulary.size), -np.inf, dtype=np.float32)
        answers = self._queries.score(questions)
        start = 0
        for item in items:
            rows = answers[item.sequence]
            np.put_along_axis(logits[start : start + item.rows], rows.ids, rows.logprobs, axis=1)
            start += item.rows
        self._commit(items)
        return logits

    # As `SharesPrefixes`

    def isolate(self, sequence: int, namespace: str) -> None:
        self._namespaces[sequence] = namespace

    # As `RunsElsewhere`

    def away(self) -> str:
        return self._queries.away

    def shut_down(self) -> None:
        self._queries.close()
        self._server.close()


def connect(
    settings: InferenceServerSettings, local: LocalTokens, url: str, *, samples: Sequence[int]
) -> RemoteVerifier:
    """Return the verifier, once the server has proved that it serves the target; raises `VerifierError`."""
    key_file = settings.api_key_file
    if key_file is not None and url.startswith("http://") and urlsplit(url).hostname not in _LOOPBACK:
        _log.warning("The key in %s goes to %s unencrypted; use https:// where others may listen.", key_file, url)
    top = min(settings.top_logprobs, len(local.strings))
    server = VllmServer(url, key_file, connections=_CONNECTIONS)
    queries = Queries(server, Expected(settings.served_model, local.strings, samples, top), settings)
    try:
        return RemoteVerifier(local, server, queries, queries.start(), top=top)
    except BaseException:
        queries.close()
        server.close()
        raise
