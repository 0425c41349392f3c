"""`fleet device forget`: deletes what the device has kept of its texts."""

from fleet_cli.errors import CommandError
from fleet_cli.settings_flags import with_settings
from fleet_device.drafters.suffix import history_folder
from fleet_device.drafters.suffix_index import forget_histories
from fleet_device.settings import DeviceSettings


@with_settings(DeviceSettings, only=("device", "history_dir"))
def forget_command(settings: DeviceSettings) -> None:
    """Delete the history from which `suffix` drafts: the texts that this device has written.

    A device that runs keeps in memory what it has read; restart it.
    """
    folder = history_folder(settings)
    if folder is None:
        raise CommandError("There is no folder for a history: this user has no home; name one as history_dir.")
    try:
        number = forget_histories(folder)
    except OSError as error:
        raise CommandError(f"The history in {folder} cannot be deleted: {error.strerror or error}.") from error
    print(f"The history in {folder} is deleted." if number else f"Nothing was kept in {folder}.")
