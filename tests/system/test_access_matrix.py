"""Who may do what, on a real mosquitto with real certificates: every identity, every topic, both ways.

What is expected comes from `broker_config.matrix`, which is also what the table in `broker_config/README.md` is made
of; what is tried is the text of the rendered files.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from broker_config.access import render_access
from broker_config.broker import Broker
from broker_config.files import Profile, render_files
from broker_config.local import IdentityFiles
from broker_config.mosquitto_conf import ACCESS_FILE, CONF_FILE
from broker_config.trial import INSPECTOR, TrialBroker, TrialFiles
from fleet_cli.broker.probe import Deviation, Form, Prober, topics_to_try
from fleet_cli.broker.trial_identities import TrialAuthority
from fleet_link.errors import ConnectFailed
from fleet_link.paho_link import PahoLink
from fleet_link.settings import LinkSettings, TlsSettings
from tests.support.brokers import require_mosquitto
from tests.support.links import START_S

pytestmark = pytest.mark.broker

HOME = Path("/etc/mosquitto/fleet")
DESCRIPTION = Broker.production(edges=("edge-1", "edge-2"), banned=("device-c",))
DEVICES = ("device-a", "device-b", "device-c")
IMPOSTORS = ("_edge/edge-1", "_edge/edge-2")
USERS = (*DEVICES, *DESCRIPTION.edges, *DESCRIPTION.monitors, *IMPOSTORS)
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Stage:
    """A broker on the rendered files, and everyone who has a good certificate connected to it."""

    broker: TrialBroker
    prober: Prober
    authority: TrialAuthority
    folder: Path

    def link(self, files: IdentityFiles | None, client_id: str) -> PahoLink:
        return link_to(self.broker.port, files or IdentityFiles(self.folder / "ca.pem", Path(), Path()), client_id)


def link_to(port: int, files: IdentityFiles, client_id: str) -> PahoLink:
    own = files.certificate if files.certificate.name else None
    tls = TlsSettings(files.ca, own, files.key if own else None)
    return PahoLink(LinkSettings(client_id=client_id, port=port, tls=tls, min_backoff_s=0.05, max_backoff_s=0.1))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    require_mosquitto()
    folder = tmp_path_factory.mktemp("matrix")
    folder.chmod(0o755)
    authority = TrialAuthority(folder / "pki", datetime.now(UTC))
    authority.broker()
    texts = {file.name: file.text for file in render_files(DESCRIPTION, Profile.PRODUCTION, home=HOME)}
    files = TrialFiles(texts[CONF_FILE], texts[ACCESS_FILE], authority.folder)
    with ExitStack() as stack:
        broker = stack.enter_context(TrialBroker(files, DESCRIPTION))

        def connect(name: str, number: int) -> PahoLink:
            # Everybody claims a client id that is not its own: the certificate decides.
            link = link_to(broker.port, authority.client(name, file=f"user-{number}"), "somebody")
            link.start(timeout_s=START_S)
            stack.callback(link.stop)
            return link

        links = {name: connect(name, number) for number, name in enumerate(USERS)}
        inspector = connect(INSPECTOR, len(USERS))
        prober = Prober(DESCRIPTION, links, inspector, topics_to_try(DESCRIPTION, [*DEVICES, "edge-1", "monitor"]))
        yield Stage(broker, prober, authority, folder / "pki")


@pytest.mark.parametrize("form", Form, ids=lambda form: form.name.lower())
def test_everyone_who_is_let_in_can_do_what_the_table_says_and_nothing_else(stage: Stage, form: Form) -> None:
    assert [str(deviation) for deviation in stage.prober.deviations([form])] == []


def test_nobody_else_is_let_in(stage: Stage, tmp_path: Path) -> None:
    stranger = TrialAuthority(tmp_path / "other", datetime.now(UTC))
    foreign = stranger.client("device-a")
    revoked = stage.authority.client("device-r")
    stage.authority.revoke(revoked)
    stage.broker.set_access(render_access(DESCRIPTION))  # reads the revocations too
    refused = {
        "unknown authority": IdentityFiles(stage.folder / "ca.pem", foreign.certificate, foreign.key),
        "expired": stage.authority.client("device-a", file="old", begins=-2 * DAY),
        "not yet valid": stage.authority.client("device-a", file="new", begins=DAY),
        "revoked": revoked,
        "no certificate": None,
    }
    let_in = []
    for why, files in refused.items():
        link = stage.link(files, "device-a")
        try:
            link.start(timeout_s=0.5)
            let_in.append(why)
        except ConnectFailed:
            pass
        finally:
            link.stop()
    assert let_in == []
    assert stage.broker.log().count("error:0A") >= len(refused)


def test_a_client_id_that_is_anothers_does_not_end_the_others_session(stage: Stage) -> None:
    thief = stage.authority.client("thief")
    link = stage.link(thief, "device-b")
    link.start(timeout_s=START_S)
    link.stop()
    assert "as thief" in stage.broker.log()
    assert stage.prober.deviations([Form.WILDCARD]) == []


def mutations(text: str) -> Iterator[tuple[str, str]]:
    """Yield every change that takes a line away or makes it wider, with what it is called."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line or line.startswith("#"):
            continue
        wider = set()
        if not line.startswith("user "):
            wider = {
                re.sub(r"^(topic|pattern) (read|write) ", r"\1 readwrite ", line),
                re.sub(r"/[^/]+$", "/#", line),
                re.sub(r"/\+$", "/#", line),
                line.replace("/%u/", "/+/"),
                line.replace("/home/", "/+/"),
                re.sub(r"/edge-\d", "/+", line),
            } - {line}
        for changed in (None, *sorted(wider)):
            body = [*lines[:number], *([] if changed is None else [changed]), *lines[number + 1 :]]
            yield f"{line!r} -> {changed!r}", "\n".join(body) + "\n"


def test_every_line_of_the_rules_matters(stage: Stage) -> None:
    survived = []
    tried = 0
    for what, text in mutations(render_access(DESCRIPTION)):
        tried += 1
        stage.broker.set_access(text)
        if not stage.prober.deviations([Form.WILDCARD]):
            survived.append(what)
    stage.broker.set_access(render_access(DESCRIPTION))
    assert stage.prober.deviations([Form.WILDCARD]) == list[Deviation]()
    assert survived == []
    assert tried > 100
