import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker_config.broker import Broker, BrokerFilesError, Tls
from broker_config.checks.check import check_certificates, check_directory
from broker_config.checks.trial import TrialAuthority
from broker_config.files import Profile, render_files, write_files
from fleet_cli.broker import app
from fleet_common.checks import CheckStatus
from tests.support.brokers import require_mosquitto

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def production(tmp_path: Path) -> Path:
    folder = tmp_path / "rendered"
    write_files(render_files(Broker.production(), Profile.PRODUCTION, home=Path("/etc/mosquitto/fleet")), folder)
    return folder


def failed(folder: Path) -> set[str]:
    return {check.name for check in check_directory(folder) if check.status is CheckStatus.FAILED}


def change(path: Path, pattern: str, replacement: str) -> None:
    text = path.read_text()
    changed = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    assert changed != text
    path.write_text(changed)


@pytest.mark.broker
def test_what_is_rendered_passes(production: Path, tmp_path: Path) -> None:
    require_mosquitto()
    checks = check_directory(production)
    assert [check.name for check in checks if check.status is not CheckStatus.OK] == ["certificates"]
    assert {check.status for check in checks} == {CheckStatus.OK, CheckStatus.SKIPPED}
    loopback = tmp_path / "loopback"
    write_files(render_files(Broker(port=1883), Profile.LOOPBACK, home=loopback), loopback)
    assert {check.status for check in check_directory(loopback)} == {CheckStatus.OK}


@pytest.mark.broker
@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "check"),
    [
        ("mosquitto.conf", r"^sys_interval", "no_such_option", "syntax"),
        ("mosquitto.conf", r"^require_certificate true", "require_certificate false", "clients"),
        ("mosquitto.conf", r"^use_identity_as_username true", "use_identity_as_username false", "clients"),
        ("mosquitto.conf", r"^crlfile .*$", "", "strangers"),
        ("mosquitto.conf", r"^use_username_as_clientid true", "use_username_as_clientid false", "client id"),
        ("mosquitto.conf", r"^max_packet_size .*$", "max_packet_size 5000", "packets"),
        ("mosquitto.conf", r"^set_tcp_nodelay true", "set_tcp_nodelay false", "round trip"),
        ("access.acl", r"^pattern read .*down/verdict$", "", "access"),
        ("access.acl", r"%u/down/verdict", "+/down/verdict", "access"),
    ],
)
def test_what_is_spoilt_is_found(production: Path, file: str, pattern: str, replacement: str, check: str) -> None:
    require_mosquitto()
    change(production / file, pattern, replacement)
    assert check in failed(production)


@pytest.mark.broker
def test_the_command_prints_lines_or_json_and_fails_with_1(production: Path) -> None:
    require_mosquitto()
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


def foreign(file: Path) -> None:
    """Replace a file by that of another authority."""
    other = TrialAuthority(file.parent / "other", NOW)
    other.broker()
    file.write_bytes((other.folder / file.name).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "broker.key").unlink(), r"broker\.key is missing"),
        (lambda folder: (folder / "broker.pem").write_text("nonsense"), r"broker\.pem is no certificate"),
        (lambda folder: (folder / "broker.key").write_text("nonsense"), r"broker\.key is no unencrypted private key"),
        (lambda folder: (folder / "crl.pem").write_text("nonsense"), r"crl\.pem is no revocation list"),
        (lambda folder: foreign(folder / "broker.key"), "does not belong to the certificate"),
        (lambda folder: foreign(folder / "ca.pem"), "was not signed by"),
        (lambda folder: foreign(folder / "crl.pem"), "refuse every client"),
    ],
)
def test_unmatched_files_are_refused(authority: TrialAuthority, spoil: Callable[[Path], object], sentence: str) -> None:
    spoil(authority.folder)
    with pytest.raises(BrokerFilesError, match=sentence):
        certificates(authority)


@pytest.mark.parametrize(("now", "sentence"), [(NOW + 2 * DAY, "ran out"), (NOW - 2 * DAY, "set the clock")])
def test_expired_certificates_are_refused(authority: TrialAuthority, now: datetime, sentence: str) -> None:
    with pytest.raises(BrokerFilesError, match=sentence):
        certificates(authority, now)
