"""Preflight: checks that a program makes before it loads a model, all of them, to tell all mistakes at once."""

from collections.abc import Callable, Mapping

from fleet_common.errors import SettingsError
from fleet_common.fields import Settings
from schemas.errors import FleetError


def check_all(settings: Settings, checks: Mapping[str, Callable[[], object]]) -> None:
    """Make checks of settings.

    Args:
        settings: As loaded.
        checks: By the setting's name; each raises a FleetError if the value cannot work. One that has an attribute
            `setting` is about that other setting.

    Raises:
        SettingsError: Settings cannot work; a line for each, with where its value comes from.
    """
    failed: list[str] = []
    for name, check in checks.items():
        try:
            check()
        except FleetError as error:
            about = str(getattr(error, "setting", name))
            place = ", ".join(filter(None, (f"setting {about!r}", settings.origin(about))))
            failed.append(f"{str(error).rstrip('.')} ({place}).")
    if failed:
        raise SettingsError("\n".join(failed))
