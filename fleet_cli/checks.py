"""Output of a self-test's findings."""

from fleet_device.checks.checklist import Check

__all__ = ["ignore_check", "show_check"]


def show_check(check: Check) -> None:
    """Print one finding as a line."""
    print(f"{'ok' if check.ok else 'FAILED':<7}{check.name:<14}{check.ms:>8.0f} ms  {check.sentence}", flush=True)


def ignore_check(_check: Check) -> None:
    """Say nothing: the JSON at the end has it all."""
