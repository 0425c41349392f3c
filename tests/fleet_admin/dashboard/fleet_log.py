"""Filled session log for the dashboard's tests: a small fleet with some history, and names that try to break out."""

from datetime import datetime, timedelta

from fleet_edge.store import housekeeping
from fleet_edge.store.database import open_store
from fleet_edge.store.records.record import Record
from fleet_edge.store.records.segments import segment_number
from schemas.policy import Mode
from schemas.reasons import EndReason
from tests.fleet_edge.store import samples

HOSTILE = (
    '<img src=x onerror="document.title=\'broken\'">\'"--><script>document.title="broken"</script>\u202e\x1b[2J=1+1'
)
DEVICES = ("gateway-1", "gateway-2", "gateway-3", "gateway-4")


def fill(url: str, *, now: datetime) -> None:
    """Write sessions of the last day, the latest a minute old."""
    with open_store(url) as store:
        store.apply(records(now))
        housekeeping.roll_up(store.engine, since=now - timedelta(days=2), now=now)


def records(now: datetime) -> list[Record]:
    found: list[Record] = [
        samples.edge_seen(at=now - timedelta(minutes=1)),
        samples.edge_seen(edge="edge-2", at=now - timedelta(minutes=2)),
    ]
    for number, device in enumerate(DEVICES):
        seen = now - timedelta(minutes=1 + 3 * number)
        found.append(samples.device_seen(device=device, software=f"0.{number}.0", at=seen))
        for hour in range(1, 24, 5):
            found += session(device, at=now - timedelta(hours=hour, minutes=number), number=number * 100 + hour)
    found += session("gateway-1", at=now - timedelta(minutes=1), number=999, ended=False)
    found += hostile(now)
    return found


def session(device: str, *, at: datetime, number: int, ended: bool = True) -> list[Record]:
    own = {"session": f"{number:016x}", "segment": segment_number(at), "device": device}
    found: list[Record] = [
        samples.opened(**own, at=at, edge=f"edge-{1 + number % 2}", mode=Mode.RESIDUAL),
        samples.progress(**own, at=at + timedelta(seconds=2), tokens=40 + number % 7, accepted=12 + number % 5),
        samples.judged(**own, at=at + timedelta(seconds=1)),
    ]
    if ended:
        found.append(samples.closed(**own, at=at + timedelta(seconds=3), reason=EndReason.STOP))
    return found


def hostile(now: datetime) -> list[Record]:
    """What a device may say of itself, and what an edge may quote of it."""
    return [
        samples.device_seen(
            device="evil", draft_model=HOSTILE, quantization=HOSTILE, software=HOSTILE, at=now - timedelta(minutes=3)
        ),
        samples.event(
            id="evil-1", device="evil", session=None, code=HOSTILE, sentence=HOSTILE, at=now - timedelta(minutes=3)
        ),
    ]
