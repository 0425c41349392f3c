"""Suffix: reports of one form and texts that do not repeat, drafted by the model alone and with earlier text (ratios).

A real edge, a real mosquitto, and a device for each way of drafting. The devices write the same texts one after the
other, each first every second time: reports that all have one form, from readings that differ; then answers to
questions that differ, with all the reports in the history. Ratios are of the tokens a second of all texts of a kind;
their interval is that of 1,000 samples of pairs (bootstrap, 95 %). Takes 12 minutes.
"""

import argparse
import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

from benchmarks.harness import Bench, SuiteReport, at_least, number_of, say, table
from benchmarks.processes import BenchError
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.device import Device
from fleet_device.settings import AUTO, DRAFTERS, DeviceSettings
from schemas.policy import Mode

_RULES: Final = (
    "Shift reports of the pumping station. Every report has the same form.\n\n"
    "Reading: pump 3, 71 C, 2.1 bar, low vibration, operator Weber\n"
    "Report: Pump 3 was inspected at the end of the shift. The temperature of the bearing is 71 C and the pressure is "
    "2.1 bar. The vibration is low. No further action is required. Signed by Weber.\n\n"
)
_OPERATORS: Final = ("Weber", "Okafor", "Lindqvist", "Moreau", "Tanaka", "Silva")
_VIBRATION: Final = ("low", "normal", "raised")

_SUBJECTS: Final = (
    "a harbour in winter", "the invention of paper", "how bees find flowers", "a train that never stops",
    "learning to play the violin", "why bridges sway", "the first day at a new school", "baking bread at high altitude",
    "a map of an unknown island", "how vaccines are tested", "an old clockmaker", "the colours of minerals",
    "moving to another country", "why leaves fall", "a library under the sea", "repairing a bicycle",
    "the history of chess", "a conversation between two rivers", "how glass is made", "saving money for a journey",
    "a storm on the lake", "training for a marathon", "the uses of salt", "a letter to a lost friend",
)  # fmt: skip
_FORMS: Final = ("Write a short paragraph about {}.", "Tell me something surprising about {}, in your own words.")

QUESTIONS: Final = tuple(form.format(subject) for form in _FORMS for subject in _SUBJECTS)


def report_prompt(number: int) -> str:
    """Return the prompt of a number, always the same one."""
    rng = random.Random(number)
    pump, temperature, pressure = rng.randint(1, 24), rng.randint(48, 96), rng.randint(12, 39) / 10
    vibration, operator = rng.choice(_VIBRATION), rng.choice(_OPERATORS)
    return (
        f"{_RULES}Reading: pump {pump}, {temperature} C, {pressure} bar, {vibration} vibration, operator {operator}\n"
        "Report:"
    )


_MODEL, _BOTH, _SUFFIX = "model", "model and suffix", "suffix"
_RESAMPLED: Final = 1000
_MAX_LOST: Final = 0.97
_ONLINE_S: Final = 30.0
_COUNTERS: Final = (
    "drafted", "tested", "accepted", "suffix_drafted", "suffix_tested", "suffix_accepted", "edge_only", "draft_ms",
)  # fmt: skip

Text = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument("--reports", type=number_of(int, 1), default=200, help="texts of one form")
    parser.add_argument("--questions", type=int, choices=range(1, len(QUESTIONS) + 1), default=32, metavar="1…48")
    parser.add_argument("--tokens", type=number_of(int, 1), default=64, help="of each text, at most")
    parser.add_argument("--edge-only", action="store_true", help="let devices choose edge-only decoding")
    parser.add_argument("--without-model", action="store_true", help="also measure a device that has no draft model")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.RESIDUAL, help="(default: %(default)s)")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    written: list[Text] = []
    ways = [_MODEL, _BOTH, *([_SUFFIX] if options.without_model else [])]
    with ExitStack() as stack:
        broker = stack.enter_context(bench.broker())
        stack.enter_context(bench.edge(broker.port, bench.target()))
        devices = {way: stack.enter_context(_device(bench, broker.port, way)) for way in ways}
        if not all(device.wait_for_edge(_ONLINE_S) for device in devices.values()):
            raise BenchError("The edge is not online for the benchmark's device.")
        for kind, count in (("reports", options.reports), ("questions", options.questions)):
            for number in range(count):
                first = number % len(ways)  # a device that comes second finds the prompt computed: they take turns
                turns = (*ways[first:], *ways[:first])
                written += [_write(devices[way], way, kind, number, options.tokens) for way in turns]
                if number % 20 == 0:
                    say(f"{kind} {number}")
    rows = _summary(written)
    interval = {"ratio": ".2f", "low": ".2f", "high": ".2f"}
    table(rows, {"texts": "", "way": "", "tokens_per_s": ".1f", **interval, "acceptance": ".2f", "earlier": ".0%"})
    kept = next(row["ratio"] for row in rows if (row["texts"], row["way"]) == ("questions", _BOTH))
    goal = at_least("pace with earlier text on texts that do not repeat", kept, _MAX_LOST)
    return SuiteReport(rows, [goal], more={"texts": written})


def _device(bench: Bench, port: int, way: str) -> Device:
    return Device(
        DeviceSettings(
            fleet=bench.fleet,
            device=way.replace(" ", "-"),
            broker=BrokerSettings(port=port),
            model=str(bench.model(f"{bench.options.draft}.gguf")),
            drafter="suffix" if way == _SUFFIX else next(iter(DRAFTERS)),
            suffix=way == _BOTH,
            mode=bench.options.mode,
            edge_only=AUTO if bench.options.edge_only else False,
            draft_length=AUTO,
        )
    )


def _write(device: Device, way: str, kind: str, number: int, tokens: int) -> Text:
    if kind == "reports":
        text = device.generate(report_prompt(number), raw=True, stop="\n", max_new_tokens=tokens, seed=number)
    else:
        text = device.generate(QUESTIONS[number], max_new_tokens=tokens, seed=number)
    counted = {name: getattr(text.generation.counters, name) for name in _COUNTERS}
    own = {"tokens": len(text.tokens), "seconds": text.generation.wall_ms / 1e3}
    return {"texts": kind, "number": number, "way": way, **own, **counted}


def ratio(written: Sequence[Text], way: str, *, seed: int = 1) -> tuple[float, float, float]:
    """Return tokens per second over those of the model alone, with the ends of its interval."""
    alone = {(each["texts"], each["number"]): each for each in written if each["way"] == _MODEL}
    pairs = [(each, alone[each["texts"], each["number"]]) for each in written if each["way"] == way]
    rng = random.Random(seed)
    sampled = sorted(_ratio(rng.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLED))
    return _ratio(pairs), sampled[int(0.025 * _RESAMPLED)], sampled[int(0.975 * _RESAMPLED) - 1]


def _ratio(pairs: Sequence[tuple[Text, Text]]) -> float:
    own, other = (
        sum(pair[side]["tokens"] for pair in pairs) / sum(pair[side]["seconds"] for pair in pairs) for side in (0, 1)
    )
    return float(own / other)


def _summary(written: Sequence[Text]) -> list[dict[str, Any]]:
    rows = []
    for kind, way in dict.fromkeys((each["texts"], each["way"]) for each in written):
        own = [each for each in written if each["texts"] == kind]
        total = {name: sum(e[name] for e in own if e["way"] == way) for name in ("tokens", "seconds", *_COUNTERS)}
        middle, low, high = ratio(own, way)
        rows.append(
            {
                **total,
                "texts": kind,
                "way": way,
                "tokens_per_s": total["tokens"] / total["seconds"],
                "acceptance": total["accepted"] / total["tested"] if total["tested"] else None,
                "earlier": total["suffix_drafted"] / total["drafted"] if total["drafted"] else 0.0,
                "ratio": middle,
                "low": low,
                "high": high,
            }
        )
    return rows
