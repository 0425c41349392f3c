"""Where a site reports to."""

import re
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from broker_config.tls import File
from schemas.names import Name
from schemas.topics import Topic

__all__ = ["REPORTED", "HeadOffice"]

REPORTED: Final = (Topic.STATE, Topic.EDGE_STATE, Topic.TELEMETRY, Topic.CLOSE, Topic.SESSION)
"""What goes up: who is there, the counters, and each session's account as both ends give it at its end.

No prompt and no text: those are on `up/open` and the two hot topics.
"""

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[?[0-9A-Fa-f:]+\]?")


def _host(name: str) -> str:
    if not _HOST.fullmatch(name):
        raise ValueError(f"{name!r} is neither a host name nor an address")
    return name.strip("[]")


class HeadOffice(BaseModel):
    """The broker at the head office, as a site's broker reaches it: as a client, over TLS.

    Attributes:
        host: Name or address; the certificate there must carry it.
        port: TCP port.
        site: The name in this site's certificate. Unique at the head office.
        ca: Who may vouch for the head office's broker.
        certificate: This site's certificate, signed by the head office.
        key: Its private key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, AfterValidator(_host)]
    port: Annotated[int, Field(ge=1, le=65_535)] = 8883
    site: Name
    ca: File = Path("head-office-ca.pem")
    certificate: File = Path("site.pem")
    key: File = Path("site.key")
