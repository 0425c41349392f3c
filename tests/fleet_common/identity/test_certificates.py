import shutil
import socket
import ssl
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleet_common.identity.authority import Authority, Issued, create_authority, issue
from fleet_common.identity.certificates import IdentityRole
from fleet_common.identity.files import NameRefused
from tests.fleet_common.identity.conftest import FrozenClock

ACCEPTED = "accepted"


@pytest.fixture
def today(tmp_path: Path) -> Authority:
    """Return an authority of today, because OpenSSL checks dates against the present."""
    return create_authority(tmp_path / "ca", fleet="home", actor="tester")


def made(authority: Authority, name: str, role: IdentityRole, hosts: Sequence[str] = ()) -> Issued:
    return issue(authority, name, role=role, hosts=hosts, folder=authority.folder.path / name)


def verdict(error: OSError) -> str:
    return str(getattr(error, "verify_message", "") or getattr(error, "reason", "") or error)


def handshake(
    server: Issued, client: Issued, *, host: str = "localhost", lists: Sequence[Path] = ()
) -> tuple[str, str]:
    """Return the results of both ends of a handshake, the server's first."""
    asked = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    asked.maximum_version = ssl.TLSVersion.TLSv1_2  # so that a client learns of its refusal within the handshake
    asked.load_cert_chain(server.certificate, server.key)
    asked.load_verify_locations(server.ca)
    asked.verify_mode = ssl.CERT_REQUIRED
    for each in lists:
        asked.load_verify_locations(each)
        asked.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    asks = ssl.create_default_context(cafile=client.ca)
    asks.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    asks.load_cert_chain(client.certificate, client.key)
    near, far = socket.socketpair()
    said = [ACCEPTED]

    def serve() -> None:
        try:
            with asked.wrap_socket(far, server_side=True):
                pass
        except OSError as error:
            said[0] = verdict(error)
        finally:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    heard = ACCEPTED
    try:
        with asks.wrap_socket(near, server_hostname=host):
            pass
    except OSError as error:
        heard = verdict(error)
    finally:
        near.close()
        thread.join()
    return said[0], heard


def test_a_broker_and_a_client_of_one_authority_accept_each_other(today: Authority) -> None:
    broker = made(today, "broker", IdentityRole.BROKER, ["localhost", "127.0.0.1"])
    edge = made(today, "edge-1", IdentityRole.EDGE)
    for host in ("localhost", "127.0.0.1"):
        assert handshake(broker, edge, host=host, lists=[today.folder.revocation_list]) == (ACCEPTED, ACCEPTED)
    assert "mismatch" in handshake(broker, edge, host="elsewhere")[1]


def test_a_client_cannot_play_the_broker_nor_the_broker_a_client(today: Authority) -> None:
    broker = made(today, "broker", IdentityRole.BROKER, ["localhost"])
    edge = made(today, "edge-1", IdentityRole.EDGE)
    assert "purpose" in handshake(edge, edge)[1]
    assert "purpose" in handshake(broker, broker)[0]


def test_an_identity_of_another_fleets_authority_is_a_stranger(today: Authority, tmp_path: Path) -> None:
    broker = made(today, "broker", IdentityRole.BROKER, ["localhost"])
    other = create_authority(tmp_path / "other", fleet="home", actor="tester")
    stranger = made(other, "edge-1", IdentityRole.EDGE)
    trusting = Issued(stranger.entry, stranger.certificate, stranger.key, broker.ca)
    assert handshake(broker, trusting)[0] != ACCEPTED


def test_a_second_list_of_the_same_second_is_obeyed(tmp_path: Path) -> None:
    # OpenSSL keeps all lists that it has read and uses the latest; of two equally recent ones, the first.
    clock = FrozenClock()
    clock.now = datetime.now(UTC)
    authority = create_authority(tmp_path / "ca", fleet="home", actor="tester", clock=clock)
    broker = made(authority, "broker", IdentityRole.BROKER, ["localhost"])
    edges = [made(authority, f"edge-{number}", IdentityRole.EDGE) for number in range(3)]
    lists = [Path(shutil.copy(authority.folder.revocation_list, tmp_path / "list-0.pem"))]
    for number, edge in enumerate(edges):
        assert handshake(broker, edge, lists=lists)[0] == ACCEPTED
        authority.revoke([edge.entry.name])
        lists.append(Path(shutil.copy(authority.folder.revocation_list, tmp_path / f"list-{number + 1}.pem")))
        assert "revoked" in handshake(broker, edge, lists=lists)[0]


def test_an_issued_key_is_not_overwritten_and_not_left_behind(today: Authority) -> None:
    first = made(today, "edge-1", IdentityRole.EDGE)
    before = first.key.read_bytes()
    with pytest.raises(NameRefused):
        made(today, "edge-1", IdentityRole.EDGE)
    assert first.key.read_bytes() == before
    with pytest.raises(NameRefused, match="fleet broker renew"):
        issue(today, "edge-1", role=IdentityRole.EDGE, folder=today.folder.path / "elsewhere")
    assert list((today.folder.path / "elsewhere").iterdir()) == []
    assert first.key.stat().st_mode & 0o777 == 0o600
