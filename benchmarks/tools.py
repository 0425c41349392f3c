"""Tools: cases of the Berkeley function-calling leaderboard, BFCL (answers that parse, that are valid, that are right).

A real mosquitto, a real edge and a real device are started. The package `openai` asks for an answer to each case, in
which several calls are allowed, and with temperature 0. In all categories but `irrelevance` a call is required. The
library jsonschema validates the arguments of each call, and BFCL's own checker compares the calls with the right ones.
The package `bfcl-eval`, which has cases and checker, is installed in --tools once. Takes about ten seconds a case.
"""

import argparse
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import jsonschema
from openai import OpenAI, OpenAIError

from benchmarks.harness import MODELS, Bench, SuiteReport, add_engine, number_of, say, table
from benchmarks.processes import BenchError, venv

_PACKAGE: Final = "bfcl-eval==2026.3.23"
_NO_CALL: Final = "irrelevance"
_CATEGORIES: Final = ("simple_python", "multiple", "parallel", "parallel_multiple", _NO_CALL)
_FIGURES: Final = ("cases", "calls", "several", "truncated", "parsed", "valid", "right")
_CONTEXT: Final = 4096
_RETRIES: Final = 20  # of a device whose queue is full

Check = Callable[[Any, Any, Any, str], bool]
"""Whether calls are right: takes functions, calls, the right calls, and the category."""


@dataclass(frozen=True, slots=True)
class ToolCase:
    category: str
    name: str
    messages: Any
    functions: Any
    right: Any  # what BFCL's checker compares with; None where no function fits


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """Answer to a case: its number of calls, whether they parse, are valid and right, and what is wrong."""

    category: str
    case: str
    calls: int = 0
    truncated: bool = False
    parsed: bool = False
    valid: bool = False
    right: bool = False
    sentence: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=number_of(int, 1), default=20, help="of a category (default: %(default)s)")
    parser.add_argument("--clients", type=number_of(int, 1), default=4, help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 1), default=400, help="of an answer (default: %(default)s)")
    parser.add_argument("--tools", type=Path, default=MODELS.parent / "tools", help="(default: %(default)s)")
    add_engine(parser)


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    # Its dependencies are the clients of all models.
    venv(options.tools / "bfcl", "--no-deps", _PACKAGE)
    packages = next((options.tools / "bfcl").resolve().glob("lib/python*/site-packages"))
    check, cases = load_checker(packages), load_cases(packages / "bfcl_eval" / "data", options.cases)
    device = {"api_waiting": options.clients, "context": _CONTEXT}
    target = bench.target()
    with (
        bench.broker() as broker,
        bench.edge(broker.port, target),
        bench.device(broker.port, **device) as served,
        OpenAI(base_url=served.url, api_key="unused", max_retries=_RETRIES) as client,
        ThreadPoolExecutor(options.clients) as pool,
    ):
        answers = []
        for answer in pool.map(lambda case: ask(client, case, check, tokens=options.tokens), cases):
            answers.append(answer)
            if len(answers) % 10 == 0:
                say(f"{len(answers)} of {len(cases)} cases")
    return judge(answers)


def judge(answers: Sequence[ToolAnswer]) -> SuiteReport:
    """Print counts by category. Only a truncated answer may fail to parse or to be valid."""
    counts = dict[str, Counter[str]]()
    for each in answers:
        flags = {name: int(getattr(each, name)) for name in ("truncated", "parsed", "valid", "right")}
        counted = counts.setdefault(each.category, Counter())
        counted.update(cases=1, calls=each.calls, several=int(each.calls > 1), **flags)
    table([{"category": name, **counts[name]} for name in counts], {"category": ""} | dict.fromkeys(_FIGURES, "d"))
    wrong = [f"{each.case}: {each.sentence}" for each in answers if not (each.valid or each.truncated)]
    return SuiteReport([asdict(each) for each in answers], wrong=wrong)


def load_cases(data: Path, number: int) -> list[ToolCase]:
    cases = []
    for category in _CATEGORIES:
        rights: dict[str, Any] = {}
        name = f"BFCL_v4_{category}.json"
        if category != _NO_CALL:
            rights = {line["id"]: line["ground_truth"] for line in _lines(data / "possible_answer" / name)}
        for line in islice(_lines(data / name), number):
            right = rights.get(line["id"])
            cases.append(ToolCase(category, line["id"], line["question"][0], line["function"], right))
    return cases


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_checker(packages: Path) -> Check:
    """Return BFCL's checker. It asks its list of models, which imports all clients, only how one spells names."""
    sys.path.append(str(packages))
    models = ModuleType("bfcl_eval.constants.model_config")
    vars(models)["MODEL_CONFIG_MAPPING"] = {"fleet": SimpleNamespace(underscore_to_dot=True)}
    sys.modules[models.__name__] = models
    checker: Any = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def check(functions: Any, calls: Any, right: Any, category: str) -> bool:  # noqa: ANN401 - JSON
        return bool(checker.ast_checker(functions, calls, right, python, category, "fleet")["valid"])

    return check


_TYPES: Final = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function of BFCL as a tool: names without dots, and types of JSON schemas."""
    parameters = _schema(function["parameters"])
    described = {"name": _name(function), "description": function["description"], "parameters": parameters}
    return {"type": "function", "function": described}


def _name(function: Mapping[str, Any]) -> str:
    return re.sub(r"\.", "_", function["name"])


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in schema.items() if key not in {"optional", "format"}}
    found["type"] = _TYPES.get(schema["type"], schema["type"])
    if "properties" in schema:
        found["properties"] = {name: _schema(inner) for name, inner in schema["properties"].items()}
    if "items" in schema:
        found["items"] = _schema(schema["items"])
    return found


def ask(client: OpenAI, case: ToolCase, check: Check, *, tokens: int) -> ToolAnswer:
    """Ask for an answer to a case, and compare it with what is right."""
    tools = [tool(function) for function in case.functions]
    request: Any = {"messages": case.messages, "tools": tools, "temperature": 0, "max_tokens": tokens}
    try:
        reply = client.chat.completions.create(
            model="fleet", tool_choice="auto" if case.right is None else "required", **request
        )
    except OpenAIError as error:
        raise BenchError(f"{case.name}: {error}") from None
    choice = reply.choices[0]
    truncated = choice.finish_reason == "length"
    called = choice.message.tool_calls or []
    answer = {"category": case.category, "case": case.name, "calls": len(called), "truncated": truncated}
    try:
        calls = [{call.function.name: json.loads(call.function.arguments)} for call in called]
    except ValueError as error:
        return ToolAnswer(**answer, sentence=f"It does not parse: {error}")
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
    try:
        for name, arguments in (pair for call in calls for pair in call.items()):
            jsonschema.validate(arguments, schemas[name])
    except (jsonschema.ValidationError, KeyError) as error:
        return ToolAnswer(**answer, parsed=True, sentence=f"It is not valid: {error!r}"[:500])
    right = not calls if case.right is None else check(case.functions, calls, case.right, case.category)
    return ToolAnswer(**answer, parsed=True, valid=True, right=right)
