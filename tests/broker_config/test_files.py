import stat
from pathlib import Path

import pytest

from broker_config.broker import Broker, BrokerFilesError, describe, read_description, render_description
from broker_config.files import Profile, render_files, write_files

HOME = Path("/etc/mosquitto/fleet")


@pytest.mark.parametrize(
    "broker",
    [
        Broker(),
        Broker.production(),
        Broker.production(host="10.0.0.1", devices=("a", "b"), banned=("c",)),
        Broker.production(storage=None, user=None, acl_plugin="/usr/lib/x.so"),
    ],
)
def test_a_description_is_read_as_it_was_written(broker: Broker, tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text(render_description(broker))
    assert read_description(path, production=False) == broker


def test_what_a_description_leaves_out_has_productions_default(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text('fleet = "plant"\n[tls]\nca = "other.pem"\n')
    broker = read_description(path)
    assert (broker.fleet, broker.port, broker.host) == ("plant", 8883, None)
    assert (broker.tls.ca, broker.tls.key) == (Path("other.pem"), Path("broker.key"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fleet = ", "TOML"),
        ('fleet = "a/b"', "fleet"),
        ("max_queue = 1", "max_queue"),
        ("[tls]\ncrt = 'a'", "'tls.crt'"),
        ('edges = ["a", "a"]', "description"),
        ('tls = "yes"', "tls"),
    ],
)
def test_an_invalid_description_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text(text)
    with pytest.raises(BrokerFilesError, match=sentence):
        read_description(path)


def test_each_profile_has_its_files() -> None:
    names = {
        profile: {file.name for file in render_files(broker, profile, home=HOME)}
        for profile, broker in {
            Profile.LOOPBACK: Broker(port=1883),
            Profile.PRODUCTION: Broker.production(),
        }.items()
    }
    assert names[Profile.LOOPBACK] == {"broker.toml", "mosquitto.conf", "access.acl"}
    firewall = {"firewall.nft", "systemd/fleet-broker-firewall.service"}
    services = {"mosquitto.service.d/fleet.conf", "fleet-broker-janitor.service", "fleet-broker-janitor.timer"}
    assert names[Profile.PRODUCTION] == names[Profile.LOOPBACK] | firewall | {f"systemd/{each}" for each in services}


@pytest.mark.parametrize(
    ("profile", "values"), [(Profile.LOOPBACK, {"tls": {}}), (Profile.PRODUCTION, {}), (Profile.LOOPBACK, {"port": 0})]
)
def test_a_profile_refuses_an_unfit_description(profile: Profile, values: dict[str, object]) -> None:
    broker = describe({"port": 8883} | values, production=False)
    with pytest.raises(BrokerFilesError):
        render_files(broker, profile, home=HOME)


def test_files_are_written_with_their_modes_and_leave_nothing_behind(tmp_path: Path) -> None:
    files = render_files(Broker.production(), Profile.PRODUCTION, home=HOME)
    for _ in range(2):
        write_files(files, tmp_path)
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path)) for path in written] == sorted(file.name for file in files)
    for file in files:
        assert stat.S_IMODE((tmp_path / file.name).stat().st_mode) == file.mode
    assert stat.S_IMODE((tmp_path / "access.acl").stat().st_mode) == 0o640
