import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.command import Run, refused
from tests.support.waiting import PATIENCE_S


@pytest.fixture
def password(tmp_path: Path) -> str:
    file = tmp_path / "password"
    file.write_text("correct horse battery\n")
    return str(file)


def test_an_account_from_its_beginning_to_its_end(admin: Run, password: str) -> None:
    assert admin("user", "add", "anna", "--role", "operator", "--password-file", password)[0] == 0
    assert admin("user", "add", "scraper", "--no-password")[0] == 0
    _, listed, _ = admin("user", "list")
    assert re.search(r"anna +operator +yes", listed)
    assert re.search(r"scraper +viewer +no", listed)
    assert admin("user", "role", "anna", "viewer")[0] == 0
    assert admin("user", "password", "anna", "--password-file", password)[0] == 0
    assert admin("user", "remove", "anna")[0] == 0
    assert "anna" not in admin("user", "list")[1]
    assert re.search(r"account remove +anna", admin("audit")[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("user", "add", "anna smith", "--no-password"), "not a valid name"),
        (("user", "add", "anna"), "--password-file"),
        (("user", "add", "anna", "--password-file", "/nowhere"), "cannot be read"),
        (("user", "remove", "nobody"), "no account 'nobody'"),
        (("serve", "--listen", "0.0.0.0:8400"), "in the clear"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    admin: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert said in refused(admin(*arguments))


@pytest.mark.slow
def test_the_dashboard_is_served_until_it_is_told_to_stop(url: str) -> None:
    command = [sys.executable, "-m", "fleet_cli.main", "admin", "serve", "--db", url, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stderr.readline().rpartition(" ")[2].strip()
            assert "add" in process.stderr.readline()
            with urllib.request.urlopen(f"{address}/login", timeout=PATIENCE_S) as page:
                assert b"Log in" in page.read()
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()  # or a failure would wait for it without end
