"""One text from the device's API, whose edge is pulled away in its middle."""

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import httpx

from benchmarks.applications.offline_site import AFTER_S, ANSWER_S, Site
from fleet_device.settings import OfflinePolicy
from schemas.policy import Mode, SamplingPolicy
from tests.support.scripted_language import LANGUAGE, reference_text

_AWAY_S: Final = 4.0
_PROMPT: Final = 8
_TIMEOUT_S: Final = 120.0
_SEEN: Final = ("killed", "cut")
"""Ways that the broker or the device's own line reports; the others show only as silence."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a text."""

    policy: OfflinePolicy
    way: str
    at: int
    after_s: float | None
    session: str | None
    tokens: int
    unverified: int
    wrong: str | None

    def line(self) -> str:
        after = "       " if self.after_s is None else f"{self.after_s:5.2f} s"
        return (
            f"{self.policy.value:5} {self.way:8} pulled at {self.at:4} {after} {self.tokens:4} tokens, "
            f"{self.unverified:4} unverified  {self.wrong or 'right'}"
        )

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class _Pull:
    """The edge away, and back after a time where the text waits for that."""

    def __init__(self, site: Site, way: str) -> None:
        self._site, self._way = site, way
        self.at = self.back_at = 0.0
        self._thread: threading.Thread | None = None

    @property
    def away(self) -> bool:
        return self.at > 0.0

    def begin(self, *, comes_back: bool) -> None:
        self._site.pull(self._way)
        self.at = time.monotonic()
        if comes_back:
            self._thread = threading.Thread(target=self._return, name="return")
            self._thread.start()

    def end(self) -> None:
        """Bring the edge back, if it is not, and wait until the device finds it."""
        if self._thread is not None:
            self._thread.join()
        elif self.away:
            self._site.put_back(self._way)
        self._site.wait_until_there()

    def _return(self) -> None:
        time.sleep(_AWAY_S)
        self._site.put_back(self._way)
        self.back_at = time.monotonic()


@dataclass(slots=True)
class _Seen:
    """What the application has seen."""

    words: list[str]
    verified: list[bool]
    last: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    changed_at: float | None = None
    status: int = 200


def run_trial(site: Site, policy: OfflinePolicy, way: str, *, tokens: int, rng: random.Random) -> Trial:
    """Write one text; on return the edge is back."""
    prompt = [rng.randrange(LANGUAGE.size) for _ in range(_PROMPT)]
    sampling = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=12, top_p=0.95, seed=rng.getrandbits(63))
    pull_at, pull, seen = rng.randint(10, tokens // 2), _Pull(site, way), _Seen([], [])
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "offline": policy.value,
        "stream": True,
        **sampling.model_dump(mode="json"),
    }
    for chunk in _chunks(site, body, seen):
        now = time.monotonic()
        if "error" in chunk:
            seen.error, seen.changed_at = chunk["error"], now
            continue
        _take(chunk, seen, now, pull, policy)
        if not pull.away and len(seen.words) >= pull_at:
            pull.begin(comes_back=policy is OfflinePolicy.WAIT)
    pull.end()
    expected = [LANGUAGE.words[token] for token in reference_text(prompt, sampling, tokens)]
    return Trial(
        policy=policy,
        way=way,
        at=pull_at,
        after_s=_after_s(seen, pull, policy, way),
        session=None if seen.last is None else seen.last["session"],
        tokens=len(seen.words),
        unverified=0 if seen.last is None else seen.last["unverified_tokens"],
        wrong=_wrong(seen, policy, expected),
    )


def _chunks(site: Site, body: dict[str, Any], seen: _Seen) -> Iterator[dict[str, Any]]:
    with httpx.stream("POST", f"{site.address}/v1/completions", json=body, timeout=_TIMEOUT_S) as reply:
        seen.status = reply.status_code
        if reply.status_code != httpx.codes.OK:
            yield json.loads(reply.read())
            return
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def _take(chunk: dict[str, Any], seen: _Seen, now: float, pull: _Pull, policy: OfflinePolicy) -> None:
    words = chunk["choices"][0]["text"].split() if chunk["choices"] else []
    own = chunk.get("fleet", {})
    if "session" in own:
        seen.last = own
    verified = own.get("verified", True)
    seen.words += words
    seen.verified += [verified] * len(words)
    if seen.changed_at is not None or not words:
        return
    if not verified or (policy is OfflinePolicy.WAIT and pull.back_at):
        seen.changed_at = now


def _after_s(seen: _Seen, pull: _Pull, policy: OfflinePolicy, way: str) -> float | None:
    if seen.changed_at is None:
        return None
    if policy is OfflinePolicy.WAIT:
        return seen.changed_at - pull.back_at
    return seen.changed_at - pull.at - (AFTER_S if way in _SEEN else ANSWER_S)


def _wrong(seen: _Seen, policy: OfflinePolicy, expected: list[str]) -> str | None:
    head = [word for word, verified in zip(seen.words, seen.verified, strict=True) if verified]
    if seen.words[: len(head)] != head:
        return "a verified token follows an unverified one"
    if head != expected[: len(head)]:
        return "what claims to be verified is not the target's text"
    if policy is OfflinePolicy.FAIL:
        sound = seen.error is not None and seen.error.get("code") == "edge_unavailable"
        return None if sound else f"no error of the API's shape came, but {seen.error or seen.last}"
    if seen.error is not None or seen.last is None:
        return f"it failed: {seen.error}"
    return _wrong_end(seen, seen.last, policy, verified=len(head), length=len(expected))


def _wrong_end(seen: _Seen, last: dict[str, Any], policy: OfflinePolicy, *, verified: int, length: int) -> str | None:
    if len(seen.words) != length:
        return f"it has {len(seen.words)} tokens of {length}"
    if last["unverified_tokens"] != length - verified or last["verified"] is not (verified == length):
        return "what is said at the end is not what the chunks have said"
    if policy is OfflinePolicy.WAIT and verified != length:
        return "it has unverified tokens"
    if policy is OfflinePolicy.LOCAL and verified == length:
        return "it was done before the edge was away"
    return None
