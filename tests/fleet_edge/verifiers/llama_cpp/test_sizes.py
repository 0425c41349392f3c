import pytest

from fleet_edge.verifiers.llama_cpp.target import Sizes, size_states, size_streams

TOKEN_BYTES = 23_040  # of SmolLM2-135M


def plan(budget_bytes: int, *, wanted: int = 0, trained: int = 8192, heads: int = 9) -> Sizes:
    found = size_streams(
        budget_bytes=budget_bytes,
        token_bytes=TOKEN_BYTES,
        trained=trained,
        wanted=wanted,
        width=49_152,
        heads=heads,
    )
    assert found is not None
    return found


@pytest.mark.parametrize("gib", [2, 2.1, 2.5, 3, 4])
def test_a_budget_that_holds_sixteen_texts_of_some_length_has_room_for_sixteen(gib: float) -> None:
    found = plan(int(gib * (1 << 30)))
    assert found.sequences >= 16
    assert found.context >= 4096


def test_a_smaller_budget_holds_fewer_texts_rather_than_short_ones() -> None:
    found = plan(1 << 30)
    assert (found.sequences, found.context) == (11, 4095)
    assert plan(256 << 20).sequences == 2
    assert plan(16 << 20).context == 255  # and the smallest one a single sequence


@pytest.mark.parametrize("wanted", [0, 1, 255, 256, 3000, 100_000])
def test_the_budget_is_kept_to(wanted: int) -> None:
    for budget_bytes in range(6_000_000, 3_000_000_000, 93_000_000):
        found = plan(budget_bytes, wanted=wanted)
        assert found.cells * TOKEN_BYTES <= budget_bytes
        assert 0 < found.context < found.cells // found.sequences
        assert found.cells % (256 * found.sequences) == 0


@pytest.mark.parametrize("heads", [1, 9, 32, 128])
@pytest.mark.parametrize("wanted", [512, 4096, 100_000])
def test_the_scores_of_a_call_have_a_bound(heads: int, wanted: int) -> None:
    found = plan(2 << 30, wanted=wanted, trained=1 << 17, heads=heads)
    assert 64 <= found.batch <= 512
    scores = found.batch * found.cells // found.sequences * heads * 4
    assert scores <= 64 << 20 or found.batch == 64
    assert plan(2 << 30, wanted=wanted, trained=1 << 17, heads=0).batch == 512, "a GPU keeps none"


@pytest.mark.parametrize("width", [1000, 49_152, 1 << 20])
@pytest.mark.parametrize("state", [0, 1 << 20])
def test_a_call_has_rows_for_all_sequences_of_llama_cpp_which_would_end_the_process(width: int, state: int) -> None:
    sizes = {"budget_bytes": 4 << 30, "token_bytes": TOKEN_BYTES, "trained": 8192, "wanted": 512, "width": width}
    streams = size_streams(**sizes, heads=9)
    hybrid = size_states(**sizes, heads=9, state_bytes=state)
    assert streams is not None
    assert hybrid is not None
    assert streams.rows >= streams.sequences
    assert hybrid.rows >= 2 * hybrid.sequences
    assert hybrid.sequences * 2 * state + hybrid.cells * TOKEN_BYTES <= 4 << 30
    assert hybrid.batch >= hybrid.rows
