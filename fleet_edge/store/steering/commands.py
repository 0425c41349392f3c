"""Commands to devices, kept with what came of them; their results, which may be long, are not."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from fleet_edge.store.models import CommandRow
from fleet_edge.store.steering.views import CommandView
from schemas.control import CommandRequest

SILENT = "silent"
"""Outcome of a command that was not answered in time."""

CommandEnd = tuple[str, str]
"""Outcome and sentence."""


def keep_commands(connection: Connection, requests: Mapping[str, CommandRequest], *, batch: str, now: datetime) -> None:
    """Keep commands that are about to be sent, by the device's name."""
    rows = [
        {
            "id": each.id,
            "batch": batch,
            "device": device,
            "command": each.command,
            "arguments": json.dumps(each.arguments),
            "who": each.who,
            "at": now,
            "deadline_at": each.deadline,
        }
        for device, each in requests.items()
    ]
    if rows:
        connection.execute(insert(CommandRow), rows)


def end_commands(connection: Connection, ended: Mapping[str, CommandEnd], *, now: datetime) -> None:
    """Keep what came of commands, by their ids."""
    for command, (outcome, sentence) in ended.items():
        values = {"outcome": outcome, "sentence": sentence, "ended_at": now}
        connection.execute(update(CommandRow).where(CommandRow.id == command).values(values))


def read_commands(
    connection: Connection,
    *,
    since: datetime | None = None,
    devices: Sequence[str] = (),
    batch: str | None = None,
    limit: int = 100,
) -> list[CommandView]:
    """Return commands, the latest first; what is left out admits all."""
    query = select(CommandRow.__table__)
    if since is not None:
        query = query.where(CommandRow.at >= since)
    if devices:
        query = query.where(CommandRow.device.in_(devices))
    if batch is not None:
        query = query.where(CommandRow.batch == batch)
    rows = connection.execute(query.order_by(CommandRow.at.desc(), CommandRow.device, CommandRow.id).limit(limit))
    return [CommandView(**{**row, "arguments": json.loads(row["arguments"])}) for row in map(dict, rows.mappings())]
