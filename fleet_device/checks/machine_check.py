"""Machine check: memory and processor cores, held against what the settings ask of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.model_source import locate_model
from fleet_device.errors import ConfigurationError
from fleet_device.settings import AUTO, DeviceSettings
from fleet_runtime.available_memory import available_memory

__all__ = ["check_memory", "check_threads"]

_MEGA: Final = 1_000_000

_WORKING_BYTES: Final = 100 * _MEGA
"""What the program and llama.cpp take beside the model's file, keys and values left out."""

_READS_WEIGHTS: Final = "llama.cpp"


def check_memory(settings: DeviceSettings, available: Callable[[], int | None] = available_memory) -> str:
    """Return how much memory is free, and how much the draft model's file takes.

    Keys and values come on top; how large a context they leave room for, the model's loading says.

    Args:
        settings: The device's.
        available: Returns the bytes that this process may still take; None where the system does not say.

    Raises:
        ConfigurationError: The model's file does not fit.
    """
    free = available()
    known = "The system does not say how much memory is free" if free is None else f"{free / _MEGA:,.0f} MB are free"
    if settings.drafter != _READS_WEIGHTS:
        return f"{known}; the drafter {settings.drafter} reads no weights."
    try:
        size = _size(locate_model(settings.model, folder=settings.models_dir).path)
    except DrafterError:
        return f"{known}; what the model takes is not known, since it was not found."
    needed = size + _WORKING_BYTES
    if free is not None and needed > free:
        raise ConfigurationError(
            f"The draft model takes {needed / _MEGA:,.0f} MB ({size / _MEGA:,.0f} MB its file), and "
            f"{free / _MEGA:,.0f} MB are free: end other programs, or set 'model' to a smaller one."
        )
    return (
        f"{known}; the draft model takes {needed / _MEGA:,.0f} MB ({size / _MEGA:,.0f} MB its file), and "
        f"{_budget(settings)} for keys, values and buffers of {settings.texts_at_once} texts of up to "
        f"{settings.context:,} tokens."
    )


def check_threads(
    settings: DeviceSettings,
    *,
    cores: Callable[[], int] = lambda: len(os.sched_getaffinity(0)),
    load: Callable[[], float] = lambda: os.getloadavg()[0],
) -> str:
    """Return how many threads there are for how many cores, and what else runs on them.

    Args:
        settings: The device's.
        cores: Returns the processor cores that this process may use.
        load: Returns the mean number of programs that wanted to run, over the last minute.

    Raises:
        ConfigurationError: There are more threads than cores: they wait for each other at every layer.
    """
    there = cores()
    if settings.threads > there:
        raise ConfigurationError(
            f"The setting 'threads' is {settings.threads} and this program may use {there} processor "
            f"core{'s' * (there != 1)}: threads that share one make drafting many times slower; set {there} or fewer."
        )
    return (
        f"{settings.threads} thread{'s' * (settings.threads != 1)} for drafting on {there} core{'s' * (there != 1)}; "
        f"the load of the last minute is {load():.1f}."
    )


def _budget(settings: DeviceSettings) -> str:
    """Return what may be taken beside the weights; the context becomes smaller to fit."""
    budget = settings.memory_mb
    return "half of what is left then" if budget == AUTO else f"at most {budget:,} MB (setting 'memory_mb')"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DrafterError(f"The file {path} cannot be read: {error.strerror}.") from error
