"""Worker of `python -m tests.fuzz`: one target, as a process of its own, since the fuzzer ends its process.

Guided, the fuzzer keeps what reaches something new, in `corpus/` of the target's work folder; plain, what is there is
mutated without being looked at, and without instrumentation. Every second, and at the end, the figures go to
`stats.json`; inputs that crash or are slow go to `findings/`.
"""

import argparse
import contextlib
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.fuzz.targets.registry import Target

INSTRUMENTED: Final = ("schemas", "sampling", "fleet_common", "fleet_device", "fleet_edge", "starlette")
WARM_SHARE: Final = 0.1
NOTE_EVERY_S: Final = 1.0
CROSSED: Final = 0.1
LONGEST_S: Final = 30  # of one input: the fuzzer gives up


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--plain", action="store_true")
    asked = parser.parse_args()
    with contextlib.nullcontext() if asked.plain else _instrumented():
        from tests.fuzz.harness import Watch  # noqa: PLC0415 - instrumented as it is imported
        from tests.fuzz.targets.registry import TARGETS  # noqa: PLC0415
    target = TARGETS[asked.target]()
    found, findings = asked.work / "corpus", asked.work / "findings"
    found.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (found / f"seed-{number}").write_bytes(seed)
    watch = Watch(target, findings)
    figures = asked.work / "stats.json"
    began = noted = time.monotonic()
    warm = False

    def one_input(data: bytes) -> None:
        nonlocal noted, warm
        watch(data)
        inputs, now = watch.stats.inputs, time.monotonic()
        done = inputs >= asked.runs or now - began >= asked.seconds
        if not done and now - noted < NOTE_EVERY_S:
            return
        noted, watch.stats.wall_s = now, now - began
        was_warm, warm = warm, max(inputs / asked.runs, (now - began) / asked.seconds) >= WARM_SHARE
        watch.note_memory(warm=warm and not was_warm)
        watch.write(figures)
        if done:
            os._exit(0)  # the only way to stop the fuzzer

    folders = (found, asked.corpus)
    if asked.plain:
        _plain(target, one_input, folders, random.Random(asked.seed))
    _guided(target, one_input, [f"-seed={asked.seed}", f"-artifact_prefix={findings}/fatal-", *map(str, folders)])


def _plain(target: "Target", one_input: Callable[[bytes], None], folders: Sequence[Path], rng: random.Random) -> None:
    from tests.fuzz.mutation import mutate_bytes  # noqa: PLC0415 - may be instrumented

    pool = [path.read_bytes() for folder in folders for path in sorted(folder.iterdir())]
    while True:
        data = min(rng.choice(pool), rng.choice(pool), rng.choice(pool), key=len)  # short ones cost less
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = target.mutate(data, rng, lambda part: mutate_bytes(part, rng))
        if rng.random() < CROSSED:
            data = target.cross(data, rng.choice(pool), rng)
        one_input(data[: target.max_bytes])


def _guided(target: "Target", one_input: Callable[[bytes], None], flags: Sequence[str]) -> None:
    import atheris  # noqa: PLC0415 - needed here alone

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = target.mutate(data, rng, lambda part: bytes(atheris.Mutate(part, max(len(part) + 64, 64))))
        return data[:most]

    def cross(data: bytes, other: bytes, most: int, seed: int) -> bytes:
        return target.cross(data, other, random.Random(seed))[:most]

    bounds = [f"-max_len={target.max_bytes}", f"-timeout={LONGEST_S}", "-rss_limit_mb=4096", "-len_control=0"]
    atheris.Setup([sys.argv[0], *bounds, *flags], one_input, custom_mutator=mutate, custom_crossover=cross)
    atheris.Fuzz()


def _instrumented() -> contextlib.AbstractContextManager[object]:
    import atheris  # noqa: PLC0415 - needed here alone

    manager: contextlib.AbstractContextManager[object] = atheris.instrument_imports(include=list(INSTRUMENTED))
    return manager


if __name__ == "__main__":
    main()
