import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_device.requests.generate import StopStrings


def test_the_text_ends_before_the_stop_string_even_if_pieces_cut_it() -> None:
    stops = StopStrings(["END"])
    assert [stops.feed(piece) for piece in ("one E", "N", "D two", "three")] == ["one ", "", "", ""]
    assert stops.found
    assert stops.finish() == ""


def test_what_only_began_like_a_stop_string_is_given_out() -> None:
    stops = StopStrings(["END"])
    assert stops.feed("the EN") == "the "
    assert stops.feed("VY") == "ENVY"
    assert stops.feed(" E") == " "
    assert stops.finish() == "E"
    assert not stops.found


def test_the_first_of_several_counts() -> None:
    stops = StopStrings(["second", "first"])
    assert stops.feed("a first, a second") == "a "


def test_an_empty_stop_string_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["x", ""])


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_however_a_text_is_cut_what_comes_out_is_all_of_it_up_to_the_first_stop(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    watch = StopStrings(stops)
    out = "".join([watch.feed(piece) for piece in pieces]) + watch.finish()
    # A stop string that ends first is found first; one that is longer may begin before it.
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if any(stop in text for stop in stops):
        assert watch.found
        assert any(text[len(out) :].startswith(stop) for stop in stops)
    else:
        assert out == text
