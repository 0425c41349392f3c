"""Remote verifier: the most likely tokens of each row from an inference server; all others count as impossible.

So it is exact for policies that keep no more tokens than the server names: greedy, or `0 < top_k <= most_top_k`. Where
several tokens are equally likely at the last place that is named, the server has chosen among them, as it would for a
text of its own; which it chooses does not depend on the draft, so that the law stands.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fleet_edge.settings import RemoteSettings
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TargetAway, TargetInfo, Verifier, VerifierError
from fleet_edge.verifiers.remote.client import ApiKey, Client, LoopThread
from fleet_edge.verifiers.remote.dialect import Dialect, Question, SgLang, Vllm
from fleet_edge.verifiers.remote.endpoint import Breaker, Endpoint, Expected, Identity
from fleet_edge.verifiers.remote.errors import BadSetting
from fleet_edge.verifiers.remote.pool import Pool, PoolTimes
from fleet_edge.verifiers.remote.tokenizer import LocalTokens, check_local, load_local, sample_tokens
from fleet_edge.verifiers.sequences import SequenceTable
from schemas.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fleet_edge.settings import EdgeSettings

# Beyond a step's own bound: the loop's thread may be kept from running.
_LATE_S: Final = 5.0
_CLOSE_S: Final = 5.0


class RemoteVerifier:
    """`Verifier` over inference servers. It keeps the tokens of open sequences, and nothing else of them.

    Args:
        local: Vocabulary and end tokens.
        pool: The servers, started.
        client: Their connections.
        loop: Where they run.
        identity: What the servers are.
        runs_on: For the log.
        top: Entries of a row that are known.
        known_tokens: Most tokens of all sequences.
        step_s: Bound of a step.
    """

    def __init__(
        self,
        *,
        local: LocalTokens,
        pool: Pool,
        client: Client,
        loop: LoopThread,
        identity: Identity,
        runs_on: str,
        top: int,
        known_tokens: int,
        step_s: float,
    ) -> None:
        size = len(local.strings)
        if known_tokens < identity.context:
            raise VerifierError(
                f"Room for {known_tokens} tokens is less than one text may have; set 'remote.known_tokens' to at least "
                f"{identity.context}."
            )
        self._pool = pool
        self._client = client
        self._loop = loop
        self._top = top
        self._budget = known_tokens
        self._step_s = step_s
        self._info = TargetInfo(
            name=local.name,
            vocabulary=Vocabulary.of(local.strings),
            context=identity.context,
            end_tokens=tuple(end for end in local.end_tokens if end < size),
            runs_on=runs_on,
            most_top_k=top if top < size else None,
        )
        self._table = SequenceTable(context=identity.context, vocabulary=size)
        self._tokens: dict[int, list[int]] = {}
        self._namespaces: dict[int, str] = {}

    @property
    def info(self) -> TargetInfo:
        """The target model's identity and limits."""
        return self._info

    def open(self, sequence: int) -> None:
        """Begin a sequence with nothing computed."""
        self._table.open(sequence)
        self._tokens[sequence] = []

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin a sequence with the first tokens of another, where they are cached if that server has room."""
        self._table.check_fork(sequence, source, length)
        if length > self.capacity():
            raise CapacityExceeded(
                f"The copy needs room for {length} tokens and 'remote.known_tokens' leaves {self.capacity()}; evict a "
                "sequence and try again."
            )
        self._table.fork(sequence, source, length)
        self._tokens[sequence] = self._tokens[source][:length]
        self._loop.call(self._pool.follow, sequence, source)

    def computed(self, sequence: int) -> int:
        """Return the number of tokens that were sent to be computed."""
        return self._table.computed(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens from `length` on; what a server has cached of them it drops by itself."""
        self._table.truncate(sequence, length)
        del self._tokens[sequence][length:]

    def close(self, sequence: int) -> None:
        if self._table.close(sequence):
            del self._tokens[sequence]
            self._namespaces.pop(sequence, None)
            self._loop.call(self._pool.forget, sequence)

    def fits(self, items: Sequence[Item]) -> bool:
        """Return whether there is room for the items' tokens."""
        return sum(len(item.tokens) for item in items) <= self.capacity()

    def capacity(self) -> int:
        """Return the number of tokens for which there is room."""
        return self._budget - self._table.total

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Have all items computed; see `Verifier.score`."""
        self._table.check(items)
        if not self.fits(items):
            raise CapacityExceeded(
                f"The step needs room for {sum(len(item.tokens) for item in items)} tokens and 'remote.known_tokens' "
                f"leaves {self.capacity()}; evict a sequence and try again."
            )
        questions = {
            item.sequence: Question(
                [*self._tokens[item.sequence], *item.tokens],
                item.rows,
                self._top,
                self._namespaces.get(item.sequence, ""),
            )
            for item in items
        }
        logits = np.full((sum(item.rows for item in items), self._info.vocabulary.size), -np.inf, dtype=np.float32)
        if not questions:
            return logits
        try:
            answers = self._loop.run(self._pool.score(questions), timeout_s=self._step_s + _LATE_S)
        except TimeoutError as error:
            raise TargetAway("The inference servers' answers could not be read in time.", retry_s=1.0) from error
        start = 0
        for item in items:
            rows = answers[item.sequence]
            np.put_along_axis(logits[start : start + item.rows], rows.ids, rows.logprobs, axis=1)
            start += item.rows
        for item in items:
            self._tokens[item.sequence].extend(item.tokens)
        self._table.commit(items)
        return logits

    # As `SharesPrefixes`

    def isolate(self, sequence: int, namespace: str) -> None:
        """Have the servers' prefix caches keep a sequence apart from those of other namespaces."""
        self._namespaces[sequence] = namespace

    # As `RunsElsewhere`

    def away(self) -> str:
        """Return why nothing can be computed now; empty if it can."""
        return self._pool.away

    def shut_down(self) -> None:
        try:
            self._loop.run(self._end(), timeout_s=_CLOSE_S)
        except (TimeoutError, RuntimeError):
            pass
        finally:
            self._loop.stop()

    async def _end(self) -> None:
        await self._pool.close()
        await self._client.close()


_log = logging.getLogger(__name__)

DIALECTS: Final[dict[str, Callable[[], Dialect]]] = {"vllm": Vllm, "sglang": SgLang}
"""By the setting `remote.api`."""

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_START_S: Final = 60.0


def connect(
    settings: RemoteSettings,
    local: LocalTokens,
    urls: Sequence[str],
    *,
    samples: Sequence[int],
    clock: Callable[[], float] = time.monotonic,
) -> RemoteVerifier:
    """Return the verifier, once the servers have proved that they serve the target.

    Args:
        settings: How they are asked.
        local: Vocabulary and end tokens.
        urls: Their addresses.
        samples: Ids whose texts are compared with the servers'.
        clock: Monotonic seconds.

    Raises:
        VerifierError: None of them does, or one serves something else.
    """
    key = ApiKey(settings.api_key_file)
    for url in urls:
        if key.source and url.startswith("http://") and urlsplit(url).hostname not in _LOOPBACK:
            _log.warning("The key in %s goes to %s unencrypted; use https:// where others may listen.", key.source, url)
    top = min(settings.top_logprobs, len(local.strings))
    loop = LoopThread("remote")
    try:
        verifier: RemoteVerifier = loop.run(
            _connect(settings, local, urls, samples=samples, clock=clock, key=key, top=top, loop=loop),
            timeout_s=_START_S + settings.request_s * len(samples),
        )
    except BaseException:
        loop.stop()
        raise
    return verifier


async def _connect(
    settings: RemoteSettings,
    local: LocalTokens,
    urls: Sequence[str],
    *,
    samples: Sequence[int],
    clock: Callable[[], float],
    key: ApiKey,
    top: int,
    loop: LoopThread,
) -> RemoteVerifier:
    client = Client(key, ca=settings.server_ca, connections=settings.connections * len(urls))
    dialect = DIALECTS[settings.api]()
    pool = Pool(
        [Endpoint(url, dialect, client, Breaker(clock)) for url in urls],
        Expected(settings.served_model, local.strings, samples, top),
        PoolTimes(settings.request_s, settings.step_s, settings.health_s),
        clock=clock,
    )
    try:
        identity = await pool.start()
        return RemoteVerifier(
            local=local,
            pool=pool,
            client=client,
            loop=loop,
            identity=identity,
            runs_on=_runs_on(dialect, identity, len(urls)),
            top=top,
            known_tokens=settings.known_tokens,
            step_s=settings.step_s,
        )
    except BaseException:
        await pool.close()
        await client.close()
        raise


def _runs_on(dialect: Dialect, identity: Identity, number: int) -> str:
    version = f" {identity.version}" if identity.version else ""
    return f"{dialect.name}{version}, {number} {'server' if number == 1 else 'servers'}"


_ENDPOINTS: Final = "remote.endpoints"


def check(settings: "EdgeSettings") -> None:
    """Check addresses, key and tokenizer, and that what asks the servers is installed.

    Raises:
        VerifierError: Something is wrong with them.
    """
    try:
        import httpx  # noqa: F401, PLC0415 - comes with the extra
    except ImportError as error:
        raise VerifierError(
            "The engine `remote` needs the extra `edge-remote`; install it: pip install 'dssd-fleet[edge-remote]'."
        ) from error
    endpoint_urls(settings.remote.endpoints)
    ApiKey(settings.remote.api_key_file)
    check_local(settings.target)


def load(settings: "EdgeSettings") -> Verifier:
    """Connect to the servers that the settings name, and have them prove that they serve the target.

    Raises:
        VerifierError: None of them does.
    """
    check(settings)
    from fleet_edge.verifiers.remote.verifier import connect  # noqa: PLC0415 - only where it is installed

    local = load_local(settings.target)
    samples = sample_tokens(local.strings, local.end_tokens)
    return connect(settings.remote, local, endpoint_urls(settings.remote.endpoints), samples=samples)


def endpoint_urls(text: str) -> list[str]:
    """Return the addresses in a setting.

    Raises:
        VerifierError: There is none, or one is no address.
    """
    urls = [word.strip().rstrip("/").removesuffix("/v1") for word in text.split(",") if word.strip()]
    if not urls:
        raise BadSetting(
            "The engine `remote` needs the address of an inference server; set 'remote.endpoints', for example to "
            "http://10.0.0.5:8000.",
            setting=_ENDPOINTS,
        )
    for url in urls:
        _check_url(url)
    if len(set(urls)) < len(urls):
        raise BadSetting(
            "An address stands twice in 'remote.endpoints'; name every inference server once.", setting=_ENDPOINTS
        )
    return urls


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment:
        raise BadSetting(
            f"{url!r} is no address of an inference server; write it as http://10.0.0.5:8000 or https://NAME.",
            setting=_ENDPOINTS,
        )
    if parts.username or parts.password:
        raise BadSetting(
            "An address in 'remote.endpoints' holds a name or password; put the key into a file and set "
            "'remote.api_key_file'.",
            setting=_ENDPOINTS,
        )
