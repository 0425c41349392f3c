import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from fleet_common.hub import hub_access, is_cached, is_reachable


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def place(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_one_that_does_not_answer_in_time_is_not() -> None:
    answers = threading.Event()

    def connect(_host: str, _port: int) -> None:
        answers.wait()

    try:
        assert not is_reachable(connect=connect, wait_s=0.05)
    finally:
        answers.set()


def test_a_proxy_is_what_must_be_reached(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", f"http://{place(listener)}")
    assert is_reachable()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert not is_reachable()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{place(listener)}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert is_reachable()


def test_without_the_hub_the_client_is_offline_and_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    logger = logging.getLogger("huggingface_hub.utils._http")
    level = logger.getEffectiveLevel()
    with hub_access() as reachable:
        assert not reachable
        assert constants.is_offline_mode()
        assert not logger.isEnabledFor(logging.WARNING)
    assert not constants.is_offline_mode()
    assert logger.getEffectiveLevel() == level


def test_a_machine_that_is_set_offline_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not is_reachable(connect=lambda *_: pytest.fail("asked"))
    with hub_access():
        pass
    assert constants.HF_HUB_OFFLINE


def test_what_is_in_the_cache_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert is_cached("owner/name", "config.json")
    assert not is_cached("owner/name", "other.json")
    assert not is_cached("owner/other", "config.json")
    assert not is_cached("not a name", "config.json")
