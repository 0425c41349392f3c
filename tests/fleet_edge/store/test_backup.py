import sqlite3
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from fleet_edge.store import backup
from fleet_edge.store.database import Store, open_store
from fleet_edge.store.errors import StoreError, StoreRefused
from fleet_edge.store.records import segment_number
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import Rows, all_rows
from tests.fleet_edge.store.samples import START, after


def _session(store: Store, number: int) -> None:
    key = {"session": f"{number:016x}", "segment": segment_number(after(number))}
    store.apply([samples.opened(**key, at=after(number)), samples.progress(**key, at=after(number))])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.sqlite3"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def copied(url: str, tmp_path: Path) -> tuple[Path, Rows]:
    """Return a backup of a log of one session, and the log's rows."""
    to = tmp_path / "copy.sqlite3"
    with open_store(url) as store:
        _session(store, 1)
        backup.back_up(url, to)
        return to, all_rows(store)


def test_a_backup_is_of_one_instant(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "_STEP_PAGES", 2)
    to, steps = tmp_path / "copy.sqlite3", []
    with open_store(url) as store:
        for number in range(20):
            _session(store, number)
        before = all_rows(store)

        def write(done: int, pages: int) -> None:
            _session(store, 1000 + len(steps))
            steps.append((done, pages))

        size = backup.back_up(url, to, progress=write)
        assert len(all_rows(store)["sessions"]) == 20 + len(steps)
    assert len(steps) > 10
    assert steps[-1][0] == steps[-1][1]
    assert (to.stat().st_size, stat.S_IMODE(to.stat().st_mode)) == (size, 0o600)
    assert [each.name for each in tmp_path.glob("copy*")] == ["copy.sqlite3"], "one file, and nothing beside it"
    with open_store(f"sqlite:///{to}") as copied:
        assert all_rows(copied) == before


def test_a_restore_brings_back_what_was_and_puts_aside_what_is(url: str, path: Path, copied: tuple[Path, Rows]) -> None:
    to, before = copied
    with open_store(url) as store:
        _session(store, 2)
        then = all_rows(store)
    with pytest.raises(StoreRefused, match="--replace"):
        backup.restore(to, url, replace=False, now=START)
    aside = backup.restore(to, url, replace=True, now=START)
    assert aside == path.with_name("fleet.sqlite3.20260304T103000Z")
    for file, rows in ((path, before), (aside, then)):
        with open_store(f"sqlite:///{file}") as opened:
            assert all_rows(opened) == rows
    assert to.exists()


def test_a_log_that_is_damaged_is_put_aside_too(url: str, path: Path, copied: tuple[Path, Rows]) -> None:
    to, before = copied
    damaged = b"This is no database. " * 1000
    path.write_bytes(damaged)
    path.with_name("fleet.sqlite3-wal").write_bytes(b"old")
    aside = backup.restore(to, url, replace=True, now=START)
    assert aside.read_bytes() == damaged
    with open_store(url) as opened:
        assert all_rows(opened) == before


def test_a_restore_into_an_empty_place(url: str, path: Path, copied: tuple[Path, Rows]) -> None:
    to, before = copied
    path.unlink()
    assert backup.restore(to, url, replace=False, now=START) is None
    with open_store(url) as store:
        assert all_rows(store) == before


def test_a_log_that_is_open_is_not_replaced(url: str, tmp_path: Path, copied: tuple[Path, Rows]) -> None:
    to, _ = copied
    with open_store(url) as store:
        with pytest.raises(StoreRefused, match="stop"):
            backup.restore(to, url, replace=True, now=START)
        _session(store, 2)
        assert len(all_rows(store)["sessions"]) == 2
    assert not list(tmp_path.glob("*.restored*"))
    assert backup.restore(to, url, replace=True, now=START)


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4096:20_000] = b"\xff" * (20_000 - 4096)
    file.write_bytes(content)


def _of_the_future(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_damage, "damaged|malformed"),
        (_of_the_future, "newer version"),
        (lambda file: file.write_bytes(b"x" * 10_000), "database"),
        (lambda file: file.write_bytes(b""), "log"),
        (lambda file: file.unlink(), "There is no file"),
    ],
)
def test_what_is_no_whole_backup_is_not_restored(
    url: str, copied: tuple[Path, Rows], spoil: Callable[[Path], object], sentence: str
) -> None:
    to, before = copied
    spoil(to)
    with pytest.raises(StoreError, match=sentence) as refused:
        backup.restore(to, url, replace=True, now=START)
    assert "\n" not in str(refused.value)
    with open_store(url) as store:
        assert all_rows(store) == before


def test_a_file_that_is_there_or_a_folder_that_is_not_is_refused(url: str, tmp_path: Path) -> None:
    open_store(url).close()
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(StoreRefused, match="already; name another"):
        backup.back_up(url, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"
    with pytest.raises(StoreRefused):
        backup.back_up(url, tmp_path / "nowhere" / "copy")
    with pytest.raises(StoreRefused):
        backup.back_up(f"sqlite:///{tmp_path}/none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_server_s_own_tools_are_named_without_its_password(tmp_path: Path) -> None:
    url = "postgresql://fleet:hunter2@db/fleet"
    for tool, attempt in {
        "pg_dump": lambda: backup.back_up(url, tmp_path / "copy"),
        "pg_restore": lambda: backup.restore(tmp_path / "copy", url, replace=True, now=START),
        "vacuumdb": lambda: backup.compact(url),
    }.items():
        with pytest.raises(StoreError, match=tool) as refused:
            attempt()
        assert "hunter2" not in str(refused.value)


def test_regular_backups_keep_the_latest(url: str, tmp_path: Path) -> None:
    open_store(url).close()
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "notes.txt").write_text("stays")
    assert backup.is_due(folder, every=timedelta(days=1), now=START)
    made = [backup.back_up_into(url, folder, keep=2, now=START + timedelta(days=day)) for day in range(4)]
    last = START + timedelta(days=3)
    assert not backup.is_due(folder, every=timedelta(hours=6), now=last + timedelta(hours=5))
    assert backup.is_due(folder, every=timedelta(hours=6), now=last + timedelta(hours=7))
    assert sorted(folder.iterdir()) == sorted([*made[-2:], folder / "notes.txt"])


def test_a_compacted_file_is_smaller_and_purges_make_it_smaller_from_then_on(url: str, path: Path) -> None:
    open_store(url).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("VACUUM")
        for number in range(400):
            connection.execute("INSERT INTO rollup_marks (name, at) VALUES (?, ?)", (f"{number}" * 900, ""))
        connection.commit()
        connection.execute("DELETE FROM rollup_marks")
    before, after_ = backup.compact(url)
    assert after_ < before / 2
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)


def test_regular_backups_need_a_file_and_a_folder(url: str, tmp_path: Path) -> None:
    backup.check_backups(url, tmp_path)
    with pytest.raises(StoreError, match="create"):
        backup.check_backups(url, tmp_path / "nowhere")
    with pytest.raises(StoreError, match="pg_dump"):
        backup.check_backups("postgresql://fleet@db/fleet", tmp_path)
