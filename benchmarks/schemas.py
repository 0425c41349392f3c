"""Schemas: a device's answers to the JSON schemas of a collection (number valid, truncated, refused and wrong).

FILE is JSON Lines: in each, `path` names a schema and `schema` is one. A real mosquitto, a real edge and a real device
are started; several clients at once ask for an answer to each schema, as `response_format`. The library jsonschema
validates the answers, also those formats that the device enforces. Takes about a second a schema.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import jsonschema
from referencing import Registry

from benchmarks.harness import Bench, SuiteReport, add_engine, at_most, number_of, say, table
from benchmarks.processes import BenchError
from fleet_common.grammar.rewriting import FORMATS

_TIMEOUT_S: Final = 600.0
_BUSY: Final = (429, 503)
_TRIES: Final = 20  # OpenAI's clients repeat these too
_MAX_REFUSED: Final = 0.05
_LONGEST_REFUSAL_S: Final = 0.3
_FORMATS: Final = jsonschema.FormatChecker(FORMATS & jsonschema.FormatChecker.checkers.keys())


@dataclass(frozen=True, slots=True)
class SchemaAnswer:
    """Answer to a schema: `valid`, `truncated`, `refused`, `wrong` or `failed`, why, and the seconds until then."""

    path: str
    outcome: str
    seconds: float
    sentence: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON Lines: path and schema")
    parser.add_argument("--clients", type=number_of(int, 1), default=8, help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 1), default=200, help="of an answer (default: %(default)s)")
    add_engine(parser)


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    try:
        lines = [json.loads(line) for line in options.file.read_text(encoding="utf-8").splitlines()]
        schemas = {line["path"]: line["schema"] for line in lines}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{options.file} is no collection of schemas: {error!r}.") from None
    target = bench.target()
    with (
        bench.broker() as broker,
        bench.edge(broker.port, target),
        bench.device(broker.port, api_waiting=options.clients, context=2048) as device,
    ):
        answers = ask_all(device.url, schemas, clients=options.clients, tokens=options.tokens)
    return judge(answers)


def judge(answers: Sequence[SchemaAnswer]) -> SuiteReport:
    """Print what the answers were, and compare with the goals."""
    counted = Counter(answer.outcome for answer in answers)
    refused = [answer for answer in answers if answer.outcome == "refused"]
    slowest = max((answer.seconds for answer in refused), default=0.0)
    row = {"schemas": len(answers), **counted, "slowest_refusal_s": slowest}
    rows = [asdict(answer) for answer in answers]
    others = [one for one in rows if one["outcome"] not in {"valid", "truncated"}]
    table(others, {"path": "", "outcome": "", "seconds": ".2f", "sentence": ""})
    numbers = dict.fromkeys(("schemas", "valid", "truncated", "refused", "wrong", "failed"), "d")
    table([Counter(row)], numbers | {"slowest_refusal_s": ".2f"})
    goals = [
        at_most("wrong or failed answers", counted["wrong"] + counted["failed"], 0),
        at_most("share of schemas that are refused", len(refused) / len(answers), _MAX_REFUSED),
        at_most("seconds until the slowest refusal", slowest, _LONGEST_REFUSAL_S),
    ]
    return SuiteReport(rows, goals, more=row)


def ask_all(url: str, schemas: Mapping[str, Any], *, clients: int, tokens: int) -> list[SchemaAnswer]:
    """Ask for one answer to each schema."""
    _ask(url, tokens, "first", {"type": "null"})  # both ends prepare the vocabulary
    answers = []
    with ThreadPoolExecutor(clients) as pool:
        for answer in pool.map(partial(_ask, url, tokens), schemas, schemas.values()):
            answers.append(answer)
            if len(answers) % 20 == 0:
                say(f"{len(answers)} of {len(schemas)} schemas")
    return answers


def _ask(url: str, tokens: int, path: str, schema: object) -> SchemaAnswer:
    body = {
        "model": "fleet",
        "messages": [{"role": "user", "content": f"Write an example of {path}, in JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "max_tokens": tokens,
    }
    asked = time.monotonic()
    for _ in range(_TRIES):
        reply = httpx.post(f"{url}/chat/completions", json=body, timeout=_TIMEOUT_S)
        if reply.status_code not in _BUSY:
            break
        time.sleep(float(reply.headers["Retry-After"]))
    found = reply.json()
    if not reply.is_success:
        refused = reply.status_code == httpx.codes.BAD_REQUEST and found["error"]["param"] == "response_format"
        outcome = "refused" if refused else "failed"
        return SchemaAnswer(path, outcome, time.monotonic() - asked, found["error"]["message"])
    choice = found["choices"][0]
    seconds = time.monotonic() - asked
    if choice["finish_reason"] == "length":
        return SchemaAnswer(path, "truncated", seconds)
    sentence = complaint(choice["message"]["content"], schema)
    return SchemaAnswer(path, "wrong" if sentence else "valid", seconds, sentence)


def complaint(text: str, schema: Any) -> str:  # noqa: ANN401 - JSON
    """Return why a text is not valid by a schema, according to jsonschema; empty if it is."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        errors: Iterable[Any] = kind(schema, format_checker=_FORMATS, registry=Registry()).iter_errors(json.loads(text))
        return next((f"{error.json_path}: {error.message}" for error in errors), "")
    except ValueError as error:
        return f"It is no JSON: {error}"
