"""`fleet admin rollouts|releases|rollout record`: what was rolled out to which machine, and what came of it."""

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from fleet_admin.reports import MACHINES, RELEASES, ROLLOUTS
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Since, Wide, open_log, time_of
from fleet_cli.errors import CommandError
from fleet_cli.tables import cell, print_json, print_table

if TYPE_CHECKING:
    from fleet_edge.store.rollouts import MachineRollout

_MOST_BYTES: Final = 4_000_000
_MOST_MACHINES: Final = 10_000
_LONGEST_SENTENCE: Final = 1000
_NO_ROLLOUTS: Final = "Nothing was rolled out: the playbooks in ansible/ record what they do."

_writing = typer.Typer(name="rollout", help="Write down what a rollout does; the playbooks do.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command()(rollouts)
    app.command()(releases)
    app.add_typer(_writing)


def rollouts(
    rollout: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Show what this one did to each machine.")
    ] = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="At most so many, the latest first.")] = 20,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List what was rolled out, back or off, by whom, and what came of it."""
    after = time_of("--since", since)
    with open_log(db) as log:
        machines = None if rollout is None else log.rollout(rollout)
        found = log.rollouts(since=after, limit=limit) if machines is None else []
    if as_json:
        print_json(found if machines is None else machines)
    elif machines is None:
        print_table(f"Rollouts: {len(found)}", ROLLOUTS, found, wide=wide, empty=_NO_ROLLOUTS)
    else:
        title = f"Rollout {cell(machines[0].rollout)}: {cell(machines[0].action)} by {cell(machines[0].who)}"
        print_table(title, MACHINES, machines, wide=wide)


def releases(
    drift: Annotated[bool, typer.Option("--drift", help="Only machines that run something else.")] = False,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Show the release that each machine should run beside the one that it runs, as the last rollout has it."""
    with open_log(db) as log:
        found = [machine for machine in log.releases() if machine.drift or not drift]
    if as_json:
        print_json(found)
    else:
        empty = "Every machine runs what it should." if drift else _NO_ROLLOUTS
        print_table(f"Machines: {len(found)}", RELEASES, found, wide=wide, empty=empty)


@_writing.command()
def record(
    stopped: Annotated[
        bool, typer.Option("--stopped", help="The rollout is over: machines that still wait were not touched.")
    ] = False,
    db: Database = DEFAULT_DB,
) -> None:
    """Write what became of machines, from a JSON array on standard input.

    Each element has rollout, host, kind (device or edge), action (site, rollout, rollback or decommission) and outcome
    (waiting, proven, unchanged, went-back, failed, untouched or removed); it may have name, wanted, found, running,
    sentence, who, started_at and ended_at (ISO 8601).
    """
    text = sys.stdin.buffer.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise CommandError(f"Standard input has more than {_MOST_BYTES:,} bytes; write fewer machines at once.")
    machines = _read(text, now=datetime.now(UTC))
    with open_log(db) as log:
        log.record_rollouts(machines, stopped=stopped)


def _read(text: bytes, *, now: datetime) -> "list[MachineRollout]":
    from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

    from fleet_edge.store.rollouts import MachineRollout, RolloutAction, RolloutOutcome
    from schemas.names import MAX_NAME_LENGTH

    word = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)]
    release = Annotated[str, Field(max_length=128)] | None

    class Written(BaseModel):
        """One machine as a playbook writes it."""

        model_config = ConfigDict(extra="forbid")

        rollout: word
        host: Annotated[str, Field(min_length=1, max_length=255)]
        kind: Literal["device", "edge"]
        name: word | None = None
        action: RolloutAction
        outcome: RolloutOutcome
        wanted: release = None
        found: release = None
        running: release = None
        sentence: Annotated[str, Field(max_length=100_000)] = ""
        who: Annotated[str, Field(max_length=255)] = ""
        started_at: AwareDatetime = now
        ended_at: AwareDatetime | None = None

    try:
        written = TypeAdapter(Annotated[list[Written], Field(max_length=_MOST_MACHINES)]).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CommandError(
            f"Standard input is no JSON array of machines{f', at {cell(where)}' if where else ''}: "
            f"{cell(first['msg'])}; see fleet admin rollout record --help."
        ) from None
    return [
        MachineRollout(
            rollout=each.rollout,
            host=each.host,
            kind=each.kind,
            name=each.name or each.host,
            action=each.action.value,
            wanted=each.wanted or None,
            found=each.found or None,
            running=each.running or None,
            started_at=each.started_at,
            ended_at=each.ended_at if each.outcome is RolloutOutcome.WAITING else each.ended_at or now,
            outcome=each.outcome.value,
            sentence=" ".join(each.sentence.split())[:_LONGEST_SENTENCE],
            who=each.who or "unknown",
        )
        for each in written
    ]
