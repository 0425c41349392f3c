from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleet_admin.unmatched import NEVER_SEEN, NOT_ENROLLED, Machine, find_unmatched
from fleet_common.identity.authority import create_authority, issue
from fleet_common.identity.certificates import IdentityRole
from fleet_common.identity.index import CertificateRecord
from fleet_edge.session_log.database import open_store
from tests.fleet_edge.store import samples
from tests.support.command import Run, as_json

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DEVICE, EDGE = IdentityRole.DEVICE, IdentityRole.EDGE


def entry(
    name: str, *, role: IdentityRole = DEVICE, days: float = 90, revoked: bool = False, serial: str = ""
) -> CertificateRecord:
    return CertificateRecord(
        serial=serial or name,
        name=name,
        role=role,
        hosts=(),
        key_sha256=name,
        not_before=NOW - timedelta(days=10),
        not_after=NOW + timedelta(days=days),
        pem="",
        revoked_at=NOW - timedelta(days=1) if revoked else None,
    )


def seen(*machines: Machine) -> dict[Machine, datetime]:
    return dict.fromkeys(machines, NOW - timedelta(hours=1))


def test_who_is_enrolled_and_was_never_seen() -> None:
    entries = [
        entry("a"),
        entry("gone", revoked=True),
        entry("over", days=-1),
        entry("monitor", role=IdentityRole.MONITOR),
        entry("broker", role=IdentityRole.BROKER),
    ]
    (found,) = find_unmatched(entries, {}, now=NOW)
    assert (found.name, found.kind) == ("a", NEVER_SEEN)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([], "never given it a certificate"),
        ([entry("a", revoked=True)], "was revoked on 2026-04-30"),
        ([entry("a", days=-1)], "has ended on 2026-04-30"),
        ([entry("a"), entry("a", revoked=True, serial="2")], "was revoked"),
        ([entry("a", role=EDGE)], "never given it a certificate"),
    ],
)
def test_who_was_seen_and_is_not_enrolled(entries: list[CertificateRecord], why: str) -> None:
    unmatched = [each for each in find_unmatched(entries, seen(("a", DEVICE)), now=NOW) if each.role is DEVICE]
    (found,) = unmatched
    assert (found.name, found.kind) == ("a", NOT_ENROLLED)
    assert why in found.sentence


def test_the_command_over_a_real_authority_and_log(tmp_path: Path, fleet: Run) -> None:
    authority = create_authority(tmp_path / "ca", fleet="north", actor="test", kept=[("edge-1", EDGE)])
    for name in ("sensor-1", "sensor-2"):
        issue(authority, name, role=DEVICE, folder=tmp_path / name)
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    with open_store(url) as store:
        store.apply([samples.device_seen(), samples.device_seen(device="stranger")])
    asked = ("admin", "unmatched", "--identities", tmp_path / "ca", "--db", url)
    found = [(each["name"], each["kind"]) for each in as_json(fleet(*asked, "--json"))]
    assert found == [("sensor-2", "never-seen"), ("stranger", "not-enrolled")]
    assert "Machines that only one side knows: 2" in fleet(*asked)[1]


def test_the_identity_of_an_edge_s_self_test_is_not_unmatched() -> None:
    entries = [entry("edge-1", role=EDGE), entry("probe-edge-1"), entry("probe-other")]
    assert [each.name for each in find_unmatched(entries, seen(("edge-1", EDGE)), now=NOW)] == ["probe-other"]
