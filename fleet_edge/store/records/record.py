"""Record: any of what the session log takes."""

from fleet_edge.store.records.events import EventLogged
from fleet_edge.store.records.fences import DeviceFenced, FenceLifted
from fleet_edge.store.records.segments import RoundJudged, SegmentLeft, SegmentProgress
from fleet_edge.store.records.sessions import CloseReported, SessionClosed, SessionOpened
from fleet_edge.store.records.sightings import DeviceSeen, DeviceTold, EdgeLoad, EdgeSeen
from fleet_edge.store.records.texts import TextWritten

Record = (
    DeviceSeen
    | EdgeSeen
    | DeviceTold
    | EdgeLoad
    | SessionOpened
    | SegmentProgress
    | RoundJudged
    | TextWritten
    | SegmentLeft
    | SessionClosed
    | CloseReported
    | EventLogged
    | DeviceFenced
    | FenceLifted
)
