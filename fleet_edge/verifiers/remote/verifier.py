"""Remote verifier: the most likely tokens of each row from an inference server; all others count as impossible.

It is exact for policies that keep no more tokens than the server names: greedy, or `0 < top_k <= most_top_k`. Among
equally likely tokens at the last place the server chooses, independently of the draft, so the output still has the
target distribution.
"""

import logging
import secrets
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fleet_edge.settings import InferenceServerSettings
from fleet_edge.verifiers.contract import Item, TargetAway, TargetInfo, TokenVerifier
from fleet_edge.verifiers.remote.client import InferenceClient, LoopThread
from fleet_edge.verifiers.remote.dialect import DIALECTS, LogprobsQuery
from fleet_edge.verifiers.remote.endpoint import Expected, Identity, RemoteEndpoint
from fleet_edge.verifiers.remote.loading import LocalTokens
from fleet_edge.verifiers.remote.queries import Queries
from schemas.vocabulary import Vocabulary

# Added to a step's own limit, since the loop's thread may be delayed.
_LATE_S: Final = 5.0
_CLOSE_S: Final = 5.0
KNOWN_TOKENS: Final = 1 << 20
"""Maximum tokens of all open sequences. What is not in the server's cache, the server computes again."""


class RemoteVerifier(TokenVerifier):
    """`Verifier` over an inference server. It stores only the tokens of open sequences.

    `top` is the number of known entries of a row.
    """

    def __init__(
        self,
        *,
        local: LocalTokens,
        queries: Queries,
        client: InferenceClient,
        loop: LoopThread,
        identity: Identity,
        runs_on: str,
        top: int,
        settings: InferenceServerSettings,
    ) -> None:
        size = len(local.strings)
        info = TargetInfo(
            name=local.name,
            vocabulary=Vocabulary.of(local.strings),
            context=identity.context,
            end_tokens=tuple(end for end in local.end_tokens if end < size),
            runs_on=runs_on,
            most_top_k=top if top < size else None,
        ).identified(settings.api.encode(), identity.model.encode())
        super().__init__(info, KNOWN_TOKENS)
        self._queries = queries
        self._client = client
        self._loop = loop
        self._top = top
        self._step_s = settings.step_s
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
        self._loop.call(self._queries.forget, sequence)

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
        if not questions:
            return logits
        try:
            answers = self._loop.run(self._queries.score(questions), timeout_s=self._step_s + _LATE_S)
        except TimeoutError as error:
            raise TargetAway("The inference server's answers could not be read in time.", retry_s=1.0) from error
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
        try:
            self._loop.run(self._end(), timeout_s=_CLOSE_S)
        except (TimeoutError, RuntimeError):
            pass
        finally:
            self._loop.stop()

    async def _end(self) -> None:
        await self._queries.close()
        await self._client.close()


_log = logging.getLogger(__name__)


_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_START_S: Final = 60.0
_CONNECTIONS: Final = 256


def connect(
    settings: InferenceServerSettings,
    local: LocalTokens,
    url: str,
    *,
    samples: Sequence[int],
) -> RemoteVerifier:
    """Return the verifier, once the server has proved that it serves the target; raises `VerifierError`."""
    key_file = settings.api_key_file
    if key_file is not None and url.startswith("http://") and urlsplit(url).hostname not in _LOOPBACK:
        _log.warning("The key in %s goes to %s unencrypted; use https:// where others may listen.", key_file, url)
    top = min(settings.top_logprobs, len(local.strings))
    loop = LoopThread("remote")

    async def start() -> RemoteVerifier:
        client = InferenceClient(key_file, connections=_CONNECTIONS)
        dialect = DIALECTS[settings.api]()
        queries = Queries(
            RemoteEndpoint(url, dialect, client),
            Expected(settings.served_model, local.strings, samples, top),
            settings,
        )
        try:
            identity = await queries.start()
            return RemoteVerifier(
                local=local,
                queries=queries,
                client=client,
                loop=loop,
                identity=identity,
                runs_on=f"{dialect.name} {identity.version}".rstrip(),
                top=top,
                settings=settings,
            )
        except BaseException:
            await queries.close()
            await client.close()
            raise

    try:
        return loop.run(start(), timeout_s=_START_S + settings.request_s * len(samples))
    except BaseException:
        loop.stop()
        raise
