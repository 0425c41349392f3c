"""Access to the Hugging Face hub: probe once whether it is reachable, without the client's retries if it is not.

Import it only where a model is named by its repository: the hub's client takes a while.
"""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

_WAIT_S: Final = 2.5  # name resolution and connection; a reachable hub answers in tenths of a second
_ADDRESS_S: Final = 1.0  # per address: where IPv6 does not work, the next one is tried
_PORTS: Final = {"http": 80, "https": 443}

Connect = Callable[[str, int], None]


def hub_name() -> str:
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


def is_cached(repository: str, file: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(repository, file), str)
    except HFValidationError:
        return False


def is_reachable(*, connect: Connect | None = None, wait_s: float = _WAIT_S) -> bool:
    """Try to connect to the hub, or to the proxy to it.

    `connect` opens and closes a connection, or raises OSError. `wait_s` includes name resolution, for which the system
    has no limit.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    place = _way_to(urlsplit(constants.ENDPOINT))
    host, port = place.hostname, place.port or _PORTS.get(place.scheme)
    if host is None or port is None:
        return True  # cannot be probed: let the client report the problem
    answered = threading.Event()

    def attempt() -> None:
        try:
            (connect or _connect)(host, port)
        except OSError:
            failed.set()
        finally:
            answered.set()

    failed = threading.Event()
    threading.Thread(target=attempt, name="hub", daemon=True).start()
    return answered.wait(wait_s) and not failed.is_set()


@contextmanager
def hub_access() -> Iterator[bool]:
    """Enable the hub's client, offline if the hub cannot be reached; yield whether it can.

    The client's warnings are suppressed: the caller reports failures once.
    """
    reachable = is_reachable()
    offline, logger = constants.HF_HUB_OFFLINE, logging.getLogger("huggingface_hub")
    level = logger.level
    constants.HF_HUB_OFFLINE = offline or not reachable
    logger.setLevel(logging.ERROR)
    try:
        yield reachable
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def _way_to(endpoint: SplitResult) -> SplitResult:
    proxies = getproxies()
    proxy = proxies.get(endpoint.scheme) or proxies.get("all")
    if not proxy or (endpoint.hostname and proxy_bypass(endpoint.hostname)):
        return endpoint
    return urlsplit(proxy if "//" in proxy else f"http://{proxy}")


def _connect(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=_ADDRESS_S).close()
