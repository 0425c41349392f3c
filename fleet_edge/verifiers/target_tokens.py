"""Token strings of a target model, read with what is installed: an edge has them whichever engine it uses."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.source import check_source, is_gguf

if TYPE_CHECKING:
    from fleet_edge.settings import EdgeSettings


def check_target_files(settings: "EdgeSettings") -> None:
    """Check that there are files to read the tokens of the target from; they need not be read for that.

    Raises:
        VerifierError: There are none.
    """
    if settings.engine == "remote":
        from fleet_edge.verifiers.remote.tokenizer import check_local  # noqa: PLC0415 - only with this engine

        check_local(settings.target)
    else:
        check_source(settings.target)


def read_target_tokens(settings: "EdgeSettings") -> list[str]:
    """Return the target's token strings by id, padding left out, without loading its weights.

    Raises:
        VerifierError: They cannot be read.
    """
    check_target_files(settings)
    path = Path(settings.target).expanduser()
    if settings.engine == "remote":
        from fleet_edge.verifiers.remote.tokenizer import load_local  # noqa: PLC0415

        return load_local(settings.target).strings
    if is_gguf(path) and find_spec("llama_cpp") is not None:
        from fleet_edge.verifiers.llama_cpp.target import GgufTarget  # noqa: PLC0415 - an edge may do without it

        file = GgufTarget(path, vocabulary_only=True)
        try:
            return file.strings
        finally:
            file.close()
    if find_spec("torch") is None:
        raise VerifierError(
            f"Reading the tokens of {settings.target} needs the extra `edge`; install it: pip install "
            "'dssd-fleet[edge]', or name a GGUF as target."
        )
    from fleet_edge.verifiers.packed.target import target_tokens  # noqa: PLC0415 - likewise

    return target_tokens(settings.target)
