import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("sentences")
ROOT = Path(__file__).parent.parent
PACKAGES = (
    "schemas",
    "sampling",
    "broker_config",
    "fleet_common",
    "fleet_device",
    "fleet_edge",
    "fleet_admin",
    "fleet_cli",
)
ROOTS = {"FleetError", "BrokerError", "LinkError"}

FOR_PROGRAMS = {
    "ApiProblem", "BadAnswer", "CapacityExceeded", "DrafterError", "GrammarError", "GrammarUnavailable", "LlamaError",
    "MalformedMessage", "NotApplicable", "OutsideGrammar", "Problem", "ProtocolViolation", "SequenceFailed",
    "StoreUnavailable", "TargetAway", "TextCancelled", "TopicError", "UnsupportedModel",
    "VerifierError",
}  # fmt: skip
"""Caught by other code, which adds a message or returns a status: the cause is enough."""

VERBS = (
    "add|ask|begin|build|change|check|choose|close|compare|convert|correct|create|delete|drop|enable|end|"
    "evict|fetch|free|give|have|install|keep|leave|list|load|log|look|lower|make|measure|move|name|open|"
    "pass|pick|point|put|raise|read|remove|renew|repeat|restart|restore|revoke|run|say|see|send|set|"
    "shorten|start|stop|take|try|turn|update|upgrade|use|wait|write"
)
REMEDY = re.compile(rf"(?:^|[;:.,] |\bor )(?:then |or |and )?(?:{VERBS})\b|`[^`]+`|--\w|\bpip install\b", re.IGNORECASE)
PARTICULAR = re.compile(r"\{\}|'[\w.]+'|\b(?:at most|at least|only|must|exactly|needs?|without|its log)\b|: ")
SENTENCE = re.compile(r"^\S+ \S+ .*(?:[.!?}]|(?:pip install|--) ?\S.*)$", re.DOTALL)


def template(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def catalogues() -> dict[str, list[str]]:
    trees = [ast.parse(file.read_text()) for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.Call)]
    bases = {node.name: list(map(last_name, node.bases)) for node in nodes if isinstance(node, ast.ClassDef)}

    def is_error(name: str) -> bool:
        return name in ROOTS or any(is_error(base) for base in bases.get(name, ()) if base != name)

    found = defaultdict(list)
    for node in nodes:
        if isinstance(node, ast.Call) and is_error(name := last_name(node.func)):
            found[name] += list(filter(None, map(template, node.args[:2])))[:1]
    return dict(found)


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[str]]:
    return {name: found for name, found in catalogues().items() if found}


def test_errors_are_found(sentences: dict[str, list[str]]) -> None:
    assert len(sentences) > 50
    assert sum(map(len, sentences.values())) > 500


def test_each_error_is_a_whole_sentence(sentences: dict[str, list[str]]) -> None:
    passed_on = re.compile(r"(?:[\w-]+|\{\}):?\s\{\}\.?")
    found = [(name, each) for name in set(sentences) - {"BadAnswer"} for each in sentences[name]]
    assert [each for each in found if not passed_on.fullmatch(each[1]) and not SENTENCE.search(each[1])] == []


def test_each_error_names_its_cause_or_what_to_do(sentences: dict[str, list[str]]) -> None:
    found = [(name, each) for name in set(sentences) - FOR_PROGRAMS for each in sentences[name]]
    assert [each for each in found if not PARTICULAR.search(each[1]) and not REMEDY.search(each[1])] == []
