"""History: what this device has written, to be searched for what follows; bounded in memory and on disk."""

import contextlib
import fcntl
import logging
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from fleet_device.drafters.suffix.index import Ints, Match, SuffixIndex, token_bytes
from schemas.vocabulary import Vocabulary

_log = logging.getLogger(__name__)

_MAGIC: Final = b"fleet-history 1\n"
_RECORD: Final = struct.Struct("<II")  # tokens, CRC-32 of their bytes
_TOKEN_BYTES: Final = 4
_PREFIX, _SUFFIX = "history-", ".log"
_MOST_FILES: Final = 4
"""Vocabularies whose texts are kept, one file each; that of the one unused for longest goes first."""


class HistoryFile:
    """Texts on disk. What goes wrong on a disk is logged once, and the device goes on without.

    Args:
        folder: Made if need be.
        vocabulary: Of the token ids.
        most_bytes: Of the file.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, *, most_bytes: int) -> None:
        # The whole header is compared, so that a shortened name can do no harm.
        fingerprint = vocabulary.fingerprint.hex()
        self.path = folder / f"{_PREFIX}{fingerprint[:16]}{_SUFFIX}"
        self._header = _MAGIC + f"{vocabulary.size} {fingerprint}\n".encode()
        self._size = vocabulary.size
        self._most_bytes = most_bytes
        self._failed = False

    def read(self) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
        """Return the texts, the oldest first; as far as the file is whole."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size > 2 * self._most_bytes:
                    _log.warning("The history %s is longer than 'history_mb' allows now; it is deleted.", self.path)
                    self.path.unlink()
                    return []
                data = file.read(2 * self._most_bytes)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._complain("read", error)
            return []
        texts, sound = self._parse(data)
        if sound < len(data):
            self._drop(whole=sound == 0, texts=texts)
        return texts

    def append(self, text: Sequence[int]) -> None:
        tokens = np.asarray(text, dtype="<i4").tobytes()
        record = _RECORD.pack(len(text), zlib.crc32(tokens)) + tokens
        if len(self._header) + len(record) > self._most_bytes:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked() as descriptor:
                size = os.fstat(descriptor).st_size
                if size == 0:
                    self._make_way()
                    record = self._header + record
                if os.write(descriptor, record) < len(record):  # the disk is full
                    os.ftruncate(descriptor, size)
                    return
                too_long = size + len(record) > self._most_bytes
                if too_long:
                    self._replace(self._newer_half())
        except OSError as error:
            self._complain("written", error)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.fchmod(descriptor, 0o600)
            yield descriptor
        finally:
            os.close(descriptor)

    def _parse(self, data: bytes) -> tuple[list[np.ndarray[tuple[int], np.dtype[np.int32]]], int]:
        """Return the whole texts, and how many bytes they take with all before them."""
        if not data.startswith(self._header):
            return [], 0
        texts, place = [], len(self._header)
        while place + _RECORD.size <= len(data):
            count, checksum = _RECORD.unpack_from(data, place)
            begin = place + _RECORD.size
            end = begin + count * _TOKEN_BYTES
            if end > len(data) or zlib.crc32(data[begin:end]) != checksum:
                break
            tokens = np.frombuffer(data[begin:end], dtype="<i4").astype(np.int32)
            if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self._size):
                break
            texts.append(tokens)
            place = end
        return texts, place

    def _drop(
        self, *, whole: bool, texts: Sequence[Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int32]]]
    ) -> None:
        what = "is none of this vocabulary's" if whole else f"is damaged behind {len(texts)} texts"
        _log.warning(
            "The history %s %s; what cannot be read is dropped, and drafts are made without it.", self.path, what
        )
        with contextlib.suppress(OSError):
            if whole:
                self.path.unlink()
            else:
                self._replace(texts)

    def _newer_half(self) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
        texts, _ = self._parse(self.path.read_bytes())
        kept, room = [], self._most_bytes // 2
        for text in reversed(texts):
            room -= _RECORD.size + _TOKEN_BYTES * len(text)
            if room < 0:
                break
            kept.append(text)
        return kept[::-1]

    def _replace(self, texts: Sequence[Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int32]]]) -> None:
        descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)  # mode 0600
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._header)
                for text in texts:
                    tokens = np.asarray(text, dtype="<i4").tobytes()
                    file.write(_RECORD.pack(len(text), zlib.crc32(tokens)) + tokens)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _make_way(self) -> None:
        """Leave no more files than there may be."""
        others = [path for path in self.path.parent.glob(f"{_PREFIX}*{_SUFFIX}") if path != self.path]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[_MOST_FILES - 1 :]:
            path.unlink(missing_ok=True)

    def _complain(self, what: str, error: OSError) -> None:
        if not self._failed:
            _log.warning(
                "The history %s cannot be %s (%s); drafts are made without it. Choose another folder by the setting "
                "'history_dir', or turn it off by 'history_mb' = 0.",
                self.path,
                what,
                error.strerror or error,
            )
        self._failed = True


def forget_histories(folder: Path) -> int:
    """Delete all history files of a folder, those that were being written too; return how many there were.

    Raises:
        OSError: One cannot be deleted.
    """
    paths = [*folder.glob(f"{_PREFIX}*{_SUFFIX}"), *folder.glob(f".{_PREFIX}*{_SUFFIX}-*")]
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


_BETWEEN: Final = (-1,)
"""Stands between two texts."""

_PROMPT_TOKENS: Final = 8
"""Of a prompt's end, so that a text's first tokens are found. Nothing else of a prompt is kept."""

_SHORTEST: Final = 2
"""Tokens: a text that is shorter is not worth its place."""


class History:
    """Texts that were written before. Several threads may use it.

    Args:
        memory_bytes: Most that it takes.
        file: Where texts are kept from one run to the next; None for in memory alone.
    """

    def __init__(self, *, memory_bytes: int, file: HistoryFile | None = None) -> None:
        self._capacity = max(64, memory_bytes // token_bytes())
        self._index = SuffixIndex(capacity=self._capacity)
        self._file = file
        self._lock = threading.Lock()
        if file is not None:
            self._take([np.asarray(text, dtype=np.int32) for text in file.read()])

    @property
    def tokens(self) -> int:
        """Tokens of all texts that can be found."""
        return len(self._index)

    def remember(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        """Add a text, behind the last tokens of its prompt."""
        if len(text) < _SHORTEST:
            return
        kept = [*prompt[-_PROMPT_TOKENS:], *text]
        with self._lock:
            self._take([np.asarray(kept, dtype=np.int32)])
            if self._file is not None:
                self._file.append(kept)

    def find(self, end: Sequence[int] | Ints) -> Match | None:
        """Return what followed such tokens; see `SuffixIndex.find`."""
        with self._lock:
            return self._index.find(end)

    def _take(self, texts: Iterable[Ints]) -> None:
        parts = [part for text in texts for part in (text, np.array(_BETWEEN, dtype=np.int32))]
        if not parts:
            return
        new = np.concatenate(parts)[-self._capacity :]
        if len(new) > self._index.room:
            # The older half goes, so that this is done rarely.
            keep = max(0, min(self._capacity // 2, self._capacity - len(new)))
            old = self._index.tokens[len(self._index) - min(keep, len(self._index)) :]
            new = np.concatenate([old, new])
            self._index.clear()
        self._index.append(new)
