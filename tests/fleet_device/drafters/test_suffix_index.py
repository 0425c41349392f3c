import logging
import random
import stat
from pathlib import Path

import numpy as np
import pytest

from fleet_device.drafters.suffix_index import (
    LENGTHS,
    LONGEST,
    TOKEN_BYTES,
    History,
    HistoryFile,
    SuffixIndex,
    forget_histories,
)
from schemas.vocabulary import Vocabulary


def search(tokens: list[int], end: list[int]) -> list[int]:
    """Return the tokens after each match of the longest indexed length, the latest first."""
    for size in reversed(LENGTHS):
        places = [p for p in range(size, len(tokens)) if len(end) >= size and tokens[p - size : p] == end[-size:]]
        if followers := [tokens[place] for place in reversed(places) if tokens[place] >= 0]:
            return followers
    return []


def test_whatever_was_appended_and_taken_back_it_finds_what_a_plain_search_finds() -> None:
    rng, index, tokens, found = random.Random(3), SuffixIndex(), list[int](), 0
    for _ in range(1500):
        if rng.random() < 0.6:
            new = [rng.randrange(3) if rng.random() < 0.98 else -1 for _ in range(rng.choice((1, 1, 1, 5, 30)))]
            tokens += new
            index.append(new)
        else:
            length = rng.randrange(max(0, len(tokens) - 40), len(tokens) + 1)
            del tokens[length:]
            index.truncate(length)
        if len(tokens) > 500:
            del tokens[40:]
            index.truncate(40)
        end = tokens[-LONGEST:]
        if min(end, default=-1) < 0:
            continue
        match, expected = index.find(end), search(tokens, end)
        followers = [] if match is None else match.followers
        assert followers == expected[: len(followers)]
        assert (match is None) == (not expected)
        found += match is not None
    assert found > 500


def test_how_much_is_alike_is_told_up_to_the_longest() -> None:
    index = SuffixIndex()
    index.append([*range(40), 7, *range(5, 40)])
    match = index.find(list(range(5, 38)))
    assert match.followers == [38, 38]
    assert match.alike == [LONGEST, LONGEST]
    match = index.find([99, 98, 10, 11])
    assert match.alike == [2, 2]


def test_nothing_is_found_across_two_texts() -> None:
    index = SuffixIndex()
    index.append([1, 2, -1, 3, 4, 5])
    assert index.find([1, 2]) is None
    assert index.find([2, 3]) is None
    assert index.find([3, 4]) is not None


def test_a_text_of_one_token_is_searched_in_bounded_steps() -> None:
    index = SuffixIndex()
    index.append(np.full(20_000, 5))
    match = index.find([5] * LONGEST)
    assert len(match.followers) <= 16


VOCABULARY = Vocabulary.of([f"t{number}" for number in range(1000)])
TEXT = list(range(100, 140))


def open_history(folder: Path, *, memory_bytes: int = 100_000, most_bytes: int = 10_000) -> History:
    return History(memory_bytes=memory_bytes, file=HistoryFile(folder, VOCABULARY, most_bytes=most_bytes))


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_was_written_is_found_also_by_the_next_run(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    open_history(folder).remember([1, 2, 3], TEXT)
    match = open_history(folder).find([2, 3, 100, 101])
    assert match.followers == [102]


def test_nobody_else_may_read_the_file(tmp_path: Path) -> None:
    open_history(tmp_path / "history").remember([], TEXT)
    assert stat.S_IMODE(only(tmp_path / "history").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o700


def test_of_a_prompt_only_its_end_is_kept(tmp_path: Path) -> None:
    history = open_history(tmp_path)
    history.remember(list(range(500, 600)), TEXT)
    assert history.tokens == 8 + len(TEXT) + 1
    assert history.find([500, 501]) is None


def test_memory_and_disk_are_bounded_and_the_latest_texts_are_kept(tmp_path: Path) -> None:
    memory_bytes, rng = 300 * TOKEN_BYTES, random.Random(2)
    history = open_history(tmp_path, memory_bytes=memory_bytes, most_bytes=2000)
    for _ in range(200):
        text = [rng.randrange(1000) for _ in range(30)]
        history.remember([], text)
        assert history.tokens <= 300
        assert only(tmp_path).stat().st_size <= 2000
        match = history.find(text[:10])
        assert match.followers[0] == text[10]
    again = open_history(tmp_path, memory_bytes=memory_bytes, most_bytes=2000)
    assert again.find(text[:10]) is not None


def test_a_text_longer_than_all_there_is_room_for_is_kept_as_far_as_there_is_room(tmp_path: Path) -> None:
    history = open_history(tmp_path, memory_bytes=100 * TOKEN_BYTES)
    history.remember([], [number % 1000 for number in range(5000)])
    assert history.tokens <= 100


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer", "alien", "emptied", "outside"])
def test_a_damaged_file_loses_what_is_damaged(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    history = open_history(tmp_path)
    history.remember([], TEXT)
    history.remember([], [*range(200, 240)])
    path = only(tmp_path)
    data = bytearray(path.read_bytes())
    match damage:
        case "cut":
            del data[-3:]
        case "flipped":
            data[-20] ^= 64
        case "longer":
            data += b"\xff\xff\xff\xff\xff\xff\xff\xff1234"
        case "alien":
            data = bytearray(b"something else")
        case "emptied":
            data = bytearray()
        case _:
            other = HistoryFile(tmp_path / "other", VOCABULARY.model_copy(update={"size": 9}), most_bytes=10_000)
            del other
            data[-4:] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = open_history(tmp_path)
    whole = damage in ("alien", "emptied")
    assert (again.find(TEXT[:10]) is None) == whole
    assert (again.find([*range(200, 210)]) is None) == (damage != "longer")
    assert any("is dropped" in message for message in caplog.messages) == (damage != "emptied")
    caplog.clear()
    again.remember([], [*range(300, 340)])
    assert open_history(tmp_path).find([*range(300, 310)]) is not None
    assert not caplog.messages


def test_a_file_over_the_present_bound_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = open_history(tmp_path)
    for _ in range(20):
        history.remember([], TEXT)
    assert open_history(tmp_path, most_bytes=1000).tokens == 0
    assert any("'history_mb'" in message for message in caplog.messages)
    assert not list(tmp_path.iterdir())


def test_any_bytes_can_stand_in_the_file(tmp_path: Path) -> None:
    rng = random.Random(9)
    open_history(tmp_path).remember([], TEXT)
    path = only(tmp_path)
    whole = path.read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randint(0, len(data))])
        open_history(tmp_path).remember([], TEXT)


def test_a_folder_that_cannot_be_written_is_a_sentence_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    history = open_history(tmp_path / "file")
    for _ in range(3):
        history.remember([], TEXT)
    assert history.find(TEXT[:10]) is not None
    assert len([message for message in caplog.messages if "history_dir" in message]) == 1


def test_texts_of_other_vocabularies_are_apart_and_bounded(tmp_path: Path) -> None:
    for number in range(9):
        vocabulary = Vocabulary.of([f"{number}", "b"])
        HistoryFile(tmp_path, vocabulary, most_bytes=1000).append([0, 1, 0, 1])
    assert len(list(tmp_path.iterdir())) <= 4
    assert HistoryFile(tmp_path, VOCABULARY, most_bytes=1000).read() == []


def test_forgetting_leaves_nothing(tmp_path: Path) -> None:
    open_history(tmp_path).remember([], TEXT)
    assert forget_histories(tmp_path) == 1
    assert not list(tmp_path.iterdir())
    assert forget_histories(tmp_path / "none") == 0
