"""Offline benchmark: what becomes of texts whose edge is pulled away in mid-answer, under each policy.

A real mosquitto, a real edge process over a scripted target, and a real device with its local API over a scripted draft
model, behind a relay. An application streams a coupled text from the API; at a random token the edge is killed or
stopped (SIGKILL, SIGSTOP), or the device's line is cut or goes dead. Told is when the text goes on alone (`local`), the
error comes (`fail`), or the edge's return is noticed (`wait`), after the moment at which the policy is to apply: the
pull and `offline_s`, or, where nobody can see that the edge is gone, the pull and `answer_s`. Texts are compared token
by token with what the target alone writes, as far as they claim to be verified; and in the end the session log with
what the applications were told: each text without an edge once, with as many unverified tokens.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.offline.log import compare
from benchmarks.offline.site import AFTER_S, ANSWER_S, WAYS, Site
from benchmarks.offline.trial import Trial, run_trial
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from broker_config.errors import BrokerError
from fleet_device.offline import OfflinePolicy
from schemas.errors import FleetError

__all__ = ["main"]

_LONGEST_S = {OfflinePolicy.LOCAL: 1.0, OfflinePolicy.FAIL: 3.0}
"""What is to be shown: seconds after the deadline in which the text goes on, or fails."""


def main(argv: Sequence[str] | None = None) -> int:
    """Pull the edge away; return 0 if all came out as promised, 1 if not, 2 if it could not be run."""
    parser = argparse.ArgumentParser(prog="benchmarks offline", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="for each policy (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=150, help="of a text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if arguments.times < 1 or not 60 <= arguments.tokens <= 2000:
        parser.error("--times must be positive, --tokens 60 to 2000")
    rng, trials = random.Random(arguments.seed), list[Trial]()
    try:
        with ending_cleanly(), ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-offline-")))
            site = stack.enter_context(Site(folder))
            for policy in OfflinePolicy:
                for number in range(arguments.times):
                    trial = run_trial(site, policy, WAYS[number % len(WAYS)], tokens=arguments.tokens, rng=rng)
                    trials.append(trial)
                    print(trial.line(), flush=True)
            site.wait_until_told()
            disagreements = compare(site.database, trials)
    except (FleetError, BrokerError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    report = _report(arguments, trials, disagreements)
    print(json.dumps(report["policies"], indent=2))
    for sentence in report["wrong"]:
        print(sentence, file=sys.stderr)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if report["wrong"] else 0


def _report(arguments: argparse.Namespace, trials: Sequence[Trial], disagreements: Sequence[str]) -> dict[str, Any]:
    wrong = [f"{trial.policy.value}, {trial.way}: {trial.wrong}." for trial in trials if trial.wrong is not None]
    wrong += [
        f"{trial.policy.value}, {trial.way}: {trial.after_s:.2f} s after the deadline."
        for trial in trials
        if trial.after_s is not None and trial.after_s > _LONGEST_S.get(trial.policy, float("inf"))
    ]
    return {
        "conditions": conditions(broker=True),
        "settings": {
            "times": arguments.times,
            "tokens": arguments.tokens,
            "seed": arguments.seed,
            "offline_s": AFTER_S,
            "answer_s": ANSWER_S,
        },
        "policies": {policy.value: _summary([t for t in trials if t.policy is policy]) for policy in OfflinePolicy},
        "log_disagreements": list(disagreements),
        "wrong": wrong + list(disagreements),
        "trials": [trial.to_json() for trial in trials],
    }


def _summary(trials: Sequence[Trial]) -> dict[str, Any]:
    after = sorted(trial.after_s for trial in trials if trial.after_s is not None)
    return {
        "texts": len(trials),
        "right": sum(trial.wrong is None for trial in trials),
        "after_deadline_s": {"median": after[len(after) // 2], "greatest": after[-1]} if after else None,
        "unverified_tokens": sum(trial.unverified for trial in trials),
    }


if __name__ == "__main__":
    sys.exit(main())
