"""Attacker process: one attack from one process, so that its own processor time is known and counted apart.

It reads the place (JSON) and then a line that lets it begin from standard input, attacks until SIGTERM or the time is
over, and writes what it has done as one line of JSON.
"""

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from typing import Any, Final

from benchmarks.hostile.attacks.contract import Attacker
from benchmarks.hostile.attacks.registry import ATTACKS
from benchmarks.hostile.place import Place

_READY: Final = "ready"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attack", choices=list(ATTACKS))
    parser.add_argument("--seconds", type=float, required=True, help="longest time")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--plain", action="store_true", help="the attack's plain load in its place")
    arguments = parser.parse_args()
    place = Place.from_json(sys.stdin.readline())
    ended: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    print(_READY, flush=True)
    sys.stdin.readline()
    began, cpu = time.monotonic(), time.process_time()
    attacker = Attacker(
        place,
        random.Random(arguments.seed),
        running=lambda: not ended and time.monotonic() - began < arguments.seconds,
    )
    attack = ATTACKS[arguments.attack]
    (attack.plain if arguments.plain and attack.plain is not None else attack.run)(attacker)
    wall_s = time.monotonic() - began
    print(json.dumps(_account(attacker, wall_s=wall_s, cpu_s=time.process_time() - cpu)), flush=True)
    for client in attacker.clients:
        client.abort()


def _account(attacker: Attacker, *, wall_s: float, cpu_s: float) -> dict[str, Any]:
    losses: Counter[str] = sum((client.counters.losses for client in attacker.clients), Counter())
    return {
        "seconds": wall_s,
        "cpu": cpu_s / wall_s,
        "sent_per_s": attacker.sent / wall_s,
        "sent_bytes": sum(client.counters.sent_bytes for client in attacker.clients),
        "received_bytes": sum(client.counters.received_bytes for client in attacker.clients),
        "answers": dict(attacker.answers),
        "connects": sum(client.counters.connects for client in attacker.clients),
        "refused_connects": attacker.failed or sum(client.counters.refused for client in attacker.clients),
        "kicked": dict(losses),
    }


if __name__ == "__main__":
    main()
