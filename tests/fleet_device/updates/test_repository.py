import itertools
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import BadVersionNumberError, ExpiredMetadataError, UnsignedMetadataError
from tuf.api.metadata import Metadata

from fleet_admin import releases
from fleet_admin.releases import ReleaseError, create_repository, publish
from fleet_common.identity.certificates import load_key
from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.settings import TlsSettings
from fleet_device.updates.repository import (
    CHUNK_BYTES,
    Manifest,
    ReleaseFile,
    Repository,
    UpdateFailed,
    UpdateWaits,
    keep_valid_chunks,
)
from tests.fleet_device.updates.conftest import LONG, Site, content

MODEL = content(3 * CHUNK_BYTES + 70_000)


def nothing(_: float) -> None:
    return


def nobody() -> None:
    """Be asked whether the download may go on."""


def model_of(site: Site, number: int, folder: Path) -> ReleaseFile:
    model = site.client(folder).release(number, nobody).model
    assert model is not None
    return model


def fetched(site: Site, model: ReleaseFile, folder: Path) -> bytes:
    site.client(folder).fetch(model, folder / "part", nothing, nothing)
    return (folder / "part").read_bytes()


def test_a_release_is_fetched_over_connections_that_are_cut(site: Site, tmp_path: Path) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    site.server.faults.cut_after = 300_000
    assert fetched(site, model, tmp_path) == MODEL
    assert site.server.begins("models") == list(range(0, len(MODEL), 300_000))


def test_a_download_goes_on_where_it_was_killed(site: Site, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    model = model_of(site, site.publish(model=MODEL), tmp_path)
    seen = 0

    def kill_at(bound: int, at: int) -> None:
        if at > bound:
            raise Killed

    for bound in range(0, len(MODEL), len(MODEL) // 7):
        with pytest.raises(Killed):
            site.client(tmp_path).fetch(model, tmp_path / "part", lambda at, b=bound: kill_at(b, at), nothing)
        seen += 1
    assert fetched(site, model, tmp_path) == MODEL
    # What the kernel holds of a killed connection is sent again: by a server next door, more than over a slow link.
    assert seen == 8


def test_of_what_a_power_cut_has_damaged_a_chunk_is_fetched_again(site: Site, tmp_path: Path) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    damaged = bytearray(MODEL[: 2 * CHUNK_BYTES + 500])
    damaged[CHUNK_BYTES + 10 :] = bytes(len(damaged) - CHUNK_BYTES - 10)
    (tmp_path / "part").write_bytes(damaged)
    assert fetched(site, model, tmp_path) == MODEL
    assert site.server.begins("models") == [CHUNK_BYTES]


@pytest.mark.parametrize("size", [0, 10, CHUNK_BYTES, len(MODEL) - 1, len(MODEL), len(MODEL) + 1, 9 * CHUNK_BYTES])
def test_a_part_is_kept_as_far_as_it_can_be_right(tmp_path: Path, site: Site, size: int) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    (tmp_path / "part").write_bytes((MODEL + bytes(9 * CHUNK_BYTES))[:size])
    with (tmp_path / "part").open("r+b") as part:
        keep_valid_chunks(part, model)
        assert part.tell() == (size if size <= len(MODEL) else len(MODEL) // CHUNK_BYTES * CHUNK_BYTES)
    assert fetched(site, model, tmp_path) == MODEL


def test_what_a_mirror_changes_is_never_taken(site: Site, tmp_path: Path) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    site.server.faults.damage = True
    with pytest.raises(UpdateWaits):
        fetched(site, model, tmp_path)
    assert (tmp_path / "part").stat().st_size == 0
    site.server.faults.damage = False
    assert fetched(site, model, tmp_path) == MODEL


def test_a_server_that_cannot_resume_is_named(site: Site, tmp_path: Path) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    site.server.faults.ranges = False
    (tmp_path / "part").write_bytes(MODEL[:5000])
    with pytest.raises(UpdateWaits, match="Range"):
        fetched(site, model, tmp_path)
    (tmp_path / "part").unlink()
    assert fetched(site, model, tmp_path) == MODEL


def test_a_server_that_is_away_is_asked_again_later(site: Site, tmp_path: Path) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    waits: list[float] = []
    away = Repository("https://127.0.0.1:9", b"", tmp_path, site.tls)
    with pytest.raises(UpdateWaits):
        away.fetch(model, tmp_path / "part", nothing, waits.append)
    assert waits == sorted(waits)
    assert waits


def every(seconds: float) -> Callable[[], float]:
    """Return a clock that a look at it moves on."""
    return itertools.count(step=seconds).__next__


@pytest.mark.parametrize("fault", ["drip", "endless"])
def test_a_mirror_that_holds_a_download_up_is_given_up(site: Site, tmp_path: Path, fault: str) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    setattr(site.server.faults, fault, True)
    client = site.client(tmp_path, every(5.0))
    with pytest.raises(UpdateWaits):
        client.fetch(model, tmp_path / "part", nothing, nothing)
    present = (tmp_path / "part").stat().st_size
    assert 0 <= present < 20
    setattr(site.server.faults, fault, False)
    assert fetched(site, model, tmp_path) == MODEL
    assert site.server.begins("models") == [0, present]


def test_the_time_that_our_own_limit_takes_is_not_the_mirrors(site: Site, tmp_path: Path) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    slept = [0.0]

    def limit(_: int) -> None:
        slept[0] += 100.0

    site.client(tmp_path, lambda: slept[0]).fetch(model, tmp_path / "part", limit, nothing)
    assert slept[0] > 1000.0
    assert (tmp_path / "part").read_bytes() == MODEL


def test_a_mirror_that_sends_a_byte_and_ends_is_given_up(site: Site, tmp_path: Path) -> None:
    model = model_of(site, site.publish(model=MODEL), tmp_path)
    site.server.faults.cut_after = 1
    with pytest.raises(UpdateWaits):
        fetched(site, model, tmp_path)
    assert site.server.begins("models") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fault", ["drip", "endless"])
def test_metadata_has_a_deadline(site: Site, tmp_path: Path, fault: str) -> None:
    site.publish(model=MODEL)
    setattr(site.server.faults, fault, True)
    with pytest.raises(UpdateWaits):
        site.client(tmp_path, every(50.0)).release(1, nobody)
    site.server.faults.endless = False
    assert site.client(tmp_path).release(1, nobody).number == 1, "slow, and in time"


def test_only_devices_of_the_fleet_are_served(site: Site, tmp_path: Path) -> None:
    site.publish(model=MODEL)
    stranger = Repository(site.server.url, site.root, tmp_path / "metadata", TlsSettings(site.tls.ca))
    with pytest.raises(UpdateWaits):
        stranger.release(1, nobody)
    with pytest.raises(ConnectFailed):
        Repository("", b"", tmp_path, TlsSettings(site.tls.ca, tmp_path / "none.pem", tmp_path / "none.key"))


def test_a_release_that_is_not_there_yet_is_waited_for(site: Site, tmp_path: Path) -> None:
    site.publish(model=MODEL)
    with pytest.raises(UpdateWaits, match="release 2"):
        site.client(tmp_path).release(2, nobody)


def test_another_key_signs_nothing(site: Site, tmp_path: Path) -> None:
    site.publish(model=MODEL)
    root = site.root
    create_repository(tmp_path / "other", tmp_path / "other-keys")
    for file in (site.repository / "metadata").iterdir():
        file.unlink()
    publish(tmp_path / "other", tmp_path / "other-keys", model=site.folder / "draft.gguf", valid=LONG)
    for file in (tmp_path / "other" / "metadata").iterdir():
        if file.name != "1.root.json":
            (site.repository / "metadata" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UpdateWaits) as caught:
        Repository(site.server.url, root, tmp_path / "metadata", site.tls).release(1, nobody)
    assert isinstance(caught.value.__cause__, UnsignedMetadataError)


def test_older_metadata_than_before_is_refused(site: Site, tmp_path: Path) -> None:
    site.publish(model=MODEL)
    old = {file: file.read_bytes() for file in (site.repository / "metadata").iterdir()}
    site.publish(model=content(5000, seed=2))
    assert site.client(tmp_path).release(2, nobody).number == 2
    for file in (site.repository / "metadata").iterdir():
        if file in old:
            file.write_bytes(old[file])
        else:
            file.unlink()
    with pytest.raises(UpdateWaits) as caught:
        site.client(tmp_path).release(1, nobody)
    assert isinstance(caught.value.__cause__, BadVersionNumberError)


def test_expired_signatures_are_refused_until_they_are_renewed(site: Site, tmp_path: Path) -> None:
    site.publish(model=MODEL, valid=timedelta(days=-1))
    with pytest.raises(UpdateWaits) as caught:
        site.client(tmp_path).release(1, nobody)
    assert isinstance(caught.value.__cause__, ExpiredMetadataError)
    assert site.publish() == 0
    assert site.client(tmp_path).release(1, nobody).number == 1


@pytest.mark.parametrize(
    "path",
    [
        "models/../../etc/passwd",
        f"models/{'a' * 64}/../x",
        f"models/{'a' * 64}/.hidden",
        f"models/{'a' * 64}/a/../b",
        f"models/{'a' * 64}/a/.b",
        f"models/{'a' * 64}/a/b/c",
        f"models/{'a' * 64}//b",
        f"models/{'A' * 64}/x",
        f"/models/{'a' * 64}/x",
        f"models/{'a' * 64}/x\n",
        f"models/{'a' * 64}/{'x' * 200}",
        f"programs/{'a' * 64}/x",
    ],
)
def test_no_path_leads_elsewhere(path: str) -> None:
    with pytest.raises(ValueError, match="no path"):
        Manifest(number=1, model=path)


@pytest.mark.parametrize(
    "changed",
    [
        {"number": 7},
        {"number": 0},
        {"model": "models/x"},
        {"wheels": {"sparc-cp311": [f"wheels/{'a' * 64}/a.whl"]}, "version": "1"},
        {"model": f"models/{'a' * 64}/unsigned.gguf"},
        {"version": "../1"},
    ],
)
def test_a_signed_release_that_makes_no_sense_fails(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]
) -> None:
    monkeypatch.setattr(
        Manifest, "model_dump_json", lambda self: json.dumps({**self.model_dump(mode="json"), **changed})
    )
    number = site.publish(model=MODEL)
    monkeypatch.undo()
    with pytest.raises(UpdateFailed):
        site.client(tmp_path).release(number, nobody)


@pytest.mark.parametrize("custom", [{}, {"chunks": ["0" * 64]}, {"chunks": []}, {"chunks": "x"}])
def test_chunks_are_checked(site: Site, tmp_path: Path, custom: dict[str, object]) -> None:
    site.publish(model=MODEL)
    newest = max((site.repository / "metadata").glob("*.targets.json"), key=lambda path: path.stat().st_mtime_ns)
    metadata = Metadata.from_file(str(newest))
    path = next(path for path in metadata.signed.targets if path.startswith("models/"))
    metadata.signed.targets[path].unrecognized_fields["custom"] = custom
    releases._sign(site.repository, CryptoSigner(load_key(site.keys / "release.key")), metadata.signed, LONG)
    with pytest.raises(UpdateFailed, match="chunks"):
        site.client(tmp_path).release(1, nobody)


def test_releases_are_numbered_and_share_files(site: Site) -> None:
    assert [site.publish(model=MODEL), site.publish(model=MODEL), site.publish(model=content(9))] == [1, 2, 3]
    assert len(list((site.repository / "targets" / "models").iterdir())) == 2


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    create_repository(tmp_path / "repository", tmp_path / "keys", passphrase=b"secret")
    assert b"ENCRYPTED" in (tmp_path / "keys" / "release.key").read_bytes()
    with pytest.raises(Exception, match="passphrase"):
        publish(tmp_path / "repository", tmp_path / "keys", valid=LONG)
    assert publish(tmp_path / "repository", tmp_path / "keys", valid=LONG, passphrase=b"secret") is None


def test_nothing_is_founded_or_published_twice_or_nowhere(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError):
        create_repository(site.repository, tmp_path / "more")
    with pytest.raises(ReleaseError):
        create_repository(tmp_path / "more", site.keys)
    with pytest.raises(ReleaseError, match="nowhere"):
        publish(tmp_path / "nowhere", site.keys, valid=LONG)
    with pytest.raises(ReleaseError, match=r"none\.gguf"):
        publish(site.repository, site.keys, model=tmp_path / "none.gguf", valid=LONG)
    with pytest.raises(ReleaseError, match=r"any\.tar"):
        publish(site.repository, site.keys, bundles=[tmp_path / "any.tar"], valid=LONG)
