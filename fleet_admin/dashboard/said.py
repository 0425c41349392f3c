"""Sentences for the page that follows a form: what was done, or why not."""

import secrets
from collections import OrderedDict
from threading import Lock
from typing import Final


class Said:
    """Sentences for the page that follows a form: kept here, so that no link can put words into a page."""

    _MOST: Final = 1_000

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._lock = Lock()

    def keep(self, account: str, sentence: str) -> str:
        """Return the name under which a sentence can be taken once."""
        name = secrets.token_urlsafe(9)
        with self._lock:
            self._kept[name] = (account, sentence)
            while len(self._kept) > self._MOST:
                self._kept.popitem(last=False)
        return name

    def take(self, account: str, name: str) -> str | None:
        """Return a sentence, once, to whom it is for."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is None or kept[0] != account:
                return None
            return self._kept.pop(name)[1]
