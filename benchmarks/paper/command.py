"""Paper benchmark: the comparisons of arXiv 2507.12000 redrawn here, and what is wrong in its published code.

DSD sends the draft model's full distributions up; DSSD, the paper's own, one probability a token up and all of p down
at a rejection; ours. Speeds and bytes are those of the suites `latency` and `bytes`, read from their JSON
or measured now in a short form. Then mistakes of published code, made again in our own words on a toy pair, each beside
ours: the acceptance ratio inverted; raw logits in place of probabilities; no cache of keys and values, which bends no
law and has the target compute each text over and over.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks import bytes as bytes_bench
from benchmarks import latency as latency_bench
from benchmarks.paper.comparison import bytes_lines, places_of, read_rows, speed_lines
from benchmarks.paper.mistakes import WAYS, hold
from benchmarks.shared.conditions import conditions
from schemas.errors import FleetError
from tests.support.statistics import ALARM

__all__ = ["main"]

_SHORT_LATENCY: Final = (
    "--costs", "1", "--round-trips", "0", "50", "--mbit", "10", "--widths", "1",
    "--texts", "2", "--tokens", "32", "--limit", "8",
    "--systems", "edge-streaming", "dsd", "dssd-dense", "ours-residual", "ours-coupled", "ours-auto",
)  # fmt: skip
_SHORT_BYTES: Final = ("--texts", "3", "--tokens", "48", "--lengths", "4")
_FAILED: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and test; return 0 if ours follows the law and the mistakes do not, 1 if not, 2 on errors."""
    arguments = _read(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="fleet-paper-") as folder:
            latency = arguments.latency or _run("latency", Path(folder), arguments)
            counted = arguments.bytes or _run("bytes", Path(folder), arguments)
            speeds, timed_with = read_rows(latency)
            sizes, counted_with = read_rows(counted)
    except FleetError as error:
        print(error, file=sys.stderr)
        return _FAILED
    places = places_of(speeds)
    print("\n".join((*speed_lines(places), "", *bytes_lines(sizes), "")))
    verdicts = []
    head = f"{'texts':>8}{'p':>10}{'distance':>10}  {'follows':<9}{'computed':>9}"
    print(f"{'law of a toy pair, chi-square':<34}{head}  what it does")
    for name in WAYS:
        verdict = hold(name, texts=arguments.texts, first_seed=arguments.seed)
        verdicts.append(verdict)
        follows = "yes" if verdict.p >= ALARM else "NO"
        p = f"{verdict.p:.3g}" if verdict.p else "<1e-300"
        figures = f"{verdict.texts:8}{p:>10}{verdict.distance:10.3f}  {follows:<9}{verdict.computed_per_token:9.1f}"
        print(f"  {name:<32}{figures}  {verdict.what}", flush=True)
    print(f"A law is rejected below p = {ALARM:g}; its distance is total variation.")
    print("Computed: tokens by the target, for each of a text of 128.")
    if arguments.json:
        report: dict[str, Any] = {
            **conditions("llama-cpp-python", "paho-mqtt", "scipy", broker=True),
            "seed": arguments.seed,
            "law": [{**asdict(verdict), "as_it_should_be": verdict.as_it_should_be} for verdict in verdicts],
            "sources": {"latency": timed_with, "bytes": counted_with},
            "rows": [*speeds, *sizes],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        from benchmarks.paper.picture import draw  # noqa: PLC0415 - matplotlib is an extra

        draw(places, sizes, arguments.picture)
    return 0 if all(verdict.as_it_should_be for verdict in verdicts) else 1


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks paper", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--draft", default="Q4_0", help="where it is measured now (default: %(default)s)")
    parser.add_argument("--latency", type=Path, metavar="FILE", help="JSON of the suite latency; else measured now")
    parser.add_argument("--bytes", type=Path, metavar="FILE", help="JSON of the suite bytes; else measured now")
    parser.add_argument("--texts", type=int, default=20_000, help="of each way, for the law (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw speeds and bytes (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.texts < 1:
        parser.error("--texts must be at least 1")
    return arguments


def _run(name: str, folder: Path, arguments: argparse.Namespace) -> Path:
    """Measure in a short form; return the JSON."""
    file = folder / f"{name}.json"
    short = _SHORT_LATENCY if name == "latency" else _SHORT_BYTES
    bench = latency_bench if name == "latency" else bytes_bench
    print(f"python -m benchmarks {name} {' '.join(short)}", file=sys.stderr, flush=True)
    told = ["--models", str(arguments.models), "--drafts", arguments.draft, *short, "--json", str(file)]
    if bench.main(told) == _FAILED:
        raise FleetError(f"`python -m benchmarks {name}` could not run; its complaint is above.")
    return file


if __name__ == "__main__":
    sys.exit(main())
