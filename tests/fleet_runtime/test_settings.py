from pathlib import Path

import pytest
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from fleet_link.settings import BrokerSettings, TlsSettings
from fleet_runtime.settings import SettingsError, load_settings


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FLEET_TEST_", env_nested_delimiter="__", extra="forbid")

    name: str = "default"
    number: int = Field(default=1, ge=0)
    broker: BrokerSettings = Field(default_factory=BrokerSettings)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('name = "file"\nnumber = 2\n[broker]\nhost = "file"\nport = 2\n', encoding="utf-8")
    return path


def test_a_flag_comes_before_the_environment_the_file_and_the_default(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings(Settings, config=None, flags={}) == Settings()
    found = load_settings(Settings, config=config, flags={})
    assert (found.name, found.number, found.broker.host, found.broker.port) == ("file", 2, "file", 2)
    monkeypatch.setenv("FLEET_TEST_NAME", "environment")
    monkeypatch.setenv("FLEET_TEST_BROKER__PORT", "3")
    found = load_settings(Settings, config=config, flags={})
    assert (found.name, found.broker.host, found.broker.port) == ("environment", "file", 3)
    found = load_settings(Settings, config=config, flags={"name": "flag", "broker": {"port": 4, "host": None}})
    assert (found.name, found.broker.host, found.broker.port) == ("flag", "file", 4)


def test_a_flag_that_is_not_given_hides_nothing(config: Path) -> None:
    found = load_settings(Settings, config=config, flags={"name": None, "broker": {"host": None, "port": None}})
    assert (found.name, found.broker.host) == ("file", "file")


def test_a_setting_that_cannot_work_is_named_with_its_file(config: Path) -> None:
    config.write_text("number = -1\n", encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load_settings(Settings, config=config, flags={})
    assert str(caught.value).startswith(f"The setting 'number' in {config} cannot be used: ")
    with pytest.raises(SettingsError) as caught:
        load_settings(Settings, config=None, flags={"number": -1})
    assert str(caught.value).startswith("The setting 'number' cannot be used: ")


def test_an_unknown_setting_is_answered_with_those_there_are_in_its_place() -> None:
    with pytest.raises(SettingsError, match="known are broker, name, number"):
        load_settings(Settings, config=None, flags={"nmae": "x"})
    with pytest.raises(SettingsError, match=r"'broker.prot' .* known are ca, certificate, host"):
        load_settings(Settings, config=None, flags={"broker": {"prot": 1}})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(SettingsError, match="cannot be read"):
            load_settings(Settings, config=path, flags={})


@pytest.mark.parametrize("content", [b"name = \n", b"\xff\xfe", b"[broker\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="not valid TOML"):
        load_settings(Settings, config=path, flags={})


@pytest.mark.parametrize("content", ["broker = 5\n", 'broker = "here"\n', "broker = []\n", "name = { a = 1 }\n"])
def test_a_section_of_the_wrong_kind_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match="cannot be used"):
        load_settings(Settings, config=path, flags={"broker": {"port": None}})


def test_an_environment_variable_that_is_no_json_is_one_sentence_without_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLEET_TEST_BROKER", "secret{")
    with pytest.raises(SettingsError, match=r'FLEET_TEST_.*"broker"') as caught:
        load_settings(Settings, config=None, flags={})
    assert "secret" not in str(caught.value)


def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_TEST_BROKER__PASSWORD", "hunter2")
    found = load_settings(Settings, config=None, flags={})
    assert "hunter2" not in repr(found)
    link = found.broker.link("device-1", will=None)
    assert link.password == "hunter2"
    assert "hunter2" not in repr(link)
    with pytest.raises(SettingsError) as caught:
        load_settings(Settings, config=None, flags={"broker": {"port": "hunter2"}})
    assert "hunter2" not in str(caught.value)


def test_the_link_is_told_who_we_are() -> None:
    link = BrokerSettings(host="broker", port=8883, keepalive_s=20).link("device-1", will=None)
    assert (link.client_id, link.username, link.host, link.port, link.keepalive_s) == (
        "device-1", "device-1", "broker", 8883, 20,
    )  # fmt: skip
    assert (link.tls, link.password) == (None, None)
    assert BrokerSettings(username="other").link("device-1", will=None).username == "other"


def test_certificates_make_an_encrypted_link() -> None:
    files = {"ca": Path("ca.pem"), "certificate": Path("own.pem"), "key": Path("own.key")}
    assert BrokerSettings(**files).link("d", will=None).tls == TlsSettings(*files.values())
    assert BrokerSettings(ca=Path("ca.pem")).link("d", will=None).tls == TlsSettings(Path("ca.pem"))


@pytest.mark.parametrize(
    "files",
    [{"certificate": "own.pem", "key": "own.key"}, {"key": "own.key"}, {"ca": "ca.pem", "key": "own.key"}],
    ids=repr,
)
def test_half_a_tls_configuration_is_refused_and_does_not_end_in_a_plain_link(files: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="set it too"):
        load_settings(Settings, config=None, flags={"broker": files})


@pytest.mark.parametrize("wrong", [{"port": 0}, {"port": 65536}, {"host": ""}, {"keepalive_s": 1}], ids=repr)
def test_a_broker_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="broker"):
        load_settings(Settings, config=None, flags={"broker": wrong})
