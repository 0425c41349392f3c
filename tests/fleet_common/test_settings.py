from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field, SecretStr

from fleet_common.mqtt.settings import BrokerSettings, TlsSettings
from fleet_common.settings import Settings, SettingsError, load_settings, setting


class Example(Settings):
    variable_prefix: ClassVar[str] = "FLEET_TEST_"

    name: str = setting("default", "A name.")
    number: int = setting(1, "A number.", ge=0)
    folder: Path = setting(Path("here"), "A folder.")
    token: SecretStr | None = setting(None, "A secret.")
    url: str = setting("none", "May hold a password.", in_errors=False)
    names: tuple[str, ...] = setting((), "Names.")
    broker: BrokerSettings = Field(default_factory=BrokerSettings)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('name = "file"\nnumber = 2\n[broker]\nhost = "file"\nport = 2\n', encoding="utf-8")
    return path


def test_a_flag_precedes_environment_file_and_default(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(Example, config=None, flags={}) == Example()
    found = load_settings(Example, config=config, flags={})
    assert (found.name, found.number, found.broker.host, found.broker.port) == ("file", 2, "file", 2)
    monkeypatch.setenv("FLEET_TEST_NAME", "environment")
    monkeypatch.setenv("FLEET_TEST_BROKER__PORT", "3")
    found = load_settings(Example, config=config, flags={})
    assert (found.name, found.broker.host, found.broker.port) == ("environment", "file", 3)
    found = load_settings(Example, config=config, flags={"name": "flag", "broker": {"port": 4, "host": None}})
    assert (found.name, found.broker.host, found.broker.port) == ("flag", "file", 4)


def complaints(**sources: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(Example, **{"config": None, "flags": {}, "environment": {}} | sources)
    return str(caught.value).splitlines()


def test_a_setting_that_cannot_work_is_told_with_its_value_and_its_source(config: Path) -> None:
    config.write_text("# first\n\nnumber = -1\n", encoding="utf-8")
    tail = "cannot be used: it must be a whole number of at least 0."
    assert complaints(config=config) == [f"The setting 'number' = -1 ({config}) {tail}"]
    assert complaints(environment={"FLEET_TEST_NUMBER": "x"}) == [
        f"The setting 'number' = 'x' (environment variable FLEET_TEST_NUMBER) {tail}"
    ]
    assert complaints(flags={"number": "1.5"}) == [f"The setting 'number' = '1.5' (flag --number) {tail}"]
    assert complaints(flags={"number": "1.5"}, by_program=True) == [f"The setting 'number' = '1.5' (argument) {tail}"]


def test_all_that_cannot_work_is_told_at_once_in_whatever_sources_it_stands(config: Path) -> None:
    config.write_text('number = "many"\n[broker]\nport = 0\nprot = 1\n', encoding="utf-8")
    found = complaints(
        config=config,
        flags={"broker": {"host": ""}},
        environment={"FLEET_TEST_BROKER__KEEPALIVE_S": "soon"},
    )
    assert {line.split("'")[1] for line in found if "'" in line} == {
        "number", "broker.port", "broker.prot", "broker.host", "broker.keepalive_s",
    }  # fmt: skip
    assert len(found) == 5


def test_settings_know_where_they_come_from(config: Path) -> None:
    found = load_settings(Example, config=config, flags={"broker": {"host": "x"}}, environment={"FLEET_TEST_NAME": "x"})
    assert found.origin("broker.host") == "flag --host"
    assert found.origin("name") == "environment variable FLEET_TEST_NAME"
    assert found.origin("broker.port") == str(config)
    assert found.origin("folder") == "the default"
    assert Example(name="x").origin("name") == ""


def test_an_unknown_setting_is_answered_with_those_that_are_like_it() -> None:
    near = "there is no setting of that name, maybe"
    assert near + " 'name'" in complaints(flags={"nmae": "x"})[0]
    assert near + " 'broker.port' is meant" in complaints(flags={"broker": {"prot": 1}})[0]
    assert near + " 'broker.host' is meant" in complaints(flags={"host": "x"})[0]
    assert "url" in complaints(flags={"xyz": 1})[0]
    assert "host" in complaints(flags={"broker": {"xyz": 1}})[0]
    assert "setting" in complaints(environment={"FLEET_TEST_BROKER__XYZ": "1"})[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(SettingsError):
            load_settings(Example, config=path, flags={})


@pytest.mark.parametrize("content", [b"name = \n", b"\xff\xfe", b"[broker\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="TOML"):
        load_settings(Example, config=path, flags={})


@pytest.mark.parametrize("content", ["broker = 5\n", 'broker = "here"\n', "broker = []\n"])
def test_a_section_of_the_wrong_kind_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content, encoding="utf-8")
    assert complaints(config=path) == [
        f"The setting 'broker' ({path}) cannot be used: it must be a section, [broker] in TOML."
    ]


def test_a_file_that_is_far_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.toml"
    path.write_text("# x\n" * 20_000, encoding="utf-8")
    assert "has more than" in complaints(config=path)[0]


def test_a_variable_that_is_no_list_or_a_section_is_one_sentence_without_its_value() -> None:
    (line,) = complaints(environment={"FLEET_TEST_NAMES": "secret{"})
    assert line == "The environment variable FLEET_TEST_NAMES is not valid JSON: write a list."
    (line,) = complaints(environment={"FLEET_TEST_BROKER": "secret{"})
    assert "it must be a section, [broker] in TOML" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    "flags",
    [
        {"token": ["hunter2"]},
        {"token": {"hunter2": 1}},
        {"url": ["hunter2"]},
        {"broker": {"password": ["hunter2"]}},
        {"broker": "mqtt://user:hunter2@host"},
        {"tokn": "hunter2"},
        {"broker": {"pasword": "hunter2"}},
    ],
    ids=repr,
)
def test_a_secret_is_never_shown(flags: dict[str, object]) -> None:
    assert "hunter2" not in "".join(complaints(flags=flags))


def test_a_password_is_not_in_the_settings_text() -> None:
    found = load_settings(Example, config=None, flags={}, environment={"FLEET_TEST_BROKER__PASSWORD": "hunter2"})
    assert "hunter2" not in repr(found)
    link = found.broker.link("home", "device-1", will=None)
    assert link.password == "hunter2"
    assert "hunter2" not in repr(link)


def test_the_link_is_told_who_we_are() -> None:
    link = BrokerSettings(host="broker", port=8883, keepalive_s=20).link("home", "device-1", will=None)
    assert (link.client_id, link.username, link.host, link.port, link.keepalive_s) == (
        "home:device-1", "device-1", "broker", 8883, 20,
    )  # fmt: skip
    assert (link.tls, link.password, link.anonymous_too) == (None, None, True)
    link = BrokerSettings(username="other").link("home", "device-1", will=None)
    assert (link.username, link.anonymous_too) == ("other", False)


def test_certificates_make_an_encrypted_link() -> None:
    files = {"ca": Path("ca.pem"), "certificate": Path("own.pem"), "key": Path("own.key")}
    link = BrokerSettings(**files).link("home", "d", will=None)
    assert (link.tls, link.client_id, link.username) == (TlsSettings(*files.values()), "d", None)
    link = BrokerSettings(ca=Path("ca.pem")).link("home", "d", will=None)
    assert (link.tls, link.client_id, link.port) == (TlsSettings(Path("ca.pem")), "home:d", 8883)
    assert BrokerSettings(ca=Path("ca.pem"), port=1883).port == 1883


@pytest.mark.parametrize(
    "files",
    [{"certificate": "own.pem", "key": "own.key"}, {"key": "own.key"}, {"ca": "ca.pem", "key": "own.key"}],
    ids=repr,
)
def test_half_a_tls_configuration_is_refused_and_does_not_end_in_a_plain_link(files: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        load_settings(Example, config=None, flags={"broker": files})
