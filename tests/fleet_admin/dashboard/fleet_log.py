"""Filled session log for the dashboard's tests: a small fleet with some history, and names that try to break out."""

from datetime import datetime, timedelta

from fleet_edge.session_log.alerts.alerts import note_evaluation, take_lease
from fleet_edge.session_log.alerts.rules import AlertProblem
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.records import Record, segment_number
from fleet_edge.session_log.views import AlertSeverity
from schemas.policy import Mode
from schemas.reasons import EndReason
from tests.fleet_edge.store import samples

HOSTILE = (
    '<img src=x onerror="document.title=\'broken\'">\'"--><script>document.title="broken"</script>\u202e\x1b[2J=1+1'
)
EVIL = "ee" * 8
ALERTS = {
    "device-offline": AlertProblem(subject="evil", device="evil", sentence=HOSTILE, value=20.0),
    "edge-offline": AlertProblem(
        subject="edge-2", severity=AlertSeverity.CRITICAL, sentence="The edge edge-2 is offline."
    ),
}
DEVICES = ("gateway-1", "gateway-2", "gateway-3", "gateway-4")


def fill(url: str, *, now: datetime) -> None:
    with open_store(url) as store:
        store.apply(records(now))
        since, at = now - timedelta(minutes=20), now - timedelta(minutes=1)
        samples.open_alerts(store, list(ALERTS.items()), since=since, now=at)
        with store.engine.begin() as connection:
            assert take_lease(connection, holder="edge-1", now=now, for_s=30.0)
            note_evaluation(connection, now=now)


def records(now: datetime) -> list[Record]:
    found: list[Record] = [
        samples.edge_seen(at=now - timedelta(minutes=1)),
        samples.edge_seen(edge="edge-2", at=now - timedelta(minutes=2)),
        samples.edge_load(at=now - timedelta(seconds=10)),
        samples.edge_load(edge="edge-2", at=now - timedelta(minutes=30), spooled_records=40),
    ]
    for number, device in enumerate(DEVICES):
        seen = now - timedelta(minutes=1 + 3 * number)
        found.append(samples.device_seen(device=device, software=f"0.{number}.0", at=seen))
        for hour in range(1, 24, 5):
            found += session(device, at=now - timedelta(hours=hour, minutes=number), number=number * 100 + hour)
    found += session("gateway-1", at=now - timedelta(seconds=90), number=999, ended=False)
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
    """Return records in which a device and an edge quote hostile text."""
    at = now - timedelta(minutes=4)
    own = {"session": EVIL, "segment": segment_number(at), "device": "evil"}
    return [
        samples.device_seen(
            device="evil", draft_model=HOSTILE, quantization=HOSTILE, software=HOSTILE, at=now - timedelta(minutes=3)
        ),
        samples.opened(**own, at=at, app=HOSTILE, draft_model=HOSTILE, quantization=HOSTILE, target=HOSTILE),
        samples.judged(**own, at=at + timedelta(seconds=1), form=HOSTILE),
        samples.closed(
            **own, at=at + timedelta(seconds=3), reason=EndReason.FAILED, tokens=5, code=HOSTILE, sentence=HOSTILE
        ),
        samples.event(
            id="evil-2", device="evil", session=EVIL, code=HOSTILE, sentence=HOSTILE, at=at + timedelta(seconds=2)
        ),
        samples.event(
            id="evil-1", device="evil", session=None, code=HOSTILE, sentence=HOSTILE, at=now - timedelta(minutes=3)
        ),
    ]
