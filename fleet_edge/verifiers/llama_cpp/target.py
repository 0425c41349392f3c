"""Target model of a GGUF: opened by llama.cpp, refused where it cannot be rolled back."""

from pathlib import Path

from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError
from fleet_runtime.llama.gguf_file import GgufFile

__all__ = ["GgufTarget", "open_target"]


class GgufTarget(GgufFile):
    """A target model's file; `GgufFile` whose errors are `VerifierError`s."""

    error = VerifierError
    key = "target"

    @property
    def name(self) -> str:
        """What the log calls it: its file's name, and of `<family>/<quantization>.gguf` the family before it."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem


def open_target(path: Path, *, gpu_layers: int) -> GgufTarget:
    """Load a target model.

    Args:
        path: The GGUF.
        gpu_layers: How many layers to put on a GPU, where llama.cpp was built for one; -1 for all.

    Raises:
        UnsupportedModel: It is not a model that tokens can be taken back from.
        VerifierError: It cannot be loaded, or llama.cpp is not installed.
    """
    target = GgufTarget(path.expanduser(), gpu_layers=gpu_layers)
    kind = target.unlike_a_decoder
    if kind is not None:
        target.close()
        raise UnsupportedModel(
            f"{path} is a model of the {kind} kind, which cannot take tokens back as every rejected draft asks; "
            "choose a transformer decoder as target model."
        )
    return target
