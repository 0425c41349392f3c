from fleet_edge.batching.grammar_share import GrammarShare
from fleet_edge.sessions.guesses import MAX_GUESS


def test_a_device_that_is_alone_is_not_limited() -> None:
    share = GrammarShare()
    share.served(["a"], 0.0)
    share.spend("a", 100.0, 0.0)
    assert not share.over("a", 0.1)
    assert share.most_forced("a", 1000, 0.1) == MAX_GUESS


def test_masks_of_a_device_get_their_share_of_the_time_while_others_are_served() -> None:
    share, now, masks = GrammarShare(), 0.0, 0.0
    while now < 100.0:
        devices = ["b"] if share.over("a", now) else ["a", "b"]
        step_s = 0.04 + (0.2 if "a" in devices else 0.0)
        now += step_s
        share.served(devices, now)
        if "a" in devices:
            share.spend("a", 0.2, now)
            masks += 0.2
    assert 0.15 < masks / now < 0.25
    assert not share.over("b", now)


def test_small_masks_never_reach_it() -> None:
    share, now = GrammarShare(), 0.0
    for _ in range(10_000):
        now += 0.04
        share.served(["a", "b"], now)
        share.spend("a", 0.002, now)
        assert not share.over("a", now)


def test_few_forced_tokens_are_guessed_beside_others() -> None:
    share = GrammarShare()
    share.served(["a", "b"], 0.0)
    first = share.most_forced("a", 0, 0.1)
    assert 0 < first < MAX_GUESS
    assert share.most_forced("a", first, 0.1) == 0
    assert share.most_forced("a", first, 10.0) == MAX_GUESS


def test_what_is_known_of_devices_is_forgotten_with_what_they_used() -> None:
    share = GrammarShare()
    for number in range(1000):
        share.served([f"device-{number}"], float(number))
        share.spend(f"device-{number}", 0.01, float(number))
    assert len(share._budgets) < 10
    assert len(share._served) < 10
