import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml

from broker_config.processes import reserved_port
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_common.mqtt.tls import certificate_name
from fleet_common.settings import load_settings
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.errors import StoreError
from fleet_edge.session_log.log import SessionLog
from tests.fleet_edge.store import samples
from tests.support.brokers import require_mosquitto
from tests.support.command import Run, as_json
from tests.support.databases import PostgresServer, running_server
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, *options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts" / "example-fleet"), str(folder), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def test_inventory_database_and_profile_have_one_password_that_others_cannot_read(tmp_path: Path) -> None:
    folder = tmp_path / "example"
    made = make(folder)
    assert made.returncode == 0, made.stderr
    vault = yaml.safe_load((folder / "inventory/group_vars/all/vault.yml").read_text())
    password = vault["vault_fleet_db"].split("@")[0].rpartition(":")[2]
    assert len(password) >= 32
    holding = [path for path in folder.rglob("*") if path.is_file() and password in path.read_text()]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [*holding, folder / "postgresql/server.key"]}
    assert modes == dict.fromkeys(("vault.yml", "roles.sql", "admin.toml", "server.key"), 0o600)
    hosts = yaml.safe_load((folder / "inventory/hosts.yml").read_text())
    assert set(hosts["all"]["children"]) == {"broker", "edges", "devices"}
    again = make(folder)
    assert (again.returncode, again.stdout) == (2, "")
    assert "name a new folder" in again.stderr


server = pytest.fixture(running_server)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that the server's user may enter, unlike pytest's."""
    made = Path(tempfile.mkdtemp(prefix="fleet-example-"))
    made.chmod(0o755)
    yield made / "example"
    shutil.rmtree(made)


@pytest.mark.broker
@pytest.mark.postgres
def test_a_rehearsal_on_one_machine_works_as_written(
    folder: Path, server: PostgresServer, fleet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_mosquitto()
    with reserved_port() as port, reserved_port() as db_port:
        made = make(folder, "--local", "--port", str(port), "--db-port", str(db_port))
    assert made.returncode == 0, made.stderr
    run_roles(server, folder / "postgresql" / "roles.sql")
    server.restart_with(folder / "postgresql" / "fleet.conf")
    monkeypatch.setenv("FLEET_ADMIN_CONFIG", str(folder / "admin.toml"))
    edge = tomllib.loads((folder / "site/settings/edge-1.toml").read_text())["db"]
    with open_store(edge) as store:
        store.apply(samples.fleet())
    assert len(as_json(fleet("admin", "sessions", "--json"))) == 3
    with pytest.raises(StoreError):
        open_store(edge.partition("?")[0] + "?sslmode=disable")
    words = re.search(r"fleet_reader LOGIN PASSWORD '(.+)'", (folder / "postgresql/roles.sql").read_text())
    assert words is not None
    reader = re.sub(r"//fleet_edge:[^@]+@", f"//fleet_reader:{words[1]}@", edge)
    with SessionLog(reader) as log:
        assert log.usage()[0].counted.tokens == 47
        with pytest.raises(StoreError, match="permission denied"):
            log.quarantine("sensor-1")
    with psycopg.connect(reader) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(b"DELETE FROM sessions")
    pages = load_settings(DashboardSettings, config=folder / "dashboard.toml", flags={}, environment={})
    assert pages.steer
    assert pages.broker.certificate is not None
    assert certificate_name(pages.broker.certificate) == pages.name
    code, output, complaint = fleet("broker", "check", folder / "site")
    assert code == 0, output + complaint


def run_roles(server: PostgresServer, script: Path) -> None:
    """Run the statements as psql would."""
    place, database = re.sub(r".*host=", "", server.database()), "postgres"
    for statement in script.read_text().splitlines():
        if statement.startswith("\\connect"):
            database = statement.split()[1]
            continue
        with psycopg.connect(f"host={place} user=fleet dbname={database}", autocommit=True) as connection:
            connection.execute(statement.encode())
