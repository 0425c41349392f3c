import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker_config.broker import Broker, BrokerFilesError, Tls
from broker_config.check import check_certificates, check_directory
from broker_config.files import Profile, render_files, write_files
from fleet_cli.broker import app
from fleet_common.checks import CheckStatus
from tests.support.broker_trial import TrialAuthority

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def production(tmp_path: Path) -> Path:
    folder = tmp_path / "rendered"
    write_files(render_files(Broker.production(), Profile.PRODUCTION, home=Path("/etc/mosquitto/fleet")), folder)
    return folder


def test_what_is_rendered_passes(production: Path) -> None:
    checks = {check.name: check.status for check in check_directory(production)}
    assert checks == {"modes": CheckStatus.OK, "certificates": CheckStatus.SKIPPED}


def test_the_command_prints_lines_or_json_and_fails_with_1(production: Path) -> None:
    (production / "access.acl").chmod(0o644)
    done = CliRunner().invoke(app, ["check", str(production)])
    assert done.exit_code == 1
    assert re.search(r"^FAILED  modes  .*chmod o-rwx", done.output, flags=re.MULTILINE)
    checks = json.loads(CliRunner().invoke(app, ["check", "--json", str(production)]).output)["checks"]
    assert {"name": "modes", "status": "failed"}.items() <= checks[0].items()


@pytest.fixture
def authority(tmp_path: Path) -> TrialAuthority:
    made = TrialAuthority(tmp_path / "pki", NOW)
    made.broker()
    return made


def certificates(authority: TrialAuthority, now: datetime = NOW) -> str:
    return check_certificates(Tls(), authority.folder, now=now)


def test_certificates_that_go_together_are_told_with_their_end(authority: TrialAuthority) -> None:
    assert f"{NOW + DAY:%Y}" in certificates(authority)


def unreadable(file: Path) -> None:
    file.write_text("nonsense")


def foreign(file: Path) -> None:
    """Replace a file by that of another authority."""
    other = TrialAuthority(file.parent / "other", NOW)
    other.broker()
    file.write_bytes((other.folder / file.name).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (Path.unlink, "broker.key"),
        (unreadable, "broker.pem"),
        (unreadable, "broker.key"),
        (unreadable, "crl.pem"),
        (foreign, "broker.key"),
        (foreign, "ca.pem"),
        (foreign, "crl.pem"),
    ],
)
def test_unmatched_files_are_refused(authority: TrialAuthority, spoil: Callable[[Path], object], name: str) -> None:
    spoil(authority.folder / name)
    with pytest.raises(BrokerFilesError, match=re.escape(name)):
        certificates(authority)


@pytest.mark.parametrize("now", [NOW + 2 * DAY, NOW - 2 * DAY])
def test_expired_certificates_are_refused(authority: TrialAuthority, now: datetime) -> None:
    with pytest.raises(BrokerFilesError):
        certificates(authority, now)
