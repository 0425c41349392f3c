"""Reports of the identity commands, for people and for programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fleet_cli.tables import Column, print_json, print_table
from fleet_common.identity.authority import Issued
from fleet_common.identity.certificates import Revocation
from fleet_common.identity.enforcement import RevocationProof
from fleet_common.identity.index import CertificateStatus, Entry


def show_issued(made: Issued, *, as_json: bool) -> None:
    """Say where key and certificate are."""
    if as_json:
        print_json(_facts(made.entry, made.certificate) | {"key": str(made.key), "ca": str(made.ca)})
        return
    print(f"The {made.entry.role} {made.entry.name} is valid until {made.entry.not_after:%Y-%m-%d}:")
    print(f"  ca = {made.ca}\n  certificate = {made.certificate}\n  key = {made.key}")


def show_signed(made: Sequence[tuple[Entry, Path]], *, ca: Path, as_json: bool) -> None:
    if as_json:
        print_json([_facts(entry, path) | {"ca": str(ca)} for entry, path in made])
        return
    for entry, path in made:
        print(f"The {entry.role} {entry.name} is valid until {entry.not_after:%Y-%m-%d}: {path}")
    if made:
        print(f"Send it there, the first time together with {ca}.")
    else:
        print("Nobody's time has come.")


def show_revoked(revocation: Revocation, done: RevocationProof | None, *, crl: Path, as_json: bool) -> None:
    """Say what was revoked, and what of it is proven at the broker."""
    ended = list(done.ended) if done is not None else []
    if as_json:
        print_json(
            {"serials": revocation.serials, "crl": str(crl), "in_force": done is not None, "sessions_ended": ended}
            | {"in_force_s": done.in_force_s if done else None, "done_s": done.done_s if done else None}
        )
        return
    count = len(revocation.serials)
    print(f"{count} certificate{'s' if count > 1 else ''} revoked; the list is {crl}.")
    if done is None:
        print(
            "No broker was asked: bring the list to it and reload it. Who is connected stays so until then and beyond; "
            "to end sessions too, say the command again with --host."
        )
        return
    print(f"The broker goes by the list since {done.in_force_s:.1f} s after the command.")
    if ended:
        print(f"No session is left of {', '.join(ended)} ({done.done_s:.1f} s).")


def show_standings(found: Sequence[CertificateStatus], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    print_table("Identities", _STANDING, found, empty="The authority has given no certificate yet.")


_STANDING: Final[list[Column[CertificateStatus]]] = [
    Column("name", lambda line: line.name, rank=0),
    Column("role", lambda line: line.role.value, "state", rank=0),
    Column("state", lambda line: line.state.value, "state", rank=0),
    Column("left", lambda line: line.days_left, "days", rank=0),
    Column("until", lambda line: line.not_after, "moment", rank=1),
    Column("serial", lambda line: line.serial, "id", rank=2),
]


def _facts(entry: Entry, path: Path) -> dict[str, object]:
    return {
        "name": entry.name,
        "role": entry.role.value,
        "serial": entry.serial,
        "hosts": list(entry.hosts),
        "not_before": entry.not_before,
        "not_after": entry.not_after,
        "certificate": str(path),
    }
