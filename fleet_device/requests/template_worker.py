"""Worker that renders chat templates, since a template may compute without end, or fill the memory.

Requests and replies are lines of JSON. A request has a limit of processor time, whose end ends the process, and the
process one of memory.
"""

import functools
import json
import signal
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fleet_common.host import limit_memory

_MAX_REPEAT: Final = 1 << 16
_MAX_REASON: Final = 300
_KNOWN: Final = 4
"""Compiled templates that are kept."""


class _Refusal(Exception):  # noqa: N818
    ...


class _TooLong(Exception):  # noqa: N818
    ...


def main() -> None:
    """Answer requests on standard input until it ends; the arguments are seconds and megabytes."""
    cpu_s, memory_mb = float(sys.argv[1]), int(sys.argv[2])
    limit_memory(memory_mb << 20)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # the signal ends the process
        reply = json.dumps(_reply(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.write(f"{reply}\n")
        sys.stdout.flush()


def _reply(request: dict[str, Any]) -> dict[str, str]:
    try:
        template = _compiled(request["source"])
    except (TemplateError, RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        return {"unreadable": _reason(error)}
    now = datetime.fromisoformat(request["now"])
    try:
        parts = template.generate(**request["names"], strftime_now=now.strftime)
        return {"text": _bounded(parts, request["most"])}
    except _Refusal as refusal:
        return {"declined": _reason(refusal)}
    except _TooLong:
        return {"long": ""}
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return {"failed": _reason(error)}


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:_MAX_REASON].rstrip(".")


def _bounded(parts: Iterable[str], most: int) -> str:
    kept: list[str] = []
    size = 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > most:
            raise _TooLong
    return "".join(kept)


@functools.lru_cache(_KNOWN)
def _compiled(source: str) -> Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
    environment.globals = {
        "namespace": environment.globals["namespace"],
        "range": environment.globals["range"],
        "dict": environment.globals["dict"],
        "raise_exception": _refuse,
    }
    environment.filters["tojson"] = _json
    return environment.from_string(source)


def _json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' filter does; Jinja's own is for HTML: it sorts keys and escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(sentence: str) -> NoReturn:
    raise _Refusal(str(sentence))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also limits the two operators that make something huge of something small."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401 - Jinja's
        for count, what in ((left, right), (right, left)):
            repeats = isinstance(count, int) and isinstance(what, str | list | tuple)
            if operator == "**" or (repeats and len(what) * count > _MAX_REPEAT):
                raise SecurityError(f"the operator {operator} would make something huge")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """Read `{% generation %}`, which marks the assistant's words for training in some templates."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


if __name__ == "__main__":
    main()
