"""Prompts that an edge computes ahead, such as a fleet's system prompts, while no session has work."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Final

from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.prefix_cache import LEAST_REUSED, WARM, PrefixCache

_log = logging.getLogger(__name__)

_FIRST_KEY: Final = 1 << 20
"""Keys above all handles of sessions, and below those that the prefix cache chooses."""

_CHUNK: Final = 16
_MAX_CHUNK: Final = 512
_CHUNK_S: Final = 0.25
"""Tokens of the first chunk, and of each while sessions are open: about as long as a step; most of one; its time."""


class WarmPrompts:
    """Computes prompts a chunk at a time; the prefix cache then keeps them for all devices."""

    def __init__(self, cache: PrefixCache, clock: Callable[[], float] = time.monotonic) -> None:
        self._cache = cache
        self._clock = clock
        self._keys = count(_FIRST_KEY)
        self._prompts: list[tuple[int, ...]] = []
        self._left: deque[tuple[int, ...]] = deque()
        self._are_deleted = False
        self._key: int | None = None  # of the prompt that is being computed
        self._chunk = _CHUNK
        cache.on_deletion = self._note_deletion

    def add(self, prompts: Sequence[Sequence[int]]) -> None:
        most = self._cache.info.context
        added = [tuple(prompt[:most]) for prompt in prompts if len(prompt) >= LEAST_REUSED]
        self._prompts += added
        self._left.extend(added)

    @property
    def left(self) -> int:
        """Prompts that are not computed whole."""
        return len(self._prompts if self._are_deleted else self._left)

    def next_chunk(self, *, brief: bool) -> Callable[[], None] | None:
        """Return a call that computes more, `brief` if sessions may have work soon; None if there is no more.

        Call it between steps, and what it returns as a step.
        """
        if self._are_deleted:
            self._are_deleted = False
            self.release()
            self._left = deque(self._prompts)
        while self._left:
            tokens = self._left[0]
            if self._key is None:
                self._open(tokens)
            assert self._key is not None
            computed = self._cache.computed(self._key)
            item = Item(self._key, tokens[computed : computed + (_CHUNK if brief else self._chunk)], 0)
            if computed == len(tokens):
                self.release()
                self._left.popleft()
                if not self._left:
                    _log.info("All warm prompts are computed.")
            elif not self._cache.fits([item]):
                _log.warning(
                    "%d warm prompts are not computed: they do not fit into kv_bytes; raise it, or shorten them.",
                    len(self._left),
                )
                self.stop()
            else:
                return partial(self._compute, item)
        return None

    def release(self) -> None:
        """Let go of the memory of a prompt that is being computed; it goes on when there is room."""
        if self._key is not None:
            self._cache.close(self._key)
            self._key = None

    def stop(self) -> None:
        """Compute no more."""
        self.release()
        self._left.clear()

    def _note_deletion(self) -> None:
        self._are_deleted = True

    def _open(self, tokens: tuple[int, ...]) -> None:
        self._key = next(self._keys)
        self._cache.open(self._key)
        self._cache.expect(self._key, tokens, owner=WARM)
        self._cache.reuse(self._key)

    def _compute(self, item: Item) -> None:
        began = self._clock()
        self._cache.score([item])
        seconds = max(1e-6, self._clock() - began)
        fits = int(len(item.tokens) * _CHUNK_S / seconds)
        self._chunk = max(_CHUNK, min(_MAX_CHUNK, 2 * len(item.tokens), fits))
