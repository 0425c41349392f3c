import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import numpy as np
import pytest

from fleet_device.drafters import llama_cpp as llama_cpp_drafter
from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from schemas.policy import SamplingPolicy
from tests.support.prepared_models import prepared
from tests.support.tiny_gguf import tiny_gguf, tiny_words

POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)


def settings(path: Path, *, context: int = 128, batch: int = 16) -> LlamaCppSettings:
    return LlamaCppSettings(path, threads=1, context=context, batch=batch)


class Make(Protocol):
    def __call__(self, *, context: int = ..., trained: int = ...) -> LlamaCppDrafter: ...


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:

        def make(*, context: int = 128, trained: int = 256) -> LlamaCppDrafter:
            path = tiny_gguf(tmp_path / "tiny.gguf", context=trained)
            return stack.enter_context(closing(LlamaCppDrafter(settings(path, context=context))))

        yield make


@pytest.fixture
def drafter(make: Make) -> LlamaCppDrafter:
    return make()


def row(drafter: LlamaCppDrafter) -> np.ndarray:
    dist = drafter.next(POLICY)
    dense = np.zeros(drafter.vocabulary.size)
    dense[dist.ids] = dist.probs
    return dense


def conversation(number: int, length: int) -> list[int]:
    return [*range(20, 40), *((7 + number + place * (number + 3)) % 200 + 3 for place in range(length - 20))]


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare up to rounding: float16 sums depend on what other cells hold."""
    return float(np.abs(one - other).sum() / 2) < 0.01


def computed_for(drafter: LlamaCppDrafter, tokens: list[int]) -> int:
    before = drafter.tokens_computed
    drafter.reset(tokens)
    row(drafter)
    return drafter.tokens_computed - before


@pytest.fixture
def roomy(make: Make) -> LlamaCppDrafter:
    return make(context=1024, trained=1024)


def test_conversations_that_take_turns_at_a_device_each_compute_what_is_new(roomy: LlamaCppDrafter) -> None:
    talks = [conversation(number, 100) for number in range(4)]
    assert [computed_for(roomy, talk) for talk in talks] == [100, 80, 80, 80], "they begin alike"
    for _ in range(3):
        for talk in talks:
            talk += [5, 6, 7]
            assert computed_for(roomy, talk) == 3


def test_a_short_text_between_two_turns_costs_the_conversation_nothing(roomy: LlamaCppDrafter) -> None:
    talk = conversation(1, 200)
    computed_for(roomy, talk)
    assert computed_for(roomy, [9, 8, 7]) == 3
    assert computed_for(roomy, [*talk, 4]) == 1


def test_what_was_drafted_and_rejected_is_cut_and_makes_no_sequence_of_its_own(roomy: LlamaCppDrafter) -> None:
    talk = conversation(1, 200)
    computed_for(roomy, talk)
    roomy.extend([3] * 10)
    row(roomy)
    assert computed_for(roomy, [*talk, 4]) == 1
    assert len(roomy._kept) == 0


def test_a_conversation_that_goes_on_in_another_way_is_there_both_ways(roomy: LlamaCppDrafter) -> None:
    talk = conversation(1, 300)
    computed_for(roomy, talk)
    assert computed_for(roomy, [*talk[:150], 3]) == 1, "a question that is asked anew"
    assert computed_for(roomy, [*talk, 4]) == 1


def test_of_others_as_many_tokens_are_kept_as_the_context_has_and_those_unused_for_longest_go(make: Make) -> None:
    drafter, fresh = make(context=256), make(context=256)
    talks = [conversation(number, 100) for number in range(4)]
    for talk in talks:
        computed_for(drafter, talk)
    assert drafter._kept.tokens == 200
    assert computed_for(drafter, [*talks[1], 4]) == 1
    assert computed_for(drafter, [*talks[0], 4]) == 81, "it had to go"
    longest = conversation(9, 256)
    assert computed_for(drafter, longest) == 236
    observed = row(drafter)
    computed_for(fresh, longest)
    assert alike(observed, row(fresh))


def test_nothing_is_kept_where_memory_is_short(roomy: LlamaCppDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    talks = [conversation(number, 100) for number in range(2)]
    monkeypatch.setattr(llama_cpp_drafter, "available_memory", lambda: 1000)
    for _ in range(2):
        assert computed_for(roomy, talks[0]) in (80, 100)
        assert computed_for(roomy, talks[1]) == 80
    assert len(roomy._kept) == 0


def test_nothing_is_kept_that_a_window_has_passed(roomy: LlamaCppDrafter) -> None:
    roomy._window = 50
    talks = [conversation(0, 100), [3] * 40, [4] * 40]
    for talk in talks:
        computed_for(roomy, talk)
    assert computed_for(roomy, [*talks[1], 5]) == 1
    assert computed_for(roomy, [*talks[0], 5]) == 101


def test_an_unreadable_copy_is_computed_again(roomy: LlamaCppDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    talks = [conversation(number, 100) for number in range(2)]
    expected = [(computed_for(roomy, talk), row(roomy))[1] for talk in talks]
    monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data", lambda *_: 0)
    assert computed_for(roomy, talks[0]) == 100
    assert alike(row(roomy), expected[0])


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_kept_the_rows_are_those_of_a_fresh_drafter(seed: int, make: Make) -> None:
    rng = random.Random(seed)
    used, fresh = make(context=rng.choice((128, 256))), make(context=256)
    talks = [[rng.randrange(3, 200) for _ in range(rng.randrange(1, 60))] for _ in range(4)]
    for _ in range(60):
        number = rng.randrange(len(talks))
        talk = talks[number]
        if rng.random() < 0.3:
            other = rng.choice(talks)
            talk = [*other[: rng.randrange(1, len(other) + 1)]]
        talk = talk[: max(1, len(talk) - rng.choice((0, 0, 3, 40)))]
        talk = talks[number] = [*talk, *(rng.randrange(3, 200) for _ in range(3))][:120]
        used.reset(talk)
        if rng.random() < 0.5:
            used.extend([5, 6])
            row(used)
            used.truncate(len(talk))
        observed = row(used)
        fresh.truncate(0)
        fresh.reset([4])
        fresh.reset(talk)
        assert alike(observed, row(fresh))
    assert used.tokens_computed < fresh.tokens_computed


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip file"])
def test_a_file_that_is_no_gguf_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(DrafterError, match="GGUF"):
        LlamaCppDrafter(settings(path))


@pytest.mark.parametrize("kept", [4, 100, 10_000, 200_000])
def test_a_cut_off_gguf_is_one_sentence(tmp_path: Path, kept: int, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DrafterError, match=r"llama\.cpp"):
        LlamaCppDrafter(settings(path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"architecture": "nonsense"}, "nonsense"),
        ({"vocabulary": False}, "vocabulary"),
        ({"context": 1 << 30}, "137,439"),
    ],
    ids=["unknown architecture", "no vocabulary", "context too large for memory"],
)
def test_a_model_that_cannot_be_used_is_refused(tmp_path: Path, model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DrafterError, match=sentence):
        LlamaCppDrafter(settings(tiny_gguf(tmp_path / "odd.gguf", **model), context=1 << 30))


def test_a_recurrent_model_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "llama_model_is_recurrent", lambda _: True)
    with pytest.raises(DrafterError):
        make()


def test_padding_rows_are_never_drafted(drafter: LlamaCppDrafter) -> None:
    assert drafter.vocabulary.size == len(tiny_words())
    drafter.reset([5, 6])
    assert len(drafter.next(POLICY)) == drafter.vocabulary.size


def test_memory_that_cannot_be_cut(drafter: LlamaCppDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter.reset([5, 6, 7])
    expected = row(drafter)
    drafter.extend([8, 9])
    row(drafter)
    monkeypatch.setattr(llama_cpp, "llama_memory_seq_rm", lambda *_: False)
    drafter.truncate(3)
    assert np.array_equal(row(drafter), expected)


def test_a_failed_computation_is_said_and_leaves_the_drafter_whole(
    drafter: LlamaCppDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter.reset(list(range(5, 40)))
    expected = row(drafter)
    drafter.truncate(10)
    drafter.extend(list(range(15, 40)))
    decode = llama_cpp.llama_decode
    calls = []

    def fail_late(context: object, batch: object) -> int:
        calls.append(1)
        status = int(decode(context, batch))
        return status if len(calls) < 2 else 2  # aborted: what was computed stays in the memory

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", fail_late)
        with pytest.raises(DrafterError):
            drafter.next(POLICY)
    assert np.array_equal(row(drafter), expected)


def test_extending_computes_nothing_until_next(drafter: LlamaCppDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    decode = llama_cpp.llama_decode

    def counted(context: object, batch: llama_cpp.llama_batch) -> int:
        computed.append(batch.n_tokens)
        return int(decode(context, batch))

    monkeypatch.setattr(llama_cpp, "llama_decode", counted)
    drafter.reset(list(range(5, 25)))
    drafter.extend([30])
    assert not computed
    drafter.next(POLICY)
    assert computed == [11, 10]  # two chunks of one size, not 16 and 5
    drafter.reset([*range(5, 25), 31, 32])
    drafter.next(POLICY)
    assert computed[2:] == [2]  # the common prefix was kept
    drafter.next(POLICY)
    assert computed[3:] == []  # the row is still there


def test_a_model_is_loaded_and_computed_on_one_own_thread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # On its own thread: in the caller's an application may compute with torch, whose use of AMX registers stops
    # llama.cpp (SIGILL). With two calling threads llama.cpp has more workers than cores, which slows all of them down.
    idents = []

    def watch(call: Callable[..., object], *arguments: object) -> object:
        idents.append(threading.get_ident())
        return call(*arguments)

    for name in ("llama_model_load_from_file", "llama_decode"):
        monkeypatch.setattr(llama_cpp, name, partial(watch, getattr(llama_cpp, name)))
    drafter = make()
    drafter.reset([5, 6, 7])
    drafter.next(POLICY)
    assert len(idents) == 2
    assert len(set(idents)) == 1
    assert threading.get_ident() not in idents


def test_nan_logits_are_said(drafter: LlamaCppDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = np.full(4096, np.nan, dtype=np.float32)
    pointer = broken.ctypes.data_as(llama_cpp.ctypes.POINTER(llama_cpp.ctypes.c_float))
    monkeypatch.setattr(llama_cpp, "llama_get_logits_ith", lambda *_: pointer)
    drafter.reset([5])
    with pytest.raises(DrafterError):
        drafter.next(POLICY)


def _compare(path: Path, *, batch: int) -> float:
    """Return the largest total variation between a much-used and a fresh drafter."""
    used, fresh = (LlamaCppDrafter(settings(path, context=256, batch=batch)) for _ in range(2))
    rng = random.Random(3)

    def some(count: int) -> list[int]:
        return [rng.randrange(17, used.vocabulary.size) for _ in range(count)]

    tokens = some(70)
    used.reset(tokens)
    worst = 0.0
    for _ in range(8):
        tokens = [*tokens[: len(tokens) - rng.randrange(1, 6)], *some(rng.choice([1, 2, 5, 9]))]
        used.reset(tokens)
        observed = row(used)
        fresh.reset([0])
        fresh.reset(tokens)
        worst = max(worst, float(np.abs(observed - row(fresh)).sum() / 2))
    used.close()
    fresh.close()
    return worst


@pytest.mark.models
@pytest.mark.parametrize("quantization", ["Q4_0", "Q2_K"])
@pytest.mark.parametrize("batch", [32, 256])
def test_the_real_model_differs_by_rounding_only_however_a_sequence_came_about(quantization: str, batch: int) -> None:
    """Activations are rounded to 8 bits, so a last bit can change a probability, by at most 0.09 as measured."""
    assert _compare(prepared(f"{quantization}.gguf"), batch=batch) < 0.15


@pytest.mark.models
def test_the_real_model_knows_its_quantization_and_its_end() -> None:
    drafter = LlamaCppDrafter(settings(prepared("Q2_K.gguf")))
    assert drafter.quantization == "Q2_K"
    assert 2 in drafter.codec.end_tokens
    assert drafter.vocabulary.size == 49152
    drafter.close()
