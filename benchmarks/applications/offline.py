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
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.applications.offline_site import WAYS, Site
from benchmarks.applications.offline_trial import Trial, run_trial
from benchmarks.harness import Bench, Goal, Report, at_most, number_of, table
from fleet_device.settings import OfflinePolicy
from fleet_edge.session_log import SessionLog

_LONGEST_S = {OfflinePolicy.LOCAL: 1.0, OfflinePolicy.FAIL: 3.0}
"""Goal: seconds after the deadline in which the text goes on, or fails."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=number_of(int, 1), default=20, help="for each policy (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 60), default=150, help="of a text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)


def run(bench: Bench) -> Report:
    """Take the edge away, again and again."""
    rng, trials = random.Random(bench.options.seed), list[Trial]()
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
    table(rows, {"policy": "", "texts": "d", "right": "d", "median_s": ".2f", "most_s": ".2f", "unverified": "d"})
    return Report(rows, _goals(rows), more={"trials": [trial.to_json() for trial in trials]}, wrong=wrong)


def _summary(policy: OfflinePolicy, trials: Sequence[Trial]) -> dict[str, Any]:
    after = sorted(trial.after_s for trial in trials if trial.after_s is not None)
    return {
        "policy": policy.value,
        "texts": len(trials),
        "right": sum(trial.wrong is None for trial in trials),
        "median_s": after[len(after) // 2] if after else None,
        "most_s": after[-1] if after else None,
        "unverified": sum(trial.unverified for trial in trials),
    }


def _goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    found = {row["policy"]: row["most_s"] for row in rows}
    return [
        at_most(f"{policy.value}: seconds after the deadline", found[policy.value], longest)
        for policy, longest in _LONGEST_S.items()
        if found[policy.value] is not None
    ]


def compare(database: Path, trials: Sequence[Trial]) -> list[str]:
    """Return what differs, in sentences: each text is in the log once, with its tokens and those unverified."""
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
