import shutil
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from broker_config.processes import IdentityFiles
from broker_config.site import make_local_broker
from tests.support.broker_trial import TrialAuthority
from tests.support.brokers import require_mosquitto
from tests.support.local_broker import LocalBroker
from tests.support.waiting import PATIENCE_S, until

SCRIPT = Path(__file__).parents[2] / "scripts" / "check-tls"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def check(port: int, files: IdentityFiles) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), f"localhost:{port}", str(files.ca), str(files.certificate), str(files.key)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.broker
def test_our_listener_speaks_no_old_protocol_and_no_weak_cipher(tmp_path: Path) -> None:
    require_mosquitto()
    folder = tmp_path / "broker"
    make_local_broker(folder, fleet="home", edges=["edge-1"], devices=["device-1"], port=18_887)
    with LocalBroker(folder, port=0) as broker:
        done = check(broker.port, broker.identity("device-1"))
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    for line in ("tls1 is refused", "tls1_1 is refused", "aNULL is refused", "without a certificate is refused"):
        assert line in done.stdout


def test_a_weak_listener_is_found_out(tmp_path: Path, free_port: int) -> None:
    authority = TrialAuthority(tmp_path, datetime.now(UTC))
    own, client = authority.broker(), authority.client("device-1")
    # It requests no certificate and accepts ciphers without authentication.
    command = ["openssl", "s_server", "-cert", own.certificate, "-key", own.key, "-quiet", "-accept"]
    command += [str(free_port), "-cipher", "ALL:aNULL:@SECLEVEL=0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as server:
        try:
            until(lambda: _listens(free_port))
            done = check(free_port, client)
        finally:
            server.kill()
    assert done.returncode == 1
    for line in ("aNULL is accepted", "CBC is accepted", "without a certificate gets through"):
        assert line in done.stdout, done.stdout


def test_nothing_there_and_files_that_cannot_be_read_are_one_line(tmp_path: Path, free_port: int) -> None:
    files = TrialAuthority(tmp_path, datetime.now(UTC)).client("device-1")
    done = check(free_port, files)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    done = check(1, IdentityFiles(tmp_path / "none.pem", files.certificate, files.key))
    assert done.returncode == 2
    assert "none.pem" in done.stderr


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
