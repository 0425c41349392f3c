from fleet_edge.answers.device_rates import DeviceRates
from tests.fleet_edge.store.samples import after


def test_each_device_has_its_own_share_of_each_span() -> None:
    rates = DeviceRates(3)
    assert [rates.admit("a", after(0)) for _ in range(5)] == [True] * 3 + [False] * 2
    assert rates.admit("b", after(0))
    assert rates.admit("a", after(60))


def test_a_clock_that_is_set_back_begins_a_new_span() -> None:
    rates = DeviceRates(1)
    assert rates.admit("a", after(0))
    assert not rates.admit("a", after(1))
    assert rates.admit("a", after(-3600))
    assert rates.admit("a", after(0))
