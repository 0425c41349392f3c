"""Files of a mosquitto, for each profile that can be made of one description."""

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from broker_config.broker import Broker
from broker_config.description import render_description
from broker_config.errors import BrokerFilesError
from broker_config.rendering.access import render_access, render_site_access
from broker_config.rendering.janitor import JANITOR_UNIT, TIMER_UNIT, render_janitor_unit, render_timer
from broker_config.rendering.mosquitto_conf import ACCESS_FILE, CONF_FILE, render_conf
from broker_config.rendering.nftables import RULES_FILE, UNIT_FILE, render_firewall_unit, render_rules
from broker_config.rendering.systemd import DROP_IN_FILE, render_drop_in
from broker_config.rendering.version import MosquittoVersion

DESCRIPTION_FILE = "broker.toml"
SITE_ACCESS_FILE = "head-office-access.acl"

PRIVATE = 0o640  # root writes, the broker's group reads; mosquitto warns of what others can read
PUBLIC = 0o644


class Profile(StrEnum):
    """Which files to make of a description."""

    LOOPBACK = "loopback"
    PRODUCTION = "production"
    BRIDGE = "bridge"


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """A file to write.

    Attributes:
        name: Path below the folder it is written to.
        text: Its contents.
        mode: Its permissions.
    """

    name: str
    text: str
    mode: int = PRIVATE


def render_files(
    broker: Broker, profile: Profile, *, home: Path, version: MosquittoVersion = MosquittoVersion.V2_0
) -> tuple[RenderedFile, ...]:
    """Return the files of a broker.

    Args:
        broker: The description.
        profile: What to make of it.
        home: The folder, absolute, where they will lie on the broker's machine.
        version: Of mosquitto there.

    Raises:
        BrokerFilesError: The description lacks what the profile needs.
    """
    if (profile is Profile.LOOPBACK) != (broker.tls is None):
        needs = "no tls" if profile is Profile.LOOPBACK else "tls"
        raise BrokerFilesError(f"The profile {profile.value!r} needs a description with {needs}.")
    if (profile is Profile.BRIDGE) != (broker.head_office is not None):
        needs = "a" if profile is Profile.BRIDGE else "no"
        raise BrokerFilesError(f"The profile {profile.value!r} needs a description with {needs} [head_office].")
    description = RenderedFile(DESCRIPTION_FILE, render_description(broker))
    try:
        conf = RenderedFile(CONF_FILE, render_conf(broker, home=home, version=version))
    except ValueError as error:
        raise BrokerFilesError(str(error)) from error
    files = [description, conf, RenderedFile(ACCESS_FILE, render_access(broker))]
    if profile is not Profile.LOOPBACK:
        files.append(RenderedFile(DROP_IN_FILE, render_drop_in(broker, home=home), PUBLIC))
        files.append(RenderedFile(RULES_FILE, render_rules(broker)))
        files.append(RenderedFile(UNIT_FILE, render_firewall_unit(broker, home=home), PUBLIC))
        if broker.janitor is not None:
            files.append(RenderedFile(JANITOR_UNIT, render_janitor_unit(broker, home=home), PUBLIC))
            files.append(RenderedFile(TIMER_UNIT, render_timer(broker), PUBLIC))
    if profile is Profile.BRIDGE:
        files.append(RenderedFile(SITE_ACCESS_FILE, render_site_access(broker)))
    return tuple(files)


def write_files(files: Iterable[RenderedFile], directory: Path) -> None:
    """Write files, each all at once, so that a broker that reloads meanwhile reads the old one or the new one.

    Raises:
        BrokerFilesError: One cannot be written.
    """
    for file in files:
        path = directory / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    stream.write(file.text)
                    os.fchmod(stream.fileno(), file.mode)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise BrokerFilesError(f"{path} cannot be written: {error.strerror or error}.") from error
