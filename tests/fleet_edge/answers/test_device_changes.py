from datetime import datetime

import pytest

from fleet_edge.answers.device_log import DeviceChanges
from schemas.control import DeviceState, Presence
from tests.fleet_edge.store.samples import START, after


class Scene:
    def __init__(self, most: int = 100) -> None:
        self.at = START
        self.changes = DeviceChanges(lambda: self.at, most=most)

    def says(
        self, presence: Presence, *, device: str = "gateway", since: datetime = START, **fields: str
    ) -> tuple[list[str], datetime | None]:
        told = {"software": "0.2.0", "draft_model": "toy", "quantization": "Q4_0", **fields}
        events, held_since = self.changes.note(device, DeviceState(presence=presence, since=since, **told))
        return [code for code, _ in events], held_since


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_what_the_broker_has_kept_from_before_is_no_event(scene: Scene) -> None:
    scene.at = after(5)
    assert scene.says(Presence.ONLINE, since=after(-3600)) == ([], after(-3600))
    assert scene.says(Presence.OFFLINE, device="other") == ([], None)  # gone, and nobody knows since when
    assert scene.changes.presence("gateway") is Presence.ONLINE
    assert scene.changes.presence("nobody") is None


def test_a_device_connects_is_lost_and_comes_back(scene: Scene) -> None:
    scene.at = after(10)
    assert scene.says(Presence.ONLINE, since=after(9)) == (["online"], after(9))
    scene.at = after(20)
    assert scene.says(Presence.ONLINE, since=after(9)) == ([], None)
    assert scene.says(Presence.OFFLINE) == (["offline"], after(20))
    scene.at = after(30)
    assert scene.says(Presence.ONLINE) == (["online"], after(30))


def test_another_release_and_another_model_are_events(scene: Scene) -> None:
    scene.says(Presence.ONLINE)
    assert scene.says(Presence.ONLINE, software="0.3.0") == (["software-changed"], None)
    assert scene.says(Presence.ONLINE, software="0.3.0", quantization="Q8_0") == (["model-changed"], None)


def test_a_clock_that_is_ahead_dates_nothing_in_the_future(scene: Scene) -> None:
    assert scene.says(Presence.ONLINE, since=after(9999))[1] == START


def test_what_is_remembered_is_bounded() -> None:
    scene = Scene(most=2)
    for number in range(5):
        scene.says(Presence.ONLINE, device=f"device-{number}")
    assert len(scene.changes._known) == 2
    assert scene.says(Presence.OFFLINE, device="device-4") == ([], None)
    assert scene.says(Presence.OFFLINE, device="device-1")[0] == ["offline"]
