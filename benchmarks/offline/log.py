"""Comparison of the session log with what applications were told of their texts."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.offline.trial import Trial
from fleet_device.offline import OfflinePolicy
from fleet_edge.session_log import SessionLog

__all__ = ["compare"]


def compare(database: Path, trials: Sequence[Trial]) -> list[str]:
    """Return what differs, in sentences: each text is in the log once, with its tokens and those unverified."""
    with SessionLog(f"sqlite:///{database}") as log:
        logged = log.sessions(limit=max(1000, 2 * len(trials)))
    found: dict[str, list[tuple[int | None, int | None, str | None]]] = {}
    for session in logged:
        row = (session.final_tokens, session.device_unverified, session.reason)
        found.setdefault(session.session, []).append(row)
    wrong = []
    for trial in trials:
        if trial.session is None:
            continue
        rows = found.pop(trial.session, [])
        if [(tokens, unverified or 0) for tokens, unverified, _ in rows] != [(trial.tokens, trial.unverified)]:
            wrong.append(
                f"Session {trial.session} ({trial.policy.value}) has {trial.tokens} tokens, {trial.unverified} of them "
                f"unverified; the log has {rows}."
            )
    failed = sum(trial.policy is OfflinePolicy.FAIL for trial in trials)
    if len(found) != failed:
        wrong.append(f"{failed} texts failed, and the log has {len(found)} sessions beside the others.")
    if reported := [name for name, rows in found.items() if any(unverified for _, unverified, _ in rows)]:
        wrong.append(f"The log has unverified texts that nobody was told of: {', '.join(reported)}.")
    return wrong
