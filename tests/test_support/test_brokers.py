import pytest

from tests.support.brokers import require_mosquitto


@pytest.fixture
def without_mosquitto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker_config.processes.SYSTEM_PATHS", ())
    monkeypatch.setenv("PATH", "/nonexistent")


@pytest.mark.usefixtures("without_mosquitto")
def test_elsewhere_the_test_is_skipped_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt"):
        require_mosquitto()


@pytest.mark.usefixtures("without_mosquitto")
def test_on_ci_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt"):
        require_mosquitto()
