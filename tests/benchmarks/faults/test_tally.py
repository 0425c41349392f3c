from benchmarks.faults.moments import percentiles
from benchmarks.faults.tally import EndedText, Tally

TEXT = {"event": "text", "session": "aa", "written": 3, "reason": "length", "mode": "coupled", "resumes": 2}


def test_texts_tokens_and_what_is_wrong_are_counted() -> None:
    tally = Tally()
    tally.take("device-1", {"event": "tokens", "at": 1.0, "number": 3})
    tally.take("device-1", {**TEXT, "wrong": None, "confirmed": True})
    tally.take("device-2", {**TEXT, "session": "bb", "mode": "residual", "wrong": "altered", "confirmed": False})
    tally.take("device-2", {"event": "failed", "sentence": "No edge.", "written": 0, "wrong": None})
    tally.take("device-2", {"event": "failed", "sentence": "Too often.", "written": 9, "wrong": "torn"})
    assert tally.texts["aa"] == EndedText("device-1", "length", 3)
    assert (tally.tokens, tally.resumes, tally.unconfirmed) == (3, 4, 1)
    assert tally.by_mode == {"coupled": 1, "residual": 1}
    assert tally.wrong == {"altered": 1, "torn": 1}
    assert (tally.refused, tally.broken_off, tally.failed) == (["No edge."], ["Too often."], {"device-2": 2})


def test_a_device_has_gone_on_with_its_first_token_after_the_moment() -> None:
    tally = Tally()
    for device, at in (("device-1", 1.0), ("device-1", 4.0), ("device-1", 5.0), ("device-2", 2.0)):
        tally.take(device, {"event": "tokens", "at": at, "number": 1})
    assert tally.wait_for_all(2, since=3.0, timeout_s=0.0) == {"device-1": 1.0}
    tally.forget_moments()
    assert tally.wait_for_all(1, since=0.0, timeout_s=0.0) == {}


def test_percentiles_are_of_what_was_measured() -> None:
    assert percentiles([]) == (0.0, 0.0, 0.0)
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles([float(each) for each in range(101)]) == (50.0, 95.0, 100.0)
