from functools import partial
from pathlib import Path

import pytest

from fleet_admin.dashboard.settings import DashboardSettings
from fleet_cli.commands import CommandError
from fleet_edge.session_log.database import open_store
from tests.support.command import Run, as_json, refused


@pytest.fixture
def admin(fleet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return partial(fleet, "admin")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config" / "fleet" / "admin.toml"


def test_a_flag_and_a_variable_override_the_profile(
    admin: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.parent.mkdir(parents=True)
    file.write_text('db = "sqlite:////nowhere/at/all.sqlite3"\n')
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    open_store(url).close()
    assert "/nowhere/at" in refused(admin("devices"))
    assert as_json(admin("devices", "--json", "--db", url)) == []
    monkeypatch.setenv("FLEET_DB", url)
    assert as_json(admin("devices", "--json")) == []
    monkeypatch.delenv("FLEET_DB")
    other = tmp_path / "other.toml"
    other.write_text(f'db = "{url}"\n')
    assert "No device gw-9 has been seen" in refused(admin("retire", "gw-9", "--log-only", "--config", other))
    monkeypatch.setenv("FLEET_ADMIN_CONFIG", str(other))
    assert as_json(admin("devices", "--json")) == []
    monkeypatch.setenv("FLEET_ADMIN_CONFIG", str(tmp_path / "new" / "south.toml"))
    assert "cannot be read" in refused(admin("devices"))


@pytest.mark.parametrize(
    ("content", "command", "sentence"),
    [
        ("fleet = ", "devices", "is not valid TOML"),
        ('host = "north"', "devices", "no setting of that name, maybe 'broker.host' is meant"),
        ("[broker]\nport = 0", "set draft_length=4 --all", "'broker.port' = 0"),
        ('db = "mysql://north"', "devices", "The database 'mysql' is not supported"),
    ],
)
def test_a_profile_that_cannot_be_used_is_one_sentence(
    admin: Run, file: Path, content: str, command: str, sentence: str
) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert sentence in refused(admin(*command.split()))
    assert file.read_text() == content


def test_the_dashboard_serves_the_database_of_the_profile_or_the_variable(
    admin: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = list[str]()

    def take(settings: DashboardSettings) -> None:
        served.append(settings.db)
        raise CommandError("Only the settings matter here.")

    monkeypatch.setattr("fleet_admin.dashboard.services.open_services", take)
    urls = {name: f"sqlite:///{tmp_path / name}.sqlite3" for name in ("profile", "general", "own", "flag")}
    file.parent.mkdir(parents=True)
    file.write_text(f'db = "{urls["profile"]}"\n')
    admin("serve")
    monkeypatch.setenv("FLEET_DB", urls["general"])
    admin("serve")
    monkeypatch.setenv("FLEET_DASHBOARD_DB", urls["own"])
    admin("serve")
    admin("serve", "--db", urls["flag"])
    assert served == list(urls.values())
