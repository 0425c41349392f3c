import pytest

from tests.support.brokers import require_mosquitto


@pytest.fixture
def without_mosquitto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker_config.processes.SYSTEM_PATHS", ())
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.mark.usefixtures("without_mosquitto")
def test_on_ci_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt"):
        require_mosquitto()
