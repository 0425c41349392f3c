import json
from pathlib import Path
from typing import Any

import pytest

from fleet_common.mqtt.settings import LinkSettings
from fleet_common.settings import SettingsError, load_settings
from fleet_edge.edge import Edge
from fleet_edge.preflight import preflight
from fleet_edge.session_log.spool import Spool
from fleet_edge.settings import EdgeSettings
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = MemoryBroker()
        self.connected: list[str] = []
        target = folder / "target"
        target.mkdir()
        (target / "config.json").write_text(json.dumps({}))
        (target / "model.safetensors").write_bytes(b"")

    def settings(self, **flags: Any) -> EdgeSettings:
        usual = {
            "target": str(self.folder / "target"),
            "db": f"sqlite:///{self.folder / 'log.sqlite3'}",
            "spool": self.folder / "spool",
        }
        return load_settings(EdgeSettings, config=None, flags=usual | flags, environment={})

    def link(self, link: LinkSettings) -> MemoryLink:
        assert link.will is None, "nobody must be told that an edge is gone that has not come"
        self.connected.append(link.client_id)
        return MemoryLink(self.broker, link.client_id)

    def problems(self, **flags: Any) -> list[str]:
        with pytest.raises(SettingsError) as caught, self.broker.running():
            preflight(self.settings(**flags), make_link=self.link)
        return str(caught.value).splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_is_well_passes_and_leaves_nothing_open(place: Place) -> None:
    with place.broker.running():
        for _ in range(2):  # a lock that was kept would stop the second
            preflight(place.settings(), make_link=place.link)
    assert place.connected == ["fleet:edge-1", "fleet:edge-1"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("db", "sqlite:////no/such/folder/log.sqlite3", "The folder /no/such/folder of the database does not exist"),
        ("db", "mysql://host/log", "The database 'mysql' is not supported"),
        ("db", "nonsense", "The database URL cannot be read"),
        ("target", "/no/such/model", "There is no folder or file /no/such/model"),
        ("target", "/no/such/model.gguf", "There is no file /no/such/model.gguf"),
        ("spool", "/dev/null/spool", "The spool folder /dev/null/spool cannot be used"),
    ],
)
def test_an_impossible_setting_is_named_with_its_source(place: Place, name: str, value: str, said: str) -> None:
    (line,) = place.problems(**{name: value})
    assert line.startswith(said)
    assert line.endswith(f" (setting '{name}', flag --{name}).")


def test_all_that_cannot_work_is_told_at_once(place: Place) -> None:
    place.broker.up = False
    found = place.problems(db="mysql://host/log", target="/no/such/model", spool=Path("/dev/null/spool"))
    assert [line.split("(")[-1] for line in found[:3]] == [
        "setting 'target', flag --target).",
        "setting 'db', flag --db).",
        "setting 'spool', flag --spool).",
    ]
    assert len(found) == 4
    assert "broker" in found[3]


def test_a_running_edge_is_not_thrown_off_the_broker(place: Place) -> None:
    running = Spool(place.folder / "spool")
    (line,) = place.problems()
    running.close()
    assert "is in use by another process" in line
    assert place.connected == []


def test_an_edge_tells_a_bad_database_before_it_loads_the_model(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    monkeypatch.setattr("fleet_edge.edge.load_verifier", lambda *given: loaded.append(given))
    settings = place.settings(db="sqlite:////no/such/folder/log.sqlite3")
    with pytest.raises(SettingsError, match="/no/such/folder"), place.broker.running():
        Edge(settings, make_link=place.link).run()
    with pytest.raises(SettingsError, match="/no/such/folder"), place.broker.running():
        Edge(settings, make_link=place.link).__enter__()
    assert loaded == []
