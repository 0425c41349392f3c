import pytest

from fleet_common.settings import load_settings
from fleet_edge.settings import EdgeSettings
from tests.support.edge_thread import NO_QUOTAS
from tests.support.processes import quota_variables


def test_an_edge_of_a_benchmark_has_no_quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"fleet": "home", "target": "models/target"}
    assert load_settings(EdgeSettings, config=None, flags=flags).quotas != NO_QUOTAS
    for name, value in quota_variables().items():
        monkeypatch.setenv(name, value)
    assert load_settings(EdgeSettings, config=None, flags=flags).quotas == NO_QUOTAS
