"""Structured: texts of ten JSON schemas, and free ones on the same prompts (tokens a second, share of forced tokens).

Every structured text is parsed, and validated against its schema by another library than the one that constrained it.
Free and structured texts of a prompt alternate, with the same device, edge and seed; a free text is asked for as many
tokens as the structured text before it had. Devices use the real draft model and pace themselves. Takes 6 minutes.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import closing
from functools import partial
from typing import Any, Final

import jsonschema

from benchmarks.harness import Bench, SuiteReport, connected, number_of, say, table
from fleet_device.client.agent import Agent
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.pacing.adaptive import make_pacing
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.generate import GeneratedText, GenerateRequest, generate_text
from fleet_device.requests.structured import ChatMessage
from fleet_device.session.sequence import TokenOrigin
from fleet_device.settings import DeviceSettings
from sampling.distribution import Dist, Ids
from schemas.policy import Grammar, Mode, SamplingPolicy
from schemas.reasons import EndReason

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(most: int) -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": most}


def _whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _list(items: Schema, most: int, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_POINT: Final = _object(latitude={"type": "number", "minimum": -90, "maximum": 90}, longitude=_whole(-180, 180))

_MAIL: Final = {"type": "string", "pattern": "^[a-z]{2,8}@[a-z]{2,8}\\.org$"}

SCHEMAS: Final[dict[str, tuple[str, Schema]]] = {
    "reading": (
        "Report the state of a water pump that runs hot.",
        _object(
            device=_text(20),
            status={"enum": ["normal", "warning", "critical"]},
            temperature=_whole(-40, 200),
            needs_inspection={"type": "boolean"},
        ),
    ),
    "nested": (
        "Describe a sensor on a roof, with its place and its owner.",
        _object(
            sensor=_object(name=_text(20), place=_POINT),
            owner=_object(name=_text(20), contact=_object(email=_MAIL)),
        ),
    ),
    "enums": (
        "Classify the message: the machine stopped and makes a loud noise.",
        _object(
            kind={"enum": ["question", "complaint", "report", "praise"]},
            urgency={"enum": ["low", "medium", "high"]},
            language={"enum": ["English", "German", "French", "Spanish"]},
            part={"enum": ["motor", "belt", "valve", "display", "unknown"]},
        ),
    ),
    "array": (
        "List three things to check before a machine is started.",
        _object(steps=_list(_text(40), 3, 3)),
    ),
    "objects": (
        "List the parts of a bicycle with their number.",
        _object(parts=_list(_object(name=_text(15), count=_whole(1, 9), spare={"type": "boolean"}), 4)),
    ),
    "patterns": (
        "Write an order for spare parts.",
        _object(
            order={"type": "string", "pattern": "^ORD-[0-9]{4}-[A-Z]{2}$"},
            date={"type": "string", "format": "date"},
            items=_list({"type": "string", "pattern": "^[A-Z]{3}[0-9]{3}$"}, 3),
        ),
    ),
    "unicode": (
        "Schreibe einen kurzen Gruß mit Umlauten für Käufer aus München.",
        _object(
            gruß=_text(40),
            städte=_list({"enum": ["München", "Köln", "Zürich", "東京", "Łódź"]}, 3),
            zeichen={"enum": ["✓", "✗", "→"]},
        ),
    ),
    "choice": (
        "Say how to reach the service: by phone or by mail.",
        {
            "anyOf": [
                _object(by={"const": "phone"}, number={"type": "string", "pattern": "^[0-9]{5,9}$"}),
                _object(by={"const": "mail"}, street=_text(25), house=_whole(1, 200)),
            ]
        },
    ),
    "numbers": (
        "Give measurements of a day: temperature, pressure and wind.",
        _object(
            temperature=_whole(-30, 45),
            pressure=_whole(950, 1060),
            wind={"type": "array", "prefixItems": [_whole(0, 120), {"enum": ["N", "E", "S", "W"]}], "items": False,
                  "minItems": 2},
            rain={"type": ["integer", "null"], "minimum": 0, "maximum": 99},
        ),
    ),
    "recursive": (
        "Describe a folder with a folder in it.",
        {
            "$ref": "#/$defs/top",
            "$defs": {
                "top": _object(name=_text(12), inner=_list({"$ref": "#/$defs/folder"}, 2)),
                "folder": _object(name=_text(12), files=_list(_text(12), 2, 0)),
            },
        },
    ),
}  # fmt: skip
"""By name, what is asked for and the schema of the answer."""


class CountingDrafter(LlamaCppDrafter):
    calls = 0

    def next(self, policy: SamplingPolicy) -> Dist:
        self.calls += 1
        return super().next(policy)

    def next_allowed(self, policy: SamplingPolicy, allowed: Ids) -> Dist:
        self.calls += 1
        return super().next_allowed(policy, allowed)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=number_of(int, 1), default=30, help="texts of a schema (default: %(default)s)"
    )
    parser.add_argument("--free", type=number_of(int, 0), default=10, help="free texts of its prompt")
    parser.add_argument("--tokens", type=number_of(int, 1), default=400, help="of a text, at most")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.RESIDUAL, help="(default: %(default)s)")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    settings = DeviceSettings(fleet=bench.fleet, device="device-0")
    found = {"free": Counter[str](), "structured": Counter[str]()}
    wrong: list[str] = []
    with (
        closing(CountingDrafter(LlamaCppSettings(bench.model(f"{options.draft}.gguf")))) as drafter,
        bench.broker() as broker,
        bench.edge(broker.port, bench.target()),
        connected(broker.port, bench.fleet, [drafter], pacing=lambda: make_pacing(settings)) as (agent,),
    ):
        for name, (asked, schema) in SCHEMAS.items():
            say(f"{name}: {options.repeats} texts, {options.free} free ones")
            prompt = tuple(chat_prompt(drafter.codec, [ChatMessage("user", asked)]).tokens)
            grammar = Grammar.json_schema(schema)
            write = partial(_write, bench, agent, drafter, prompt)
            write(0, grammar, 8)  # prepared once at both ends
            found[name] = Counter()
            for number in range(options.repeats):
                text, counts = write(number, grammar, options.tokens)
                if complaint := _wrong(text, schema):
                    wrong.append(f"{name}, seed {number}: {complaint}")
                    print(f"{wrong[-1]}: {text.text!r}", file=sys.stderr)
                found["structured"] += counts
                found[name] += counts
                if number < options.free:
                    found["free"] += write(number, None, len(text.tokens))[1]
    rows = [{"texts_of": name, **_figures(counts)} for name, counts in found.items()]
    shares = {"forced_share": ".2f", "draft_calls_per_token": ".2f", "large_calls_per_token": ".2f"}
    table(rows, {"texts_of": "", "texts": "d", "tokens_per_s": ".1f", **shares, "acceptance": ".2f"})
    if rows[0]["texts"]:
        print(f"structured over free: {rows[1]['tokens_per_s'] / rows[0]['tokens_per_s']:.2f} tokens/s")
    return SuiteReport(rows, wrong=wrong)


def _write(
    bench: Bench,
    agent: Agent,
    drafter: CountingDrafter,
    prompt: tuple[int, ...],
    seed: int,
    grammar: Grammar | None,
    tokens: int,
) -> tuple[GeneratedText, Counter[str]]:
    """Complete a prompt, and count the cost."""
    mode, before = bench.options.mode, drafter.calls
    policy = SamplingPolicy(mode=mode, temperature=0.7, top_k=50, top_p=0.95, seed=seed, grammar=grammar)
    text = generate_text(agent, drafter, GenerateRequest(prompt, policy, tokens))
    counters = text.generation.counters
    return text, Counter(
        texts=1,
        tokens=len(text.tokens),
        wall_ms=round(text.generation.wall_ms),
        forced=text.origins.count(TokenOrigin.FORCED),
        draft_calls=drafter.calls - before,
        rounds=counters.rounds,
        tested=counters.tested,
        accepted=counters.accepted,
        edge_only=counters.edge_only,
    )


def _figures(counts: Counter[str]) -> dict[str, Any]:
    tokens = max(1, counts["tokens"])
    return {
        "texts": counts["texts"],
        "tokens": counts["tokens"],
        "tokens_per_s": 1e3 * counts["tokens"] / max(1, counts["wall_ms"]),
        "forced_share": counts["forced"] / tokens,
        "draft_calls_per_token": counts["draft_calls"] / tokens,
        "large_calls_per_token": counts["rounds"] / tokens,
        "acceptance": counts["accepted"] / max(1, counts["tested"]),
        "edge_only_share": counts["edge_only"] / tokens,
    }


def _wrong(text: GeneratedText, schema: dict[str, Any]) -> str:
    """Return what is wrong with a structured output; empty if nothing is."""
    if text.reason is not EndReason.STOP:
        return f"ended by {text.reason.value}"
    try:
        jsonschema.validate(json.loads(text.text), schema, format_checker=jsonschema.FormatChecker())
    except json.JSONDecodeError as error:
        return f"no JSON: {error}"
    except jsonschema.ValidationError as error:
        return f"not of the schema: {error.message}"
    return ""
