"""Connects to the inference servers and makes the verifier of them."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

from fleet_edge.verifiers.remote.breaker import Breaker
from fleet_edge.verifiers.remote.client import Client
from fleet_edge.verifiers.remote.dialect import Dialect
from fleet_edge.verifiers.remote.endpoint import Endpoint, Expected, Identity
from fleet_edge.verifiers.remote.key import ApiKey
from fleet_edge.verifiers.remote.loop import LoopThread
from fleet_edge.verifiers.remote.pool import Pool, PoolTimes
from fleet_edge.verifiers.remote.settings import RemoteSettings
from fleet_edge.verifiers.remote.sglang import SgLang
from fleet_edge.verifiers.remote.tokenizer import LocalTokens
from fleet_edge.verifiers.remote.verifier import RemoteVerifier
from fleet_edge.verifiers.remote.vllm import Vllm

__all__ = ["DIALECTS", "connect"]

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
