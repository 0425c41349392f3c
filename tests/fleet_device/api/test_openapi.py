from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings as hypothesis_settings
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.fleet_device.api.openapi_document import ENDPOINTS, document

schemathesis = pytest.importorskip("schemathesis")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

EXAMPLES = 40
HEADERS = {"host": "127.0.0.1"}


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda each: each.path)
def test_every_request_is_answered_as_documented(app: Starlette, endpoint: Any) -> None:
    app.router.routes.append(Route("/openapi.json", lambda _request: JSONResponse(document())))
    api = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    checks = schemathesis.checks
    checks.load_all_checks()
    named = ["response_schema_conformance", "status_code_conformance", "content_type_conformance"]
    chosen = [checks.not_a_server_error, *map(checks.CHECKS.get_one, named)]
    seen: dict[int, int] = {}

    @seed(1)
    @hypothesis_settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=api[endpoint.path]["GET" if endpoint.request is None else "POST"].as_strategy())
    def ask(case: Any) -> None:
        answer = case.call(headers=HEADERS)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        case.validate_response(answer, checks=chosen)

    ask()
    print(endpoint.path, seen)
    assert not {401, 421} & set(seen)
    assert 200 in seen or endpoint.path in ("/v1/models/{name}", "/api/show")  # which need the name of a model
