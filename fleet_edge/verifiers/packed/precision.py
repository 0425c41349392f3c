"""Device and number format of the target model."""

import logging
from pathlib import Path
from typing import Final

import torch

from fleet_edge.verifiers.contract import VerifierError

__all__ = ["AUTO", "DTYPES", "describe", "resolve_device", "resolve_dtype"]

_log = logging.getLogger(__name__)

AUTO: Final = "auto"

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")

# Instructions that multiply bfloat16 matrices. Without them it is emulated and slower than float32.
_FAST_BFLOAT16: Final = ("amx_bf16", "avx512_bf16")

# There wherever the driver of an NVIDIA GPU is loaded, unless systemd hides the devices from us.
_NVIDIA_DRIVER: Final = Path("/dev/nvidiactl")


def resolve_device(name: str, *, driver: Path = _NVIDIA_DRIVER) -> str:
    """Return torch's name of the device to use; `auto` is a CUDA device if torch can use one, else the CPU.

    Args:
        name: As configured.
        driver: There if this machine has an NVIDIA GPU, whether or not torch can use it.

    Raises:
        VerifierError: There is no such device here.
    """
    if name == AUTO:
        if torch.cuda.is_available():
            return "cuda"
        if driver.exists():
            _log.warning(
                "This machine has an NVIDIA GPU that torch cannot use, so the target model runs on the CPU: install "
                "torch for CUDA and a driver that it works with, or set torch_device to cpu."
            )
        return "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise VerifierError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:0.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise VerifierError("There is no CUDA device here; use the device cpu, or auto.")
    return name


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Say what a model runs on."""
    number = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device}), {number}"
    return f"{device.type}, {number}, {torch.get_num_threads()} threads"


def resolve_dtype(name: str, *, device: str) -> torch.dtype:
    """Return the torch type for a configured name; `auto` is bfloat16 where that is fast, else float32.

    Args:
        name: As configured.
        device: As `resolve_device` returns it.

    Raises:
        VerifierError: There is no such type.
    """
    if name not in DTYPES:
        raise VerifierError(f"{name!r} is not a number format for the target model; use {', '.join(DTYPES)}.")
    kind = torch.device(device).type
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    return torch.bfloat16 if _bfloat16_is_fast(kind) else torch.float32


def _bfloat16_is_fast(kind: str) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in _FAST_BFLOAT16)
