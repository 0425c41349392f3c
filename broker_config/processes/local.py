"""Local broker made by `fleet broker init`: its folder has all it needs, and what its clients need."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker_config.broker import Tls
from broker_config.description import read_description
from broker_config.errors import BrokerFilesError
from broker_config.files import DESCRIPTION_FILE
from broker_config.processes.runner import ThrowAwayBroker, find_mosquitto
from broker_config.rendering.mosquitto_conf import ACCESS_FILE, CONF_FILE, render_conf
from broker_config.rendering.version import installed_version

IDENTITIES: Final = "identities"


@dataclass(frozen=True, slots=True)
class IdentityFiles:
    """What a client needs to speak with the broker, as PEM files.

    Attributes:
        ca: Who vouches for the broker.
        certificate: The client's own certificate.
        key: Its private key.
    """

    ca: Path
    certificate: Path
    key: Path


def identity_files(directory: Path, tls: Tls, name: str) -> IdentityFiles:
    """Return where the files of an identity lie in a folder made by `fleet broker init`."""
    folder = directory / IDENTITIES
    return IdentityFiles(directory / tls.ca, folder / f"{name}.pem", folder / f"{name}.key")


class LocalBroker(ThrowAwayBroker):
    """Runs mosquitto on a folder made by `fleet broker init`. The folder stays when the broker is closed.

    Args:
        directory: The folder.
        port: Where to listen: None for the port that was chosen at `init`, 0 for a free one.

    Raises:
        BrokerFilesError: The folder was not made by `init`, or is incomplete.
    """

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        self._home = directory.resolve()
        broker = read_description(self._home / DESCRIPTION_FILE, production=False)
        if broker.tls is None:
            raise BrokerFilesError(f"{directory} describes a broker without TLS: make one with `fleet broker init`.")
        files = (ACCESS_FILE, broker.tls.ca, broker.tls.certificate, broker.tls.key, broker.tls.crl)
        missing = [str(file) for file in files if not (self._home / file).is_file()]
        if missing:
            raise BrokerFilesError(
                f"{directory} lacks {', '.join(missing)}: make the folder anew with `fleet broker init`."
            )
        self._tls = broker.tls
        super().__init__(broker if port is None else broker.model_copy(update={"port": port}))

    def identity(self, name: str) -> IdentityFiles:
        """Return the files of an identity that `init` made.

        Raises:
            BrokerFilesError: It made none of that name.
        """
        files = identity_files(self._home, self._tls, name)
        if not files.certificate.is_file() or not files.key.is_file():
            known = sorted(path.stem for path in (self._home / IDENTITIES).glob("*.pem"))
            raise BrokerFilesError(f"There is no identity {name!r} in {self._home}; known are {', '.join(known)}.")
        return files

    def _prepare(self, directory: Path) -> list[str]:
        program = find_mosquitto()
        conf = directory / CONF_FILE
        conf.write_text(render_conf(self._broker, home=self._home, version=installed_version(program)))
        return [str(program), "-c", str(conf)]
