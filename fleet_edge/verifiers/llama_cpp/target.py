"""Target model of a GGUF: opened by llama.cpp, refused where it cannot be rolled back."""

from pathlib import Path
from typing import Final

from fleet_common.host import available_memory
from fleet_common.llama import GgufFile, LlamaError, library
from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError

_GIGA: Final = 1e9


class GgufTarget(GgufFile):
    """A target model's file; `GgufFile` whose errors are `VerifierError`s."""

    error = VerifierError
    key = "target"

    @property
    def name(self) -> str:
        """What the log calls it: its file's name, and of `<family>/<quantization>.gguf` the family before it."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem


def _check_memory(path: Path) -> None:
    """Check that the weights have room: mapped from a file they would otherwise be read anew in every step."""
    available = available_memory()
    size = path.stat().st_size if path.is_file() else 0
    if available is not None and size > available:
        raise VerifierError(
            f"{path} takes {size / _GIGA:.1f} GB of memory, and {available / _GIGA:.1f} GB are left; end what else "
            "runs here, or take a smaller target model or quantization."
        )


def open_target(path: Path, *, gpu_layers: int) -> GgufTarget:
    """Load a target model.

    Args:
        path: The GGUF.
        gpu_layers: How many layers to put on a GPU, where llama.cpp was built for one; -1 for all.

    Raises:
        UnsupportedModel: It is not a model that tokens can be taken back from.
        VerifierError: It cannot be loaded, the machine lacks memory or a GPU for it, or llama.cpp is not installed.
    """
    path = path.expanduser()
    try:
        native = library()
    except LlamaError as error:
        raise VerifierError(str(error)) from None
    if not native.llama_supports_gpu_offload():
        if gpu_layers > 0:
            raise VerifierError(
                f"gpu_layers is {gpu_layers}, but llama.cpp finds no GPU here, or was built for none; install "
                "llama-cpp-python built for yours, as with CMAKE_ARGS=-DGGML_CUDA=on, or leave gpu_layers out."
            )
        _check_memory(path)
    target = GgufTarget(path, gpu_layers=gpu_layers)
    kind = target.unlike_a_decoder
    if kind is not None:
        target.close()
        raise UnsupportedModel(
            f"{path} is a model of the {kind} kind, which cannot take tokens back as every rejected draft asks; "
            "choose a transformer decoder as target model."
        )
    return target
