"""Told loads: what devices are told of the edge's load, and when: where it has changed enough to be worth it."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from fleet_edge.sessions.acceptance import AcceptanceByModel
from fleet_edge.sessions.machine import EdgeSession
from schemas.fields import EdgeLoad

_MOST: Final = 128
"""Draft models, which devices name, of which the latest are known."""


@dataclass(slots=True)
class ToldLoads:
    """Keeps the load as it is to be told now, by draft model and by whether texts are to repeat.

    It is the same object until it has changed enough, so that each verdict is soon told to need none.
    """

    _known: OrderedDict[tuple[str, bool], tuple[EdgeLoad, EdgeLoad]] = field(default_factory=OrderedDict)

    def of(self, session: EdgeSession, load: EdgeLoad, acceptance: AcceptanceByModel) -> EdgeLoad:
        """Return what the device of a session is to know.

        Args:
            session: Whose.
            load: The edge's; the same object as long as nothing has happened.
            acceptance: Of each draft model.
        """
        key = session.draft_model, session.policy.repeats
        known = self._known.get(key)
        if known is not None and known[0] is load:
            return known[1]
        share = acceptance.share(session.draft_model)
        told = load.model_copy(
            update={
                "acceptance": None if share is None else round(share, 3),
                "free": load.free if session.policy.repeats else 0,
            }
        )
        if known is not None and not told.differs(known[1]):
            told = known[1]
        self._known[key] = load, told
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return told
