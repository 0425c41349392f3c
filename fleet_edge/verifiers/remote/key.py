"""API key of the inference servers: read from a file that only its owner may read, and never shown."""

from pathlib import Path
from typing import Final

from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.remote.errors import BadSetting

__all__ = ["ApiKey"]

_MOST_BYTES: Final = 4096


class ApiKey:
    """A key in a file, which may be replaced while the edge runs."""

    def __init__(self, path: Path | None) -> None:
        """Read the file; without one there is no key.

        Raises:
            VerifierError: It cannot be read, others may read it, or it holds no key.
        """
        self._path = path
        self._headers = self._read()

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every request."""
        return dict(self._headers)

    @property
    def source(self) -> str:
        """Where the key comes from, for a sentence; empty if there is none."""
        return "" if self._path is None else str(self._path)

    def reload(self) -> bool:
        """Read the file again after a server has refused the key; return whether it is another one now."""
        try:
            headers = self._read()
        except VerifierError:
            return False
        changed = headers != self._headers
        self._headers = headers
        return changed

    def __repr__(self) -> str:
        return f"ApiKey({self._path})"

    def _read(self) -> dict[str, str]:
        if self._path is None:
            return {}
        path = self._path.expanduser()
        try:
            mode = path.stat().st_mode
            with path.open("rb") as file:
                raw = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise self._bad(f"The key file {path} cannot be read ({error.strerror}); check its path.") from error
        if mode & 0o077:
            raise self._bad(f"Others may read the key file {path}; make it yours alone (chmod 600).")
        key = raw.decode("ascii", "replace").strip()
        if not key or len(raw) > _MOST_BYTES or not all("!" <= each <= "~" for each in key):
            raise self._bad(f"The key file {path} holds no key: one line of printable characters is expected.")
        return {"Authorization": f"Bearer {key}"}

    @staticmethod
    def _bad(sentence: str) -> BadSetting:
        return BadSetting(sentence, setting="remote.api_key_file")
