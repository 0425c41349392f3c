import pytest

from fleet_edge.verifiers.llama_cpp.streams import StreamSizes, size_streams

TOKEN_BYTES = 23_040  # of SmolLM2-135M


def plan(budget_bytes: int, *, wanted: int = 0, trained: int = 8192, heads: int = 9) -> StreamSizes:
    found = size_streams(
        budget_bytes=budget_bytes,
        token_bytes=TOKEN_BYTES,
        trained=trained,
        wanted=wanted,
        width=49_152,
        heads=heads,
        threads=2,
    )
    assert found is not None
    return found


@pytest.mark.parametrize("gib", [2, 2.1, 2.5, 3, 4])
def test_a_budget_that_holds_sixteen_texts_of_some_length_has_room_for_sixteen(gib: float) -> None:
    found = plan(int(gib * (1 << 30)))
    assert found.streams >= 16
    assert found.context >= 4096


def test_a_smaller_budget_holds_fewer_texts_rather_than_short_ones() -> None:
    found = plan(1 << 30)
    assert (found.streams, found.context) == (11, 4095)
    assert plan(256 << 20).streams == 2
    assert plan(16 << 20).context == 255  # and the smallest one a single sequence


@pytest.mark.parametrize("wanted", [0, 1, 255, 256, 3000, 100_000])
def test_the_budget_is_kept_to(wanted: int) -> None:
    for budget_bytes in range(6_000_000, 3_000_000_000, 93_000_000):
        found = plan(budget_bytes, wanted=wanted)
        assert found.streams * found.shape.cells * TOKEN_BYTES <= budget_bytes
        assert 0 < found.context < found.shape.cells
        assert found.shape.cells % 256 == 0


@pytest.mark.parametrize("heads", [1, 9, 32, 128])
@pytest.mark.parametrize("wanted", [512, 4096, 100_000])
def test_the_scores_of_a_call_have_a_bound_and_two_tokens_of_each_stream_fit_into_it(heads: int, wanted: int) -> None:
    found = plan(2 << 30, wanted=wanted, trained=1 << 17, heads=heads)
    shape = found.shape
    assert 64 <= shape.tokens <= 512
    assert shape.tokens >= 2 * shape.streams
    scores = shape.tokens * shape.cells * heads * 4 * found.slabs
    assert scores <= 64 << 20 or shape.tokens == max(64, 2 * shape.streams)
    assert plan(2 << 30, wanted=wanted, trained=1 << 17, heads=0).shape.tokens == 512, "a GPU keeps none"
