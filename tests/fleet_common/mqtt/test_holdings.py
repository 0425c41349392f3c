from hypothesis import given
from hypothesis import strategies as st

from fleet_common.mqtt.outbox.holdings import SPARE, Holdings


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-3, 5)), max_size=100))
def test_the_largest_is_the_largest(changes: list[tuple[str, int]]) -> None:
    holdings: Holdings[str] = Holdings()
    amounts = dict.fromkeys("abcd", 0)
    for key, change in changes:
        if change > 0:
            holdings.add(key, change)
        elif change < 0:
            change = -min(-change, amounts[key])  # noqa: PLW2901
            if change:
                holdings.remove(key, -change)
        amounts[key] += change
        key, most = holdings.largest()  # type: ignore[assignment]  # noqa: PLW2901
        assert most == max(amounts.values())
        assert most == (amounts[key] if key is not None else 0)


def test_outdated_records_are_cleared_away() -> None:
    holdings: Holdings[str] = Holdings()
    for _ in range(1000):
        holdings.add("a", 2)
        holdings.remove("a", 1)
    assert len(holdings._records) <= SPARE + 3
    assert holdings.largest() == ("a", 1000)
