#!/usr/bin/env python3
"""Reads the vocabularies of many model families as a device, as an edge and as transformers do, and compares.

    .venv/bin/python scripts/check_vocabularies.py [FILE.gguf ...]

The vocabularies are those that the source of llama-cpp-python carries: fetched by pip, 77 MB, and kept in FLEET_CACHE
(~/.cache/dssd-fleet); more files may be named. One line a file; exit code 1 if two readers disagree. Takes three
minutes on two free cores.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

if importlib.util.find_spec("transformers") is None:
    sys.exit("Run it in the project's environment, after `make test`: .venv/bin/python scripts/check_vocabularies.py")

import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from fleet_device.drafters.model_file import GgufModel
from fleet_edge.verifiers.tokens import gguf_tokens
from schemas.vocabulary import Vocabulary, token_strings

SOURCE = "llama-cpp-python"
PATTERN = "vendor/llama.cpp/models/ggml-vocab-*.gguf"
HEAD = ("vocabulary", "rows", "tokens", "device and edge", "transformers")


def main() -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    agreed = True
    print(_line(HEAD))
    for path in [*vocabularies(), *map(Path, sys.argv[1:])]:
        rows = gguf_tokens(path, vocabulary_only=True)
        strings = token_strings(rows)
        edge, device = Vocabulary.of(strings), device_vocabulary(path)
        same, said = by_transformers(path, rows, strings)
        ends = f"{edge.fingerprint[:4].hex()}" if edge == device else f"DIFFERENT: {device} and {edge}"
        print(_line((path.stem, str(len(rows)), str(len(strings)), ends, said)), flush=True)
        agreed = agreed and same and edge == device
    return 0 if agreed else 1


def vocabularies() -> list[Path]:
    """Return the vocabularies in the source of the installed llama.cpp."""
    version = importlib.metadata.version(SOURCE)
    cache = Path(os.environ.get("FLEET_CACHE") or "~/.cache/dssd-fleet").expanduser()
    folder = cache / f"{SOURCE}-{version}-vocabularies"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            print(f"Fetching the source of {SOURCE} {version} …", file=sys.stderr)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
            what = ["--no-deps", "--no-binary", SOURCE, f"{SOURCE}=={version}"]
            subprocess.run([*pip, "--dest", work, *what], check=True)
            kept = Path(work) / "kept"
            kept.mkdir()
            extract(next(Path(work).glob("*.tar.gz")), kept)
            kept.rename(folder)
    return sorted(folder.glob("*.gguf"))


def extract(archive: Path, folder: Path) -> None:
    """Unpack only the vocabularies of a source archive."""
    with tarfile.open(archive) as source:
        for member in source:
            name = PurePosixPath(member.name)
            if name.match(PATTERN) and (file := source.extractfile(member)) is not None:
                (folder / name.name.removeprefix("ggml-vocab-")).write_bytes(file.read())


def device_vocabulary(path: Path) -> Vocabulary:
    """Read a file as a device does, through llama.cpp."""
    model = GgufModel(path, vocabulary_only=True)
    try:
        return model.vocabulary
    finally:
        model.close()


def by_transformers(path: Path, rows: Sequence[str], strings: Sequence[str]) -> tuple[bool, str]:
    """Compare our reading with that of transformers, if it reads the file; return the result as text.

    It puts tokens of its own after the file's last row, and spells some strings differently; neither moves an id.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # noqa: BLE001 - it fails in many ways
        return True, f"cannot read it: {str(error).splitlines()[0]}"
    found = {index: token for token, index in tokenizer.get_vocab().items()}
    theirs = token_strings(found.get(index, f"[PAD{index}]") for index in range(len(rows)))
    if len(theirs) != len(strings):
        return False, f"DIFFERENT: {len(theirs)} tokens"
    differing = [index for index, string in enumerate(strings) if theirs[index] != string]
    wrong = [index for index in differing if theirs[index] not in respellings(strings[index])]
    if wrong:
        return False, f"DIFFERENT in {len(wrong)}: {wrong[0]} is {theirs[wrong[0]]!r} and {strings[wrong[0]]!r}"
    if differing:
        example = f"{theirs[differing[0]]!r} for {strings[differing[0]]!r}"
        return True, f"the same but for the spelling of {len(differing)}: {example}"
    return True, "the same"


def respellings(string: str) -> tuple[str, str]:
    """Return transformers' other spellings of a string: spaces as SentencePiece does, or all in stand-ins for bytes."""
    level = ByteLevel(add_prefix_space=False, use_regex=False)
    return string.replace(" ", "\u2581"), "".join(piece for piece, _ in level.pre_tokenize_str(string))


def _line(cells: Sequence[str]) -> str:
    name, rows, tokens, ends, said = cells
    return f"{name:<18} {rows:>7} {tokens:>7}  {ends:<15}  {said}"


if __name__ == "__main__":
    raise SystemExit(main())
