"""Keys and values that survive the process."""

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from fleet_edge.settings import EdgeSettings, KeptIn, PrefixSharing
from fleet_edge.verifiers import blocks_engine
from fleet_edge.verifiers.blocks import weight_cache
from fleet_edge.verifiers.blocks.geometry import Pool
from fleet_edge.verifiers.blocks.kv import PAGE, Pages
from fleet_edge.verifiers.blocks.page_file import LAYOUT, KeptPages, PageFile
from fleet_edge.verifiers.blocks.weight_cache import CachedWeights
from fleet_edge.verifiers.contract import Item, Verifier
from fleet_edge.verifiers.prefix_cache import PrefixCache
from tests.fleet_edge.verifiers.oracle import VOCABULARY, tiny_target_gguf

POOLS = [Pool(2, 1, 4), Pool(1, 2, 8)]
COUNT = 12
DAY_S = 86_400.0
SIZE = 1000
TOGETHER = 8


def _open(path: Path, identity: str = "model", *, pools: Sequence[Pool] = POOLS, count: int = COUNT) -> PageFile:
    return PageFile(path, identity, pools, count)


def _kept(file: PageFile, *, keep_s: float = DAY_S) -> list[KeptPages]:
    return file.sequences(vocabulary=SIZE, keep_s=keep_s, threads=2)


class Sequences:
    """Sequences whose keys and values are their tokens, recorded as an engine does."""

    def __init__(self, file: PageFile) -> None:
        self.file, self.pages, self.tokens = file, Pages(file), dict[int, list[int]]()
        self.midway: Callable[[], object] = lambda: None  # called in a step

    def write(self, sequence: int, tokens: list[int], *, owner: str = "") -> None:
        mine = self.tokens.setdefault(sequence, [])
        self.pages.reserve(sequence, len(mine), len(tokens))
        table, first = self.pages.table(sequence), len(mine) // PAGE
        for token in tokens:
            page, place = table[len(mine) // PAGE], len(mine) % PAGE
            for keys, values in zip(self.pages.keys, self.pages.values, strict=True):
                keys[page, ..., place] = values[page, :, :, place] = token
            mine.append(token)
        self.midway()
        for place in range(first, -(-len(mine) // PAGE)):
            its = mine[place * PAGE : (place + 1) * PAGE]
            self.file.record(table[place], its, table[place - 1] if place else None, owner)

    def truncate(self, sequence: int, length: int) -> None:
        self.pages.truncate(sequence, length)
        del self.tokens[sequence][length:]

    def fork(self, sequence: int, source: int, length: int) -> None:
        self.pages.fork(sequence, source, length)
        self.tokens[sequence] = self.tokens[source][:length]

    def close(self, sequence: int) -> None:
        self.pages.close(sequence)
        del self.tokens[sequence]


def _content(file: PageFile, kept: KeptPages) -> list[int]:
    """Return the tokens that all keys and values are those of."""
    found = list[int]()
    for at in range(len(kept.tokens)):
        page, place = kept.pages[at // PAGE], at % PAGE
        numbers = [each[page, ..., place].ravel() for each in file.keys]
        numbers += [each[page, :, :, place].ravel() for each in file.values]
        (number,) = set(np.concatenate(numbers).tolist())
        found.append(number)
    return found


def _act(its: Sequences, number: int, rng: random.Random) -> None:
    """Do something that an engine does; `number` is a new sequence."""
    action, open_ = rng.random(), list(its.tokens)
    if not open_ or action < 0.15:
        its.tokens[number] = []
    elif action < 0.3:
        source = rng.choice(open_)
        its.fork(number, source, rng.randint(0, len(its.tokens[source])))
    elif action < 0.45:
        sequence = rng.choice(open_)
        its.truncate(sequence, rng.randint(0, len(its.tokens[sequence])))
    elif action < 0.55:
        its.close(rng.choice(open_))
    else:
        sequence, added = rng.choice(open_), rng.randint(1, 150)
        if its.pages.needed(sequence, len(its.tokens[sequence]), added) <= its.pages.count - its.pages.used:
            its.write(sequence, [rng.randrange(3) for _ in range(added)])


@pytest.mark.parametrize("seed", range(12))
def test_what_is_taken_over_was_computed_and_few_tokens_of_an_open_sequence_are_lost(seed: int, tmp_path: Path) -> None:
    rng, path = random.Random(seed), tmp_path / "pages"
    its = Sequences(_open(path))

    def kill() -> PageFile:
        """Return what a successor has, if the process is killed now: a copy of the file."""
        copy = path.with_name(f"pages-{rng.random()}")
        copy.write_bytes(path.read_bytes())
        return _open(copy)

    def in_a_step() -> None:
        if rng.random() < 0.3:
            file = kill()
            for each in _kept(file):
                assert _content(file, each) == list(each.tokens)

    its.midway = in_a_step
    for number in range(60):
        _act(its, number, rng)
        if rng.random() < 0.1:
            next_file = kill()
            path = next_file.path
            kept = _kept(next_file)
            found = [list(each.tokens) for each in kept]
            assert [_content(next_file, each) for each in kept] == found
            for tokens in its.tokens.values():
                recorded = tokens[: len(tokens) // TOGETHER * TOGETHER]
                assert not recorded or any(each[: len(recorded)] == recorded for each in found)
            its = Sequences(next_file)
            its.pages.restore({number + 1000 + place: each.pages for place, each in enumerate(kept)})
            its.tokens = {number + 1000 + place: list(each.tokens) for place, each in enumerate(kept)}
            its.midway = in_a_step


def _two_sequences(path: Path) -> None:
    its = Sequences(_open(path))
    its.write(1, list(range(3 * PAGE + 5)), owner="device-1")
    its.fork(2, 1, PAGE + 3)
    its.write(2, [7] * (2 * PAGE), owner="device-2")


def test_sequences_come_back_with_their_owners_and_shared_pages(tmp_path: Path) -> None:
    _two_sequences(tmp_path / "pages")
    kept = {each.owner: each for each in _kept(_open(tmp_path / "pages"))}
    assert list(kept["device-1"].tokens) == list(range(3 * PAGE))
    assert list(kept["device-2"].tokens) == [*range(PAGE + 3), *[7] * (2 * PAGE - 3)]
    assert kept["device-1"].pages[0] == kept["device-2"].pages[0]


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


HEADER_BYTES = 4096
KEYS = slice(HEADER_BYTES + 3 * 4096, None)  # behind the header and twelve records


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
        lambda path: _flip(path, 10),
        lambda path: path.write_bytes(path.read_bytes()[: KEYS.start] + bytes(path.stat().st_size - KEYS.start)),
    ],
    ids=["cut", "empty", "noise", "header", "no-content"],
)
def test_a_damaged_file_gives_nothing(damage: Callable[[Path], object], tmp_path: Path) -> None:
    _two_sequences(tmp_path / "pages")
    damage(tmp_path / "pages")
    assert _kept(_open(tmp_path / "pages")) == []


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_bit_never_gives_a_wrong_page(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "pages"
    _two_sequences(path)
    whole = {tuple(each.tokens) for each in _kept(_open(path))}
    _flip(path, random.Random(seed).randrange(4096, path.stat().st_size))
    file = _open(path)
    for each in _kept(file):
        assert any(tokens[: len(each.tokens)] == tuple(each.tokens) for tokens in whole)
        assert _content(file, each) == list(each.tokens)


@pytest.mark.parametrize("other", [{"identity": "another"}, {"count": COUNT - 1}])
def test_pages_of_another_model_or_size_are_not_taken(other: dict[str, object], tmp_path: Path) -> None:
    _two_sequences(tmp_path / "pages")
    assert _kept(_open(tmp_path / "pages", **other)) == []  # type: ignore[arg-type]


def test_pages_are_erased_after_their_time(tmp_path: Path) -> None:
    _two_sequences(tmp_path / "pages")
    assert _kept(_open(tmp_path / "pages"), keep_s=0.0) == []
    assert _kept(_open(tmp_path / "pages")) == []
    _without_content(tmp_path / "pages")


def _without_content(path: Path) -> None:
    data = path.read_bytes()
    assert b"device-1" not in data
    assert not any(data[KEYS])


def test_a_page_is_kept_as_long_as_it_or_a_later_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hour = 0.0
    monkeypatch.setattr(time, "time", lambda: 3600 * hour)
    file = _open(tmp_path / "pages")
    its = Sequences(file)
    its.write(1, [1] * (3 * PAGE))
    its.write(2, [2] * PAGE)
    hour = 20.0
    its.write(2, [2] * PAGE)
    its.fork(3, 1, PAGE)
    file.note_use(its.pages.table(3))
    hour = 30.0
    kept = {each.tokens[0]: each for each in _kept(file)}
    assert {token: (len(each.tokens), each.age_s / 3600) for token, each in kept.items()} == {
        1: (PAGE, 10.0),
        2: (2 * PAGE, 10.0),
    }


def test_only_its_owner_may_read_the_file(tmp_path: Path) -> None:
    _open(tmp_path / "pages")
    assert (tmp_path / "pages").stat().st_mode & 0o777 == 0o600


def test_a_second_process_does_not_get_the_file(tmp_path: Path) -> None:
    file = _open(tmp_path / "pages")
    program = (
        "import sys; from pathlib import Path; from fleet_edge.verifiers.blocks.page_file import PageFile; "
        f"PageFile(Path(sys.argv[1]), 'model', {[tuple(pool) for pool in POOLS]}, {COUNT})"
    )
    found = subprocess.run([sys.executable, "-c", program, file.path], capture_output=True, check=False)
    assert b"BlockingIOError" in found.stderr


def test_a_deleted_file_is_noticed(tmp_path: Path) -> None:
    file = _open(tmp_path / "pages")
    assert not file.is_deleted
    file.path.unlink()
    assert file.is_deleted


def test_without_room_for_all_pages_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - the system's
        _open(tmp_path / "pages", count=1 << 34)


# In the engine


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def load(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verifier]:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))

    def loaded(**settings: object) -> Verifier:
        given = {"target": str(gguf), "engine": "blocks", "kv_bytes": 1 << 20, "kv_kept": "disk", "threads": 1}
        return blocks_engine.load(EdgeSettings.model_validate(given | settings))

    return loaded


TOKENS = [5 * index % VOCABULARY for index in range(3 * PAGE + 10)]
KEPT = 3 * PAGE + TOGETHER


def _computed(cache: PrefixCache, tokens: list[int], *, owner: str) -> np.ndarray:
    """Compute the tokens that cannot be reused; return the last row."""
    cache.open(1)
    cache.expect(1, tokens, owner=owner)
    cache.reuse(1)
    return np.array(cache.score([Item(1, tokens[cache.computed(1) :], 1)]))[0]


def test_a_restarted_engine_goes_on_with_the_same_bits(load: Callable[..., Verifier]) -> None:
    row = _computed(PrefixCache(load()), TOKENS, owner="device-1")
    cache = PrefixCache(load(), sharing=PrefixSharing.DEVICE)
    cache.open(1)
    cache.expect(1, TOKENS, owner="device-1")
    assert cache.reuse(1) == KEPT
    assert np.array_equal(np.array(cache.score([Item(1, TOKENS[KEPT:], 1)]))[0], row)


def test_pages_survive_an_upgrade(load: Callable[..., Verifier], monkeypatch: pytest.MonkeyPatch) -> None:
    row = _computed(PrefixCache(load()), TOKENS, owner="device-1")
    monkeypatch.setattr(weight_cache, "sources_hash", lambda: "another release")
    cache = PrefixCache(load())
    assert cache.retained_tokens == KEPT
    assert np.array_equal(_computed(cache, TOKENS, owner="device-1"), row)


def test_another_layout_has_another_version(
    load: Callable[..., Verifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the same tokens have other bits or another place: raise LAYOUT, and put the new hash here."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    _computed(PrefixCache(load()), TOKENS, owner="device-1")
    (path,) = (tmp_path / "pages").iterdir()
    found = hashlib.sha256(path.read_bytes()[HEADER_BYTES:]).hexdigest()[:16]
    assert {LAYOUT: found} == {2: "03451ba426667115"}


def test_a_running_engine_erases_what_nobody_has_used_for_a_day(load: Callable[..., Verifier], gguf: Path) -> None:
    now = 0.0
    cache = PrefixCache(load(), clock=lambda: now)
    _computed(cache, TOKENS, owner="device-1")
    now = DAY_S
    cache.close(1)
    path = blocks_engine.kept_pages_path(EdgeSettings(target=str(gguf), kv_kept=KeptIn.DISK))
    assert path is not None
    cache.expire()
    assert b"device-1" in path.read_bytes()
    now = 2 * DAY_S + 1
    cache.expire()
    assert cache.retained_tokens == 0
    data = path.read_bytes()
    assert b"device-1" not in data
    assert not any(data[4096:])


def test_a_day_goes_on_across_a_restart(load: Callable[..., Verifier], monkeypatch: pytest.MonkeyPatch) -> None:
    wall = time.time()
    monkeypatch.setattr(time, "time", lambda: wall)
    cache = PrefixCache(load())
    _computed(cache, TOKENS, owner="device-1")
    wall += 20 * 3600
    now = 0.0
    cache = PrefixCache(load(), clock=lambda: now)
    now = 3 * 3600.0
    cache.expire()
    assert cache.retained_tokens
    now = 5 * 3600.0
    cache.expire()
    assert cache.retained_tokens == 0


@pytest.mark.parametrize(("sharing", "gained"), [(PrefixSharing.DEVICE, 0), (PrefixSharing.ALL, KEPT)])
def test_who_may_share_a_prefix_is_the_same_after_a_restart(
    load: Callable[..., Verifier], sharing: PrefixSharing, gained: int
) -> None:
    _computed(PrefixCache(load(), sharing=sharing), TOKENS, owner="device-1")
    cache = PrefixCache(load(), sharing=sharing)
    cache.open(1)
    cache.expect(1, TOKENS, owner="device-2")
    assert cache.reuse(1) == gained


def test_a_rejected_draft_is_not_taken_for_what_replaced_it(load: Callable[..., Verifier]) -> None:
    other = [*TOKENS[: 2 * PAGE - 3], *[1] * 10]
    cache = PrefixCache(load())
    _computed(cache, TOKENS[: 2 * PAGE], owner="device-1")
    cache.truncate(1, 2 * PAGE - 3)
    row = np.array(cache.score([Item(1, other[2 * PAGE - 3 :], 1)]))[0]
    assert np.array_equal(_computed(PrefixCache(load()), other, owner="device-1"), row)


@pytest.mark.parametrize("off", [{"kv_kept": "off"}, {"prefix_sharing": "off"}])
def test_nothing_is_kept_where_the_settings_say_so(load: Callable[..., Verifier], off: dict[str, str]) -> None:
    _computed(PrefixCache(load(**off)), TOKENS, owner="device-1")
    assert PrefixCache(load(**off)).retained_tokens == 0
    assert not (Path(os.environ["CACHE_DIRECTORY"]) / "pages").exists()


def test_what_an_administrator_deletes_is_forgotten(load: Callable[..., Verifier], gguf: Path) -> None:
    cache = PrefixCache(load())
    _computed(cache, TOKENS, owner="device-1")
    cache.close(1)
    path = blocks_engine.kept_pages_path(EdgeSettings(target=str(gguf), kv_kept=KeptIn.DISK))
    assert path is not None
    path.unlink()
    cache.open(2)
    assert cache.retained_tokens == 0


def test_kept_sequences_make_room_for_others(load: Callable[..., Verifier]) -> None:
    cache = PrefixCache(load())
    whole = cache.capacity()
    _computed(cache, TOKENS, owner="device-1")
    cache = PrefixCache(load())
    for number in count(2):
        cache.open(number)
        item = Item(number, TOKENS, 0)
        if not cache.fits([item]):
            break
        cache.score([item])
    assert cache.retained_tokens == 0
    assert number - 2 == whole // (4 * PAGE)


def _cut(path: Path, _foreign: bytes) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def _flip_much(path: Path, _foreign: bytes) -> None:
    draw, data = random.Random(3), bytearray(path.read_bytes())
    for _ in range(500):
        data[draw.randrange(len(data))] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_cut, _flip_much, Path.write_bytes], ids=["cut", "flipped", "of-another-model"])
def test_after_a_power_cut_an_engine_starts_and_computes_the_same(
    load: Callable[..., Verifier],
    damage: Callable[[Path, bytes], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks_engine, "_MIN_KEPT_BYTES", 0)
    monkeypatch.setattr(CachedWeights, "keep_later", CachedWeights.keep)
    other = tiny_target_gguf(tmp_path / "other.gguf", seed=8)

    def kept() -> list[Path]:
        return [path for folder in ("pages", "weights") for path in (tmp_path / folder).iterdir()]

    _computed(PrefixCache(load(target=str(other))), TOKENS, owner="device-1")
    foreign = [path.read_bytes() for path in kept()]
    for path in kept():
        path.unlink()
    row = _computed(PrefixCache(load()), TOKENS, owner="device-1")
    for path, content in zip(kept(), foreign, strict=True):
        damage(path, content)
    assert np.array_equal(_computed(PrefixCache(load()), TOKENS, owner="device-1"), row)
    cache = PrefixCache(load())  # with files that are whole again
    assert cache.retained_tokens == KEPT
    assert np.array_equal(_computed(cache, TOKENS, owner="device-1"), row)
