from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings

from fleet_admin.dashboard.api import PREFIX
from fleet_admin.dashboard.app import create_app
from fleet_admin.dashboard.endpoints import ENDPOINTS
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.settings import AccountRole
from tests.fleet_admin.dashboard.conftest import ACTOR

schemathesis = pytest.importorskip("schemathesis")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

EXAMPLES = 80


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda each: f"{each.method} {each.path}")
def test_no_request_makes_the_api_fail(services: Services, endpoint: Any) -> None:
    key = services.keys.add("fuzzer", account="olga", role=AccountRole.OPERATOR, actor=ACTOR)
    headers = {"authorization": f"Bearer {key}", "host": "127.0.0.1"}
    api = schemathesis.openapi.from_asgi(f"{PREFIX}/openapi.json", create_app(services), headers=headers)
    checks = schemathesis.checks
    checks.load_all_checks()
    named = ["response_schema_conformance", "status_code_conformance", "content_type_conformance"]
    chosen = [checks.not_a_server_error, *map(checks.CHECKS.get_one, named)]
    seen: dict[int, int] = {}

    @seed(1)
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=api[PREFIX + endpoint.path][endpoint.method].as_strategy())
    def ask(case: Any) -> None:
        answer = case.call(headers=headers)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        case.validate_response(answer, checks=chosen)

    ask()
    print(endpoint.method, endpoint.path, seen)
    assert 401 not in seen
    assert sum(seen.values()) >= 1
