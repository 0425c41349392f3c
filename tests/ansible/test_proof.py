"""Ansible really asks a device for a text, wherever its local API listens."""

from pathlib import Path
from typing import Any

import pytest

from fleet_common.identity.authority import issue
from fleet_common.identity.certificates import IdentityRole
from tests.ansible.local_play import play
from tests.ansible.test_settings import GIVEN
from tests.support.keys_file import keys_file
from tests.support.served_device import served_device
from tests.support.tls_fleet import new_authority

pytestmark = [pytest.mark.slow, pytest.mark.broker]

HEALTH = {"ansible.builtin.include_role": {"name": "device", "tasks_from": "health.yml"}}


def proven(folder: Path, *, key: str = "", **settings: Any) -> tuple[bool, str]:
    return play(folder, HEALTH, **GIVEN, device_settings=settings, device_api_key=key)


@pytest.mark.parametrize(
    "way", ["port", "https", *(pytest.param(way, marks=pytest.mark.exhaustive) for way in ("socket", "key"))]
)
def test_a_device_is_proven_where_its_api_listens(way: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    if way == "https":
        made = issue(
            new_authority(tmp_path / "ca"), "api", role=IdentityRole.BROKER, folder=tmp_path, hosts=["gateway-7.test"]
        )
        given["api_certificate"] = tmp_path / "both.pem"
        given["api_certificate"].write_bytes(made.certificate.read_bytes() + made.key.read_bytes())
    elif way == "socket":
        given["api_listen"] = str(tmp_path / "api.sock")
    elif way == "key":
        given["applications"] = keys_file(tmp_path)
    with served_device(tmp_path, **given) as served:
        where = {} if way == "socket" else {"api_listen": served.gateway.address.partition("://")[2]}
        texts = {name: str(value) for name, value in given.items()}
        passed, said = proven(tmp_path, key="sesame" if way == "key" else "", **texts, **where)
    assert passed, said


def test_a_device_that_gives_no_text_is_not_proven(tmp_path: Path) -> None:
    with served_device(tmp_path, applications=keys_file(tmp_path)) as served:
        passed, said = proven(tmp_path, key="another", api_listen=served.gateway.address.partition("://")[2])
    assert not passed
    assert "localhost writes no text" in said


@pytest.mark.parametrize(
    "settings", [{"api_listen": ""}, {"api_listen": "127.0.0.1:0"}, {"applications": "/etc/fleet/applications.json"}]
)
def test_an_api_that_the_proof_cannot_use_is_refused_before_anything_is_done(
    settings: dict[str, str], tmp_path: Path
) -> None:
    model = tmp_path / "draft.gguf"
    model.touch()
    name = {"ansible.builtin.include_role": {"name": "device", "tasks_from": "name.yml"}}
    passed, said = play(tmp_path, name, **{**GIVEN, "fleet_draft_model": str(model)}, device_settings=settings)
    assert not passed
    assert "device_api_key" in said
