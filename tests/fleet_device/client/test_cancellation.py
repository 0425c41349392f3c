from fleet_device.requests.generate import Cancellation


def test_whoever_waits_is_woken_when_the_text_is_cancelled() -> None:
    cancellation, woken = Cancellation(), list[str]()
    with cancellation.waking(lambda: woken.append("woken")):
        assert (woken, cancellation.requested) == ([], False)
        cancellation.cancel()
        assert (woken, cancellation.requested) == (["woken"], True)


def test_a_text_that_was_cancelled_before_it_began_is_woken_at_once() -> None:
    cancellation, woken = Cancellation(), list[str]()
    cancellation.cancel()
    with cancellation.waking(lambda: woken.append("woken")):
        assert woken == ["woken"]


def test_nobody_is_woken_once_the_text_is_over() -> None:
    cancellation, woken = Cancellation(), list[str]()
    with cancellation.waking(lambda: woken.append("woken")):
        pass
    cancellation.cancel()
    assert (woken, cancellation.requested) == ([], True)
