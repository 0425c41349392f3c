"""Fuzzes whatever reads what others write: decoders, edge, device, local API, screen of MQTT packets.

    .venv/bin/python -m tests.fuzz [TARGET ...] [--runs N] [--seconds S] [--plain]

Guided by coverage, the fuzzer (atheris) keeps the inputs that reach something new in --work, and a later run goes on
from there. With --plain they are mutated at random, without the fuzzer and its instrumentation: three times as many.

For each target: inputs, inputs a second, the slowest input by the processor time of its thread (the least of three
goes; garbage is collected between inputs, its longest time is reported apart), how much memory grows after the first
tenth, branches reached and inputs kept as the fuzzer counts them, and what went wrong. `plain ms` is the slowest input
once more without instrumentation. Exit code 1 if an input crashed, or took more than 50 ms.

--minimize writes few inputs that still reach all of it into tests/fuzz/corpus, which the tests replay; --replay FILE
TARGET runs one input.
"""

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]

CORPUS: Final = ROOT / "tests" / "fuzz" / "corpus"
SLOW_MS: Final = 50.0
PAUSE_S: Final = 1.0 if sys.stderr.isatty() else 30.0
HEAD: Final = (
    "target", "inputs", "inputs/s", "slowest ms", "plain ms", "its bytes", "gc ms", "grown MB", "coverage", "crashes",
    "slow",
)  # fmt: skip


def main() -> int:
    names = target_names()
    parser = argparse.ArgumentParser(description="Fuzzes whatever reads what others write.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--runs", type=int, default=10_000, help="inputs for each target (10000)")
    parser.add_argument("--seconds", type=float, default=1e6, help="longest time for each target")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the mutations")
    parser.add_argument("--work", type=Path, default=ROOT / ".fuzz", help="where inputs and findings are kept (.fuzz)")
    parser.add_argument("--plain", action="store_true", help="without coverage: mutate what is kept")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--minimize", action="store_true", help="replace tests/fuzz/corpus by a minimal one")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run this input alone, and show what it raises")
    asked = parser.parse_args()
    wrong = sorted(set(asked.targets) - set(names))
    if wrong:
        parser.error(f"there is no target {wrong[0]!r}; there are {', '.join(names)}")
    targets = asked.targets or names
    if asked.replay:
        return replay(targets, asked.replay)
    if asked.minimize:
        return minimize(targets, asked.work)
    if not asked.plain and importlib.util.find_spec("atheris") is None:
        sys.exit("The fuzzer is missing: install it with `.venv/bin/pip install -e '.[fuzz]'` (Linux on x86-64).")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended before its time."))  # so that no process is left behind
    rows = []
    for name in targets:
        rows.append(fuzz(name, asked))
        print("\n".join([line(HEAD)] * (len(rows) == 1) + [line(cells(rows[-1]))]), flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for row in rows:
        for crash in row["crashes"]:
            print(f"{row['target']}: {crash}")
    return int(any(row["crashes"] or row["slow"] for row in rows))


def target_names() -> list[str]:
    if importlib.util.find_spec("starlette") is None:
        sys.exit("Run it in the project's environment, after `make check`: .venv/bin/python -m tests.fuzz")
    from tests.fuzz.targets.registry import TARGETS  # noqa: PLC0415 - there may be no environment

    return list(TARGETS)


def fuzz(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    work = (asked.work / name).resolve()
    work.mkdir(parents=True, exist_ok=True)
    figures, log = work / "stats.json", work / "log.txt"
    figures.unlink(missing_ok=True)
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    command: list[str] = [
        sys.executable, "-m", "tests.fuzz.worker", name, "--work", str(work), "--corpus", str(corpus),
        "--runs", str(asked.runs), "--seconds", str(asked.seconds), "--seed", str(asked.seed),
        *(["--plain"] if asked.plain else []),
    ]  # fmt: skip
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        try:
            while not ended(process):
                show(name, read(figures), time.monotonic() - began)
        finally:
            process.terminate()
            process.wait()
    row = {"target": name, "coverage": coverage(log), **read(figures)}
    if process.returncode != 0:
        row["crashes"] = [*row["crashes"], f"the fuzzer ended with {process.returncode}; see {log}"]
    slowest = work / "findings" / "slowest.bin"
    row["plain_ms"] = plain_ms(name, slowest) if slowest.exists() else 0.0
    return row


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait for a while; return whether a process has ended."""
    try:
        process.wait(PAUSE_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def read(figures: Path) -> dict[str, Any]:
    from tests.fuzz.harness import Stats  # noqa: PLC0415 - there may be no environment

    whole = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    return {field: getattr(Stats(), field) for field in Stats.__slots__} | whole


def show(name: str, stats: dict[str, Any], seconds: float) -> None:
    print(
        f"{name}: {stats['inputs']} inputs, {stats['inputs'] / seconds:.0f}/s, slowest {stats['slowest_ms']:.1f} ms, "
        f"{len(stats['crashes'])} crashes",
        end="\r" if sys.stderr.isatty() else "\n",
        file=sys.stderr,
        flush=True,
    )


def coverage(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [words.split() for words in lines if " cov: " in words]
    if not said:
        return "?"
    last = said[-1]
    return f"{last[last.index('cov:') + 1]} ({last[last.index('corp:') + 1].partition('/')[0]})"


def plain_ms(name: str, path: Path) -> float:
    """Return the CPU time of an input without instrumentation, the least of five runs."""
    command = [sys.executable, "-m", "tests.fuzz", name, "--replay", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.split()[-2:]
    return float(last[0]) if last[1:] == ["ms"] else 0.0


def replay(targets: list[str], path: Path) -> int:
    """Run one input; return 1 if it crashes or is slow."""
    from tests.fuzz.harness import SurvivedErrors  # noqa: PLC0415 - there may be no environment
    from tests.fuzz.targets.registry import TARGETS  # noqa: PLC0415

    log = SurvivedErrors()
    log.install()
    target, data, min_ms = TARGETS[targets[0]](), path.read_bytes(), float("inf")
    for _ in range(5):
        began = time.thread_time()
        target(data)
        min_ms = min(min_ms, (time.thread_time() - began) * 1e3)
        log.check()
    print(f"{min_ms:.2f} ms")
    return int(min_ms > SLOW_MS)


def minimize(targets: list[str], work: Path) -> int:
    from tests.fuzz.minimal import minimal_corpus  # noqa: PLC0415 - there may be no environment
    from tests.fuzz.targets.registry import TARGETS  # noqa: PLC0415

    for name in targets:
        kept = minimal_corpus(TARGETS[name](), [CORPUS / name, work / name / "corpus"])
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.bin"):
            if not old.name.startswith("found-"):  # what once went wrong stays
                old.unlink()
        for file, data in kept.items():
            (folder / file).write_bytes(data)
        print(f"{name}: {len(kept)} inputs, {sum(map(len, kept.values()))} bytes")
    return 0


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["target"],
        str(row["inputs"]),
        f"{row['inputs'] / max(row['wall_s'], 1e-3):.0f}",
        f"{row['slowest_ms']:.1f}",
        f"{row['plain_ms']:.1f}",
        str(row["slowest_bytes"]),
        f"{row['collection_ms']:.1f}",
        f"{max(0.0, row['last_mb'] - row['warm_mb']):.0f}",
        row["coverage"],
        str(len(row["crashes"])),
        str(row["slow"]),
    )


def line(cells: tuple[str, ...]) -> str:
    return "  ".join(cell.ljust(max(len(name), 10)) for cell, name in zip(cells, HEAD, strict=True)).rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
