"""Ask the session log.

    python examples/query_the_log.py [sqlite:///fleet.sqlite3]

Needs the database that an edge writes; the edge may run meanwhile.
"""

import sys

from fleet_edge import FleetError, SessionLog


def main(url: str = "sqlite:///fleet.sqlite3") -> None:
    """Print the last hour's sessions, and what they come to by device."""
    with SessionLog(url) as log:
        for session in log.sessions(since="1h", limit=10):
            counted = session.counted
            acceptance = f"{counted.acceptance:.2f}" if counted.acceptance is not None else "none"
            ended = session.reason or "open"
            print(f"{session.session}  {session.device}: {counted.tokens} tokens, acceptance {acceptance}, {ended}")
        for usage in log.usage(since="1h", by=["device"]):
            total = usage.counted
            print(
                f"{usage.device}: {total.sessions} sessions, {total.tokens} tokens, {total.mean_batch or 0:.1f} a batch"
            )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except FleetError as error:
        sys.exit(str(error))
