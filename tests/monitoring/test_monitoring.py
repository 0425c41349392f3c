import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleet_common.metrics import MetricKind
from fleet_edge.metrics import CATALOGUE
from schemas.control import Presence
from schemas.reasons import EndReason, FaultCode, RefusalCode

FOLDER = Path(__file__).parents[2] / "monitoring"
RULES, TESTS = FOLDER / "prometheus" / "alerts.yml", FOLDER / "prometheus" / "alerts_test.yml"
DASHBOARD = FOLDER / "grafana" / "fleet.json"

SERIES = {
    each.name + ending: each
    for each in CATALOGUE
    for ending in (("_bucket", "_sum", "_count") if each.kind is MetricKind.HISTOGRAM else ("",))
}
LABELS = {"instance", "job", "le"}
VALUES = {
    "state": {each.value for each in Presence},
    "reason": {each.value for each in EndReason},
}

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: scripts/need-promtool")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def queries() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def check(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["promtool", *map(str, arguments)], check=False, capture_output=True, text=True)


@pytest.mark.parametrize(("title", "query"), list(queries()), ids=lambda text: text[:30])
def test_every_series_and_label_of_a_query_is_told_by_an_edge(title: str, query: str) -> None:
    named = set(re.findall(r"\bdssd_\w+", query))
    assert named or "up{" in query, title
    assert named <= set(SERIES), named - set(SERIES)
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
    labels |= {
        name.strip() for group in re.findall(r"\b(?:by|ignoring)\s*\(([^)]*)\)", query) for name in group.split(",")
    }
    assert labels <= LABELS | {label for name in named for label in SERIES[name].labels}, title


def test_what_queries_choose_by_is_there_to_choose() -> None:
    for _, query in queries():
        for label, value in re.findall(r"(state|reason)=~?\"([^\"$]*)\"", query):
            assert set(value.split("|")) <= VALUES[label], value
        for code in re.findall(r"code!=\"([^\"]*)\"", query):
            assert code in {each.value for kind in (RefusalCode, FaultCode) for each in kind}


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for _, query in queries() for name in re.findall(r"\bdssd_\w+", query)}
    assert {each.name for each in CATALOGUE} == {SERIES[name].name for name in shown}


def test_every_rule_says_how_grave_it_is_and_what_to_do_and_is_tested() -> None:
    tested = {
        case["alertname"]: bool(case["exp_alerts"])
        for group in yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]
        for case in sorted(group["alert_rule_test"], key=lambda case: bool(case["exp_alerts"]))
    }
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert tested.get(rule["alert"]), f"{rule['alert']} is never seen to fire"


@promtool
def test_the_rules_fire_when_they_are_to() -> None:
    done = check("test", "rules", TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_takes_the_dashboards_queries(tmp_path: Path) -> None:
    asked = [
        {
            "record": f"dashboard:query:{number}",
            "expr": query.replace("$__rate_interval", "5m").replace("$instance", ".*"),
        }
        for number, (_, query) in enumerate(queries())
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": asked}]}), encoding="utf-8")
    done = check("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
