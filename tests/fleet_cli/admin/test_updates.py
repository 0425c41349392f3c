from pathlib import Path

import pytest

from fleet_device.gateway import Gateway as Service
from fleet_device.updates.handoff import RESTART, STATE, UpdateState
from schemas.control import UpdateStage
from tests.fleet_cli.admin.test_steering import _as_ada, devices
from tests.fleet_device.updates.conftest import FIRST, Gateway, Site, content, gateway, site
from tests.support.command import Run, as_json, refused
from tests.support.waiting import until

__all__ = ["_as_ada", "devices", "gateway", "site"]


def pull(fleet: Run, gateway: Gateway, *, url: str = "", trial_s: float = 1.0) -> tuple[int, str, str]:
    site = gateway.site
    files = ("--ca", site.tls.ca, "--certificate", site.tls.certificate, "--key", site.tls.key)
    places = ("--folder", gateway.shared, "--programs", gateway.layout.programs, "--models", gateway.layout.models)
    root = site.repository / "metadata" / "1.root.json"
    wanted = ("--url", url or site.server.url, "--root", root, "--trial-s", trial_s)
    return fleet("device", "update", *wanted, *files, *places)


def test_a_release_is_signed_and_pulled_by_commands(fleet: Run, gateway: Gateway, tmp_path: Path) -> None:
    assert pull(fleet, gateway)[1] == "No release is desired.\n"
    model = tmp_path / "small.gguf"
    model.write_bytes(content(5000))
    made = fleet("admin", "update", "publish", gateway.site.repository, "--keys", gateway.site.keys, "--model", model)
    assert made == (0, "Release 1 is signed for 90 days.\n", "")
    gateway.want(1)
    code, said, _ = pull(fleet, gateway)
    assert code == 0
    stages = [line.split(": ")[1].split(".")[0] for line in said.splitlines()]
    assert stages == ["fetching", "installing", "testing", "failed"], "nobody has tested it"
    assert str(gateway.shared / RESTART) in said, "it says what it waits for"
    assert gateway.running == FIRST
    state = gateway.exchange.read(UpdateState, STATE)
    assert state is not None
    assert state.stage is UpdateStage.FAILED


def test_a_repository_is_made_once_and_renewed(fleet: Run, tmp_path: Path) -> None:
    folder, keys = tmp_path / "repository", tmp_path / "keys"
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    given = (folder, "--keys", keys, "--passphrase-file", secret)
    assert fleet("admin", "update", "create", *given)[0] == 0
    assert "already" in refused(fleet("admin", "update", "create", *given))
    assert fleet("admin", "update", "publish", *given)[:2] == (0, "The signatures are renewed.\n")
    assert "passphrase" in refused(fleet("admin", "update", "publish", folder, "--keys", keys))


def test_what_an_updater_cannot_use_is_one_sentence(fleet: Run, gateway: Gateway, site: Site) -> None:
    assert "https://" in refused(pull(fleet, gateway, url="http://127.0.0.1/"))
    (site.repository / "metadata" / "1.root.json").unlink()
    assert "No such file" in refused(pull(fleet, gateway))


@pytest.mark.broker
def test_a_rollout_stops_at_a_device_without_an_updater(fleet: Run, devices: list[Service], url: str) -> None:
    assert as_json(fleet("admin", "update", "status", "--json", "--db", url)) == []
    code, _, complaint = fleet("admin", "update", "rollout", 3, "--all", "--wait", 30, "--db", url)
    assert code == 2
    assert "stops at 1 of 2 devices" in complaint
    assert "no updater" in complaint
    until(lambda: len(as_json(fleet("admin", "update", "status", "--json", "--db", url))) == 1)
    assert devices
