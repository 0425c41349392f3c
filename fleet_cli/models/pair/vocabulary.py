"""Vocabulary file of a target: its GGUF without weights, for devices whose draft model has another vocabulary.

llama.cpp opens it as it opens any GGUF whose weights it is told to leave alone.
"""

import struct
from pathlib import Path
from typing import Final

from fleet_cli.models.errors import ModelsError
from fleet_cli.models.files import PARTIAL, seal
from schemas.vocabulary import Vocabulary, token_strings

_KEPT: Final = ("general.", "tokenizer.")
_TOKENS: Final = "tokenizer.ggml.tokens"
_ALIGNMENT: Final = 32
_VERSION: Final = 3


class VocabularyUnusable(ModelsError):  # noqa: N818 - reads as what it says
    """The file has no vocabulary that could be taken out of it."""


def write_vocabulary(target: Path, out: Path) -> Vocabulary:
    """Write the vocabulary of a target's GGUF, whatever its quantization, to a file of its own.

    Takes some ten seconds for each 250,000 tokens: the library reads them one by one.

    Returns:
        What the file holds.

    Raises:
        VocabularyUnusable: The target is no GGUF, is damaged, or has no vocabulary.
        ModelsError: The file cannot be written, or it is the target's own.
    """
    reader = _reader(target)
    if out.exists() and out.samefile(target):
        raise ModelsError(f"{out} is the target itself; name another file with --out.")
    fields = [
        b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if name.startswith(_KEPT)
    ]
    head = b"GGUF" + struct.pack("<IQQ", _VERSION, 0, len(fields))
    body = head + b"".join(fields)
    partial = out.with_name(f"{PARTIAL}{out.name}")
    try:
        partial.write_bytes(body + bytes(-len(body) % _ALIGNMENT))
        seal(partial)
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ModelsError(f"The file {out} cannot be written: {error.strerror or error}.") from error
    field = reader.fields[_TOKENS]
    return Vocabulary.of(token_strings(str(bytes(field.parts[at]), "utf-8", "surrogateescape") for at in field.data))


def _reader(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - the library is untyped
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelsError("Reading a GGUF needs gguf; install it with: pip install 'dssd-fleet[edge]'") from None
    if path.is_dir():
        raise VocabularyUnusable(
            f"{path} is a folder; give a GGUF of the same model, in any quantization: a device reads it with llama.cpp."
        )
    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise VocabularyUnusable(f"There is no file {path}; give a GGUF of the target model.") from None
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise VocabularyUnusable(f"The file {path} is no GGUF, or is damaged; fetch it again.") from error
    if reader.get_field(_TOKENS) is None:
        raise VocabularyUnusable(f"The GGUF {path} has no tokenizer; choose a file of a whole model.")
    return reader
