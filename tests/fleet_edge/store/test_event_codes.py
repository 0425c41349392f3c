import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_edge.session_log.event_codes import EVENT_CODES, EventKind, Severity, severity_of
from schemas.control import Presence
from schemas.reasons import EndReason, FaultCode, RefusalCode

ROOT = Path(__file__).resolve().parents[3]
KNOWN = {(each.kind, each.code) for each in EVENT_CODES}


def _emitted() -> Iterator[tuple[str, EventKind, str]]:
    """Yield every kind and code that occur as literals in a call, with their location."""
    for package in ("fleet_edge", "fleet_admin", "fleet_cli"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)) if "EventKind." in text else ():
                if not isinstance(node, ast.Call):
                    continue
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                kind, code, *_ = (*node.args, None, None) if node.args else (named.get("kind"), named.get("code"))
                of_kind = isinstance(kind, ast.Attribute) and ast.unparse(kind.value) == "EventKind"
                if of_kind and isinstance(code, ast.Constant):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", EventKind[kind.attr], code.value


EMITTED = list(_emitted())


@pytest.mark.parametrize("where, kind, code", [pytest.param(*each, id=each[0]) for each in EMITTED])  # noqa: PT006
def test_whatever_is_logged_is_in_the_table(where: str, kind: EventKind, code: str) -> None:
    assert (kind, code) in KNOWN, where


def test_there_is_something_to_find() -> None:
    assert len(EMITTED) >= 16


def test_what_a_device_may_be_told_is_in_the_table() -> None:
    assert {code for kind, code in KNOWN if kind is EventKind.REFUSED} == {code.value for code in RefusalCode}
    assert {code for kind, code in KNOWN if kind is EventKind.FAULT} == {code.value for code in FaultCode}
    assert {(EventKind.DEVICE, presence.value) for presence in Presence} <= KNOWN
    assert {(EventKind.SESSION, reason.value) for reason in (EndReason.LOST, EndReason.FAILED)} <= KNOWN


def test_each_is_there_once_and_is_a_sentence() -> None:
    assert len(KNOWN) == len(EVENT_CODES)
    assert all(each.meaning.endswith(".") for each in EVENT_CODES)
    assert {each.kind for each in EVENT_CODES} == set(EventKind)


def test_what_the_table_lacks_is_to_be_looked_at() -> None:
    assert severity_of("edge", "hangs") is Severity.ERROR
    assert severity_of("edge", "unheard-of") is Severity.WARNING
