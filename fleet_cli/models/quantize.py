"""Quantizes a GGUF further; a program of its own, because llama.cpp writes to stderr by itself.

Usage: python -m fleet_cli.models.quantize SOURCE OUTPUT QUANTIZATION
"""

import os
import sys

from fleet_cli.models.lifeline import exit_with_parent


def quantize(source: str, output: str, quantization: str) -> None:
    """Write `source` to `output`, its weights rounded to `quantization` (a llama.cpp name such as Q4_0).

    Raises:
        SystemExit: With a sentence, if llama.cpp is missing or declines.
    """
    try:
        import llama_cpp
    except ImportError:
        sys.exit("Quantizing needs llama-cpp-python; install it with: pip install 'dssd-fleet[device]'")
    kind = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}", None)
    if kind is None:
        sys.exit(f"This llama.cpp knows no quantization {quantization}.")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    parameters.nthread = os.cpu_count() or 1
    # The source is quantized already; a draft may lose a little more.
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), parameters) != 0:
        sys.exit(f"llama.cpp could not make {quantization} of {source}.")


def main(arguments: list[str]) -> None:
    exit_with_parent()
    source, output, quantization = arguments
    quantize(source, output, quantization)


if __name__ == "__main__":
    main(sys.argv[1:])
