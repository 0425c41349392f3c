"""Tally of what writers tell: texts, tokens, what is wrong with them, and when each device went on."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class EndedText:
    """A text that its device has brought to an end, whole or cancelled."""

    device: str
    reason: str
    tokens: int


@dataclass(slots=True)
class Tally:
    """What has been written so far.

    Attributes:
        texts: Ended texts, by session.
        by_mode: Ended texts, by mode.
        tokens: Committed, as reported piece by piece.
        wrong: What is wrong with texts: by word, how many.
        refused: Sentences of texts that failed before a token was committed.
        broken_off: Sentences of texts that failed after tokens had been committed.
        failed: Texts that failed, by device.
        killed: Processes that were killed, by device: each may have left a text.
        edge_kills: How often the edge was killed: it may have left texts of devices that were killed too.
        resumes: How often sessions were opened again.
        unconfirmed: Texts whose end no edge had confirmed when they were returned.
    """

    texts: dict[str, EndedText] = field(default_factory=dict)
    by_mode: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    broken_off: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    edge_kills: int = 0
    resumes: int = 0
    unconfirmed: int = 0
    _commits: dict[str, list[float]] = field(default_factory=dict)
    _heard: threading.Condition = field(default_factory=threading.Condition)

    def take(self, device: str, event: dict[str, Any]) -> None:
        """Take an event of a writer's process. Callable from any thread."""
        with self._heard:
            match event:
                case {"event": "tokens", "at": at, "number": number}:
                    self.tokens += number
                    self._commits.setdefault(device, []).append(at)
                    self._heard.notify_all()
                case {"event": "text", "session": session, "reason": reason, "written": written}:
                    self.texts[session] = EndedText(device, reason, written)
                    self.by_mode[event["mode"]] += 1
                    self.resumes += event["resumes"]
                    self.unconfirmed += not event["confirmed"]
                    self._wrong(event)
                case {"event": "failed", "sentence": sentence, "written": written}:
                    (self.broken_off if written else self.refused).append(sentence)
                    self.failed[device] += 1
                    self._wrong(event)

    def forget_moments(self) -> None:
        """Forget when tokens were committed so far."""
        with self._heard:
            self._commits.clear()

    def wait_for_all(self, devices: int, *, since: float, timeout_s: float) -> dict[str, float]:
        """Wait until a number of devices have committed a token after `since` (monotonic), or the time is over.

        Returns:
            Seconds from then to its first token, by device; those that have not gone on are missing.
        """
        deadline = time.monotonic() + timeout_s
        with self._heard:
            while len(found := self._firsts(since)) < devices and (left := deadline - time.monotonic()) > 0:
                self._heard.wait(min(left, 0.5))
            return found

    def _firsts(self, since: float) -> dict[str, float]:
        return {
            device: first - since
            for device, moments in self._commits.items()
            if (first := next((at for at in moments if at > since), None)) is not None
        }

    def _wrong(self, event: dict[str, Any]) -> None:
        if event["wrong"] is not None:
            self.wrong[event["wrong"]] += 1
