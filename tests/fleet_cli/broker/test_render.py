from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker_config.broker import BrokerFilesError, read_description
from fleet_cli.broker import app


def render(*arguments: str) -> None:
    CliRunner().invoke(app, ["render", *arguments], catch_exceptions=False)


def test_production_is_rendered_for_where_it_will_lie(tmp_path: Path) -> None:
    render("--out", str(tmp_path), "--mosquitto", "2.1", "--edge", "edge-7", "--monitor", "desk")
    conf = (tmp_path / "mosquitto.conf").read_text()
    assert "acl_file /etc/mosquitto/fleet/access.acl\n" in conf
    assert "per_listener_settings" not in conf
    assert "user edge-7\n" in (tmp_path / "access.acl").read_text()
    description = read_description(tmp_path / "broker.toml", production=False)
    assert (description.edges, description.monitors) == (("edge-7",), ("desk",))


def test_a_malformed_name_is_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BrokerFilesError, match="_edge"):
        render("--out", str(tmp_path / "out"), "--edge", "_edge")
    assert not (tmp_path / "out").exists()
