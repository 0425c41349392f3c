import random

import pytest

from fleet_edge.sessions.statistics import AcceptanceByModel, RecentAcceptance, TokenTimes

MODEL, OTHER = "small Q4_0", "small Q4_1"


def drafting(known: AcceptanceByModel, device: str, share: float, *, model: str = MODEL, drafts: int = 50) -> None:
    """Let a device send drafts of four tokens, of which `share` are accepted."""
    rng = random.Random(device)
    for _ in range(drafts):
        accepted = next((place for place in range(4) if rng.random() >= share), 4)
        known.count(model, device, tested=min(4, accepted + 1), accepted=accepted)


def test_models_are_told_apart_and_nothing_is_said_of_one_that_hardly_drafted() -> None:
    known = AcceptanceByModel()
    drafting(known, "a", 0.9)
    drafting(known, "b", 0.3, model=OTHER)
    drafting(known, "c", 0.5, model="new", drafts=2)
    assert known.share(MODEL) == pytest.approx(0.9, abs=0.1)
    assert known.share(OTHER) == pytest.approx(0.3, abs=0.15)
    assert known.share("new") is None
    assert known.share("never seen") is None


def test_what_some_devices_send_does_not_change_what_most_find() -> None:
    """A device may draft nonsense at any rate, under the model name of others."""
    known = AcceptanceByModel()
    for number in range(5):
        drafting(known, f"honest-{number}", 0.9)
    for number in range(4):
        drafting(known, f"hostile-{number}", 0.0, drafts=10_000)
    assert known.share(MODEL) == pytest.approx(0.9, abs=0.1)


def test_what_is_remembered_is_bounded_and_the_latest_count() -> None:
    known = AcceptanceByModel()
    for number in range(200):
        drafting(known, f"old-{number}", 0.1, drafts=10)
    for number in range(64):
        drafting(known, f"new-{number}", 0.9)
    assert known.share(MODEL) == pytest.approx(0.9, abs=0.1)
    for number in range(1_000):
        drafting(known, "a", 0.5, model=f"model-{number}", drafts=10)
    assert known.share(MODEL) is None
    assert known.share("model-999") is not None
    assert sum(known.share(f"model-{number}") is not None for number in range(1_000)) <= 64


def test_a_draft_on_which_nothing_was_decided_counts_nothing() -> None:
    known, recent = AcceptanceByModel(), RecentAcceptance()
    known.count(MODEL, "a", tested=0, accepted=0)
    assert known.share(MODEL) is None
    assert not recent.fair


def test_the_first_token_is_told_from_the_open_on_and_gaps_are_shared_by_those_that_come_together() -> None:
    times = TokenTimes()
    times.begin(committed=10, at=5.0)
    assert (times.first_token_ms, times.gap_p95_ms) == (None, None)
    times.add_tokens(committed=13, at=5.5)
    assert (times.first_token_ms, times.gap_p95_ms) == (500.0, None)
    times.add_tokens(committed=17, at=5.9)
    assert times.gap_p95_ms == pytest.approx(100.0, rel=0.05)
    times.add_tokens(committed=17, at=9.0)  # nothing new
    assert times.gap_p95_ms == pytest.approx(100.0, rel=0.05)


def test_one_in_twenty_is_slower_than_the_percentile_within_a_twentieth() -> None:
    rng = random.Random(4)
    times, at, gaps, committed = TokenTimes(), 0.0, [], 0
    times.begin(committed=0, at=at)
    times.add_tokens(committed=(committed := 1), at=at)
    for _ in range(2000):
        new, gap = rng.randint(1, 6), rng.lognormvariate(-3.0, 0.8)
        at += gap * new
        committed += new
        times.add_tokens(committed=committed, at=at)
        gaps += [gap * 1e3] * new
    exact = sorted(gaps)[int(0.95 * len(gaps))]
    assert times.gap_p95_ms == pytest.approx(exact, rel=0.05)
    assert len(times._gaps) < 100
