"""Number format of the target model."""

from typing import Final

import torch

from fleet_edge.verifiers.contract import VerifierError

__all__ = ["DTYPES", "resolve_dtype"]

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")

# Instructions that multiply bfloat16 matrices. Without them it is emulated and slower than float32.
_FAST_BFLOAT16: Final = ("amx_bf16", "avx512_bf16")


def resolve_dtype(name: str, *, device: str) -> torch.dtype:
    """Return the torch type for a configured name; `auto` is bfloat16 where that is fast, else float32.

    Raises:
        VerifierError: There is no such type or device.
    """
    if name not in DTYPES:
        raise VerifierError(f"{name!r} is not a number format for the target model; use {', '.join(DTYPES)}.")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise VerifierError(f"{device!r} is not a device; use cpu, cuda or cuda:0.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise VerifierError("There is no CUDA device here; use the device cpu.")
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
