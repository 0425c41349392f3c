"""Preflight of the device, before a model is loaded: the model's file, the identity's files and the API's port."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fleet_common.preflight import check_all
from fleet_device.drafters.model_source import locate_model
from fleet_device.errors import ConfigurationError
from fleet_device.offline import OfflinePolicy
from fleet_device.settings import MODEL_DRAFTER, DeviceSettings


def preflight(settings: DeviceSettings, *, serves: bool) -> None:
    """Check all that can be checked before the draft model is loaded. A broker may still be away.

    Args:
        settings: The configuration.
        serves: Whether the local API is to run.

    Raises:
        SettingsError: Settings cannot work; a line for each.
    """
    broker = settings.broker
    files = {"broker.ca": broker.ca, "broker.certificate": broker.certificate, "broker.key": broker.key}
    checks: dict[str, Callable[[], object]] = {
        "model": partial(locate_model, settings.model, folder=settings.models_dir),
        "target_vocabulary": partial(_check_vocabulary, settings.target_vocabulary),
        "offline": partial(_check_writes_alone, settings),
        **{name: partial(_check_readable, path) for name, path in files.items() if path is not None},
    }
    if serves and settings.api_port:
        checks["api_port"] = partial(_check_free, settings.api_port)
    check_all(settings, checks)


def _check_vocabulary(path: Path | None) -> None:
    if path is not None and not path.expanduser().is_file():
        raise ConfigurationError(
            f"There is no file {path}; make it of the target's GGUF with 'fleet models vocabulary', and copy it here."
        )


def _check_writes_alone(settings: DeviceSettings) -> None:
    if settings.offline is OfflinePolicy.LOCAL and settings.drafter != MODEL_DRAFTER:
        raise ConfigurationError(
            f"The drafter {settings.drafter!r} has no model that could go on alone; set drafter = {MODEL_DRAFTER!r}, "
            "or offline to 'wait' or 'fail'."
        )


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigurationError(f"The file {path} cannot be read: {error.strerror}.") from error


def _check_free(port: int) -> None:
    from fleet_device.api.server import listen  # noqa: PLC0415 - a web server, only where there is to be one

    listen(port).close()
