"""Check and load a target model in the engine `blocks`; importing this module needs none of its libraries."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleet_common.extras import install_command
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import UnsupportedModel, Verifier, VerifierError
from fleet_edge.verifiers.source import check_memory, check_source, fetch_files, is_gguf, target_name
from schemas.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fleet_edge.verifiers.blocks.folder_weights import FolderWeights
    from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights

_FILES: Final = ("*.safetensors", "*.json")


def check(settings: EdgeSettings) -> None:
    """Check that the engine is installed and serves the target model, without loading it.

    Raises `UnsupportedModel` if it does not serve it, `VerifierError` if it is not installed or there is no model.
    """
    if find_spec("numba") is None:
        raise VerifierError(
            "The engine blocks needs numba, which the extra `edge` has; set engine to another one, or install it: "
            f"{install_command('edge')}"
        )
    check_source(settings.target)
    path = Path(settings.target).expanduser()
    if path.exists():  # without numba, whose import takes a second
        open_weights(path, bits=settings.weight_bits)


def check_architecture(settings: EdgeSettings) -> None:
    """Check by a target's metadata whether the engine serves it; raises `UnsupportedModel`, or as `check`."""
    check(settings)
    path = Path(settings.target).expanduser()
    if path.is_dir() or is_gguf(path):
        open_weights(path, bits=settings.weight_bits)
        return
    from fleet_edge.verifiers.blocks.architectures import of_config  # noqa: PLC0415 - likewise

    config = fetch_files(settings.target, "config.json") / "config.json"
    of_config(json.loads(config.read_text(encoding="utf-8")), {})


def load(settings: EdgeSettings) -> Verifier:
    """Load the target model that the settings name.

    Raises `UnsupportedModel` if the engine does not serve it, `VerifierError` if there is none, or too little memory.
    """
    check(settings)  # before numba is imported
    import numba  # noqa: PLC0415 - only where a model is loaded

    from fleet_edge.verifiers.blocks.model import Model  # noqa: PLC0415
    from fleet_edge.verifiers.blocks.products import variants  # noqa: PLC0415
    from fleet_edge.verifiers.blocks.verifier import BlocksVerifier  # noqa: PLC0415
    from fleet_edge.verifiers.contract import TargetInfo  # noqa: PLC0415
    from fleet_edge.verifiers.tokens import grammar_tokenizer, target_tokens  # noqa: PLC0415

    class Loaded(BlocksVerifier):
        def grammar_tokenizer(self) -> Any:  # noqa: ANN401
            return grammar_tokenizer(path, vocabulary=self.info.vocabulary.size, end_tokens=self.info.end_tokens)

    path = _local(settings.target)
    file = open_weights(path, bits=settings.weight_bits)
    strings = target_tokens(path)
    name = target_name(settings.target)
    geometry = file.geometry
    if len(strings) > geometry.rows:
        raise UnsupportedModel(
            f"The tokenizer of {name} has {len(strings)} tokens and the model {geometry.rows}; they do not belong "
            "together: fetch the model again, whole."
        )
    # The packed weights, and one tensor of the file.
    check_memory(name, file.packed_bytes + file.largest_bytes, "or use a smaller target model or a GGUF of 4 bits")
    threads = settings.threads or numba.config.NUMBA_DEFAULT_NUM_THREADS
    model = Model(file, threads=threads)
    info = TargetInfo(
        name=name,
        vocabulary=Vocabulary.of(strings),
        context=geometry.context,
        end_tokens=geometry.end_tokens,
        runs_on=f"blocks, {file.number_format}, {variants()[0]}, {threads} threads",
    )
    return Loaded(model, info, budget_bytes=settings.kv_bytes)


def open_weights(path: Path, *, bits: int) -> "GgufWeights | FolderWeights":
    """Open a GGUF or a folder to be loaded; raises `UnsupportedModel`."""
    from fleet_edge.verifiers.blocks.folder_weights import FolderWeights  # noqa: PLC0415 - likewise
    from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights  # noqa: PLC0415

    return FolderWeights(path, bits=bits) if path.is_dir() else GgufWeights(path)


def _local(target: str) -> Path:
    """Return the folder or file of a target; a repository is fetched unless it is cached."""
    path = Path(target).expanduser()
    return path if path.is_dir() or is_gguf(path) else fetch_files(target, *_FILES)
