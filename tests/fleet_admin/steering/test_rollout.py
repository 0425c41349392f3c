from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from fleet_admin.steering import Actor, Selection, Steering, SteeringError
from fleet_admin.steering.planning import DeviceSettingsView, SettingState
from fleet_admin.steering.rollout import RELEASE, SHARES, roll_out, update_views
from schemas.control import Presence, SettingValue, UpdateReport, UpdateStage

NOW = datetime(2026, 5, 4, tzinfo=UTC)
ALICE = Actor("alice")
ALL = Selection(everything=True)


@dataclass
class Fleet:
    """Devices that report at the next look what `outcome` says of them."""

    names: list[str]
    outcome: Callable[[str], UpdateStage | None] = lambda _: UpdateStage.DONE
    wanted: dict[str, int] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    slept_s: float = 0.0

    def choose(self, _: Selection) -> list[str]:
        return self.names

    def set(self, changes: Mapping[str, SettingValue], selection: Selection, **_: Any) -> Iterator[None]:
        self.asked.append(len(selection.devices))
        self.wanted |= dict.fromkeys(selection.devices, int(changes[RELEASE]))
        yield None

    def wanted_and_reported(self, devices: Collection[str]) -> list[DeviceSettingsView]:
        return [self.view(device) for device in devices if device in self.names]

    def view(self, device: str) -> DeviceSettingsView:
        release = self.wanted.get(device)
        stage = None if release is None or not self.slept_s else self.outcome(device)
        report = None if stage is None else UpdateReport(release=release, stage=stage, sentence="Why.", at=NOW)
        return DeviceSettingsView(
            device=device,
            presence=Presence.ONLINE,
            state=SettingState.IN_FORCE,
            sentence="",
            reports=True,
            wanted={} if release is None else {RELEASE: release},
            update=report,
        )

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


def rolled(fleet: Fleet, release: int = 7, *, failures: int = 0) -> list[str]:
    shown: list[str] = []
    roll_out(
        cast("Steering", fleet),
        release,
        ALL,
        SHARES,
        actor=ALICE,
        failures=failures,
        wait_s=60.0,
        show=shown.append,
        clock=lambda: fleet.slept_s,
        sleep=fleet.sleep,
    )
    return shown


def names(count: int) -> list[str]:
    return [f"gw-{number:03}" for number in range(count)]


def test_a_share_begins_when_the_one_before_has_reported_success() -> None:
    fleet = Fleet(names(40))
    assert len(rolled(fleet)) == len(SHARES)
    assert fleet.asked == [1, 3, 16, 20]
    assert set(fleet.wanted.values()) == {7}
    fleet.asked.clear()
    rolled(fleet)
    assert fleet.asked == [], "again, it changes nothing"


@pytest.mark.parametrize("outcome", [UpdateStage.FAILED, UpdateStage.WAITING, None])
def test_a_bad_release_is_stopped_after_the_first_share(outcome: UpdateStage | None) -> None:
    fleet = Fleet(names(40), lambda _: outcome)
    with pytest.raises(SteeringError, match="1 of 40"):
        rolled(fleet)
    assert len(fleet.wanted) == 1


def test_some_failures_may_be_allowed_and_it_goes_on_where_it_has_stopped() -> None:
    bad: set[str] = set()

    def outcome(device: str) -> UpdateStage:
        return UpdateStage.FAILED if device in bad else UpdateStage.DONE

    fleet = Fleet(names(40), outcome)
    rolled(fleet)
    first = sorted(fleet.wanted)[:2]
    bad.update(first)
    with pytest.raises(SteeringError, match="2 "):
        rolled(fleet, failures=1)
    assert rolled(fleet, failures=2)[-1] == "Release 7 runs on 38 of 40 devices."


def test_not_always_the_same_devices_go_first() -> None:
    firsts = set()
    for release in range(1, 9):
        fleet = Fleet(names(40), lambda _: UpdateStage.FAILED)
        with pytest.raises(SteeringError):
            rolled(fleet, release)
        firsts |= set(fleet.wanted)
    assert len(firsts) > 2


@pytest.mark.parametrize("share", ["", "0", "0%", "101%", "ten", "-1", "1.5", "²"])
def test_a_share_that_makes_no_sense_changes_nothing(share: str) -> None:
    fleet = Fleet(names(4))
    with pytest.raises(SteeringError):
        roll_out(
            cast("Steering", fleet), 7, ALL, [share], actor=ALICE, failures=0, wait_s=1.0, show=print, sleep=fleet.sleep
        )
    assert fleet.wanted == {}


def test_a_report_of_another_release_does_not_count() -> None:
    fleet = Fleet(["gw-1"], lambda _: UpdateStage.DONE, wanted={"gw-1": 7}, slept_s=1.0)
    [view] = update_views(fleet.wanted_and_reported(["gw-1"]))
    assert (view.stage, view.release) == ("done", 7)
    stale = fleet.view("gw-1")
    fleet.wanted["gw-1"] = 8
    [view] = update_views([replace(fleet.view("gw-1"), update=stale.update)])
    assert (view.stage, view.release) == ("asked", 8)
