"""Check and load a target model in the engine `blocks`; importing this module needs none of its libraries."""

import json
import logging
import os
import threading
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleet_common.extras import install_command
from fleet_common.host import cache_folder, private_folder
from fleet_edge.settings import MTP, EdgeSettings, KeptIn, PrefixSharing
from fleet_edge.verifiers.contract import OnProgress, UnsupportedModel, Verifier, VerifierError, no_progress
from fleet_edge.verifiers.source import check_memory, check_source, fetch_files, is_gguf, target_name, window_limit
from schemas.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fleet_edge.verifiers.blocks.folder_weights import FolderWeights
    from fleet_edge.verifiers.blocks.geometry import Geometry
    from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights
    from fleet_edge.verifiers.blocks.kv import ProcessMemory
    from fleet_edge.verifiers.blocks.page_file import PageFile
    from fleet_edge.verifiers.contract import TargetInfo

_FILES: Final = ("*.safetensors", "*.json")


_log = logging.getLogger(__name__)

_MIN_KEPT_BYTES: Final = 32 << 20
"""Smaller models are packed in less time than a file takes."""

_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - the folder within belongs to this user alone


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


def check_mtp(settings: EdgeSettings) -> None:
    """Check that the target has a layer that proposes tokens; raises `UnsupportedModel`."""
    open_weights(Path(settings.target).expanduser(), bits=settings.weight_bits, mtp=True)


def load(settings: EdgeSettings, on_progress: OnProgress = no_progress) -> Verifier:
    """Load the target model that the settings name.

    Raises `UnsupportedModel` if the engine does not serve it, `VerifierError` if there is none, or too little memory.
    """
    check(settings)  # before numba is imported
    import numba  # noqa: PLC0415 - only where a model is loaded

    from fleet_edge.verifiers.blocks.compiler import processor_features  # noqa: PLC0415
    from fleet_edge.verifiers.blocks.model import Model  # noqa: PLC0415
    from fleet_edge.verifiers.blocks.mtp import MtpVerifier  # noqa: PLC0415
    from fleet_edge.verifiers.blocks.products import variants  # noqa: PLC0415
    from fleet_edge.verifiers.blocks.verifier import BlocksVerifier, Trial  # noqa: PLC0415
    from fleet_edge.verifiers.blocks.weight_cache import CachedWeights, fingerprint  # noqa: PLC0415
    from fleet_edge.verifiers.contract import TargetInfo  # noqa: PLC0415
    from fleet_edge.verifiers.tokens import grammar_tokenizer, target_tokens  # noqa: PLC0415

    mtp = settings.edge_draft == MTP

    class Loaded(MtpVerifier if mtp else BlocksVerifier):  # type: ignore[misc]
        def grammar_tokenizer(self) -> Any:  # noqa: ANN401
            return grammar_tokenizer(path, vocabulary=self.info.vocabulary.size, end_tokens=self.info.end_tokens)

    path = _local(settings.target)
    file = open_weights(path, bits=settings.weight_bits, mtp=mtp)
    strings = target_tokens(path)
    name = target_name(settings.target)
    geometry = file.geometry
    if len(strings) > geometry.rows:
        raise UnsupportedModel(
            f"The tokenizer of {name} has {len(strings)} tokens and the model {geometry.rows}; they do not belong "
            "together: fetch the model again, whole."
        )
    threads = settings.threads or numba.config.NUMBA_DEFAULT_NUM_THREADS
    identity = fingerprint(file.files, bits=settings.weight_bits)
    kept = kept_weights_path(path) if file.packed_bytes >= _MIN_KEPT_BYTES else None
    loaded, counting = 0, threading.Lock()

    def note_bytes(count: int) -> None:
        nonlocal loaded
        with counting:  # tensors are packed on several threads
            loaded += count
            on_progress(min(1.0, loaded / file.packed_bytes))

    cached = CachedWeights(file, kept, identity, threads=threads, on_bytes=note_bytes)
    # The packed weights, and one tensor of the file.
    check_memory(name, file.packed_bytes + file.largest_bytes, "or use a smaller target model or a GGUF of 4 bits")
    model = Model(cached, threads=threads)
    info = TargetInfo(
        name=name,
        vocabulary=Vocabulary.of(strings),
        context=min(geometry.context, window_limit(path) or geometry.context),
        end_tokens=geometry.end_tokens,
        runs_on=f"blocks, {file.number_format}, {variants()[0]}, {threads} threads",
    )
    trial = Trial(model, info)
    # The same code gives the same rows, so what an earlier start has proven with it holds.
    proof = sha256(trial.rows.tobytes() + f"{numba.__version__} {threads} {sorted(processor_features())}".encode())
    repeats = cached.proof == proof.hexdigest() or trial.repeats()
    info = replace(info, batch_invariant=repeats).identified(trial.rows.tobytes())
    cached.keep_later(proof.hexdigest() if repeats else "")
    if not repeats:
        _log.warning("Rows depend on the batch on this processor, so that seeded requests may not repeat.")
    memory = _memory(settings, file.geometry, info)
    return Loaded(model, info, memory, threads=threads)


def _memory(settings: EdgeSettings, geometry: "Geometry", info: "TargetInfo") -> "ProcessMemory | PageFile":
    """Return the memory for keys and values; one that survives the process where it is wanted and possible."""
    from fleet_edge.verifiers.blocks.kv import (  # noqa: PLC0415 - likewise
        MIN_STATES,
        STATES_SHARE,
        ProcessMemory,
        divide,
        state_bytes,
    )
    from fleet_edge.verifiers.blocks.page_file import PageFile  # noqa: PLC0415

    count, states = divide(geometry, settings.kv_bytes)
    if states and states[0][0] < MIN_STATES:
        needed = MIN_STATES * STATES_SHARE * state_bytes(geometry.state_shapes)
        raise VerifierError(
            f"kv_bytes holds less than {MIN_STATES} states of the recurrent layers of {info.name}; set it to at least "
            f"{needed}, or to {needed * 8} for some sequences."
        )
    if (
        settings.kv_kept is not KeptIn.NOTHING
        and settings.prefix_sharing is not PrefixSharing.OFF
        and info.batch_invariant
    ):
        path = kept_pages_path(settings)
        try:
            if path is not None:
                return PageFile(path, info.target_id.hex(), geometry.pools, count, states)
        except OSError as error:
            _log.warning(
                "Keys and values end with this process, so that a restart computes prompts again: %s: %s", path, error
            )
    try:
        return ProcessMemory(geometry.pools, count, states)
    except (OSError, OverflowError) as error:
        raise VerifierError(
            f"The machine does not provide {settings.kv_bytes} bytes for keys and values; set a smaller kv_bytes."
        ) from error


def kept_weights_path(source: Path) -> Path | None:
    """Return the file in which packed weights of a source are kept; None if there is no folder for it."""
    caches = cache_folder()
    folder = caches and private_folder(caches / "weights")
    return folder and folder / f"{sha256(str(source.resolve()).encode()).hexdigest()[:16]}.weights"


def kept_pages_path(settings: EdgeSettings) -> Path | None:
    """Return the file in which an edge keeps keys and values; None if there is no folder for it."""
    if settings.kv_kept is KeptIn.MEMORY:
        parent: Path | None = _SHARED_MEMORY / f"dssd-fleet-{os.geteuid()}"
    else:
        parent = cache_folder()
    folder = parent and private_folder(parent / "pages")
    return folder and folder / f"{settings.fleet}.{settings.edge}"


def open_weights(path: Path, *, bits: int, mtp: bool = False) -> "GgufWeights | FolderWeights":
    """Open a GGUF or a folder to be loaded, with `mtp` as `GgufWeights`; raises `UnsupportedModel`."""
    from fleet_edge.verifiers.blocks.folder_weights import FolderWeights  # noqa: PLC0415 - likewise

    if mtp and not is_gguf(path):
        raise UnsupportedModel(f"edge_draft is {MTP}, which needs a GGUF; set target to one, or edge_draft to a model.")
    if path.is_dir():
        return FolderWeights(path, bits=bits)
    stat = path.stat() if path.is_file() else None
    return _opened(path, stat and (stat.st_size, stat.st_mtime_ns), mtp=mtp)


@lru_cache(maxsize=2)  # a start opens the target several times, and an edge's draft model
def _opened(path: Path, _version: tuple[int, int] | None, *, mtp: bool) -> "GgufWeights":
    from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights  # noqa: PLC0415 - likewise

    return GgufWeights(path, mtp=mtp)


def _local(target: str) -> Path:
    """Return the folder or file of a target; a repository is fetched unless it is cached."""
    path = Path(target).expanduser()
    return path if path.is_dir() or is_gguf(path) else fetch_files(target, *_FILES)
