"""A mosquitto on the files that `fleet broker init` has made."""

from pathlib import Path

from broker_config.broker import read_description
from broker_config.files import DESCRIPTION_FILE
from broker_config.mosquitto import CONF_FILE, installed_version, render_conf
from broker_config.processes import IdentityFiles, ThrowAwayBroker, find_mosquitto, identity_files


class LocalBroker(ThrowAwayBroker):
    """Run mosquitto on a folder made by `fleet broker init`, which stays when the broker is closed.

    `port` is None for the port chosen at `init`, 0 for any free port.
    """

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        self._home = directory.resolve()
        broker = read_description(self._home / DESCRIPTION_FILE, production=False)
        super().__init__(broker if port is None else broker.model_copy(update={"port": port}))

    def identity(self, name: str) -> IdentityFiles:
        """Return the files of an identity that `init` made."""
        assert self.broker.tls is not None
        files = identity_files(self._home, self.broker.tls, name)
        assert files.certificate.is_file(), f"there is no {name}"
        return files

    def _prepare(self, directory: Path) -> list[str]:
        program = find_mosquitto()
        conf = directory / CONF_FILE
        conf.write_text(render_conf(self._broker, home=self._home, version=installed_version(program)))
        return [str(program), "-c", str(conf)]
