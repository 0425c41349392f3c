"""Staged rollout of a release that gateways pull: a share of the devices after the other, with a stop on failures."""

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from fleet_admin.steering.planning import Actor, DeviceSettingsView, Selection, SettingState, SteeringError
from fleet_admin.steering.steering import Steering
from schemas.control import UpdateStage

RELEASE: Final = "update.release"
SHARES: Final = ("1", "10%", "50%", "100%")

_POLL_S: Final = 2.0
_ALL: Final = 100
_REFUSED: Final = "refused"
_FAILED: Final = frozenset({UpdateStage.FAILED, _REFUSED})


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateView:
    """A device's update. `stage` is also `asked` before its first report, `refused`, or `none`."""

    device: str
    release: int | None  # desired
    stage: str
    running: str
    share: float | None  # of the bytes that are present
    sentence: str
    at: datetime | None


def update_views(views: Iterable[DeviceSettingsView]) -> list[UpdateView]:
    """Return the updates of devices whose release was set remotely, or that had one; those that are done last."""
    found = [_view(each) for each in views if RELEASE in each.wanted or each.update is not None]
    return sorted(found, key=lambda each: (each.stage == UpdateStage.DONE, each.device))


def _view(view: DeviceSettingsView) -> UpdateView:
    wanted, said = view.wanted.get(RELEASE), view.update
    release = wanted if isinstance(wanted, int) else None
    stage, sentence = ("none", "") if said is None else (said.stage.value, said.sentence)
    if release is not None and view.state is SettingState.REFUSED:
        stage, sentence = _REFUSED, view.sentence
    elif release is not None and (said is None or said.release != release):
        stage, sentence = "asked", view.sentence
    return UpdateView(
        device=view.device,
        release=release,
        stage=stage,
        running="" if said is None else said.running,
        share=said.fetched / said.size if said is not None and said.size else None,
        sentence=sentence,
        at=None if said is None else said.at,
    )


def roll_out(
    steering: Steering,
    release: int,
    selection: Selection,
    shares: Sequence[str],
    *,
    actor: Actor,
    failures: int,
    wait_s: float,
    show: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Set the release for growing shares of the devices; raise SteeringError to stop.

    A share begins when all devices of the one before have reported success, but for `failures` that have failed, or
    have not within `wait_s`. Called again, it goes on where it has stopped.
    """
    chosen = sorted(steering.choose(selection), key=lambda device: _rank(release, device))
    for count in [_count(share, len(chosen)) for share in shares]:
        stage = set(chosen[:count])
        late = stage - {each.device for each in _views(steering, stage) if each.release == release}
        if late:
            for _ in steering.set({RELEASE: release}, Selection(devices=tuple(late)), actor=actor):
                pass
        deadline = clock() + wait_s
        while True:
            views = _views(steering, stage)
            failed = [each for each in views if each.stage in _FAILED]
            left = [each for each in views if each.stage not in {*_FAILED, UpdateStage.DONE}]
            if len(failed) > failures or (left and clock() >= deadline and len(failed) + len(left) > failures):
                raise SteeringError(_stopped(release, [*failed, *left], count, len(chosen)))
            if not left or clock() >= deadline:
                break
            sleep(_POLL_S)
        show(f"Release {release} runs on {count - len(failed) - len(left)} of {len(chosen)} devices.")


def _views(steering: Steering, devices: Collection[str]) -> list[UpdateView]:
    return update_views(steering.wanted_and_reported(devices))


def _stopped(release: int, bad: Sequence[UpdateView], count: int, total: int) -> str:
    first = bad[0]
    return (
        f"The rollout of release {release} stops at {count} of {total} devices; {len(bad)} have not reported success: "
        f"{first.device} is {first.stage}. {first.sentence} The others keep their release."
    )


def _rank(release: int, device: str) -> bytes:
    """Return an order of the devices that is another for each release, so that not always the same ones go first."""
    return hashlib.sha256(f"{release} {device}".encode()).digest()


def _count(share: str, total: int) -> int:
    number, percent = share.removesuffix("%"), share.endswith("%")
    if not number.isascii() or not number.isdigit() or not 0 < int(number) <= (_ALL if percent else 10**9):
        raise SteeringError(f"{share[:20]!r} is no share of the devices; give a number, or a percentage such as 10%.")
    return max(1, math.ceil(total * int(number) / _ALL)) if percent else min(int(number), total)
