import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet_common.settings import SettingsError, load_settings
from fleet_edge.preflight import preflight
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item, TargetAway, VerifierError
from fleet_edge.verifiers.registry import check_verifier
from fleet_edge.verifiers.remote.local import endpoint_url
from tests.fleet_edge.verifiers.remote.serving import SCRIPT, SIZE, TOP, asking, server
from tests.support.inference_server import Fault
from tests.support.markov import MarkovScript
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.waiting import until


def key_file(folder: Path, key: str = "right", mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_text(f"{key}\n", encoding="ascii")
    path.chmod(mode)
    return path


def test_a_server_that_names_all_tokens_serves_every_policy() -> None:
    with server() as one, asking(one, top_logprobs=64) as verifier:
        assert verifier.info.max_top_k is None


@pytest.mark.parametrize(
    ("options", "settings", "sentence"),
    [
        ({"key": "right"}, {}, "remote.api_key_file"),
        ({"max_logprobs": TOP - 1}, {}, f"max allowed: {TOP - 1}.*--max-logprobs {TOP}, or set 'remote.top_logprobs'"),
        ({}, {"served_model": "other"}, "served/model"),
        ({"words": [f"x{token}" for token in range(SIZE)]}, {}, "Token"),
        ({"words": SCRIPT.words[:20]}, {}, "family"),
        ({"context": 5}, {}, "max_model_len"),
    ],
)
def test_an_unfit_server_is_refused(options: dict[str, Any], settings: dict[str, Any], sentence: str) -> None:
    one = server(**{name: value for name, value in options.items() if name != "words"})
    one.words = options.get("words", one.words)
    with one, pytest.raises(VerifierError, match=sentence) as caught, asking(one, **settings):
        pass
    assert "\n" not in str(caught.value)


def test_a_port_where_nobody_listens_is_told_of() -> None:
    with server() as one:
        pass
    with (
        pytest.raises(VerifierError),
        asking(one),
    ):
        pass


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with server(fault=Fault(hangs=True)) as one:
        with pytest.raises(VerifierError, match=r"0\.2"), asking(one, request_s=0.2):
            pass
        one.fault.hangs = False


def test_another_model_at_the_address_is_not_used() -> None:
    other = MarkovScript(size=SIZE, seed=4, period=5)
    with server() as one, asking(one) as verifier:
        one.kill(None, None, None)
        verifier.open(1)
        with pytest.raises(TargetAway):
            verifier.score([Item(1, [1, 2], 1)])
        with server(script=other, port=one.port):
            until(lambda: "the same model" in verifier.away())


def test_the_key_goes_with_every_request_and_nowhere_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with server(key="right") as one, caplog.at_level(logging.DEBUG):
        with asking(one, api_key_file=key_file(tmp_path)) as verifier:
            assert verifier.away() == ""
        wrong = key_file(tmp_path, "wrong-secret")
        with (
            pytest.raises(VerifierError, match="key") as caught,
            asking(one, api_key_file=wrong),
        ):
            pass
    assert "wrong-secret" not in caplog.text + str(caught.value) + repr(caught.value)
    assert "right" not in caplog.text


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: key_file(folder, mode=0o640), "600"),
        (lambda folder: key_file(folder, ""), "key"),
        (lambda folder: key_file(folder, "two words"), "key"),
        (lambda folder: folder / "missing", "cannot be read"),
        (lambda folder: folder, "cannot be read"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_told_of(make: Callable[[Path], Path], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(VerifierError, match=sentence), asking("http://127.0.0.1:9", api_key_file=make(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "remote.endpoint"),
        ("http://a:1, http://b:1", "router"),
        ("10.0.0.5:8000", "inference"),
        ("ftp://host", "inference"),
        ("http://host:99999", "inference"),
        ("http://host/?x=1", "inference"),
        ("http://user:secret@host", "key"),
    ],
)
def test_addresses_that_are_none_are_told_of(text: str, sentence: str) -> None:
    with pytest.raises(VerifierError, match=sentence) as caught:
        endpoint_url(text)
    assert "secret" not in str(caught.value)


def test_the_preflight_looks_for_the_tokenizer(tmp_path: Path) -> None:
    settings = {"engine": "remote", "remote": {"endpoint": "http://a:1"}, "target": str(tmp_path)}
    with pytest.raises(VerifierError, match=r"tokenizer\.json"):
        check_verifier(EdgeSettings.model_validate(settings))
    with pytest.raises(VerifierError, match="served"):
        check_verifier(EdgeSettings.model_validate(settings | {"target": str(tmp_path / "missing")}))


def test_the_preflight_says_which_setting_is_wrong_and_where_it_comes_from(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"engine": "remote", "target": str(tmp_path)}
    usual |= {"db": f"sqlite:///{tmp_path / 'log'}", "spool": tmp_path / "spool"}
    broker = MemoryBroker()
    key = {"endpoint": "http://a:1", "api_key_file": tmp_path / "key"}
    for wrong, place in (
        ({}, r"\(setting 'remote.endpoint', the default\)"),
        ({"endpoint": "10.0.0.5:8000"}, r"\(setting 'remote.endpoint', flag --endpoint\)"),
        (key, r"\(setting 'remote.api_key_file', flag --api-key-file\)"),
    ):
        settings = load_settings(EdgeSettings, config=None, flags=usual | {"remote": wrong}, environment={})
        with pytest.raises(SettingsError, match=place), broker.running():
            preflight(settings, make_link=lambda link: MemoryLink(broker, link.client_id))
