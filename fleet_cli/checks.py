"""Output of a self-test's findings."""

from fleet_device.checks.selftest import Check
from schemas.printable import printable_line


def show_check(check: Check) -> None:
    """Print one finding as a line."""
    # A sentence may quote what a broker or an edge has said.
    status = "FAILED" if check.status == "failed" else check.status
    print(f"{status:<8}{check.name:<14}{check.ms:>8.0f} ms  {printable_line(check.sentence)}", flush=True)


def ignore_check(_check: Check) -> None:
    """Say nothing: the JSON at the end has it all."""
