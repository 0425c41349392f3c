import random
import threading
from pathlib import Path

import llama_cpp
import pytest

from fleet_device.drafters.contract import Drafter, DrafterError, known_tokens, sequences_of
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.model_file import load_drafter
from fleet_device.settings import DeviceSettings
from sampling.distribution import Dist
from tests.fleet_device.drafters.conftest import CONTEXT, POLICY, Make
from tests.support.waiting import PATIENCE_S


def equal(left: Dist | None, right: Dist | None) -> bool:
    """Compare up to rounding: float16 sums depend on what other cells hold."""
    if left is None or right is None:
        return left is right
    tokens = {*left.ids.tolist(), *right.ids.tolist()}
    return sum(abs(left.probability(token) - right.probability(token)) for token in tokens) / 2 < 0.01


def move(drafter: Drafter, tokens: list[int], rng: random.Random) -> list[int]:
    """Change a sequence that holds these tokens at random; return its new tokens."""
    new = [rng.randrange(10) for _ in range(rng.randint(1, 6))]
    match rng.randrange(3):
        case 0 if len(tokens) < CONTEXT - 10:
            drafter.extend(new)
            return tokens + new
        case 1 if len(tokens) > 1:
            tokens = tokens[: rng.randint(1, len(tokens))]
            drafter.truncate(len(tokens))
            return tokens
        case _:
            tokens = [*tokens[: rng.randint(0, len(tokens))], *new][:CONTEXT]
            drafter.reset(tokens)
            return tokens


def test_each_sequence_gives_what_a_drafter_of_its_own_would(make: Make) -> None:
    used, fresh = sequences_of(make(3), 3), make()
    assert len(used) == 3
    rng = random.Random(3)
    texts = [[1], [1], [1]]
    for drafter in used:
        drafter.reset([1])
    for _ in range(120):
        which = rng.randrange(3)
        texts[which] = move(used[which], texts[which], rng)
        if rng.random() < 0.5:
            fresh.reset([11])
            fresh.reset(texts[which])
            assert equal(used[which].next(POLICY), fresh.next(POLICY)), texts[which]


def test_sequences_may_be_used_from_a_thread_each(make: Make) -> None:
    used, fresh = sequences_of(make(3), 3), make()
    seen: list[list[tuple[list[int], Dist | None]]] = [[], [], []]
    failed: list[BaseException] = []

    def work(which: int) -> None:
        try:
            rng, tokens = random.Random(which), [1]
            used[which].reset(tokens)
            for _ in range(60):
                tokens = move(used[which], tokens, rng)
                seen[which].append((tokens, used[which].next(POLICY)))
        except BaseException as error:  # noqa: BLE001 - reported by the test
            failed.append(error)

    threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failed
    for tokens, dist in [pair for each in seen for pair in each]:
        fresh.reset([11])
        fresh.reset(tokens)
        assert equal(dist, fresh.next(POLICY)), tokens


def test_there_are_no_more_sequences_than_the_settings_say(tiny: Path) -> None:
    drafter = LlamaCppDrafter(LlamaCppSettings(tiny, threads=1, context=CONTEXT, sequences=2))
    found = sequences_of(drafter, 5)
    assert len(found) == 2
    assert found[1].context == CONTEXT
    drafter.close()
    with pytest.raises(DrafterError):
        found[1].reset([3]) or found[1].next(POLICY)


def test_a_sequence_that_begins_as_a_text_does_is_known_by_it(tiny: Path) -> None:
    drafter = LlamaCppDrafter(LlamaCppSettings(tiny, threads=1, context=CONTEXT, sequences=2))
    first, second = sequences_of(drafter, 2)
    first.reset([3, 4, 5, 6])
    first.next(POLICY)
    second.reset([3, 9])
    second.next(POLICY)
    assert [known_tokens(each, [3, 4, 5, 7]) for each in (first, second)] == [3, 1]
    drafter.close()


def test_a_sequence_that_cannot_be_cut_leaves_the_others_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = LlamaCppDrafter(LlamaCppSettings(tiny, threads=1, context=CONTEXT, sequences=2))
    first, second = sequences_of(drafter, 2)
    for each in (first, second):
        each.reset([3, 4, 5])
    expected = [each.next(POLICY) for each in (first, second)]
    first.extend([8, 9])
    first.next(POLICY)
    remove = llama_cpp.llama_memory_seq_rm
    # A part of a sequence cannot be removed, a whole one can.
    monkeypatch.setattr(
        llama_cpp,
        "llama_memory_seq_rm",
        lambda memory, each, begin, end: begin < 0 and remove(memory, each, begin, end),
    )
    first.truncate(3)
    assert [equal(each.next(POLICY), before) for each, before in zip((first, second), expected, strict=True)] == [
        True,
        True,
    ]
    drafter.close()


def test_by_default_the_memory_of_a_device_holds_two_sequences(tiny: Path) -> None:
    drafter = load_drafter(DeviceSettings(model=str(tiny), context=CONTEXT))
    assert len(sequences_of(drafter, 8)) == 2
    drafter.close()
