"""Offline: what becomes of texts whose edge is taken away in mid-answer, under each policy (seconds to react).

A real mosquitto, a real edge process over a scripted target, and a real device with its local API over a scripted
draft model, behind a relay. An application streams a coupled text from the API; at a random token the edge is killed
or stopped (SIGKILL, SIGSTOP), or the device's line is cut or goes silent. Measured is when the text goes on alone
(`local`), the error comes (`fail`), or the edge's return is noticed (`wait`), after the moment at which the policy is
to apply: the loss and `offline_s`, or, where nobody can see that the edge is gone, the loss and `answer_s`. Texts are
compared token by token with the target's own, as far as they claim to be verified, and the session log with what the
applications received: each text once, with as many unverified tokens. Takes 6 minutes.
"""

import argparse
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

from benchmarks.harness import Bench, BenchGoal, SuiteReport, at_most, number_of, table
from benchmarks.processes import BenchError
from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_device.api.listening import listen
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.gateway import Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings, OfflinePolicy
from fleet_edge.session_log.log import SessionLog
from sampling.distribution import Dist
from schemas.policy import Mode, SamplingPolicy
from tests.support.processes import BrokerClient, Program, scripted_edge
from tests.support.relay import Relay
from tests.support.scripted_language import LANGUAGE, draft_language, reference_text

FLEET: Final = "offline"
DEVICE: Final = "device-1"

AFTER_S: Final = 1.0
"""`offline_s` of the device."""

ANSWER_S: Final = 2.5
"""`answer_s` of the device."""

WAYS: Final = ("killed", "stopped", "cut", "dead")
"""How the edge goes away: its process dies or hangs; the device's line is cut or goes silent."""

_TOKEN_S: Final = 0.004
_PATIENCE_S: Final = 60.0


class PacedDrafter(ScriptedDrafter):
    """A draft model with a realistic time per token."""

    def next(self, policy: SamplingPolicy) -> Dist:
        time.sleep(_TOKEN_S)
        return super().next(policy)


class Site:
    def __init__(self, folder: Path) -> None:
        self.database = folder / "log.sqlite3"
        self._folder = folder
        self._stack = ExitStack()
        self._edge: Program | None = None

    def __enter__(self) -> Self:
        try:
            self._broker = self._stack.enter_context(MosquittoProcess(Broker(fleet=FLEET)))
            self._relay = self._stack.enter_context(Relay(self._broker.port))
            self._stack.callback(self._end_edge)
            self._start_edge()
            script = draft_language()
            settings = DeviceSettings.model_validate(
                {
                    "fleet": FLEET,
                    "device": DEVICE,
                    "broker": {"port": self._relay.port},
                    "mode": "coupled",
                    "draft_length": 4,
                    "context": 4096,
                    "offline_s": AFTER_S,
                    "answer_s": ANSWER_S,
                    "state_dir": str(self._folder),
                    "api_listen": "",
                }
            )
            self._gateway = Gateway(DeviceService(settings, PacedDrafter(script, script.words)))
            self._gateway.serve(listen())
            self._gateway.start()
            self._stack.callback(self._gateway.stop)
            self.wait_until_there()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        assert self._gateway.address is not None
        return self._gateway.address

    def pull(self, way: str) -> None:
        assert self._edge is not None
        match way:
            case "killed":
                self._edge.kill()
                self._edge.end()
            case "stopped":
                self._edge.send_signal(signal.SIGSTOP)
            case "cut":
                self._relay.isolate()
            case "dead":
                self._relay.stall()

    def put_back(self, way: str) -> None:
        assert self._edge is not None
        match way:
            case "killed":
                self._start_edge()
            case "stopped":
                self._edge.send_signal(signal.SIGCONT)
            case "cut":
                self._relay.reunite()
            case "dead":
                self._relay.release()

    def wait_until_there(self) -> None:
        _until(lambda: self._gateway.absence() is None, "The device does not find its edge again.")

    def wait_until_told(self) -> None:
        """Wait until the edge has confirmed every request that was completed without it."""
        self.wait_until_there()
        _until(lambda: not len(self._gateway.service.reports), "The device does not get rid of its reports.")
        time.sleep(1.0)  # what the edge has answered is in the log; what is repeated may still come

    def _start_edge(self) -> None:
        place, cores = BrokerClient("edge-1", "127.0.0.1", self._broker.port), os.sched_getaffinity(0)
        self._edge = scripted_edge(place, fleet=FLEET, folder=self._folder, cores=cores, lease_s=30.0)

    def _end_edge(self) -> None:
        if self._edge is not None:
            self._edge.send_signal(signal.SIGCONT)
            self._edge.end()


def _until(true: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + _PATIENCE_S
    while not true():
        if time.monotonic() > until:
            raise BenchError(otherwise)
        time.sleep(0.02)


_AWAY_S: Final = 4.0
_PROMPT: Final = 8
_TIMEOUT_S: Final = 120.0
_SEEN: Final = ("killed", "cut")
"""Ways that the broker or the device's own line reports; the others show only as silence."""


@dataclass(frozen=True, slots=True)
class OfflineTrial:
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


class _Pull:
    """Takes the edge away, and brings it back after a time if the request waits for it."""

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
        """Bring the edge back, and wait until the device finds it."""
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
    words: list[str]
    verified: list[bool]
    last: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    changed_at: float | None = None
    status: int = 200


def run_trial(site: Site, policy: OfflinePolicy, way: str, *, tokens: int, rng: random.Random) -> OfflineTrial:
    """Run one request; on return the edge is back."""
    prompt = [rng.randrange(LANGUAGE.size) for _ in range(_PROMPT)]
    sampling = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=12, top_p=0.95, seed=rng.getrandbits(63))
    pull_at, pull, seen = rng.randint(10, tokens // 2), _Pull(site, way), _Seen([], [])
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "offline": policy.value,
        "stream": True,
        **sampling.model_dump(mode="json", exclude={"logit_bias"}),
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
    return OfflineTrial(
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


_LONGEST_S = {OfflinePolicy.LOCAL: 1.0, OfflinePolicy.FAIL: 3.0}
"""Goal: seconds after the deadline until the request continues or fails."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=number_of(int, 1), default=20, help="for each policy (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 60), default=150, help="of a text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)


def run(bench: Bench) -> SuiteReport:
    rng, trials = random.Random(bench.options.seed), list[OfflineTrial]()
    with Site(bench.new_folder()) as site:
        for policy in OfflinePolicy:
            for number in range(bench.options.times):
                trial = run_trial(site, policy, WAYS[number % len(WAYS)], tokens=bench.options.tokens, rng=rng)
                trials.append(trial)
                print(trial.line(), flush=True)
        site.wait_until_told()
        wrong = compare(site.database, trials)
    wrong += [f"{trial.policy.value}, {trial.way}: {trial.wrong}." for trial in trials if trial.wrong is not None]
    rows = [_summary(policy, [t for t in trials if t.policy is policy]) for policy in OfflinePolicy]
    table(rows, {"policy": "", "texts": "d", "right": "d", "median_s": ".2f", "max_s": ".2f", "unverified": "d"})
    return SuiteReport(rows, _goals(rows), more={"trials": [asdict(trial) for trial in trials]}, wrong=wrong)


def _summary(policy: OfflinePolicy, trials: Sequence[OfflineTrial]) -> dict[str, Any]:
    after = sorted(trial.after_s for trial in trials if trial.after_s is not None)
    return {
        "policy": policy.value,
        "texts": len(trials),
        "right": sum(trial.wrong is None for trial in trials),
        "median_s": after[len(after) // 2] if after else None,
        "max_s": after[-1] if after else None,
        "unverified": sum(trial.unverified for trial in trials),
    }


def _goals(rows: Sequence[dict[str, Any]]) -> list[BenchGoal]:
    found = {row["policy"]: row["max_s"] for row in rows}
    return [
        at_most(f"{policy.value}: seconds after the deadline", found[policy.value], longest)
        for policy, longest in _LONGEST_S.items()
        if found[policy.value] is not None
    ]


def compare(database: Path, trials: Sequence[OfflineTrial]) -> list[str]:
    """Return differences: each request is in the log once, with its tokens and the unverified ones."""
    with SessionLog(f"sqlite:///{database}") as log:
        logged = log.sessions(limit=max(1000, 2 * len(trials)))
    found: dict[str, list[tuple[int | None, int | None, str | None]]] = {}
    for session in logged:
        row = (session.final_tokens, session.device_unverified, session.reason)
        found.setdefault(session.session, []).append(row)
    wrong = []
    for trial in trials:
        if trial.session is None:
            continue
        rows = found.pop(trial.session, [])
        if [(tokens, unverified or 0) for tokens, unverified, _ in rows] != [(trial.tokens, trial.unverified)]:
            wrong.append(
                f"Session {trial.session} ({trial.policy.value}) has {trial.tokens} tokens, {trial.unverified} of them "
                f"unverified; the log has {rows}."
            )
    failed = sum(trial.policy is OfflinePolicy.FAIL for trial in trials)
    if len(found) != failed:
        wrong.append(f"{failed} texts failed, and the log has {len(found)} sessions in addition to the others.")
    if reported := [name for name, rows in found.items() if any(unverified for _, unverified, _ in rows)]:
        wrong.append(f"The log has unverified texts that no application received: {', '.join(reported)}.")
    return wrong
