import json
from functools import partial
from pathlib import Path

import pytest

from fleet_edge.step_curve import read_curve, write_curve
from tests.support.command import Run, refused
from tests.support.step_curves import AVX2, CHEAP_TOKENS

DRAFTS = ("--draft-ms", "10", "--acceptance", "0.7", "--rtt-ms", "20")


@pytest.fixture
def advise(fleet: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return partial(fleet, "edge", "advise")


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    write_curve(AVX2, tmp_path / "avx2.json")
    return tmp_path / "avx2.json"


def test_where_tokens_are_dear_it_says_that_the_edge_is_to_write(advise: Run, curve: Path) -> None:
    code, out, _ = advise("--curve", curve, *DRAFTS, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["loads"][0]["gain_by_cost"]["1"] < 1.05
    assert found["says"][0].startswith("Drafting does not pay here for one device")
    assert found["pays_with_devices"] == []
    held = found["holds"]["edge_only"]["devices"]
    # A prompt takes 256 ms: with 7 devices or more, 5 % of the gaps contain one.
    assert held == 6


def test_where_tokens_are_cheap_it_says_how_to_draft_and_up_to_which_load(advise: Run, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    write_curve(CHEAP_TOKENS, file)
    copy = tmp_path / "copy.json"
    code, out, _ = advise(
        "--curve", file, "--save-curve", copy, *DRAFTS, "--level-tokens", "5", "--level-gap-ms", "400"
    )
    assert code == 0
    assert "Drafting pays here for one device" in out
    assert "Drafting pays with" in out or "Drafting pays at all of these loads" in out
    assert read_curve(copy) == read_curve(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--curve", "none.json", *DRAFTS), "The curve none.json cannot be read"),
        (("--draft-ms", "10"), "give --acceptance"),
        (("--acceptance", "0.7"), "give --draft-ms"),
        (("--draft-ms", "-1", "--acceptance", "0.5"), "--draft-ms is -1"),
        (("--draft-ms", "10", "--acceptance", "70"), "give the share of draft tokens that is accepted, from 0 to 1"),
        (("--draft-ms", "10", "--acceptance", "nan"), "from 0 to 1"),
        (("--draft-ms", "10", "--acceptance", "0.5", "--rtt-ms", "1e9"), "--rtt-ms"),
        (("--target", "nowhere", *DRAFTS), "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(advise: Run, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(advise(*arguments))
