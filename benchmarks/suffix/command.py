"""Suffix benchmark: reports of one form and texts that do not repeat, drafted by the model alone and with earlier text.

A real edge, a real mosquitto, and a device for each way of drafting. The devices write the same texts one after the
other, each first every second time: reports that all have one form, from readings that differ; then answers to
questions that differ, with all the reports in the history. Ratios are of the tokens a second of all texts of a kind;
their interval is that of 1,000 samples of pairs (bootstrap, 95 %).
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.processes import Cores, on_cores
from benchmarks.suffix.texts import QUESTIONS, report_prompt
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_device.device import Device
from fleet_device.settings import AUTO, DRAFTERS, DeviceSettings
from fleet_link.settings import BrokerSettings
from schemas.errors import FleetError
from schemas.policy import Mode
from tests.support.edge_process import edge_process

__all__ = ["Written", "main", "ratio"]

FLEET: Final = "suffix"
MODEL, BOTH, SUFFIX = "model", "model and suffix", "suffix"
KINDS: Final = ("reports", "questions")
_RESAMPLED: Final = 1000
_MOST_LOST: Final = 0.97
_ONLINE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Written:
    """A text that was written.

    Attributes:
        kind: `reports` or `questions`.
        number: Of the text.
        way: How it was drafted.
        tokens: Written.
        seconds: From the request to the end.
        drafted: Tokens, `tested` and `accepted` of them; and so for those from earlier text.
        streamed: Tokens that the edge wrote by itself.
        draft_ms: Time that drafting took.
    """

    kind: str
    number: int
    way: str
    tokens: int
    seconds: float
    drafted: int
    tested: int
    accepted: int
    suffix_drafted: int
    suffix_tested: int
    suffix_accepted: int
    streamed: int
    draft_ms: float


def ratio(written: Sequence[Written], way: str, *, seed: int = 1) -> tuple[float, float, float]:
    """Return tokens a second beside those of the model alone, with the ends of its interval."""
    alone = {(each.kind, each.number): each for each in written if each.way == MODEL}
    pairs = [(each, alone[each.kind, each.number]) for each in written if each.way == way]
    rng = random.Random(seed)
    sampled = sorted(_ratio(rng.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLED))
    return _ratio(pairs), sampled[int(0.025 * _RESAMPLED)], sampled[int(0.975 * _RESAMPLED) - 1]


def _ratio(pairs: Sequence[tuple[Written, Written]]) -> float:
    own_tokens, own_s = sum(own.tokens for own, _ in pairs), sum(own.seconds for own, _ in pairs)
    tokens, seconds = sum(other.tokens for _, other in pairs), sum(other.seconds for _, other in pairs)
    return (own_tokens / own_s) / (tokens / seconds)


def summary(written: Sequence[Written]) -> list[dict[str, Any]]:
    """Return a row for each kind of texts and way of drafting."""
    rows = []
    for kind in KINDS:
        of_kind = [each for each in written if each.kind == kind]
        for way in dict.fromkeys(each.way for each in of_kind):
            texts = [each for each in of_kind if each.way == way]
            total = {name: sum(getattr(each, name) for each in texts) for name in _SUMMED}
            beside, low, high = ratio(of_kind, way)
            rows.append(
                {
                    "kind": kind,
                    "way": way,
                    "texts": len(texts),
                    **total,
                    "tokens_per_s": total["tokens"] / total["seconds"],
                    "acceptance": _share(total["accepted"], total["tested"]),
                    "suffix_acceptance": _share(total["suffix_accepted"], total["suffix_tested"]),
                    "ratio": beside,
                    "ratio_low": low,
                    "ratio_high": high,
                }
            )
    return rows


_SUMMED: Final = (
    "tokens", "seconds", "drafted", "tested", "accepted", "suffix_drafted", "suffix_tested", "suffix_accepted",
    "streamed", "draft_ms",
)  # fmt: skip


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def main(argv: Sequence[str] | None = None) -> int:
    """Write all texts and print the ratios; return 1 if more than 3 % is lost on texts that do not repeat."""
    parser = argparse.ArgumentParser(prog="benchmarks suffix", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument("--reports", type=int, default=200, help="texts of one form (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=32, help=f"other texts, at most {len(QUESTIONS)}")
    parser.add_argument("--tokens", type=int, default=64, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--stream", action="store_true", help="let devices have the edge write, where they choose so")
    parser.add_argument("--without-model", action="store_true", help="also measure a device that has no draft model")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.RESIDUAL, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.questions <= len(QUESTIONS) or arguments.reports < 1:
        parser.error(f"--questions must be 1 to {len(QUESTIONS)}, --reports at least 1")
    cores = Cores.choose(os.sched_getaffinity(0), apart=True)
    try:
        with ending_cleanly(), on_cores(cores.others):
            written = _measure(arguments, cores)
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    rows = summary(written)
    print(f"{'texts':10} {'drafted by':17} {'tokens/s':>8} {'beside':>6} {'(95 %)':14} {'accepted':>8} {'earlier':>8}")
    for row in rows:
        accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.2f}"
        earlier = row["suffix_drafted"] / row["drafted"] if row["drafted"] else 0.0
        print(
            f"{row['kind']:10} {row['way']:17} {row['tokens_per_s']:8.1f} {row['ratio']:6.2f} "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}) {accepted:>8} {earlier:8.0%}"
        )
    if arguments.json is not None:
        found = {
            **conditions("llama-cpp-python", "paho-mqtt", broker=True),
            "settings": {name: str(value) for name, value in vars(arguments).items() if name != "json"},
            "rows": rows,
            "texts": [asdict(each) for each in written],
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    lost = [row for row in rows if row["kind"] == "questions" and row["way"] == BOTH and row["ratio"] < _MOST_LOST]
    return 1 if lost else 0


def _measure(arguments: argparse.Namespace, cores: Cores) -> list[Written]:
    written: list[Written] = []
    with ExitStack() as stack:
        broker = stack.enter_context(MosquittoProcess(Broker(fleet=FLEET)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        edge = [
            "--fleet", FLEET, "--port", str(broker.port),
            "--target", str(arguments.models / "target-Q8_0.gguf"), "--engine", "llama.cpp",
            "--threads", str(len(cores.edge)), "--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool",
        ]  # fmt: skip
        with on_cores(cores.edge):
            stack.enter_context(edge_process(edge))
        devices = {
            way: stack.enter_context(_device(arguments, broker.port, folder, way))
            for way in (MODEL, BOTH, SUFFIX)
            if way != SUFFIX or arguments.without_model
        }
        for device in devices.values():
            if not device.wait_for_edge(_ONLINE_S):
                raise FleetError("The edge is not online for the benchmark's device.")
        for kind, number in [
            *(("reports", number) for number in range(arguments.reports)),
            *(("questions", number) for number in range(arguments.questions)),
        ]:
            # Whoever comes second finds the prompt computed at the edge: they take turns.
            ways = list(devices)
            first = number % len(ways)
            written += [
                _write(devices[way], way, kind, number, arguments.tokens) for way in (*ways[first:], *ways[:first])
            ]
            if number % 20 == 0:
                print(f"{kind} {number}", file=sys.stderr, flush=True)
    return written


def _device(arguments: argparse.Namespace, port: int, folder: Path, way: str) -> Device:
    return Device(
        DeviceSettings(
            fleet=FLEET,
            device=way.replace(" ", "-"),
            broker=BrokerSettings(port=port),
            model=str(arguments.models / f"{arguments.draft}.gguf"),
            drafter="suffix" if way == SUFFIX else next(iter(DRAFTERS)),
            suffix=way == BOTH,
            history_dir=folder / way,
            mode=arguments.mode,
            stream=AUTO if arguments.stream else False,
            draft_length=AUTO,
        )
    )


def _write(device: Device, way: str, kind: str, number: int, tokens: int) -> Written:
    if kind == "reports":
        text = device.generate(report_prompt(number), raw=True, stop="\n", max_new_tokens=tokens, seed=number)
    else:
        text = device.generate(QUESTIONS[number], max_new_tokens=tokens, seed=number)
    counters = text.generation.counters
    return Written(
        kind=kind,
        number=number,
        way=way,
        tokens=len(text.tokens),
        seconds=text.generation.wall_ms / 1e3,
        drafted=counters.drafted,
        tested=counters.tested,
        accepted=counters.accepted,
        suffix_drafted=counters.suffix_drafted,
        suffix_tested=counters.suffix_tested,
        suffix_accepted=counters.suffix_accepted,
        streamed=counters.streamed,
        draft_ms=counters.draft_ms,
    )


if __name__ == "__main__":
    sys.exit(main())
